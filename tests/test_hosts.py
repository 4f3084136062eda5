"""Hostfiles, and hosts that answer or do not."""

import pytest

from vir.cluster import hosts
from vir.errors import SettingsError


def test_a_hostfile_is_read_in_its_order_and_written_back(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode-b slots=8\n\n  node-a   slots=4  # the old one\n10.0.0.7 slots=1\n")
    found = hosts.read_hostfile(file)
    assert list(found.items()) == [("node-b", 8), ("node-a", 4), ("10.0.0.7", 1)]
    hosts.write_hostfile(tmp_path / "again", found)
    assert (tmp_path / "again").read_text() == "node-b slots=8\nnode-a slots=4\n10.0.0.7 slots=1\n"


@pytest.fixture(autouse=True)
def nothing_was_told():
    hosts._tell_of_secrets.cache_clear()


@pytest.mark.parametrize("text, error", [
    ("node-a slots=8\nnode-b\n", r":2: 'node-b' is no line `host slots=GPUS` with at least one"),
    ("-oProxyCommand=x slots=8\n", r":1: .* is no line"), ("$(x) slots=8\n", r":1: .* is no line"),
    ("a;x slots=8\n", r":1: .* is no line"), ("a,b slots=8\n", r":1: .* is no line"),
    ("node-a slots=0\n", r":1: 'node-a slots=0' is no line"),
    ("node-a slots=8 gpus\n", r":1: .* is no line"),
    ("node-a slots=8\nnode-a slots=8\n", r":2: node-a is named twice"),
    ("\n# none\n", r"names no host; give it a line `host slots=GPUS`"),
])
def test_a_line_that_is_none_is_named(tmp_path, text, error):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(SettingsError, match=error):
        hosts.read_hostfile(tmp_path / "hosts")


def test_a_hostfile_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"--hostfile .*/hosts cannot be read: No such file or directory; give a"):
        hosts.read_hostfile(tmp_path / "hosts")
    (tmp_path / "hosts").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="it is no text"):
        hosts.read_hostfile(tmp_path / "hosts")


def test_the_ssh_of_pdsh_and_ours_have_the_same_options(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F '/a b/config'")
    words = hosts.ssh("node-a", "true", 2222)
    assert words[0] == "ssh" and words[-2:] == ["node-a", "true"] and words[-4:-2] == ["-p", "2222"]
    assert words[words.index("-F") + 1] == "/a b/config" and "BatchMode=yes" in words


def test_variables_for_other_nodes_are_those_that_a_run_heeds_and_no_secret(capsys):
    ours = {"NCCL_DEBUG": "INFO", "UCX_TLS": "tcp", "PYTHONPATH": "/a", "https_proxy": "p", "DS_ACCELERATOR": "cpu",
            "LD_LIBRARY_PATH": "/l", "VIR_FOLDER": "/f", "AWS_SHARED_CREDENTIALS_FILE": "/c",
            "GOOGLE_APPLICATION_CREDENTIALS": "/g"}
    here = {"CUDA_VISIBLE_DEVICES": "3", "DS_ENV_FILE": "e", "HOME": "/root", "MY_NCCL_DEBUG": "x"}
    secret = {"WANDB_API_KEY": "1", "HF_TOKEN": "2"}
    assert hosts.forwarded({**ours, **here, **secret, "MY_PASSWORD": "3"}) == ours
    hosts.forwarded(secret)
    said = capsys.readouterr().err
    assert said.startswith("HF_TOKEN, WANDB_API_KEY: not forwarded to other nodes") and said.count("\n") == 1
    of_user = {"MINE": "1", "NCCL_DEBUG": "WARN", "MY_PASSWORD": "3", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert hosts.forwarded({**ours, **here}, of_user) == {
        **ours, "MINE": "1", "NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert capsys.readouterr().err.startswith("MY_PASSWORD: not forwarded")


def test_hosts_that_do_not_answer_are_told_with_the_reason():
    """Nobody listens on port 9 of this machine, and the other name is nobody's."""
    silent = hosts.unreachable(["127.0.0.1", "no-such-host.invalid"], port=9)
    assert silent.keys() == {"127.0.0.1", "no-such-host.invalid"}
    if "cannot be run" not in silent["127.0.0.1"]:
        assert "refused" in silent["127.0.0.1"] and "resolve" in silent["no-such-host.invalid"]


@pytest.mark.parametrize("name, value, is_secret", [
    ("AWS_SECRET_ACCESS_KEY", "x", True), ("HF_TOKEN", "x", True), ("WANDB_API_KEY", "x", True),
    ("AZURE_STORAGE_CONNECTION_STRING", "x", True), ("FSSPEC_S3", "{}", True), ("AWS_PWD", "x", True),
    ("https_proxy", "http://me:pw@proxy:3128", True), ("WANDB_BASE_URL", "https://tok@host", True),
    ("https_proxy", "http://proxy:3128", False), ("NCCL_IB_PKEY", "0x8001", False),
    ("AWS_SHARED_CREDENTIALS_FILE", "/x", False), ("GOOGLE_APPLICATION_CREDENTIALS", "/x", False),
    ("NCCL_SOCKET_IFNAME", "eth0", False), ("HF_HOME", "/a b", False)])
def test_secrets_are_known_by_their_names_or_by_a_login(name, value, is_secret, capfd):
    assert hosts.secrets({name: value}) == (frozenset([name]) if is_secret else frozenset())
    assert (name in hosts.forwarded({name: value})) is not is_secret
    of_user = hosts.forwarded({"NCCL_DEBUG": "INFO"}, {name: value})
    assert of_user.keys() == {"NCCL_DEBUG"} | (set() if is_secret else {name})


@pytest.mark.parametrize("host, here", [
    ("localhost", True), ("192.0.2.7", False), ("node..1", False), ("a" * 70, False)])
def test_whether_a_host_is_this_machine(host, here):
    assert hosts.is_here(host) is here
