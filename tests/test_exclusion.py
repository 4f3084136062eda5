"""Samples that are left out: which ones come in their places, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import INPUT, OFF, SEED, damaged, reader, shards  # noqa: F401 (fixtures)

from vir.config import DataConfig, TrainConfig
from vir.data.exclusion import NOTHING, exclude, read_exclusion
from vir.data.explanation import explain_step
from vir.data.loader import train_batches
from vir.data.opening import open_reader, places
from vir.data.order import SampleOrder
from vir.errors import SettingsError


@pytest.fixture()
def keys_file(tmp_path):
    def write(text):
        (tmp_path / "keys.txt").write_bytes(text.encode())
        return str(tmp_path / "keys.txt")
    return write


@pytest.mark.parametrize("excluded", [[0], [3, 4], [0, 2, 4], [1, 3], [5, 6, 7, 8, 9], list(range(12)), [12]])
def test_a_place_goes_to_the_first_substitute_that_is_left(reader, excluded):  # noqa: F811
    expected = [next(other for other in reader.substitutes(i) if other not in excluded) for i in excluded]
    found = exclude(np.array(excluded), reader)
    assert found.substitutes.tolist() == expected and [found.holds(i) for i in range(13)] == [
        i in excluded for i in range(13)]


def test_excluded_samples_never_come_and_all_others_keep_their_places(reader):  # noqa: F811
    exclusion = exclude(np.array([2, 3, 7]), reader)
    plain = SampleOrder(SEED, reader.shard_sizes, 3, 4)
    order = SampleOrder(SEED, reader.shard_sizes, 3, 4, exclusion)
    positions = np.arange(5 * 13)
    before, after = plain.samples(positions), order.samples(positions)
    is_other = ~np.isin(before, [2, 3, 7])
    assert not set(after) & {2, 3, 7} and (before[is_other] == after[is_other]).all()
    assert (order.before_exclusion(positions) == before).all()
    assert (order.global_batch(8, 4) == plain.global_batch(8, 4)).all()


def test_a_damaged_sample_is_not_replaced_by_an_excluded_one(reader, damaged):  # noqa: F811
    bad = 0
    first, second, *_ = reader.substitutes(bad)
    other = damaged("train", [bad])
    order = SampleOrder(SEED, other.shard_sizes, 3, 4, exclude(np.array([first]), other))
    served = {}
    for batch in train_batches(other, order, OFF, INPUT, seed=SEED, first_step=0, last_step=7, global_batch_size=4,
                               micro_batch_size=2, rank=0, world_size=1, workers=1, prefetch=2,
                               device=torch.device("cpu")):
        served |= zip(batch.positions.tolist(), batch.images)
    pixels = {int(sample): served[position] for position, sample in enumerate(order.samples(np.arange(28)))}
    assert torch.equal(pixels[bad], pixels[second]) and first not in pixels


def test_damaged_and_excluded_samples_are_told_where_another_one_takes_their_place(reader, damaged):  # noqa: F811
    bad = 0
    first, second, *_ = reader.substitutes(bad)
    other = damaged("train", [bad, second])
    plain = SampleOrder(SEED, other.shard_sizes, 3, 4)
    order = SampleOrder(SEED, other.shard_sizes, 3, 4, exclude(np.array([first]), other))
    train = TrainConfig(seed=SEED, global_batch_size=26, micro_batch_size=26)
    (batch, samples), = explain_step(other, order, OFF, INPUT, train, 0, [0], 1)
    assert {bad, first, second} < set(plain.samples(np.arange(13)))
    for sample in samples:
        position = np.array([sample.position])
        meant, served = int(plain.samples(position)[0]), int(order.samples(position)[0])
        tried = [served]
        left = (number for number in other.substitutes(served) if number != first)
        while tried[-1] in (bad, second):
            tried.append(next(left))
        tried = [meant] * (meant == first) + tried
        assert [*sample.instead_of, sample.key] == list(map(other.key, tried))
        assert batch.samples[sample.place] == tried[-1]


def test_the_file_has_keys_and_comments(reader, keys_file):  # noqa: F811
    a, b = reader.key(4), reader.key(11)
    found = read_exclusion(keys_file(f"# found by vir-explain\n\n{b}  # two labels\n  {a}\n{a}\n"), reader)
    assert found.samples.tolist() == [4, 11]
    assert read_exclusion("", reader) is NOTHING and not NOTHING.holds(0)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A folder of images whose names have what a file of keys has a meaning for."""
    folder = tmp_path_factory.mktemp("named")
    for number, name in enumerate(("photo", "photo #2", "photo #2 #3", "#4", "line\u2028end", "tab", "other")):
        (folder / "c").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "c" / f"{name}.png")
    return open_reader(str(folder), places(DataConfig(train="x")), first=True)


@pytest.mark.parametrize("text, names", [
    ("c_photo", ["photo"]), ("c_photo #2", ["photo #2"]), ("c_photo #5", ["photo"]), ("c_photo #2 #5", ["photo #2"]),
    ("c_photo #2 #3\t# both #5", ["photo #2 #3"]), ("c_tab\t# said\r\n#c_photo", ["tab"]),
    ("c_line\u2028end\nc_other #\n", ["line\u2028end", "other"])])
def test_a_comment_is_told_from_a_key_with_the_same_signs(named, keys_file, text, names):
    found = read_exclusion(keys_file(text), named)
    assert sorted(map(named.key, found.samples)) == sorted(f"c_{name}" for name in names)


def test_the_fingerprint_is_of_the_data_and_of_what_is_left_out(reader):  # noqa: F811
    one, two = exclude(np.array([1]), reader), exclude(np.array([2]), reader)
    said = {exclusion.fingerprint(data) for exclusion in (NOTHING, one, two) for data in ("a", "b")}
    assert len(said) == 6 and NOTHING.fingerprint("a") == "a"


@pytest.mark.parametrize("text, message", [
    ("# none\n\n", "names no sample; write the key of one into each line"),
    ("no/such\nnor-this\n", "names 2 of 2 keys that .* has not: 'no/such', 'nor-this'; .* such as "),
    (None, "names all 13 samples of .*; leave some to train on")])
def test_files_that_are_refused(reader, keys_file, text, message):  # noqa: F811
    path = keys_file("\n".join(map(reader.key, range(13))) if text is None else text)
    with pytest.raises(SettingsError, match=f"--data.exclude {path} {message}"):
        read_exclusion(path, reader)


def test_a_file_that_cannot_be_read_is_refused(reader, tmp_path):  # noqa: F811
    (tmp_path / "picture").write_bytes(b"\xff\xd8")
    for path in (tmp_path / "none.txt", tmp_path / "picture"):
        with pytest.raises(SettingsError, match=f"--data.exclude {path} cannot be read: "):
            read_exclusion(str(path), reader)
