"""The command of deepspeed's launcher: what reaches a rank through the runner, pdsh and the shell of another node is
what was given. deepspeed's own runners build the commands here, and a real shell reads them."""

import base64
import json
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from vir.cluster import deepspeed, hosts
from vir.cluster.deepspeed import DeepSpeedLaunch, active_hosts, add_options, for_remote_shell
from vir.errors import SettingsError

WORDS = ["--data.train", "/a b/shards", "--model.freeze", r"patch_embed|blocks\.[0-5]\.", "--model.args",
         "{patch_size: 14, embed_dim: 128}", "--x", "$HOME `id` \\ \" '", "--y", "a;b&c>(d)$HOME*", "--z", "it's",
         "100%h", "", "#no", "~", r"a\b c", "--q=[0.8, 1.0]"]


def options(*words):
    parser = ArgumentParser(allow_abbrev=False)
    add_options(parser)
    parser.set_defaults(max_restarts=0, print=False)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture
def hostfile(tmp_path):
    (tmp_path / "hosts").write_text("node-a slots=2\nnode-b slots=2\nnode-c slots=1\n")
    return tmp_path / "hosts"


def started(args, words=(), run="/a run"):
    with DeepSpeedLaunch(args, list(words)).start("x-0", Path(run, ".status-x-0.json")) as start:
        return start, Path(start.environment.get("DS_ENV_FILE", os.devnull)).read_text()


def test_on_one_machine_words_are_as_they_were_given():
    start, _ = started(options("--num_accelerators", 2), WORDS)
    assert start.command[-len(WORDS) - 2:] == ["--module", "vir.train", *WORDS] and "--num_gpus=2" in start.command
    assert start.folder == Path.cwd() and start.environment["VIR_RUN_ID"] == "x-0"
    ports = {next(word for word in started(options())[0].command if "--master_port" in word) for _ in range(5)}
    assert len(ports) > 1


def over_there(start, forwarded, tmp_path, monkeypatch) -> dict:
    """What a rank gets: deepspeed's own code makes the words of pdsh, which a shell reads in a node's home folder."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "pdsh").touch(mode=0o755)
    args = runner.parse_args(start.command[3:])
    world = base64.urlsafe_b64encode(json.dumps({"node-a": [0], "node-b": [0]}).encode()).decode()
    pdsh = PDSHRunner(args, world)
    for line in forwarded.splitlines():
        pdsh.add_export(*line.split("=", maxsplit=1))
    monkeypatch.chdir(start.folder)
    words, _, _ = pdsh.get_cmd({}, {"node-a": [0], "node-b": [0]})
    command = " ".join(words[words.index("node-a,node-b") + 1:]).replace("%n", "1").replace("%%", "%")
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"
    command = command.replace(f"{sys.executable} -u -m deepspeed.launcher.launch",
                              shlex.join([sys.executable, "-c", tell]))
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    given, environment, folder = json.loads(done.stdout)
    return {"words": given[given.index("vir.train") + 1:], "environment": environment, "folder": folder}


def test_words_and_variables_pass_the_shell_of_another_node(hostfile, tmp_path, monkeypatch):
    folder = tmp_path / "a folder's $name"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/a b/$x`y`\"z\\%h")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("UNKNOWN", "here")
    start, forwarded = started(options("--hostfile", hostfile, "--master_addr", "10.0.0.1"), WORDS)
    assert "secret" not in forwarded
    got = over_there(start, forwarded, tmp_path, monkeypatch)
    assert got["words"] == WORDS and got["folder"] == "/"
    expected = {"NCCL_DEBUG_FILE": "/a b/$x`y`\"z\\%h", "OMP_NUM_THREADS": "3", "HTTPS_PROXY": "http://proxy:3128",
                "AWS_REGION": "eu-west-1", "VIR_FOLDER": str(folder), "VIR_RUN_ID": "x-0",
                "VIR_STATUS": "/a run/.status-x-0.json"}
    assert {name: got["environment"].get(name) for name in expected} == expected
    assert {"WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"} <= start.without  # nor does the runner export them by itself
    assert not Path(start.environment["DS_ENV_FILE"]).exists()  # with the end of the block


def test_the_file_is_for_this_user_alone_and_takes_the_users_own_in(hostfile, tmp_path, monkeypatch, capsys):
    hosts._tell_of_secrets.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text(
        "# mine\n\nWANDB_API_KEY=secret\nWANDB_MODE=offline\nNCCL_DEBUG=WARN\n")
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG = INFO\nEMPTY\n")
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    launch = DeepSpeedLaunch(options("--hostfile", hostfile, "--master_addr", "10.0.0.1"), [])
    with launch.start("x", tmp_path / "x") as start:
        file = Path(start.environment["DS_ENV_FILE"])
        assert file.stat().st_mode & 0o777 == 0o600
        lines = file.read_text().splitlines()
    assert {"WANDB_MODE=offline", "NCCL_DEBUG=INFO"} <= set(lines) and all("=" in line for line in lines)
    assert not any("secret" in line for line in lines) and "WANDB_API_KEY: not forwarded" in capsys.readouterr().err


def test_the_interface_is_told_to_nccl_and_gloo_on_every_node(hostfile):
    _, forwarded = started(options("--hostfile", hostfile, "--interface", "ib0", "--master_addr", "10.0.0.1"))
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"} <= set(forwarded.splitlines())


def test_mpi_is_told_where_rank_0_is_and_gets_no_value_that_would_come_with_quotes(hostfile, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/a b")
    args = options("--hostfile", hostfile, "--launcher", "openmpi", "--master_addr", "10.0.0.1", "--master_port", 2000,
                   "--launcher_args", "--mca x y")
    start, forwarded = started(args, WORDS, run="/run")
    assert {"MASTER_ADDR=10.0.0.1", "MASTER_PORT=2000", "VIR_STATUS=/run/.status-x-0.json"} <= set(
        forwarded.splitlines())
    assert "/a b" not in forwarded and start.folder == Path.cwd()
    assert start.command[-len(WORDS):] == WORDS and "--launcher_args=--mca x y" in start.command
    with pytest.raises(SettingsError, match="--launcher openmpi cannot tell other nodes VIR_STATUS=/a run/.*; give "):
        started(args, WORDS)


def test_nodes_that_others_start_share_no_name_of_a_start(hostfile):
    start, _ = started(options("--hostfile", hostfile, "--no_ssh", "--node_rank", 1, "--master_addr", "10.0.0.1",
                               "--master_port", 2000))
    assert "VIR_RUN_ID" not in start.environment and "--node_rank=1" in start.command


@pytest.mark.parametrize("words, left", [
    ([], "abc"), (["--num_nodes", "2"], "ab"), (["--include", "node-b@node-c:0"], "bc"),
    (["--exclude", "node-a"], "bc"), (["--exclude", "node-a:1"], "abc")])
def test_the_hosts_are_those_that_deepspeed_takes(words, left):
    from deepspeed.launcher import runner

    found = active_hosts({"node-a": 2, "node-b": 2, "node-c": 1}, options(*words))
    assert list(found) == [f"node-{letter}" for letter in left]
    theirs = runner.parse_args([*words, "x"])
    active = runner.parse_inclusion_exclusion({"node-a": 2, "node-b": 2, "node-c": 1}, theirs.include, theirs.exclude)
    assert list(found) == list(runner.apply_num_nodes_and_gpus(active, theirs.num_nodes, theirs.num_gpus))


def test_a_host_that_is_in_no_hostfile_is_refused():
    with pytest.raises(SettingsError, match="--include names node-x; the hostfile has node-a"):
        active_hosts({"node-a": 2}, options("--include", "node-x:0"))


def test_a_python_whose_path_no_shell_would_read_is_refused(hostfile, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my project/.venv/bin/python")
    DeepSpeedLaunch(options(), [])
    with pytest.raises(SettingsError, match="/my project/.venv/bin/python has a space in its path"):
        DeepSpeedLaunch(options("--hostfile", hostfile), [])


def test_an_address_that_a_host_does_not_tell_is_asked_for(hostfile):
    with pytest.raises(SettingsError, match=r"node-a does not tell its address by `ip .* dev eth7` \(.*\); give "
                                            r"--master_addr, or another --interface"):
        started(options("--hostfile", hostfile, "--interface", "eth7"))


@pytest.mark.parametrize("word", ["plain", "--lr=1e-3", "/a/b_c.yaml", "s3://bucket/x-000.tar"])
def test_plain_words_stay_readable(word):
    assert for_remote_shell(word) == word


def test_deepspeeds_own_place_of_a_hostfile_is_known(hostfile, monkeypatch):
    monkeypatch.setattr(deepspeed, "_DEFAULT_HOSTFILE", hostfile)
    start, _ = started(options("--master_addr", "10.0.0.1"))
    assert f"--hostfile={hostfile}" in start.command


@pytest.mark.parametrize("words", [
    ["--no_ssh", "--node_rank", 1], ["--node_rank", 1, "--master_addr", "10.0.0.1", "--master_port", 2000],
    ["--no_ssh", "--node_rank", 0, "--master_addr", "10.0.0.1"]])
def test_nodes_that_others_start_are_told_where_to_meet(hostfile, words):
    with pytest.raises(SettingsError, match="with --hostfile, --no_ssh, --node_rank, --master_addr and --master_port"):
        DeepSpeedLaunch(options("--hostfile", hostfile, *words), [])
    with pytest.raises(SettingsError, match="give them all|give their --hostfile, too"):
        DeepSpeedLaunch(options(*words), [])


def test_a_hostfile_with_another_machine_alone_trains_there_and_with_this_one_here(tmp_path):
    for host, elsewhere in (("192.0.2.7", True), ("localhost", False), (os.uname().nodename, False)):
        (tmp_path / "hosts").write_text(f"{host} slots=2\n")
        start, _ = started(options("--hostfile", tmp_path / "hosts", "--master_addr", "10.0.0.1"))
        assert ("--force_multi" in start.command) is elsewhere, host


@pytest.mark.parametrize("words, said", [
    (["--ssh_port", "a"], "'a' is no port"), (["--num_nodes", "two"], "invalid int value: 'two'"),
    (["--master_port", "99999"], "'99999' is no port from 1 to 65535")])
def test_a_value_that_is_no_number_is_told(words, said, capsys):
    with pytest.raises(SystemExit):
        options(*words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 4])
def test_more_nodes_than_there_are_or_none_are_refused(count):
    with pytest.raises(SettingsError, match=f"--num_nodes is {count}; the hostfile has 3 hosts"):
        active_hosts({"node-a": 2, "node-b": 2, "node-c": 1}, options("--num_nodes", count))


def test_paths_of_deepspeeds_own_options_are_those_of_the_folder_of_the_command(hostfile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, _ = started(options("--hostfile", hostfile, "--master_addr", "10.0.0.1", "--enable_each_rank_log", "logs"))
    assert f"--enable_each_rank_log={tmp_path}/logs" in start.command


def test_printing_asks_no_host(hostfile):
    args = options("--hostfile", hostfile)
    args.print = True
    assert "--master_addr=ADDRESS_OF_node-a" in started(args)[0].command
