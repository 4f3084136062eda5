"""tools/benchmark_loader.py on tiny sizes: each loader has its row and gives whole samples, ratios follow."""

import importlib
import io
import json
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from support.launchers import ROOT
from vir.benchmarks import feeds, loader, order, photographs
from vir.benchmarks.conversion import make_images
from vir.benchmarks.feeds import Rate
from vir.benchmarks.loader import AUGMENTATIONS, Row, cells_of_pixels
from vir.data import convert, jpeg
from vir.data import order as orders
from vir.data.folder_reader import FolderReader
from vir.data.reader import ShardReader
from vir.data.sidecars import write_sidecars


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_loader").main


@pytest.fixture
def run(main, tmp_path, monkeypatch, capsys):
    """What the command prints, and its file; it leaves nothing else behind."""
    monkeypatch.setattr(feeds, "BATCH", 4)

    def run(*args, left=()):
        args = [*args, "--rounds", "1", "--folder", tmp_path, "--json", tmp_path / "x.json"]
        assert main([str(word) for word in args]) == 0
        assert sorted(os.listdir(tmp_path)) == [*left, "x.json"]
        return capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())

    return run


TINY = ("--images", "40", "--image_bytes", "9000")


def test_whole_samples_by_augmentation_and_loader(run, tmp_path):
    printed, content = run(*TINY, "--workers", "2", "--plot", tmp_path / "p.png", left=["p.png"])
    decoders = [f"ours, {name}" for name in jpeg.DECODERS[1:jpeg.DECODERS.index(jpeg.decoder()) + 1]]
    names = [*decoders, "timm's wds reader", "webdataset, timm's transforms", "ImageFolder, timm's transforms"]
    assert [row[:3] for row in content["rows"]] == [[kind, "2", name] for kind in AUGMENTATIONS for name in names]
    walls, cpus = zip(*content["rounds"][0])
    assert content["rows"][0][3].startswith(f"{walls[0]:,.0f} (") and content["rows"][0][4] == f"{cpus[0]:,.0f}"
    assert content["rows"][0][5] == f"{walls[0] / max(walls[len(decoders):len(names)]):.2f}"
    assert content["title"].startswith("40 JPEGs of 500 x 375 pixels and 9 KB, of which Pillow decodes one in ")
    assert content["title"] in printed and f"| {' | '.join(content['rows'][-1])} |" in printed
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_ratios_are_those_of_single_rounds():
    rows = [Row(kind, workers, name, None, name == "ours")
            for kind in ("a", "b") for workers in (1, 2) for name in ("ours", "slow", "quick")]
    first = [Rate(*pair) for pair in ((30, 20), (5, 4), (10, 10), (66, 22), (9, 4), (20, 11))]
    other = [Rate(*pair) for pair in ((10, 10), (20, 2), (10, 5), (15, 10), (50, 4), (10, 8))]
    cells = cells_of_pixels(rows, [first + other, first + other, other + other])
    assert cells[0] == ["a", "1", "ours", "30 (10–30)", "20", "3.00", "2.00", "1.00"]
    assert cells[1][5:] == ["0.50", "0.40", "1.00"]
    assert cells[3] == ["a", "2", "ours", "66 (15–66)", "22", "3.30", "2.00", "2.20"]
    assert cells[6] == ["b", "1", "ours", "10 (10–10)", "10", "0.50", "2.00", "1.00"]
    assert cells_of_pixels(rows[3:6], [first[3:]])[0][-1] == ""  # nobody measured one worker


def test_reading_alone_by_the_cpu_second(run, monkeypatch):
    monkeypatch.setattr(loader, "_READ", 100)
    _, content = run("reading", *TINY, "--workers", "1,2")
    names = ["ours, shards, crc32 checked", "ours, folder", "webdataset", "webdataset, shuffled", "ImageFolder, bytes"]
    assert [row[:2] for row in content["rows"]] == [[count, name] for count in "12" for name in names]
    (of_ours, _, of_webdataset, *_), = [rates[5:] for rates in content["rounds"]]
    assert content["rows"][5][4] == f"{of_ours[1] / of_webdataset[1]:.2f}" and content["rows"][2][4] == "1.00"


def test_loaders_by_the_latency_of_a_read(run):
    printed, content = run("latency", *TINY, "--workers", "2", "--latency", "0,50")
    names = ["folder", "shards", "http", "ImageFolder"]
    assert [row[:3] for row in content["rows"]] == [
        *([name, "2", "0"] for name in [*names, "webdataset"]), *([name, "2", "50"] for name in names)]
    (fast, *_, slow, slow_shards, slow_http, slow_peer), = content["rounds"]
    # Two workers wait 50 ms for each of: the 4 images of a batch side by side, or one image after another.
    assert fast[1] > 1.5 * 2 * 4 / 0.050 > slow[1] > slow[0] and max(slow_shards[1], slow_http[1]) < 1.5 * 2 * 4 / 0.050
    assert slow_peer[0] < 1.5 * 2 / 0.050 < 1.5 * slow[1]
    assert content["rows"][0][3].startswith(f"{fast[0]:,.0f} (") and content["rows"][3][4] == ""
    assert f"| folder | 2 | 0 | {content['rows'][0][3]} |" in printed


def test_the_orders_of_epochs(run):
    printed, content = run("order", "--samples", "2500,1000000")
    assert [row[0] for row in content["rows"]] == ["2,500", "1,000,000"]
    (small, large), = content["rounds"]
    assert large[0] > small[0] and large[1] > small[1] and large[2] < large[0]
    assert content["rows"][1][1].startswith(f"{large[0]:.3g} (") and content["rows"][1][3] == f"{1000 * large[2]:.3g}"
    assert f"| {' | '.join(content['rows'][1])} |" in printed


def test_what_a_trainer_sees_of_an_order_that_is_made_beside(monkeypatch):
    def hold(*args, **kwargs):  # the interpreter, for as long as a thread may
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            sum(range(3_000_000))
        return np.arange(10)

    monkeypatch.setattr(orders, "epoch_order", hold)
    first, pause = order._seen([10], 0.3)
    assert first < 0.1 and 0.001 < pause


@pytest.mark.parametrize("words, message", [
    (["--latency=-1"], "--latency must be at least 0 ms, got -1"), (["--workers", "0"], "must be at least 1"),
    (["order", "--samples", "0"], "--samples and --rounds must be at least 1"),
    (["reading", "--plot", "x.png"], "--plot shows the rates of pixels, not of reading"),
    (["order", "--json", "gone/x.json"], "--json gone/x.json cannot be written: No such file or directory; give"),
    (["--folder", "nowhere"], "--folder nowhere is no folder; make it")])
def test_what_cannot_be_measured_is_told(words, message, main, capsys):
    assert main(words) in (2, 3)
    assert message in capsys.readouterr().err


# ---- feeds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("feeds")
    make_images(place / "src", 20, 0, pictures=photographs.make_jpegs(20, 9000, (500, 375)))
    shards = convert.convert(place / "src", "train", place / "out", convert.Settings(samples_per_shard=10), workers=1)
    write_sidecars(shards.folder, ["timm"])
    return place / "src" / "train", shards.folder


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_every_feed_gives_whole_samples(kind, place, monkeypatch):
    monkeypatch.setattr(feeds, "BATCH", 4)
    folder, shards = place
    augment = AUGMENTATIONS[kind]
    ours = feeds.ours(ShardReader(shards), augment, 1, "simplejpeg")
    batch = next(ours)
    assert os.environ["VIR_DECODER"] == "simplejpeg"
    ours.close()
    assert "VIR_DECODER" not in os.environ
    found = [(batch.images, batch.labels)]
    for start in (feeds.timm_wds, feeds.webdataset_timm, feeds.image_folder):
        feed = start(folder if start is feeds.image_folder else shards, augment, 1)
        found.append(next(feed)[:2])
        feed.close()
    for images, labels in found:
        assert images.shape == (4, 3, 224, 224) and images.dtype == torch.uint8 and len(labels) == 4
        assert 30 < images.float().mean() < 220 and images.float().std() > 10
    assert not multiprocessing.active_children()
    assert ("RandAugment" in str(feeds._transform(augment))) == (kind == "RandAugment")


def test_a_feed_without_decoding_reads_every_byte_of_an_epoch(place, monkeypatch):
    monkeypatch.setattr(feeds, "BATCH", 4)
    folder, shards = place
    total = sum(path.stat().st_size for path in folder.glob("*/*"))
    for feed in (feeds.ours_read(ShardReader(shards), 1), feeds.ours_read(FolderReader(folder), 1),
                 feeds.webdataset_read(shards, 1), feeds.webdataset_read(shards, 1, window=100)):
        assert sum(next(feed) for _ in range(5)) == total
        feed.close()
    feed = feeds.image_folder_read(folder, 1)
    assert 0.8 < 2 * sum(next(feed) for _ in range(10)) / (4 * total) < 1.2  # it draws with replacement
    feed.close()


def test_a_rate_counts_the_cpu_seconds_of_loader_processes_alone():
    def burn():
        while True:
            pass

    def feed():
        process = multiprocessing.get_context("fork").Process(target=burn, daemon=True)
        process.start()
        try:
            while True:
                time.sleep(0.1)
                yield None
        finally:
            process.kill()
            process.join()

    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
    other.start()
    rate = feeds.rate(feed, 1, 10 * feeds.BATCH)
    other.kill()
    assert 0.5 * feeds.BATCH / 0.1 < rate.wall <= feeds.BATCH / 0.1
    assert 0.9 * rate.wall < rate.cpu < 10 * rate.wall  # a core of a busy machine; this process sleeps


# ---- photographs


@pytest.mark.parametrize("has_photographs", [True, False])
def test_pictures_of_the_bytes_that_are_asked_for(has_photographs, monkeypatch):
    if not has_photographs:
        monkeypatch.setattr(photographs, "load_photographs", lambda: [])
    made = photographs.make_jpegs(6, 71_000, (500, 375))
    assert len(set(made)) == 6 and 0.9 < np.mean([len(one) for one in made]) / 71_000 < 1.1
    for one in made:
        image = Image.open(io.BytesIO(one))
        assert (image.size, image.mode) == ((500, 375), "RGB") and np.asarray(image).std() > 20
    assert photographs.decoding_us(made) > 50
    assert len(photographs.make_jpegs(1, 10, (64, 64))[0]) < 2000 < len(photographs.make_jpegs(1, 10**6, (64, 64))[0])
