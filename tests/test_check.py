"""vir-check on real nodes: nothing is found where nothing is wrong, and every planted fault is named by its node."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from torch.distributed import HashStore

from support.launchers import ROOT, TORCHRUN, fake_ssh
from support.nodes import Nodes, lacking
from vir import check, distributed
from vir.cluster import hosts, links
from vir.cluster.hosts import read_hostfile
from vir.cluster.machines import Answer, BySsh
from vir.cluster.preflight import Finding
from vir.cluster.probe import Question
from vir.data.shards import read_manifest
from vir.launcher import Place

TOOL = [sys.executable, ROOT / "tools" / "check_cluster.py"]
WITHIN_S = 60
"""What the program promises."""
needs_nodes = pytest.mark.skipif(bool(lacking()), reason=lacking())


def run_options(shards, output):
    return ["--data.train", str(shards / "train"), "--data.val", str(shards / "val"), "--output", str(output),
            "--deepspeed_config", "zero2_fp32"]


def checked(nodes, tmp_path, *words, node="node-a"):
    """What the program says on a node, its exit code, its JSON and how long it took."""
    log, found = tmp_path / "said.txt", tmp_path / "found.json"
    began = time.monotonic()
    process = nodes.launch(node, [*TOOL, "--json", found, *words], log)
    code = process.wait(timeout=2 * WITHIN_S)
    return log.read_text(), code, json.loads(found.read_text()) if found.is_file() else {}, time.monotonic() - began


@pytest.mark.launcher
@needs_nodes
def test_good_nodes_are_good(shards, tmp_path):
    output = tmp_path / "runs" / "a b"
    with Nodes(tmp_path / "nodes", 3) as nodes:
        said, code, found, took = checked(
            nodes, tmp_path, "--hostfile", nodes.hostfile, "--write-good", tmp_path / "good", "--master_port",
            "29500", *run_options(shards, output))
        assert nodes.everything(nodes.names) == {}
        by_torchrun = [launched(nodes, node, rank, tmp_path, run_options(shards, output))
                       for rank, node in enumerate(nodes.names[:2])]
        codes = [process.wait(timeout=2 * WITHIN_S) for process, _ in by_torchrun]
        table = by_torchrun[0][1].read_text()
    assert (code, found["findings"]) == (0, []), said
    assert codes == [1, 1], table  # of torchrun, whatever its ranks' are
    assert "node-b: its settings differ from those of node-a: optim.lr: None -> 1.0; see that it reads" in table
    assert [line.split()[-1] for line in table.splitlines() if line.startswith("node-a ")] == ["good"]
    assert "\nnode-b:" in table and table.count("node-b:") == 1
    assert took < WITHIN_S
    assert list(found["nodes"]) == nodes.names
    for name, facts in found["nodes"].items():
        assert facts["host"] == name and facts["problems"] == {} and facts["shared"] and facts["port"] == ""
        assert facts["interfaces"]["eth0"] == facts["reached_at"] == nodes.addresses[name]
        assert facts["versions"]["deepspeed"] == metadata.version("deepspeed")
        manifest = json.loads((shards / "train" / "manifest.json").read_text())
        assert facts["data"]["--data.train"] == manifest.get("fingerprint", facts["data"]["--data.train"])
        assert facts["config"]["output"] == str(output)
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("node-a", "node-b"), ("node-a", "node-c"), ("node-b", "node-c")]
    assert all(pair["gb_s"] > 0.01 and 0 < pair["ms"] < 1000 for pair in found["pairs"])
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["host", *nodes.names]
    assert read_hostfile(tmp_path / "good") == read_hostfile(nodes.hostfile)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".shared", ".speed", "runs"))] == []


def launched(nodes, node, rank, tmp_path, options):
    """Two ranks of the program on one of two nodes, by torchrun; that of node-b is asked for other settings."""
    log = tmp_path / f"torchrun-{node}.txt"
    return nodes.launch(node, [*TORCHRUN, "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "2",
                               "--master_addr", nodes.addresses["node-a"], "--master_port", "29500",
                               TOOL[1], *options, *(["--optim.lr", "1"] if rank else [])], log), log


def mounted(nodes, node, original: Path, other: Path):
    assert nodes.says(node, f"mount --bind '{other}' '{original}' && echo done") == "done"


@pytest.mark.launcher
@needs_nodes
def test_every_planted_fault_is_named(shards, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    deepspeed = Path(str(metadata.distribution("deepspeed").locate_file(
        f"deepspeed-{metadata.version('deepspeed')}.dist-info/METADATA")))
    other_deepspeed, other_code = tmp_path / "METADATA", tmp_path / "quickstart.yaml"
    other_deepspeed.write_text(deepspeed.read_text().replace(f"\nVersion: {metadata.version('deepspeed')}",
                                                             "\nVersion: 0.14.0"))
    code = ROOT / "vir" / "recipes" / "quickstart.yaml"
    other_code.write_text(code.read_text() + "# another version\n")
    with Nodes(tmp_path / "nodes", 4) as nodes:
        mounted(nodes, "node-b", deepspeed, other_deepspeed)
        mounted(nodes, "node-b", code, other_code)
        mounted(nodes, "node-c", shards / "train", shards / "val")
        assert nodes.says("node-c", f"mount -t tmpfs -o size=90m tmpfs '{output}' && echo done") == "done"
        nodes.clock("node-b", 2)
        nodes.slow("node-d", 5)
        rename = "ip link set eth0 down; ip link set eth0 name ib0; ip link set ib0 up"
        nodes.launch("node-b", ["sh", "-c", rename], tmp_path / "rename.txt").wait(timeout=30)
        nodes.launch("node-a", [sys.executable, "-m", "http.server", "29500"], tmp_path / "port.txt")
        hostfile = nodes.write_hostfile([*nodes.names, "node-z"], tmp_path / "hosts")
        said, exit_code, found, took = checked(
            nodes, tmp_path, "--hostfile", hostfile, "--interface", "eth0", "--master_port", "29500", "--write-good",
            tmp_path / "good", *run_options(shards, output))
    by_host = {}
    for finding in found["findings"]:
        by_host.setdefault(finding["host"], set()).add(finding["fact"])
    assert exit_code == 2 and took < WITHIN_S, said
    assert by_host == {"node-a": {"port"}, "node-b": {"environment", "code", "clock", "interface"},
                       "node-c": {"data", "disk", "shared"}, "node-d": {"slow node"}, "node-z": {"reach"}}, said
    for sentence in (
            "node-a: the ranks cannot meet at its port 29500: Address already in use; end what has it there",
            "node-b: deepspeed is 0.14.0, but ", "node-b: its vir package has digest ",
            "node-c: --data.train has other images there: fingerprint ",
            f"node-c: {output} has 0.1 GB free, less than 5",
            "node-b: its clock is 7,", "node-d: all its links are bad: to node-a 0.00",
            "node-b: it has no interface eth0 with an address, but lo 127.0.0.1, ib0 10.77.0.2; give --interface",
            "node-z: ssh does not reach it (ssh: Could not resolve hostname node-z",
            f"{tmp_path / 'good'} is not written: no machine is good"):
        assert f"\n{sentence}" in said
    assert not (tmp_path / "good").exists()


class Told:
    """Machines that answer from a list, and remember what they are told."""

    def __init__(self, answers):
        self.names, self._answers, self.told = list(answers), answers, {}

    def answers(self, of, seconds):
        return {name: self._answers[name].pop(0) for name in of}

    def tell(self, name, message):
        self.told[name] = message


def facts(number, at=1000.0, **more):
    return Answer({"interfaces": {"lo": "127.0.0.1", "eth0": f"10.0.0.{number}"}, "listens": 40000 + number,
                   "reached_at": f"192.168.0.{number}", "clock": at, "problems": {}, **more}, at)


def links_of(pairs=(), unreached=""):
    return Answer({"pairs": pairs, "unreached": unreached})


def test_a_silent_machine_stops_nobody_and_the_numbers_of_pairs_are_those_of_the_hostfile():
    machines = Told({"a": [Answer(problem="ssh does not reach it")],
                     "b": [facts(2), links_of([{"first": 0, "second": 1, "gb_s": 1.0, "ms": 0.1, "problem": ""}])],
                     "c": [facts(3), links_of()]})
    result = check.ask(machines, "", 0)
    assert result.findings == [Finding("a", "reach", "ssh does not reach it; mend that, or leave it out")]
    assert result.pairs == [links.Pair(1, 2, 1.0, 0.1)] and list(result.facts) == ["b", "c"]
    assert machines.told == {name: {"me": me, "count": 2, "addresses": ("192.168.0.2", "10.0.0.2"), "port": 40002,
                                    "interface": ""} for me, name in enumerate("bc")}
    read = json.loads(result.to_json())
    assert (read["pairs"][0]["first"], read["pairs"][0]["second"]) == ("b", "c")


def test_with_an_interface_its_address_alone_is_taken_and_who_lacks_it_does_not_measure():
    machines = Told({"a": [facts(1), links_of()], "b": [facts(2), links_of(unreached="10.0.0.1: timed out")],
                     "c": [facts(3, interfaces={"lo": "127.0.0.1"})]})
    result = check.ask(machines, "eth0", 0)
    assert machines.told["b"]["addresses"] == ("10.0.0.1",) and machines.told["c"] is None
    assert [(finding.host, finding.fact) for finding in result.findings] == [("b", "interface"), ("c", "interface")]
    assert "it cannot connect to a (10.0.0.1: timed out); see that the address is right" in result.findings[0].said


def test_one_machine_that_answers_measures_nothing():
    machines = Told({"a": [facts(1)], "b": [Answer(problem="no")]})
    assert check.ask(machines, "", 0).pairs == [] and machines.told == {"a": None}


def test_without_hostfile_and_launcher_it_is_this_machine_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert check.main(["--master_port", str(port), "--json", "found.json"]) == 2
    said = capsys.readouterr().out
    assert f"{socket.gethostname()}: the ranks cannot meet at its port {port}: Address already in use" in said
    assert check.main(["--local_rank=0"]) == 0
    assert os.listdir(tmp_path) == ["found.json"]


def test_shards_without_an_index_are_told_and_left_as_they_are(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards / "train", tmp_path / "tars", ignore=lambda _, names: [
        name for name in names if not name.endswith(".tar")])
    before = sorted(tmp_path.rglob("*"))
    assert check._fingerprints(["--data.train", "tars", "--data.val", str(shards / "val")]) == {
        "--data.train": "", "--data.val": read_manifest(shards / "val").fingerprint}
    assert sorted(tmp_path.rglob("*")) == before
    facts = {"host": {"data": {"--data.train": ""}, "offset": 0.0}}
    assert check._tell(check.Result(["host"], facts, [], []), check._parser().parse_args([]), {}) == 0
    assert "\n--data.train has no index yet on host, so its images were not compared;" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["--hostfile", "no"], "--hostfile no cannot be read: No such file"),
    (["--write-good", "x"], "--write-good x writes a hostfile without the bad machines of another; give --hostfile"),
    (["--json", "no/x"], "no/x cannot be written: No such file or directory; give another path"),
    (["--optim.learning", "1"], "no such flag: --optim.learning"),
    (["--ssh_port", "22"], "--ssh_port 22 is that of the machines of a hostfile; give --hostfile, or leave it out"),
])
def test_a_wrong_option_is_told_before_anything_is_asked(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_hostfile_without_bad_machines_keeps_the_slots_of_the_others(tmp_path, capsys):
    good = tmp_path / "good"
    args = check._parser().parse_args(["--hostfile", "h", "--write-good", str(good)])
    result = check.Result(["a", "b", "c"], {}, [], [Finding("b", "disk", "full")])
    assert check._tell(result, args, {"a": 8, "b": 8, "c": 4}) == 2
    assert read_hostfile(good) == {"a": 8, "c": 4}
    assert f"{good}: 2 of 3 machines" in capsys.readouterr().out


@pytest.fixture
def rank(monkeypatch):
    """Become a rank of two."""
    def become(number):
        for name, value in {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": 29400}.items():
            monkeypatch.setenv(name, str(value))
    return become


def test_the_port_of_a_launcher_cannot_be_tried(rank, capsys):
    rank(0)
    assert check.main(["--master_port", "29500"]) == 2
    assert ("--master_port 29500 cannot be tried under a launcher, whose ranks have met at port 29400 by now; give "
            "that port to the launcher") in capsys.readouterr().err


def test_rank_0_alone_needs_to_write_what_it_writes(rank, monkeypatch):
    monkeypatch.setattr(check, "_under_launcher", lambda *arguments: 7)
    for number, code in ((0, 2), (1, 7)):
        rank(number)
        assert check.main(["--json", "no/x"]) == code


def test_an_output_folder_is_looked_at_alone_or_with_the_settings(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    found = []
    for words in ([], ["--data.train", str(shards / "train")]):
        assert check.main(["--output", "out", "--json", "found.json", *words]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["nodes"][socket.gethostname()])
    assert [of_both["disk"]["folder"] for of_both in found] == [str(tmp_path / "out")] * 2
    assert "config" not in found[0] and found[1]["config"]["output"] == "out" and found[0]["shared"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing_in_the_output_folder(name, tmp_path):
    words = [sys.executable, "-m", "vir.check", "--output", tmp_path]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + WITHIN_S
        while not list(tmp_path.glob(".shared-*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=WITHIN_S)[1]
    assert process.returncode == 128 + getattr(signal, name) and said == "stopped\n"
    assert list(tmp_path.iterdir()) == []


# ---- by what leads to the machines


def test_a_machine_gets_variables_by_standard_input_and_answers_in_lines(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a folder's $name"
    folder.mkdir()
    python = folder / "python"
    python.write_text(f"""#!{sys.executable}
import json, os, sys
print("a line of others", flush=True)
print("vir-check: " + json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), flush=True)
print("vir-check: " + json.dumps([input(), input()]), flush=True)
""")
    python.chmod(0o755)
    fake_ssh(tmp_path, monkeypatch, 'exec env -i sh -c "$command"')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "executable", str(python))
    values = {"NCCL_DEBUG_FILE": "/a b/$x`y`\"z\\'", "WANDB_API_KEY": "hidden", "CUDA_VISIBLE_DEVICES": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    hosts._tell_of_secrets.cache_clear()
    question = Question(folder="/f", token="it's")
    with BySsh(["a", "b"], check._line(question), None) as machines:
        assert not any("NCCL" in word or "hidden" in word for process in machines._processes.values()
                       for word in process.args)
        for name in "ab":
            machines.tell(name, None)
            machines.tell(name, {"me": name})
        first, second = machines.answers("ab", 30), machines.answers("ab", 30)
    words, environment, where = first["a"].said
    assert words[:3] == ["-m", "vir.check", "--node"] and where == str(folder)
    assert Question(**{**json.loads(words[3]), "options": ()}) == question
    assert environment["NCCL_DEBUG_FILE"] == values["NCCL_DEBUG_FILE"]
    assert not {"WANDB_API_KEY", "CUDA_VISIBLE_DEVICES"} & environment.keys()
    assert [second[name].said for name in "ab"] == [["null", '{"me": "a"}'], ["null", '{"me": "b"}']]
    assert "WANDB_API_KEY: not forwarded" in capsys.readouterr().err


def test_the_time_for_names_is_a_part_of_that_for_facts(tmp_path, monkeypatch):
    """Of two ranks the second never comes."""
    asked = []

    def ask(machines, interface, port, facts_s):
        asked.append((machines.names, facts_s))
        return check.Result([], {}, [], [])

    store = HashStore()
    store.set("left-1", "")
    monkeypatch.setattr(check, "ask", ask)
    monkeypatch.setattr(check, "_FACTS_S", 1.0)
    monkeypatch.setattr(check, "_be_asked_by_store", lambda place, options: None)
    monkeypatch.setattr(distributed, "connect", lambda place, timeout: store)
    monkeypatch.chdir(tmp_path)
    place = Place(rank=0, size=2, local_rank=0, address="127.0.0.1", port=0)
    assert check._under_launcher(place, check._parser().parse_args([]), []) == 0
    ((names, facts_s),) = asked
    assert names == [socket.gethostname(), "rank 1"] and facts_s <= 0.5
