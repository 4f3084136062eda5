"""What a checkpoint says of itself. Damaged folders and other formats are in test_consolidate.py."""

import json
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
