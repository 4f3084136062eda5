"""Reading by number: the right bytes, and every kind of damage seen."""

import multiprocessing
import os
import pickle
import sys
import threading
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from support.manifests import name_index
from vir import files
from vir.data import access
from vir.data import reader as reader_module
from vir.data.access import LocalShards
from vir.data.decode import BadSampleError, decode_image, inspect_image
from vir.data.reader import ShardReader
from vir.data.shards import ShardSample, read_index, read_manifest, write_shard, write_split
from vir.errors import DataError

LABELS = [0, 0, 0, 2, 1, 0, 0, 1]  # three shards of 4, 3 and 1


def encode(image, kind="JPEG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(height=24, width=32, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [encode(picture(seed=number)) for number in range(len(LABELS))]


@pytest.fixture()
def folder(tmp_path):
    samples = [ShardSample(f"k_{number}", data, "jpg", 32, 24, label, f"{number}.jpg")
               for number, (data, label) in enumerate(zip(IMAGES, LABELS))]
    parts = [samples[:4], samples[4:7], samples[7:]]
    shards = [write_shard(tmp_path / f"s-{number}.tar", part) for number, part in enumerate(parts)]
    write_split(tmp_path, shards, name="s", split="train", classes=["a", "b", "c"], seed=0, samples_per_shard=4,
                skipped=[])
    return tmp_path


@pytest.fixture()
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "RETRY_WAITS_S", (0, 0, 0))


def test_reads_every_sample(folder):
    reader = ShardReader(folder)
    assert len(reader) == 8 and reader.shard_sizes == (4, 3, 1) and reader.classes == ("a", "b", "c")
    assert reader.labels.tolist() == LABELS and not reader.labels.flags.writeable
    assert [reader.read(i) for i in range(8)] == IMAGES
    assert reader.key(5) == "k_5"
    assert reader.where(5) == f"s-1.tar:k_5@{read_index(folder)['offset'][5]}"


def test_substitutes_prefer_class_and_shard_and_never_repeat(folder):
    reader = ShardReader(folder)
    assert list(reader.substitutes(1)) == [2, 0, 3, 4, 5, 6, 7]
    assert list(reader.substitutes(3)) == [4, 5, 6, 7, 0, 1, 2]
    assert list(reader.substitutes(5)) == [6, 7, 0, 1, 2, 3, 4]
    assert list(reader.substitutes(6)) == [5, 7, 0, 1, 2, 3, 4]
    assert list(reader.substitutes(7)) == [0, 1, 2, 3, 4, 5, 6]


def test_descriptors_are_bounded_and_closed(folder, monkeypatch):
    monkeypatch.setattr(access, "most_open", lambda: 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(folder)
    opened = len(os.listdir("/proc/self/fd"))  # the memory map may hold one
    for i in [0, 4, 7, 0, 4, 7]:
        assert reader.read(i) == IMAGES[i]
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_a_reader(folder, monkeypatch):
    monkeypatch.setattr(access, "most_open", lambda: 1)  # each read closes what another thread may be reading
    reader, wrong = ShardReader(folder), []

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 8, 2000):
            try:
                if reader.read(i) != IMAGES[i]:
                    wrong.append(i)
            except Exception as error:  # pytest would only warn of an error in a thread
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_many_threads_read_while_one_meets_failures(tmp_path, monkeypatch, no_waiting):
    """Each read reads once, the right bytes: retries would hide a descriptor that was closed in use."""
    images = [bytes([number]) * (500 + number) for number in range(40)]
    samples = [ShardSample(f"k_{number}", data, "jpg", 32, 24, 0, f"{number}.jpg")
               for number, data in enumerate(images)]
    shards = [write_shard(tmp_path / f"s-{number}.tar", samples[4 * number:4 * number + 4]) for number in range(10)]
    write_split(tmp_path, shards, name="s", split="train", classes=["a"], seed=0, samples_per_shard=4, skipped=[])
    monkeypatch.setattr(access, "most_open", lambda: 3)
    reader = ShardReader(tmp_path)
    serially = [reader.read(i) for i in range(40)]
    assert serially == images
    pread, wrong, met = os.pread, [], []

    def flaky(*args):
        if threading.current_thread().name == "flaky" and len(met) % 2 == 0:  # then read_with_retries clears the cache
            met.append("failure")
            raise OSError(5, "Input/output error")
        if threading.current_thread().name == "flaky":
            met.append("success")
        try:
            return pread(*args)
        except OSError as error:
            wrong.append(error)
            raise

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 40, 1000):
            try:
                if reader.read(i) != serially[i]:
                    wrong.append(i)
            except Exception as error:  # pytest would only warn of an error in a thread
                wrong.append(error)

    monkeypatch.setattr(os, "pread", flaky)
    threads = [threading.Thread(target=work, args=(seed,), name="flaky" if seed == 0 else None) for seed in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and met == ["failure", "success"] * 1000


def test_pickles_and_forks(folder):
    reader = ShardReader(folder)
    reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.read(i) for i in range(8)] == IMAGES and copy.fingerprint == reader.fingerprint
    assert len(pickle.dumps(reader)) < 2000  # the index stays on disk

    def check():
        os._exit(0 if [reader.read(i) for i in range(8)] == IMAGES else 1)

    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join()
    assert child.exitcode == 0 and reader.read(7) == IMAGES[7]


def edit_index(edit):
    """Changes the index together with its hash in the manifest, as a converter with a defect would."""
    def damage(folder):
        index = edit(read_index(folder).copy())
        np.save(folder / "index.npy", index)
        name_index(folder)
    return damage


def setting(field, row, value):
    def edit(index):
        index[field][row] = value
        return index
    return edit_index(edit)


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "s-1.tar").unlink(), "cannot open shard .*s-1.tar: No such file"),
    (lambda folder: os.truncate(folder / "s-1.tar", 5120), r"s-1.tar has 5120 bytes, the manifest says \d+0;"),
    (lambda folder: (folder / "index.npy").write_bytes(
        (folder / "index.npy").read_bytes()[:-1] + b"?"), "is not the index that the manifest names"),
    (edit_index(lambda index: index[:-1]), "index.npy has 7 samples, the manifest says 8"),
    (setting("shard", 4, 0), "disagree on the shards' sample counts"),
    (setting("label", 3, 3), "has labels 0..3, the manifest lists 3 classes"),
    (setting("label", 3, -1), "has labels -1..1"),
    (setting("offset", 7, 1 << 40), "samples beyond the end of their shard"),
    (setting("offset", 0, -1), "samples beyond the end of their shard"),
    (setting("offset", 0, (1 << 63) - 1), "samples beyond the end of their shard"),
    (setting("size", 0, (1 << 63) - 1), "samples beyond the end of their shard"),
    (setting("size", 0, -1), "samples beyond the end of their shard"),
    (setting("shard", 0, -1), "disagree on the shards' sample counts"),
    (lambda folder: ((folder / "s-1.tar").unlink(), os.mkfifo(folder / "s-1.tar")),
     "cannot open shard .*s-1.tar: it is no regular file"),
    (lambda folder: ((folder / "s-1.tar").unlink(), (folder / "s-1.tar").symlink_to("/dev/zero")),
     "cannot open shard .*s-1.tar: it is no regular file"),
])
def test_damage_is_seen_at_opening(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        ShardReader(folder)


def test_a_shard_that_became_a_pipe_is_refused_without_waiting(folder, no_waiting):
    reader = ShardReader(folder, check=False)
    (folder / "s-1.tar").unlink()
    os.mkfifo(folder / "s-1.tar")
    with pytest.raises(DataError, match="cannot read s-1.tar:k_5@.*it is no regular file"):
        reader.read(5)


def test_a_key_that_is_no_text_has_a_sentence(folder):
    setting("key", 5, b"\xff\xfe")(folder)
    reader = ShardReader(folder)
    with pytest.raises(DataError, match=r"index.npy: the key of sample 5, b'\\xff\\xfe', is not UTF-8; copy the split"):
        reader.key(5)
    assert reader.where(5).startswith(r"s-1.tar:\xff\xfe@") and reader.read(5) == IMAGES[5]


def test_shards_are_checked_from_one_listing_and_only_where_asked(folder, monkeypatch):
    listings, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listings.append(path) or scandir(path))
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **kwargs: asked.append(str(path)) or stat(path, *args,
                                                                                                  **kwargs))
    reader = ShardReader(folder)
    pickle.loads(pickle.dumps(reader))
    assert listings == [folder] and not any(path.endswith(".tar") for path in asked)
    os.truncate(folder / "s-1.tar", 5120)
    unchecked = ShardReader(folder, check=False)
    assert listings == [folder] and unchecked.read(0) == IMAGES[0]
    with pytest.raises(DataError, match="s-1.tar has 5120 bytes"):
        ShardReader(folder)


def test_a_shard_that_is_a_link_is_followed(folder):
    (folder / "s-1.tar").rename(folder / "elsewhere")
    (folder / "s-1.tar").symlink_to("elsewhere")
    assert ShardReader(folder).read(5) == IMAGES[5]
    (folder / "elsewhere").unlink()
    with pytest.raises(DataError, match="cannot open shard .*s-1.tar: No such file"):
        ShardReader(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(path):  # not by its mode: root reads everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"cannot list {folder}: Permission denied; make the folder readable"):
        ShardReader(folder)


def test_a_flipped_byte_is_a_bad_sample(folder):
    index = read_index(folder)
    with open(folder / "s-1.tar", "r+b") as file:
        file.seek(index["offset"][5] + 100)
        file.write(bytes([IMAGES[5][100] ^ 1]))
    reader = ShardReader(folder)
    with pytest.raises(BadSampleError, match="wrong checksum, .*s-1.tar is damaged"):
        reader.read(5)
    assert reader.read(6) == IMAGES[6]


def test_where_a_shard_has_no_sha256_its_images_have_no_checksum(folder):
    """As shards that were indexed without reading them: s-1.tar is of that kind, the others are not."""
    index, manifest = read_index(folder).copy(), read_manifest(folder)
    index["crc32"][4:7] = 0
    shards = [(replace(info, sha256=None) if number == 1 else info, index[index["shard"] == number])
              for number, info in enumerate(manifest.shards)]
    write_split(folder, shards, name="s", split="train", classes=["a", "b", "c"], seed=0, samples_per_shard=4)
    damaged = bytes([IMAGES[5][100] ^ 1])
    for shard, sample in (("s-1.tar", 5), ("s-0.tar", 2)):
        with open(folder / shard, "r+b") as file:
            file.seek(index["offset"][sample] + 100)
            file.write(damaged)
    reader = ShardReader(folder)
    assert reader.read(5) == IMAGES[5][:100] + damaged + IMAGES[5][101:] and reader.read(6) == IMAGES[6]
    with pytest.raises(BadSampleError, match="wrong checksum"):
        reader.read(2)
    assert reader.fingerprint != manifest.fingerprint
    os.truncate(folder / "s-1.tar", 5120)
    with pytest.raises(DataError, match="s-1.tar has 5120 bytes"):
        ShardReader(folder)


def test_a_shard_cut_while_open_is_an_io_error(folder, no_waiting):
    reader = ShardReader(folder)
    reader.read(4)
    os.truncate(folder / "s-1.tar", int(read_index(folder)["offset"][5]) + 10)
    with pytest.raises(DataError, match="s-1.tar:k_5@.*ends after 10 of .* bytes.* after 4 attempts") as caught:
        reader.read(5)
    assert not isinstance(caught.value, BadSampleError)


def test_a_passing_io_error_is_retried(folder, no_waiting, monkeypatch):
    reader, failures = ShardReader(folder), [5, 5, 5]
    pread = os.pread

    def flaky(*args):
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return pread(*args)

    monkeypatch.setattr(os, "pread", flaky)
    assert reader.read(0) == IMAGES[0] and not failures
    failures[:] = [5] * 4
    with pytest.raises(DataError, match="cannot read s-0.tar:k_0@.*Input/output error, after 4 attempts"):
        reader.read(0)


def test_a_read_in_pieces_is_put_together(folder, monkeypatch):
    reader, pread = ShardReader(folder), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 100), offset))
    assert reader.read(3) == IMAGES[3]


# ---- decode.py

def png_header(width, height):
    """A whole PNG of 1 x 1 that says it were larger, with the right checksum."""
    import struct
    import zlib
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = encode(Image.new("L", (1, 1)), "PNG")
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


JPEG = encode(picture(200, 300), quality=95)
BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "neither JPEG, PNG nor WebP: it begins with b'<html>404"),
    "gif": (encode(picture(), "GIF"), "neither JPEG"),
    "head only": (JPEG[:20], "broken|decode"),
    "zeros": (JPEG[:3] + bytes(5000), "broken"),
    "half a jpeg": (JPEG[:len(JPEG) // 2], "does not decode: .*truncated"),
    "jpeg without its last marker": (JPEG[:-2], "truncated"),
    "half a png": (encode(picture(200, 300), "PNG")[:9000], "does not decode"),
    "half a webp": (encode(picture(200, 300), "WEBP")[:9000], "broken|decode"),
    "bomb": (png_header(20000, 20000), "20000 x 20000 pixels, more than 178,956,970; .*decompression bomb"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(name):
    data, message = BAD[name]
    with pytest.raises(BadSampleError, match=message):
        inspect_image(data)
    with pytest.raises(BadSampleError, match=message):
        decode_image(data)


@pytest.mark.parametrize("kind, extension", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_good_images_pass_with_their_kind_and_size(kind, extension):
    data = encode(picture(20, 30), kind)
    for tail in (b"", bytes(7), b"tail"):
        assert inspect_image(data + tail) == (extension, 30, 20)
    assert decode_image(data).size == (30, 20)


def test_a_zero_filled_tail_is_found():
    """Half of a file that was allocated in full: libjpeg decodes the zeros to grey without a word."""
    with pytest.raises(BadSampleError, match="truncated"):
        inspect_image(JPEG[:len(JPEG) // 2] + bytes(len(JPEG) // 2))
    webp = BytesIO()
    Image.effect_noise((256, 256), 60).convert("RGB").save(webp, "WEBP")
    webp = webp.getvalue()
    with pytest.raises(BadSampleError):
        inspect_image(webp[:len(webp) // 2] + bytes(len(webp) // 2))


@pytest.mark.parametrize("mode, kind, value, rgb", [
    ("L", "PNG", 100, (100, 100, 100)),
    ("1", "PNG", 1, (255, 255, 255)),
    ("LA", "PNG", (100, 7), (100, 100, 100)),
    ("RGBA", "PNG", (10, 20, 30, 0), (10, 20, 30)),
    ("RGBA", "WEBP", (10, 20, 30, 255), (10, 20, 30)),
    ("I;16", "PNG", 0x6480, (0x64, 0x64, 0x64)),
    ("CMYK", "JPEG", (0, 255, 255, 0), (254, 0, 0)),
])
def test_every_mode_becomes_rgb(mode, kind, value, rgb):
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(encode(Image.new(mode, (16, 16), value), kind, **options))
    assert image.mode == "RGB" and image.size == (16, 16)
    assert np.abs(np.asarray(image).astype(int) - rgb).max() <= 1


@pytest.mark.filterwarnings("error")
def test_palettes_become_their_colours():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    for options in ({}, {"transparency": 1}, {"transparency": b"\x00\x80"}):
        assert decode_image(encode(image, "PNG", **options)).getpixel((0, 0)) == (200, 100, 50)


# ---- what the system has in its memory


def test_what_is_at_hand_is_the_file_or_nothing(folder, monkeypatch):
    reader, preadv = ShardReader(folder), os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, into, offset, flags: preadv(number, into, offset))
    assert [reader.read_at_hand(i) for i in range(len(IMAGES))] == IMAGES

    for found in (OSError(95, "Operation not supported"), BlockingIOError(11, "not yet"), 5):
        def part(*arguments, found=found):
            if isinstance(found, OSError):
                raise found
            return found

        monkeypatch.setattr(os, "preadv", part)
        assert reader.read_at_hand(0) is None and reader.read(0) == IMAGES[0]


def test_what_is_at_hand_and_damaged_is_read_again(folder, monkeypatch):
    """From the disk, which may have the right bytes."""
    preadv = os.preadv

    def damaged(number, into, offset, flags):
        count = preadv(number, into, offset)
        into[0][3] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", damaged)
    reader = ShardReader(folder)
    assert reader.read_at_hand(2) is None and reader.read(2) == IMAGES[2]


def test_a_checksum_is_computed_once(folder, monkeypatch):
    import zlib
    crc32, seen = zlib.crc32, []
    monkeypatch.setattr(reader_module.zlib, "crc32", lambda data: (seen.append(len(data)), crc32(data))[1])
    ShardReader(folder).read(1)
    assert seen == [len(IMAGES[1])]


# ---- parts that are read together


class Counted(LocalShards):
    """Reads that are joined, and counted."""

    joins = 1 << 20

    def __init__(self, paths):
        super().__init__(paths)
        self.reads = []

    def read(self, shard, offset, size):
        self.reads.append((shard, offset, size))
        return super().read(shard, offset, size)


@pytest.fixture
def joined(folder):
    return ShardReader(folder, Counted([folder / f"s-{number}.tar" for number in range(3)]))


def test_neighbours_are_one_read_and_each_gets_its_bytes(joined):
    groups = joined.together([6, 3, 1, 0, 7, 5, 1])
    assert groups == [[0, 1, 3], [5, 6], [7]]
    assert [joined.read_group(group) for group in groups] == [[IMAGES[i] for i in group] for group in groups]
    assert [shard for shard, _, _ in joined.access.reads] == [0, 1, 2]


def test_a_read_takes_no_more_at_once_than_it_may(joined, monkeypatch):
    monkeypatch.setattr(reader_module, "_MOST_AT_ONCE", len(IMAGES[0]) + len(IMAGES[1]) + 3000)
    assert joined.together([0, 1, 2, 3]) == [[0, 1], [2, 3]]
    joined.access.joins = 1
    assert joined.together([0, 1, 2, 3]) == [[0], [1], [2], [3]]


def test_one_damaged_sample_of_several_is_bad_alone(joined, folder):
    with open(folder / "s-0.tar", "r+b") as file:
        file.seek(read_index(folder)["offset"][1] + 100)
        file.write(bytes([IMAGES[1][100] ^ 1]))
    first, damaged, last = joined.read_group([0, 1, 2])
    assert (first, last) == (IMAGES[0], IMAGES[2]) and isinstance(damaged, BadSampleError)


def test_what_a_server_has_refused_for_several_is_not_asked_for_each(joined):
    def refuse(shard, offset, size):
        joined.access.reads.append(shard)
        raise DataError("refused")

    joined.access.read = refuse
    assert [str(error) for error in joined.read_group([0, 1, 2])] == ["refused"] * 3 and joined.access.reads == [0]


def test_samples_of_a_disk_that_fails_once_are_read_again_one_by_one(joined, no_waiting):
    reads = iter([OSError(5, "failed")])
    read = joined.access.read

    def failing(shard, offset, size):
        for error in reads:
            raise error
        return read(shard, offset, size)

    joined.access.read = failing
    assert joined.read_group([0, 1, 2]) == IMAGES[:3]
