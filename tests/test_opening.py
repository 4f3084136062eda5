"""The same images from wherever they lie: the same keys and pixels, in the same order, in every way of reading."""

import random
import re
import shutil
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from support.http_server import HttpServer
from support.s3_server import S3Server
from vir.config import AugmentConfig, DataConfig
from vir.data.convert import Settings, convert
from vir.data.decode import BadSampleError
from vir.data.executors import Stopped
from vir.data.loader import eval_batches, train_batches
from vir.data.opening import NoIndexError, open_reader, places
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.errors import DataError, SettingsError
from vir.index import main as index_main
from vir.weights.spec import InputSpec

torch.set_num_threads(1)
CPU = torch.device("cpu")
INPUT = InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
COUNT, PER_SHARD, BATCH, STEPS = 61, 7, 8, 17  # two epochs and a bit, nine shards
NAMES = "x-{000000..000008}.tar"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """images: an image folder; whole: its shards by default; cut: nine shards of them; tars: these without an index."""
    root = tmp_path_factory.mktemp("data")
    for number in range(COUNT):
        folder = root / "images" / "train" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (16, 16 + number % 5, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.JPEG", quality=90)
    convert(root / "images", "train", root / "whole", Settings(), workers=1)
    convert(root / "images", "train", root / "cut", Settings(samples_per_shard=PER_SHARD, name="x"), workers=1)
    (root / "tars").mkdir()
    for number, path in enumerate(sorted((root / "cut" / "train").glob("*.tar"))):
        shutil.copy(path, root / "tars" / f"x-{number:06d}.tar")
    return root


def files_of(folder, prefix):
    return {f"{prefix}/{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def http(root):
    with HttpServer({**files_of(root / "cut" / "train", "/train"), **files_of(root / "tars", "/tars")}) as server:
        yield server


@pytest.fixture(scope="module")
def s3(root):
    with S3Server() as server:
        server.upload_folder(root / "cut" / "train", "train/")
        server.upload_folder(root / "tars", "tars/")
        yield server


SPECS = {
    "shards": lambda root, http, s3: str(root / "cut" / "train"),
    "tars": lambda root, http, s3: str(root / "tars"),
    "a pattern": lambda root, http, s3: str(root / "tars" / NAMES),
    "http": lambda root, http, s3: http.url("/train"),
    "http, a pattern": lambda root, http, s3: http.url(f"/tars/{NAMES}"),
    "s3": lambda root, http, s3: s3.url("train"),
    "s3, a pattern": lambda root, http, s3: s3.url(f"tars/{NAMES}"),
    "s3, a folder of tars": lambda root, http, s3: s3.url("tars/"),
}


def opened(spec, tmp, cache_bytes=None):
    cache = {} if cache_bytes is None else {"cache": str(tmp / "cache"), "cache_bytes": str(cache_bytes)}
    kept = places(DataConfig(index_dir=str(tmp / "indexes"), timeout=20, **cache))
    return open_reader(spec, kept, first=True)


def train(reader, world=1, workers=1, first=0):
    """Key, label and pixels of each position from step `first` on, put together from all ranks."""
    order, found = SampleOrder(5, reader.shard_sizes, 3, 10), {}
    for rank in range(world):
        with closing(train_batches(
                reader, order, AugmentConfig(), INPUT, seed=5, first_step=first, last_step=STEPS,
                global_batch_size=BATCH, micro_batch_size=2, rank=rank, world_size=world, workers=workers, prefetch=2,
                device=CPU)) as batches:
            for batch in batches:
                assert batch.bad == []
                for place, position in enumerate(batch.positions.tolist()):
                    key = reader.key(int(order.samples(np.array([position]))[0]))
                    found[position] = key, int(batch.labels[place]), batch.images[place].numpy().tobytes()
    assert sorted(found) == list(range(first * BATCH, STEPS * BATCH))
    return found


@pytest.fixture(scope="module")
def expected(root):
    return train(ShardReader(root / "cut" / "train"))


@pytest.mark.parametrize("kind, cache", [
    *((kind, None) for kind in SPECS), ("http", "2 shards"), ("http", "all"), ("http, a pattern", "2 shards"),
    ("s3", "2 shards"), ("s3, a pattern", "2 shards")])
def test_keys_labels_and_pixels_are_the_same_wherever_they_lie(kind, cache, root, http, s3, expected, tmp_path):
    size = (root / "tars" / "x-000000.tar").stat().st_size
    reader = opened(SPECS[kind](root, http, s3), tmp_path, {"2 shards": 2 * size + 100, "all": 10**9}.get(cache))
    draw = random.Random(f"{kind}, {cache}")
    world, workers, first = draw.choice([1, 2, 4]), draw.choice([1, 2]), draw.randrange(STEPS)
    found = train(reader, world, workers, first)
    assert found == {position: expected[position] for position in found}, (world, workers, first)
    if cache == "2 shards":
        kept = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]
        assert sum(path.stat().st_size for path in kept) <= 2 * size + 100


def test_an_image_folder_is_read_as_the_shards_made_of_it(root, tmp_path):
    found = train(opened(str(root / "images" / "train"), tmp_path), world=2, first=3)
    assert found == train(ShardReader(root / "whole" / "train"), first=3)


def test_an_evaluation_counts_the_same_images_from_a_cache(root, http, tmp_path):
    def evaluated(reader):
        options = dict(batch_size=4, rank=0, world_size=1, workers=2, device=CPU)
        with closing(eval_batches(reader, INPUT, **options)) as batches:
            return [(batch.images.numpy().tobytes(), batch.labels.tolist()) for batch in batches]

    assert evaluated(opened(http.url("/train"), tmp_path, 10**9)) == evaluated(ShardReader(root / "cut" / "train"))
    assert list((tmp_path / "cache").glob("*.tar"))


def test_an_evaluation_leaves_the_cache_to_the_training(root, http, tmp_path):
    budget = sum(path.stat().st_size for path in (root / "tars").iterdir()) + 1
    reader = opened(http.url("/train"), tmp_path, budget)
    for shard in range(len(reader.shard_sizes)):
        reader.access.download(shard)
    cached = sorted((tmp_path / "cache").glob("*.tar"))
    assert len(cached) == 9
    other = opened(http.url(f"/tars/{NAMES}"), tmp_path, budget)
    options = dict(batch_size=2, rank=0, world_size=1, workers=1, device=CPU)
    with closing(eval_batches(other, INPUT, **options)) as batches:
        assert sum(int(batch.valid.sum()) for batch in batches) == COUNT
    assert sorted((tmp_path / "cache").glob("*.tar")) == cached


def test_a_server_that_is_restarted_within_an_epoch_changes_nothing(root, expected, tmp_path):
    with HttpServer(files_of(root / "cut" / "train", "/train")) as server:
        reader = opened(server.url("/train"), tmp_path, 200_000)
        order, found = SampleOrder(5, reader.shard_sizes, 3, 10), {}
        with closing(train_batches(
                reader, order, AugmentConfig(), INPUT, seed=5, first_step=0, last_step=STEPS, global_batch_size=BATCH,
                micro_batch_size=2, rank=0, world_size=1, workers=2, prefetch=2, device=CPU)) as batches:
            for number, batch in enumerate(batches):
                if number == 9:
                    server.stop()
                    threading.Timer(1.0, server.start).start()
                for position, image in zip(batch.positions.tolist(), batch.images):
                    found[position] = image.numpy().tobytes()
    assert found == {position: pixels for position, (_, _, pixels) in expected.items()}


def test_a_server_that_stays_away_ends_the_run_and_is_named(root, tmp_path):
    with HttpServer(files_of(root / "cut" / "train", "/train")) as server:
        kept = places(DataConfig(index_dir=str(tmp_path), timeout=1.5))
        reader = open_reader(server.url("/train"), kept, first=True)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"127.0.0.1:\d+/train/x-train-00000\d.tar is on a host that takes no "
                                        r"connection, and what else was tried for 1.5 s failed.*--data.timeout"):
        train(reader)
    assert time.monotonic() - began < 30


def test_a_shard_that_changes_on_its_server_is_told_and_never_mixed(root, tmp_path):
    content = files_of(root / "tars", "/tars")
    with HttpServer(content) as server:
        reader = opened(server.url(f"/tars/{NAMES}"), tmp_path)
        one, other = "/tars/x-000003.tar", "/tars/x-000004.tar"
        server.content[one] = content[other].ljust(len(content[one]), b"\0")[:len(content[one])]
        with pytest.raises(DataError, match=f"{one} has changed on the server"):
            train(reader)


def test_a_server_without_ranges_needs_a_cache(root, expected, tmp_path):
    with HttpServer(files_of(root / "cut" / "train", "/train"), ranged=False) as server:
        with pytest.raises(SettingsError, match=r"x-train-000000.tar sends whole files alone, not parts of them: give "
                                                r"--data.cache \(vir-evaluate: --cache\) a folder"):
            opened(server.url("/train"), tmp_path)
        found = train(opened(server.url("/train"), tmp_path, 10**9), first=10)
    assert found == {position: expected[position] for position in found}


@pytest.mark.parametrize("ranged", [True, False])
def test_shards_that_a_server_gives_no_name_are_cached_by_their_checksums_alone(root, tmp_path, caplog, ranged):
    """Other bytes of the same size would be taken from the cache."""
    with HttpServer(files_of(root / "tars", "/tars"), ranged=ranged, tagged=False) as server:
        pattern = server.url(f"/tars/{NAMES}")
        if ranged:
            assert opened(pattern, tmp_path, 10**9).budget_bytes is None
            assert re.search("x-000000.tar sends neither ETag nor Last-Modified, .*: all is read in parts from the "
                             "server; to use --data.cache, make the index by vir-index --checksums", caplog.text)
        else:
            with pytest.raises(SettingsError, match="neither ETag nor Last-Modified, .*, and sends whole files alone; "
                                                    "make the index by vir-index --checksums, .* or copy the shards"):
                opened(pattern, tmp_path, 10**9)
        assert index_main([pattern, "--index-dir", str(tmp_path / "indexes"), "--checksums", "--jobs", "1"]) == 0
        before = opened(pattern, tmp_path, 10**9).access
        assert before.budget_bytes == 10**9
        for path, data in server.content.items():
            server.content[path] = data[:-1] + b"x"  # of the padding at the end
        assert index_main([pattern, "--index-dir", str(tmp_path / "indexes"), "--jobs", "1"]) == 0
        after = opened(pattern, tmp_path, 10**9).access
        assert not {entry.name for entry in before.entries} & {entry.name for entry in after.entries}


def test_other_processes_of_a_machine_take_the_index_as_the_first_has_left_it(http, tmp_path):
    kept = places(DataConfig(index_dir=str(tmp_path), timeout=20))
    first = open_reader(http.url("/train"), kept, first=True)
    http.forget()
    second = open_reader(http.url("/train"), kept, first=False)
    assert http.requests == [] and second.fingerprint == first.fingerprint


@pytest.mark.parametrize("kind", ["folder", "pattern", "urls"])
def test_a_look_at_shards_makes_no_index_and_reads_the_one_that_is_there(kind, root, http, tmp_path):
    tars = tmp_path / "tars"
    shutil.copytree(root / "tars", tars, ignore=shutil.ignore_patterns("manifest.json", "index.npy", ".*"))
    spec = {"folder": str(tars), "pattern": f"{tars}/{NAMES}", "urls": http.url(f"/tars/{NAMES}")}[kind]
    makes = places(DataConfig(train=spec, index_dir=str(tmp_path / "indexes")))
    looks = replace(makes, makes_indexes=False)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NoIndexError, match="have no index yet; make it by vir-index first"):
        open_reader(spec, looks, first=True)
    assert sorted(tmp_path.rglob("*")) == before
    made = open_reader(spec, makes, first=True).fingerprint
    before = sorted(tmp_path.rglob("*"))
    assert open_reader(spec, looks, first=True).fingerprint == made
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("patience", [0, 1])
def test_a_stop_request_ends_the_questions_about_a_folder(http, tmp_path, patience):
    """Whether it has a manifest, and then what it holds, which this server does not tell."""
    asked = iter(range(100))
    kept = places(DataConfig(index_dir=str(tmp_path), timeout=20), lambda: next(asked) >= patience)
    with pytest.raises(Stopped):
        open_reader(http.url("/tars"), kept, first=True)


@pytest.mark.parametrize("spec, error, said", [
    ("{root}/images", DataError, "images holds 'train', in which the images or shards lie; give one .*, as .*/"),
    ("{root}/cut", DataError, "cut holds 'train', in which"),
    ("{root}/nothing", DataError, "no such folder: .*nothing; convert first"),
    ("{root}/tars/x-{{000000..000011}}.tar", DataError, "3 of the 12 shards that .* names are missing: .*x-000009.tar"),
    ("{root}/cut/train::http://127.0.0.1:9/x.tar", SettingsError, "all remote, or all local"),
    ("{root}/cut/train::{root}/tars", SettingsError, "where several are named each is a .tar"),
    ("pipe:cat {root}/tars/x-000000.tar", SettingsError, "asks to run a command, which is refused"),
    ("carrier://pigeon/x.tar", SettingsError, "carrier://"),
])
def test_what_cannot_be_opened_is_refused(root, tmp_path, spec, error, said):
    with pytest.raises(error, match=said):
        opened(spec.format(root=root), tmp_path)


def test_a_download_that_is_not_what_the_manifest_says_is_never_read(root, expected, tmp_path):
    """Of the same size, with the headers of the others: its samples are bad, one by one, and nothing is kept."""
    content = files_of(root / "cut" / "train", "/train")
    name = "/train/x-train-000003.tar"
    spoilt = bytearray(content[name])
    spoilt[1000] ^= 1  # within the first image
    with HttpServer({**content, name: bytes(spoilt)}) as server:
        reader = opened(server.url("/train"), tmp_path, 10**9)
        first = int(np.flatnonzero(reader.shard_bytes)[0]) + sum(reader.shard_sizes[:3])
        reader.access.download(0)
        with pytest.raises(DataError, match="x-train-000003.tar has the SHA-256 .*, the manifest says"):
            reader.access.download(3)
        with pytest.raises(BadSampleError, match="wrong checksum, .*x-train-000003.tar is damaged"):
            reader.read(first)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_tars_from_elsewhere_that_have_changed_name_the_command_that_takes_them_in(root, tmp_path, caplog):
    folder = shutil.copytree(root / "tars", tmp_path / "tars")
    opened(str(folder), tmp_path)
    shutil.copy(folder / "x-000000.tar", folder / "y.tar")
    assert len(opened(str(folder), tmp_path)) == COUNT
    assert f"holds tars that are not in its index, and are not read: 'y.tar'; vir-index {folder} takes" in caplog.text
    with open(folder / "x-000001.tar", "ab") as file:
        file.write(bytes(10240))
    with pytest.raises(DataError, match=f"x-000001.tar has .* bytes, .*make the index anew: vir-index {folder}"):
        opened(str(folder), tmp_path)


def test_a_url_is_no_folder_of_this_machine(tmp_path):
    for name in ("cache", "index_dir"):
        with pytest.raises(SettingsError, match=rf"--data.{name} s3://\*\*\*@b/x is a URL; give a folder"):
            places(DataConfig(train="x", **{name: "s3://me:geheim@b/x"}))
