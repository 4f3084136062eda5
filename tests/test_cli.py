"""From an error to a line and an exit code; the names of the programs."""

import configparser
import re
import runpy
import subprocess
import sys

import pytest

from support.launchers import ROOT, call
from vir import cli, errors
from vir.consolidate import main as consolidate


@pytest.mark.parametrize("kind, code", [
    (errors.SettingsError, 2), (errors.DataError, 3), (errors.CheckpointError, 3), (errors.NotFiniteError, 4),
    (errors.LossScaleError, 6)])
def test_each_error_is_one_line_and_has_its_code(monkeypatch, capsys, kind, code):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.tell(kind("no such thing"), "vir-train") == code
    assert capsys.readouterr() == ("", "vir-train: no such thing\n")


def test_torchruns_report_gets_the_line(monkeypatch, tmp_path, capsys):
    """As torchrun reads it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    cli.tell(errors.DataError("no such thing"), "vir-train", every_rank=False)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=str(file))
    assert str(ChildFailedError("vir.train", {0: failure})).splitlines()[-2].split(" : ") == [
        "  traceback", "vir-train: no such thing"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    assert cli.tell(errors.DataError("no such thing"), "vir-train") == 3  # what cannot be written changes nothing


def test_the_code_of_a_stop_is_that_of_no_error():
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert errors.EXIT_STOPPED_BY_SIGNAL == 75 and errors.EXIT_RANK_LOST == 5 and not codes & {0, 5, 75}


@pytest.mark.parametrize("rank, every_rank, speaks", [
    ("0", False, True), ("1", False, False), ("0", True, True), ("1", True, True)])
def test_the_first_rank_of_a_machine_speaks_for_all_unless_one_alone_may_know(monkeypatch, capsys, rank, every_rank,
                                                                              speaks):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert cli.tell(errors.DataError("damaged"), "p", every_rank) == 3  # its code is every rank's
    assert capsys.readouterr().err == ("p: damaged\n" if speaks else "")


def test_a_program_ends_with_the_line_and_the_code_of_its_error(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert consolidate([str(tmp_path / "nowhere"), "--output", str(tmp_path / "w.safetensors")]) == 3
    said = capsys.readouterr().err
    assert said.startswith("vir-consolidate: ") and said.count("\n") == 1 and "nowhere" in said


ENDS = """
import atexit, os, sys, threading, time
from vir import cli
class Imported:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")
imported = Imported()
end = cli.QuickEnd()
atexit.register(print, "at its end")
threading.Thread(target=lambda: time.sleep(0.5) or print("of a thread")).start()
"""


@pytest.mark.parametrize("last, code, is_quick", [
    ("end.code = 75; sys.exit(75)", 75, True), ("end.code = 0", 0, True), ("1 / 0", 1, False), ("", 0, False),
    ("sys.exit(2)", 2, False)])
def test_a_quick_end_takes_nothing_apart_but_leaves_nothing_undone(last, code, is_quick):
    done = call(sys.executable, "-c", ENDS + last)
    assert done.returncode == code
    assert done.stdout.endswith("of a thread\nat its end\n" + ("" if is_quick else "taken apart\n")), done.stdout


@pytest.mark.parametrize("before, kept", [("cli.QuickEnd()", True), ("", False)])
def test_no_garbage_is_looked_for_in_imports_nor_at_a_quick_end_in_what_they_leave(before, kept):
    done = call(sys.executable, "-c", f"""
import gc
from vir import cli
{before}
looks = []
gc.collect()  # so that none is near
gc.callbacks.append(lambda phase, info: looks.append(phase))
class Cycle:
    def __init__(self):
        self.itself = self
try:
    with cli.importing():
        kept = [Cycle() for _ in range(100_000)]
        inside = list(looks)
        raise ImportError
except ImportError:
    print(inside, gc.isenabled(), len(gc.get_objects()) < 1000)
more = [Cycle() for _ in range(10_000)]
print(len(looks) > 0)
""")
    assert done.stdout == f"[] True {kept}\nTrue\n"


# ---- which program is which


@pytest.fixture(scope="module")
def programs():
    """Name -> module of what setup.cfg installs."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return dict(re.findall(r"(\S+) = (\S+):", config["options.entry_points"]["console_scripts"]))


def test_the_package_names_its_programs_and_is_none(programs):
    done = call(sys.executable, "-m", "vir")
    assert done.returncode == 0
    assert dict(re.findall(r"^    (vir-\S+) .* python -m (\S+)$", done.stdout, re.MULTILINE)) == programs
    again = call(sys.executable, "-m", "vir", "train")
    assert again.returncode == 2 and again.stdout == done.stdout


@pytest.mark.parametrize("module, program", [
    ("vir.data.convert", "vir-convert"), ("vir.data.sources.folder", "vir-convert"), ("vir.data.shards", "vir-convert"),
    ("vir.checkpoints.consolidate", "vir-consolidate"), ("vir.evaluation.classify", "vir-evaluate"),
    ("vir.reports.curves", "tools/plot_run.py of the sources"), ("vir.training.run", "vir-train")])
def test_a_module_that_is_no_program_names_the_one_that_is_meant(module, program, programs):
    assert program in programs or (ROOT / program.split()[0]).is_file()
    with pytest.raises(SystemExit, match=f"^{module} is a part of the library; the program is {program}$"):
        runpy.run_path(str(ROOT / (module.replace(".", "/") + ".py")), run_name="__main__")


def test_messages_name_programs_that_are_installed(programs):
    """The scripts of tools/ are in the sources alone; the modules of the benchmarks serve no other."""
    for path in sorted((ROOT / "vir").rglob("*.py")):
        if "benchmarks" not in path.parts:
            text = path.read_text()
            assert not re.findall(r"tools/\s*\"?\s*f?\"?(?:convert|consolidate)\w*", text), path
            assert set(re.findall(r"\bvir-(?:train|ev\w+|con\w+)", text)) <= programs.keys(), path


TWO_SIGNALS = """
import os, signal, sys, time
from vir import cli
with cli.stop_requests() as received:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        print(received, flush=True)
        time.sleep(float(sys.argv[1]))
    print("went on")
"""


@pytest.mark.parametrize("pause, code", [(1.1, 130), (0, 0)])
def test_a_second_signal_ends_at_once_what_a_first_one_only_asks(pause, code):
    done = subprocess.run([sys.executable, "-c", TWO_SIGNALS, str(pause)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr == ""  # one that comes with the first is the same request twice
    assert ("went on" in done.stdout) == (code == 0) and done.stdout.startswith("[<Signals.SIGINT: 2>]")


TWO_INTERRUPTS = """
import os, signal, time
from vir import cli
try:
    with cli.interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            print("took away what it had begun", flush=True)
except cli.Interrupted as end:
    raise SystemExit(end.exit_code)
"""


def test_a_second_signal_does_not_come_between_what_the_first_takes_away():
    done = subprocess.run([sys.executable, "-c", TWO_INTERRUPTS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "took away what it had begun\n", "")
