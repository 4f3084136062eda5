"""Tensors in safetensors files: every byte as the library has it, in one file or several, and nothing half done."""

import errno
import itertools
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from support.small_disk import small_disk  # noqa: F401
from vir.errors import DataError
from vir.weights import tensor_files
from vir.weights.tensor_files import TensorEntry, existing, of_tensor, write_tensors

torch.set_num_threads(1)
HEADER = {"format": "pt", "vir": '{"classes": ["dög"]}'}
NAN = torch.tensor([0x7FC00001, -0x00400000, 0x7F800001], dtype=torch.int32).view(torch.float32)  # of several payloads
TENSORS = {
    "b.weight": torch.arange(15.0).view(3, 5), "a": torch.arange(7, dtype=torch.int64), "scalar": torch.tensor(3.5),
    "half": torch.randn(3).half(), "brain": torch.randn(5, 1).bfloat16(), "flag": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4), "nothing": torch.empty(0), "nan": NAN, "zeros": torch.tensor([0.0, -0.0]),
    "double": torch.randn(2, 1, 2).double(), "bytes": torch.arange(5, dtype=torch.uint8), "dö": torch.ones(1)}


def entries(tensors=TENSORS):
    return [of_tensor(name, tensor) for name, tensor in tensors.items()]


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()


def are_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bits(found[name]) == bits(tensor), name


def listed(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("piece", [8, 24, 1 << 24])
def test_every_byte_is_as_the_library_writes_it(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece)
    assert write_tensors(tmp_path / "x.safetensors", entries(), HEADER) == [tmp_path / "x.safetensors"]
    are_same(load_file(tmp_path / "x.safetensors"), TENSORS)
    save_file(TENSORS, tmp_path / "theirs.safetensors", HEADER)
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("x.safetensors", "theirs.safetensors"))
    heads = []
    for content in (ours, theirs):
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        heads.append((json.loads(content[8:8 + length]), content[8 + length:]))
    assert heads[0] == heads[1]  # the offsets and the numbers; two keys of a JSON may come in either order


def test_no_tensors_are_a_file_too(tmp_path):
    write_tensors(tmp_path / "x.safetensors", [], HEADER)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == [] and file.metadata() == HEADER


def test_a_view_that_is_not_contiguous_is_written_in_its_order(tmp_path):
    view = torch.arange(12.0).view(3, 4).T.requires_grad_()
    write_tensors(tmp_path / "x.safetensors", entries({"a": view}), HEADER)
    assert load_file(tmp_path / "x.safetensors")["a"].equal(view)


def test_a_tensor_is_read_in_pieces_in_order_once_to_be_written_and_once_to_be_compared(tmp_path):
    asked = []
    step = tensor_files.PIECE_BYTES // 4
    count = 2 * step + 5

    def read(start, stop):
        asked.append((start, stop))
        return torch.arange(start, stop, dtype=torch.int32)

    with tqdm(disable=True) as bar:
        moved = []
        bar.update = moved.append
        write_tensors(tmp_path / "x.safetensors", [TensorEntry("a", (count,), torch.int32, read)], HEADER, progress=bar)
    assert asked == 2 * [(0, step), (step, 2 * step), (2 * step, count)]
    assert sum(moved) == 4 * count and len(moved) == 3
    assert load_file(tmp_path / "x.safetensors")["a"].equal(torch.arange(count, dtype=torch.int32))


# ---- several files

FOUR = {name: torch.full((size,), float(size)) for name, size in (("d", 10), ("c", 3), ("b", 2), ("a", 100))}


@pytest.mark.parametrize("order", list(itertools.permutations(FOUR)), ids="".join)
@pytest.mark.parametrize("limit", [40, 53])
def test_several_files_are_those_that_hugging_face_would_make(tmp_path, order, limit):
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {name: FOUR[name] for name in order}
    write_tensors(tmp_path / "m.safetensors", entries(tensors), HEADER, max_file_bytes=limit)
    theirs = split_torch_state_dict_into_shards(tensors, filename_pattern="m{suffix}.safetensors", max_shard_size=limit)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["weight_map"] == theirs.tensor_to_filename
    assert index["metadata"]["total_size"] == theirs.metadata["total_size"] == 4 * 115


def test_several_files_are_read_by_the_index_alone(tmp_path):
    written = write_tensors(tmp_path / "m.safetensors", entries(FOUR), HEADER, max_file_bytes=53)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert [path.name for path in written] == [
        "m-00001-of-00003.safetensors", "m-00002-of-00003.safetensors", "m-00003-of-00003.safetensors",
        "m.safetensors.index.json"]
    assert listed(tmp_path) == sorted(path.name for path in written) and existing(tmp_path / "m.safetensors") == [
        written[-1], *written[:-1]]
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == HEADER
            found[name] = opened.get_tensor(name)
    are_same(found, FOUR)


@pytest.mark.parametrize("limit, sizes", [(None, [4]), (460, [4]), (459, [3, 1]), (52, [2, 1, 1]), (1, [1, 1, 1, 1])])
def test_a_file_is_as_full_as_the_limit_allows(tmp_path, limit, sizes):
    """A tensor that is larger has one of its own."""
    written = write_tensors(tmp_path / "m.safetensors", entries(FOUR), HEADER, max_file_bytes=limit)
    found = [load_file(path) for path in written if path.suffix == ".safetensors"]
    assert [len(one) for one in found] == sizes
    are_same({name: tensor for one in found for name, tensor in one.items()}, FOUR)


@pytest.mark.parametrize("before, after", list(itertools.permutations([None, 459, 52, 51], 2)))
def test_what_the_name_stood_for_before_is_gone_when_the_new_is_whole(tmp_path, before, after):
    old = {name: tensor + 1 for name, tensor in FOUR.items()}
    path = tmp_path / "m.safetensors"
    (tmp_path / "m-00001-of-2.safetensors").write_text("another's")
    (tmp_path / "other-00001-of-00002.safetensors").write_text("another's")
    write_tensors(path, entries(old), HEADER, max_file_bytes=before)
    written = write_tensors(path, entries(FOUR), HEADER, max_file_bytes=after)
    assert listed(tmp_path) == sorted(["m-00001-of-2.safetensors", "other-00001-of-00002.safetensors",
                                       *(one.name for one in written)])
    are_same({name: tensor for one in written if one.suffix == ".safetensors"
              for name, tensor in load_file(one).items()}, FOUR)


def test_all_files_are_whole_before_the_first_takes_its_name_and_the_index_is_the_last(tmp_path, monkeypatch):
    renamed, replace = [], os.replace
    written = write_tensors(tmp_path / "m.safetensors", entries(FOUR), HEADER, max_file_bytes=52)
    index = written[-1]

    def watched(source, target):
        if not renamed:
            parts = [path for path in tmp_path.iterdir() if path.name.startswith(".m-")]
            assert sorted(len(load_file(path)) for path in parts) == [1, 1, 2]
        assert not index.exists()  # that of the files before would point at some of these
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_tensors(tmp_path / "m.safetensors", entries(FOUR), HEADER, max_file_bytes=52)
    assert sorted(renamed) == sorted(written) and renamed[-1] == index


# ---- what goes wrong


def whole(tmp_path, limit):
    """Files of a writing before, and what is in the folder then."""
    path = tmp_path / "m.safetensors"
    write_tensors(path, entries(FOUR), HEADER, max_file_bytes=limit)
    return path, {one.name: one.read_bytes() for one in tmp_path.iterdir()}


@pytest.mark.parametrize("limit", [None, 52])
@pytest.mark.parametrize("at", [1, 3])
def test_a_disk_that_fills_half_way_changes_nothing(tmp_path, monkeypatch, limit, at):
    path, before = whole(tmp_path, limit)

    def full(start, stop):
        raise OSError(errno.ENOSPC, "No space left on device")

    broken = entries(FOUR)
    broken[at] = TensorEntry(broken[at].name, broken[at].shape, broken[at].dtype, full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(path, broken, HEADER, max_file_bytes=limit)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_failure_while_names_change_leaves_no_mixture_that_a_reader_would_take(tmp_path, monkeypatch, at, before):
    """Three files and their index, in the place of none, of one, and of as many."""
    path, tensors = tmp_path / "x.safetensors", {name: torch.ones(2) for name in "abc"}
    if before:
        write_tensors(path, entries({name: torch.zeros(2) for name in "abc"}), HEADER, max_file_bytes=24 // before)
    there, calls, replace = {one: (tmp_path / one).read_bytes() for one in listed(tmp_path)}, [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == at:
            raise OSError(errno.EIO, "it fails")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="it fails"):
        write_tensors(path, entries(tensors), HEADER, max_file_bytes=8)
    left = {one: (tmp_path / one).read_bytes() for one in listed(tmp_path)}
    if before < 3:
        assert left == there
    else:
        assert left.keys() == there.keys() - {"x.safetensors.index.json"}
    monkeypatch.undo()
    write_tensors(path, entries(tensors), HEADER, max_file_bytes=8)  # the next try is not disturbed
    assert len(listed(tmp_path)) == 4


def test_a_disk_with_too_little_space_is_told_before_anything_is_written(small_disk):  # noqa: F811
    path, before = whole(small_disk, None)
    big = of_tensor("a", torch.zeros(1 << 18))
    with pytest.raises(DataError, match=r"m\.safetensors needs 1\.0 MB, and 1\.0 MB are free there; free some space"):
        write_tensors(path, [big], HEADER)
    assert {one.name: one.read_bytes() for one in small_disk.iterdir()} == before


def test_a_disk_that_another_program_fills_leaves_no_temporary_file(small_disk):  # noqa: F811
    path, before = whole(small_disk, None)

    def read(start, stop):
        (small_disk / "other").write_bytes(bytes(700_000))
        return torch.zeros(stop - start)

    with pytest.raises(OSError, match="No space left"):
        write_tensors(path, [TensorEntry("a", (100_000,), torch.float32, read)], HEADER)
    (small_disk / "other").unlink()
    assert {one.name: one.read_bytes() for one in small_disk.iterdir()} == before


@pytest.mark.parametrize("limit", [None, 52])
def test_a_file_that_does_not_read_back_is_refused_with_its_name_and_the_tensors(tmp_path, monkeypatch, limit):
    path, before = whole(tmp_path, limit)
    write = tensor_files._write

    def damaging(temporary, part, head, progress):
        write(temporary, part, head, progress)
        if any(entry.name == "c" for entry in part):
            content = bytearray(temporary.read_bytes())
            begin, end = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])["c"]["data_offsets"]
            content[len(head) + end - 1] ^= 1
            temporary.write_bytes(content)

    monkeypatch.setattr(tensor_files, "_write", damaging)
    with pytest.raises(DataError, match=r"m(-00001-of-00003)?\.safetensors: the tensor c did not read back"):
        write_tensors(path, entries(FOUR), HEADER, max_file_bytes=limit)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:20],
                                    lambda content: content.replace(b'"format":"pt"', b'"format":"tp"')])
def test_a_header_that_does_not_read_back_is_refused(tmp_path, monkeypatch, damage):
    write = tensor_files._write

    def damaging(temporary, *more):
        write(temporary, *more)
        temporary.write_bytes(damage(temporary.read_bytes()))

    monkeypatch.setattr(tensor_files, "_write", damaging)
    with pytest.raises(DataError, match=r"x\.safetensors: its header .*did not read back"):
        write_tensors(tmp_path / "x.safetensors", entries(), HEADER)
    assert listed(tmp_path) == []


def test_the_sign_of_a_zero_is_compared_too(tmp_path):
    times = []

    def read(start, stop):
        times.append(1)
        return torch.zeros(1) if len(times) == 1 else -torch.zeros(1)

    with pytest.raises(DataError, match="the tensor a did not read back"):
        write_tensors(tmp_path / "x.safetensors", [TensorEntry("a", (1,), torch.float32, read)], HEADER)


@pytest.mark.parametrize("limit", [None, 52])
def test_others_may_read_the_files_as_the_umask_says(tmp_path, limit):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "m.safetensors", entries(FOUR), HEADER, max_file_bytes=limit)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}
