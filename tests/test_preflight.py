"""What is wrong with machines by their facts: each fault alone is found, on its machine alone."""

import copy

import pytest

from vir.cluster.preflight import NO_INDEX, Finding, clocks_off, counted, judge, notes, right, table
from vir.config import to_dict
from vir.flags import parse

GOOD = {
    "host": "h", "versions": {"python": "3.11.7", "torch": "2.15.0", "driver": "550.54"}, "cuda": "13.2",
    "code": "c0de" * 16, "config": to_dict(parse(["--data.train", "d", "--optim.lr", "0.1"])),
    "data": {"--data.train": "da7a" * 16}, "disk": {"folder": "/runs", "free": 900e9, "speed": 800e6}, "shared": True,
    "devices": ["NVIDIA H100, 81559 MiB"] * 8, "ecc": [0] * 8, "xid": [], "interfaces": {"eth0": "10.0.0.1"},
    "port": "", "offset": 0.1, "problems": {}}


def nodes(count=3, **of_b):
    """Good facts of node-a, node-b, …; `of_b` are those of the second."""
    found = {f"node-{letter}": copy.deepcopy(GOOD) for letter in "abcdef"[:count]}
    found.get("node-b", {}).update(of_b)
    return found


def with_config(**sections):
    config = copy.deepcopy(GOOD["config"])
    for section, values in sections.items():
        config[section].update(values)
    return config


def test_good_machines_have_no_finding():
    assert judge(nodes(), "eth0", 29500) == [] and judge(nodes(1)) == [] and judge({}) == []


@pytest.mark.parametrize("of_b, fact, said", [
    ({"versions": {"python": "3.11.7", "torch": "2.9.0", "driver": "550.54"}}, "environment",
     "torch is 2.9.0, but 2.15.0 on node-a and 1 more; install the same everywhere"),
    ({"versions": {"python": "3.11.7", "torch": "2.15.0", "driver": "470.1"}}, "environment",
     "driver is 470.1, but 550.54 on node-a and 1 more; install"),
    ({"cuda": "12.1"}, "environment", "CUDA of torch is 12.1, but 13.2 on node-a"),
    ({"code": "bad0" * 16}, "code", "its vir package has digest bad0bad0bad0, but c0dec0dec0de on node-a and 1 more; "
                                    "check out the same version"),
    ({"config": with_config(optim={"lr": 0.2}, train={"log_every": 1})}, "config",
     "its settings differ from those of node-a and 1 more: optim.lr: 0.1 -> 0.2; train.log_every: 50 -> 1; see that it "
     "reads the same YAML files"),
    ({"data": {"--data.train": "bad0" * 16}}, "data", "--data.train has other images there: fingerprint bad0bad0bad0, "
                                                      "but da7ada7ada7a on node-a and 1 more; copy the same shards"),
    ({"disk": {"folder": "/runs", "free": 4.9e9, "speed": 800e6}}, "disk",
     "/runs has 4.9 GB free, less than 5 GB for checkpoints; free some, or give another --output"),
    ({"disk": {"folder": "/runs", "free": 900e9, "speed": 99e6}}, "disk",
     "/runs takes 99.0 MB/s, where 800.0 MB/s is usual here; each checkpoint waits for it: mend it"),
    ({"shared": False}, "shared", "it does not see in the output folder what the asking machine writes there; give "
                                  "--output a folder that all machines share"),
    ({"devices": GOOD["devices"][:7]}, "devices",
     "it has 7 x NVIDIA H100, 81559 MiB, but node-a and 1 more 8 x NVIDIA H100, 81559 MiB; all ranks wait"),
    ({"ecc": [0, 2]}, "ECC", "GPU 1 has had 2 uncorrected memory errors since its driver was loaded; reset it"),
    ({"xid": ["NVRM: Xid 48", "NVRM: Xid 79"]}, "Xid", "its driver has told of an error: NVRM: Xid 79; look it up"),
    ({"offset": -7200.0}, "clock", "its clock is 7,200 s behind the others', more than 60 s; start its time service"),
    ({"interfaces": {"lo": "127.0.0.1"}}, "interface", "it has no interface eth0 with an address, but lo 127.0.0.1; "
                                                       "give --interface a name that all machines have"),
    ({"interfaces": {}}, "interface", "it has no interface eth0 with an address, but none; give"),
    ({"problems": {"devices": "no answer within 24 s"}}, "devices",
     "its devices could not be looked at: no answer within 24 s; see what it waits for there"),
    ({"problems": {"data": "no/shards is missing"}}, "data",
     "its data could not be looked at: no/shards is missing; mend that, or leave it out"),
])
def test_one_fault_of_one_machine(of_b, fact, said):
    (finding,) = judge(nodes(**of_b), "eth0", 29500)
    assert (finding.host, finding.fact) == ("node-b", fact)
    assert finding.said.startswith(said) and str(finding).startswith("node-b: ")


def test_a_taken_port_matters_on_the_first_machine_alone():
    taken = nodes(port="Address already in use")
    assert judge(taken, "", 29500) == []
    taken["node-a"]["port"] = "Address already in use"
    assert [str(finding) for finding in judge(taken, "", 29500)] == [
        "node-a: the ranks cannot meet at its port 29500: Address already in use; end what has it there, or give "
        "another --master_port"]
    assert judge(taken) == []


@pytest.mark.parametrize("of_b", [
    {"config": with_config(data={"train": "elsewhere", "cache": "/disk", "workers": 2, "index_dir": "i"})},
    {"offset": 59.0}, {"disk": {"folder": "/runs", "free": 5e9, "speed": 201e6}},
    {"disk": {"folder": "/runs", "free": 5e9, "speed": 101e6}}])
def test_what_may_differ_by_machine(of_b):
    assert judge(nodes(**of_b), "eth0", 29500) == []


def test_settings_of_each_machine_do_not_hide_which_ones_most_have():
    """The caches are all different, so no two machines have the same settings in all."""
    found = nodes(4)
    for host, facts in found.items():
        lr = 0.2 if host == "node-a" else 0.1
        facts["config"] = with_config(data={"cache": f"/disk/{host}"}, optim={"lr": lr})
    (finding,) = judge(found)
    assert str(finding).startswith("node-a: its settings differ from those of node-b and 2 more: optim.lr: 0.1 -> 0.2;")


def test_shards_without_an_index_are_a_note_and_the_others_are_compared():
    found = nodes(4)
    assert notes(found) == []
    for host in ("node-a", "node-b"):
        found[host]["data"] = {"--data.train": NO_INDEX, "--data.val": NO_INDEX}
    found["node-d"]["data"] = {"--data.train": "bad0" * 16}
    assert [finding.host for finding in judge(found)] == ["node-d"]
    assert notes(found) == [f"--data.{split} has no index yet on node-a and 1 more, so its images were not compared; "
                            "make it by vir-index first, or the run makes it" for split in ("train", "val")]


def test_disks_that_are_all_slow_are_named_only_below_the_bound():
    slow = nodes()
    for facts in slow.values():
        facts["disk"]["speed"] = 3e6
    assert judge(slow) == []
    slow["node-c"]["disk"]["speed"] = 1.9e6
    assert [(finding.host, finding.fact) for finding in judge(slow)] == [("node-c", "disk")]


def test_most_are_right_and_among_equals_the_first():
    assert right({"a": 1, "b": 2, "c": 2}) == (2, ["a"])
    assert right({"a": 1, "b": 2}) == (1, ["b"])
    assert right({}) == (None, [])
    assert clocks_off({"a": 0.0, "b": 5000.0}) == {"b": 5000.0} and clocks_off({}) == {}
    assert clocks_off({"a": 5000.0, "b": 0.0}) == {"b": -5000.0}
    assert clocks_off({"a": 5000.0, "b": 5001.0, "c": 0.0}) == {"c": -5000.0}  # the one who asks may be wrong
    assert counted(["x", "x", "y"]) == "2 x x + 1 x y"


def test_the_table_has_a_line_for_each_host_also_for_a_silent_one():
    found = nodes(2)
    said = table(found, ["node-a", "node-b", "node-c"], {"node-a": "12 GB/s, 0.03 ms"},
                 [Finding("node-c", "reach", "no"), Finding("node-b", "disk", "x"), Finding("node-b", "code", "y")])
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["host", "node-a", "node-b", "node-c"]
    assert lines[1].endswith("12 GB/s, 0.03 ms  good") and lines[2].endswith("code, disk")
    assert "8 x NVIDIA H100, 81559 MiB  900 GB, 800 MB/s  +0 s" in lines[1]
    assert lines[3].split()[1:] == ["-"] * 6 + ["reach"]
    assert lines[4:] == ["", "node-c: no", "node-b: x", "node-b: y"]
