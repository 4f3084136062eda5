"""What a checkpoint says of itself. Damaged folders and other formats are in test_consolidate.py."""

import json
import math
import time
from dataclasses import replace

import pytest

from vir.checkpoints import info
from vir.checkpoints.info import CheckpointInfo
from vir.errors import CheckpointError
from vir.weights.spec import InputSpec, ModelSpec

INFO = CheckpointInfo(
    samples_seen=640, step=10, updates=9, world_size=2, zero_stage=3, precision="fp16", ema=True,
    loss_scaler={"cur_scale": 256.0, "cur_iter": 9}, metrics={"top1": 12.5}, config={"optim": {"betas": [0.9, 0.99]}},
    model=ModelSpec(name="test_vit", args={"num_classes": 2}, classes=("cat", "dög"), input=InputSpec(
        size=(3, 28, 32), mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)),
    data_fingerprint="f")


def folder_with(path, **contents):
    """A checkpoint of these files, described as they are."""
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    listed = {name: {"bytes": len(content), "sha256": info.sha256(path / name)} for name, content in contents.items()}
    (path / info.DESCRIPTION).write_text(replace(INFO, files=listed).to_json())
    return path


def test_what_is_written_comes_back_with_the_same_types(tmp_path):
    assert info.read_info(folder_with(tmp_path / "c", a=b"12")).files["a"]["bytes"] == 2
    assert replace(info.read_info(tmp_path / "c"), files={}) == INFO


def test_the_text_is_plain_json_with_its_format_and_sorted_files():
    fields = json.loads(replace(INFO, files={"b": {}, "a": {}}).to_json())
    assert fields["format"] == info.FORMAT and list(fields["files"]) == ["a", "b"]
    assert fields["model_input"]["size"] == [3, 28, 32] and fields["classes"] == ["cat", "dög"]


def test_a_checkpoint_from_before_there_were_teachers_had_none(tmp_path):
    folder = folder_with(tmp_path / "c")
    assert replace(info.read_info(described(tmp_path / "d", teacher="t")), files={}) == replace(INFO, teacher="t")
    fields = json.loads((folder / info.DESCRIPTION).read_text())
    assert fields.pop("teacher") == ""
    (folder / info.DESCRIPTION).write_text(json.dumps(fields))
    assert replace(info.read_info(folder), files={}) == INFO


def test_every_file_is_checked_by_one_of_the_ranks(tmp_path):
    folder = folder_with(tmp_path / "c", a=b"1", b=b"2", c=b"3")
    said = info.read_info(folder)
    for rank in range(2):
        info.verify(folder, said, rank, 2)
    (folder / "b").write_bytes(b"x")
    info.verify(folder, said, 0, 2)  # a and c
    with pytest.raises(CheckpointError, match=r"/b has changed since it was written \(sha256 differs\)"):
        info.verify(folder, said, 1, 2)
    with pytest.raises(CheckpointError, match="/b has changed"):
        info.verify(folder, said)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="gone cannot be read: No such file"):
        info.sha256(tmp_path / "gone")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 2}', '{"format": 2, "model_input": 3}'])
def test_a_description_that_is_none_is_told(tmp_path, text):
    (tmp_path / info.DESCRIPTION).write_text(text)
    with pytest.raises(CheckpointError, match="checkpoint.json cannot be read"):
        info.read_info(tmp_path)


def described(path, **changed):
    """A checkpoint whose description says something else, or lacks what is None."""
    folder = folder_with(path, a=b"12")
    fields = json.loads((folder / info.DESCRIPTION).read_text()) | changed
    (folder / info.DESCRIPTION).write_text(json.dumps({name: value for name, value in fields.items()
                                                       if value is not None}))
    return folder


WHOLE = {"bytes": 2, "sha256": "0"}


@pytest.mark.parametrize("changed, said", [
    ({"files": {"a": WHOLE | {"bytes": math.inf}}}, "files, a: bytes is inf; it must be a whole number"),
    ({"files": {"a": WHOLE | {"bytes": "2"}}}, "files, a: bytes is '2'; it must be a whole number"),
    ({"files": {"a": {"bytes": 2}}}, "files, a: it lacks fields: sha256"),
    ({"files": {"a": 2}}, "files, a: it is 2, not an object of fields"),
    ({"files": {"../a": WHOLE}}, "files is .*; it must be an object of files by their names"),
    ({"files": {"..": WHOLE}}, "files is .*; it must be an object of files by their names"),
    ({"files": {"a\0": WHOLE}}, "files is .*; it must be an object of files by their names"),
    ({"files": ["a"]}, "files is .*; it must be an object of files"),
    ({"files": None}, "it lacks fields: files"),
    ({"format": None}, "it lacks fields: format"),
    ({"step": "10"}, "step is '10'; it must be a whole number"),
    ({"samples_seen": 2**63}, "samples_seen is 9223372036854775808; it must be a whole number"),
    ({"updates": -1}, "updates is -1; it must be a whole number"),
    ({"world_size": 0}, "world_size is 0; it must be a whole number, 1 or more"),
    ({"zero_stage": True}, "zero_stage is True; it must be 0, 1, 2 or 3"),
    ({"precision": ["fp32"]}, "precision is .*; it must be one of fp32, bf16, fp16"),
    ({"ema": 1}, "ema is 1; it must be true or false"),
    ({"loss_scaler": {"cur_scale": "x"}}, "loss_scaler is .*; it must be an object of numbers"),
    ({"metrics": {"top1": "x"}}, "metrics is .*; it must be an object of numbers"),
    ({"config": []}, "config is .*; it must be an object of settings"),
    ({"model_name": 3}, "model_name is 3; it must be the name of a model"),
    ({"model_args": []}, "model_args is .*; it must be an object of arguments"),
    ({"classes": "ab"}, "classes is 'ab'; it must be a list of names"),
    ({"model_input": 3}, "model_input is 3; it must be an object of fields"),
    ({"model_input": {"cls": 3}}, "model_input: it has unknown fields: cls"),
    ({"data_fingerprint": 3}, "data_fingerprint is 3; it must be a text"),
], ids=str)
def test_a_field_that_is_not_what_it_must_be_is_told_with_its_file(tmp_path, changed, said):
    folder = described(tmp_path / "c", **changed)
    with pytest.raises(CheckpointError, match=f"^{folder / info.DESCRIPTION} cannot be read: {said}"):
        info.read_info(folder)


@pytest.mark.parametrize("text, said", [("[" * 200_000, "it is nested too deeply"), ("[]", "it is .*, not an object"),
                                        ('{"step": ' + "1" * 5000 + "}", "Exceeds the limit"), ("\xff", ".*codec")])
def test_a_text_that_no_reader_takes_is_told(tmp_path, text, said):
    (tmp_path / info.DESCRIPTION).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"^{tmp_path / info.DESCRIPTION} cannot be read: {said}"):
        info.read_info(tmp_path)


def test_a_checkpoint_of_a_run_whose_loss_is_no_number_and_of_old_is_read(tmp_path):
    image = json.loads(INFO.to_json())["model_input"]
    del image["crop_mode"]
    found = info.read_info(described(tmp_path / "c", metrics={"loss": math.nan, "ema_loss": math.inf},
                                     config={"eval": {"every_epochs": math.inf}}, model_input=image,
                                     classes=["crane", "crane"]))
    assert math.isnan(found.metrics["loss"]) and found.metrics["ema_loss"] == math.inf
    assert found.config == {"eval": {"every_epochs": math.inf}}
    assert found.model == replace(INFO.model, classes=("crane", "crane"))


def test_after_a_file_that_has_changed_no_other_is_begun(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "c", **{f"f{number}": b"1" for number in range(9)})
    said, begun = info.read_info(folder), []

    def slow(path):
        begun.append(path.name)
        if len(begun) > 1:
            time.sleep(0.5)  # in which the first is found out
        return "another"

    monkeypatch.setattr(info, "sha256", slow)
    monkeypatch.setattr(info, "cores", lambda: 1)
    with pytest.raises(CheckpointError, match="/f0 has changed"):
        info.verify(folder, said)
    assert begun in (["f0"], ["f0", "f1"])
