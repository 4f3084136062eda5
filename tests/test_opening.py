"""The same images from wherever they lie: the same keys and pixels, in the same order, in every way of reading."""

import random
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from support.http_server import HttpServer, Lie
from support.s3_server import S3Server
from vir.config import AugmentConfig, DataConfig
from vir.data.convert import Settings, convert
from vir.data.loader import eval_batches, train_batches
from vir.data.opening import open_reader, places
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.shards import INDEX, MANIFEST
from vir.errors import DataError, SettingsError
from vir.models.spec import InputSpec

torch.set_num_threads(1)
CPU = torch.device("cpu")
INPUT = InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
COUNT, PER_SHARD, BATCH, STEPS = 61, 7, 8, 17  # two epochs and a bit, nine shards
NAMES = "x-{000000..000008}.tar"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """images: an image folder; whole: its shards as vir-convert makes them; train: in nine shards; tars: these alone."""
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
    (kind, cache) for kind in SPECS for cache in ([None, "2 shards", "all"] if kind[0] in "hs" and kind != "shards"
                                                  else [None])])
def test_keys_labels_and_pixels_are_the_same_wherever_they_lie(kind, cache, root, http, s3, expected, tmp_path):
    size = (root / "tars" / "x-000000.tar").stat().st_size
    reader = opened(SPECS[kind](root, http, s3), tmp_path, {"2 shards": 2 * size + 100, "all": 10**9}.get(cache))
    draw = random.Random(f"{kind}, {cache}")
    for _ in range(2):
        world, workers, first = draw.choice([1, 2, 4]), draw.choice([1, 2, 3]), draw.randrange(STEPS)
        found = train(reader, world, workers, first)
        assert found == {position: expected[position] for position in found}, (world, workers, first)
    if cache == "2 shards":
        kept = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]
        assert sum(path.stat().st_size for path in kept) <= 2 * size + 100
