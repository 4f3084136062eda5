"""From an error to a line and an exit code."""

import pytest

from vir import cli, errors
from vir.consolidate import main as consolidate


@pytest.mark.parametrize("kind, code", [
    (errors.SettingsError, 2), (errors.DataError, 3), (errors.CheckpointError, 3), (errors.NotFiniteError, 4),
    (errors.LossScaleError, 6)])
def test_each_error_is_one_line_and_has_its_code(monkeypatch, capsys, kind, code):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.tell(kind("no such thing"), "vir.train") == code
    assert capsys.readouterr() == ("", "vir.train: no such thing\n")


def test_torchruns_report_gets_the_line(monkeypatch, tmp_path, capsys):
    """As torchrun reads it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    cli.tell(errors.DataError("no such thing"), "vir.train", every_rank=False)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=str(file))
    assert str(ChildFailedError("vir.train", {0: failure})).splitlines()[-2].split(" : ") == [
        "  traceback", "vir.train: no such thing"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    assert cli.tell(errors.DataError("no such thing"), "vir.train") == 3  # what cannot be written changes nothing


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
    assert said.startswith("consolidate_checkpoint: ") and said.count("\n") == 1 and "nowhere" in said
