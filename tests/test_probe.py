"""The facts of a machine: what is read, and that a part that fails or hangs is a fact, too."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vir
from support.launchers import ROOT
from vir.cluster import probe
from vir.cluster.probe import Question, code_digest, disk, look, nearest, port_problem, sees


def test_it_needs_no_torch_to_begin():
    code = "import sys, vir.cluster.probe, vir.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


SMI = """#!/bin/sh
echo "$@" > "$(dirname "$0")/asked"
cat <<END
NVIDIA H100 80GB HBM3, 81559, 0
NVIDIA H100 80GB HBM3, 81559, 3
Tesla, with a comma in quotes no, 16160, [N/A]
END
"""
DMESG = """#!/bin/sh
cat <<END
[    1.0] NVRM: loading NVIDIA UNIX Open Kernel Module
[12345.6] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.
[12346.6] usb 1-1: new device
END
"""


def program(folder: Path, name: str, text: str):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_the_facts_of_this_machine_are_told_and_nothing_is_left(tmp_path):
    facts = look(Question(folder=str(tmp_path)))
    assert facts["problems"] == {}
    assert facts["host"] == socket.gethostname() and abs(facts["clock"] - time.time()) < 60
    assert facts["versions"]["vir"] == vir.__version__
    assert facts["disk"]["folder"] == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert facts["disk"]["speed"] > 0 and abs(facts["disk"]["free"] - shutil.disk_usage(tmp_path).free) < 5e9
    assert facts["interfaces"]["lo"] == "127.0.0.1"
    assert not {"shared", "port", "config", "data"} & facts.keys()


def test_gpus_with_their_errors_and_the_drivers_log_are_read(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", SMI.replace("Tesla, with a comma in quotes no", '"Tesla, old"'))
    program(tmp_path, "dmesg", DMESG)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = probe.devices()
    assert found["devices"] == ["NVIDIA H100 80GB HBM3, 81559 MiB"] * 2 + ["Tesla, old, 16160 MiB"]
    assert found["ecc"] == [0, 3, 0] and found["memory_gib"] > 0
    assert "--query-gpu=name,memory.total,ecc" in (tmp_path / "asked").read_text()
    assert probe.xids() == {"xid": ["NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."]}


def test_a_driver_that_fails_or_hangs_is_a_problem_and_the_other_facts_are_there(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\n"
                                    "exit 18\n")
    program(tmp_path, "dmesg", "#!/bin/sh\nexec sleep 3\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    import torch  # noqa: F401  (within the bound)

    monkeypatch.setattr(probe, "PART_S", 2.5)
    facts = look(Question(folder=str(tmp_path)))
    assert facts["problems"] == {
        "devices": "nvidia-smi ended with 18: Failed to initialize NVML: Driver/library version mismatch",
        "driver's log": "no answer within 2.5 s"} and facts["disk"]["speed"] > 0 and "devices" not in facts


def test_a_torch_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = look(Question(folder=str(tmp_path)))
    assert facts["problems"].keys() == {"torch"} and "torch" in facts["problems"]["torch"]
    assert facts["versions"]["torch"] != "none" and "cuda" not in facts


def test_parts_from_elsewhere_are_looked_at_as_those_here(tmp_path):
    facts = look(Question(folder=str(tmp_path)), {"config": lambda: {"config": 1}, "data": lambda: {}["no"]})
    assert facts["config"] == 1 and facts["problems"] == {"data": "'no'"}


def test_the_digest_of_the_code_is_of_names_and_contents_alone(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(ROOT / "vir" / "recipes", tmp_path / name / "recipes")
        (tmp_path / name / "a.py").write_text("a")
    (tmp_path / "two" / "__pycache__").mkdir()
    (tmp_path / "two" / "__pycache__" / "a.pyc").write_text("x")
    same = code_digest(tmp_path / "one")
    assert code_digest(tmp_path / "two") == same != code_digest()
    (tmp_path / "two" / "a.py").rename(tmp_path / "two" / "b.py")
    assert code_digest(tmp_path / "two") != same
    (tmp_path / "two" / "b.py").rename(tmp_path / "two" / "a.py")
    assert code_digest(tmp_path / "two") == same
    (tmp_path / "two" / "recipes" / "quickstart.yaml").write_text("x: 1")
    assert code_digest(tmp_path / "two") != same


def test_the_folder_of_checkpoints_is_the_nearest_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nearest(Path("runs/a/b")) == tmp_path
    (tmp_path / "runs").mkdir()
    assert nearest(Path("runs")) == nearest(Path("runs/a/b")) == tmp_path / "runs"


def test_a_disk_is_written_to_and_left_as_it_was(tmp_path):
    began = time.monotonic()
    found = disk(tmp_path)
    took = time.monotonic() - began
    assert found["speed"] >= probe._WRITTEN_BYTES / took * 0.5 or took > probe._WRITES_S
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="no/folder"):
        disk(Path("no/folder"))


def test_the_written_bytes_go_with_the_process(tmp_path):
    code = ("import sys, pathlib; from vir.cluster import probe; probe._WRITTEN_BYTES = 1 << 60; probe._WRITES_S = 60;"
            "print(flush=True); probe.disk(pathlib.Path(sys.argv[1]))")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.kill()
    assert process.returncode == -9 and list(tmp_path.iterdir()) == []


def test_a_token_must_be_read_as_it_was_written(tmp_path):
    assert not sees(tmp_path, "token")
    (tmp_path / "token").write_text("other")
    assert not sees(tmp_path, "token")
    (tmp_path / "token").write_text("token")
    assert sees(tmp_path, "token") and look(Question(folder=str(tmp_path), token="token"))["shared"] is True


def test_a_port_is_free_or_not():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_problem(port) == "Address already in use"
    assert port_problem(port) == ""
