"""Which part of loading bounds a run: tables of figures, and bottlenecks that are planted and measured."""

import itertools
import json
import logging
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from support.forked import forked
from support.launchers import ROOT, TINY
from vir import distributed, launcher
from vir.benchmarks import diagnosis as measured
from vir.benchmarks.feeds import slow_reads
from vir.benchmarks.file_server import serving
from vir.config import RunConfig
from vir.data import transforms, worker
from vir.data.diagnosis import Bound, Figures, diagnose
from vir.data.opening import Places, open_reader
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.stages import Spent
from vir.distributed import World
from vir.engine.engine import Update
from vir.errors import DataError
from vir.flags import parse
from vir.training.meter import _TELLS_EVERY, Meter, StepRecord
from vir.training.prepare import prepare

ALONE = World(0, 1, torch.device("cpu"))
BATCH = 8
PLAIN = ["--augment.auto_augment", "null", "--augment.color_jitter", "0"]


def spent(read=1.0, decode=2.0, augment=1.0, collate=0.1, cpu=3.0, images=1000):
    """Of so many images; milliseconds of each."""
    ms = images / 1e3
    return Spent(images=images, bytes=images * 100_000, read=read * ms, decode=decode * ms, augment=augment * ms,
                 collate=collate * ms, total=(read + decode + augment + collate) * ms, cpu=cpu * ms)


BASE = Figures(spent=spent(), workers=7, cores=8, share=8, rate=1700.0, trainer=1.0, needed=3000.0)


@pytest.mark.parametrize("changes, bound, says", [
    ({"rate": 2900.0}, Bound.MODEL, "the loader gives 2,900 images/s, training takes 3,000"),
    ({"hand_over": 5e-4, "trainer": 0.3}, Bound.DECODE, ""),  # it waited for a core
    ({"hand_over": 5e-4, "micro_batch_size": 64}, Bound.HAND_OVER, "--train.micro_batch_size 128"),
    ({"hand_over": 1e-4, "copy": 5e-4}, Bound.COPY, "PCIe"),
    ({"spent": spent(read=9)}, Bound.READ, "wait 9 ms of 12.1 ms an image for bytes; copy the shards to a faster disk"),
    ({"spent": spent(read=9), "is_remote": True}, Bound.READ, "--data.cache FOLDER"),
    ({"spent": spent(read=9), "storage": 170e6}, Bound.READ, "gives 170 MB/s of 300 needed"),
    ({"spent": spent(read=9), "workers": 2, "rate": 160.0}, Bound.READ, "--data.workers 7"),
    ({"spent": spent(read=9, cpu=12.0), "rate": 570.0}, Bound.READ, "8.9 ms of 12.1 ms an image, in 7 loader processes "
     "on 8 cores, to copy and check bytes that are at hand; more cores for each rank"),
    ({"spent": spent(read=9, cpu=12.0), "rate": 160.0, "workers": 2}, Bound.WORKERS, ""),
    ({"spent": spent(read=9), "side": 2000.0}, Bound.READ, "vir-convert --resize-short 512"),
    ({"workers": 2, "rate": 480.0}, Bound.WORKERS, "2 loader processes of 4.1 ms an image for 8 cores, "
     "of which 5.6 are idle"),
    ({"workers": 2, "rate": 480.0}, Bound.WORKERS, "--data.workers 7"),
    ({"workers": 2, "rate": 480.0, "needed": 1000.0}, Bound.WORKERS, "--data.workers 5"),
    ({"workers": 2, "rate": 480.0, "needed": 490.0, "trainer": 0.1}, Bound.MODEL, ""),
    ({"workers": 2, "rate": 480.0, "needed": None}, Bound.WORKERS, "--data.workers 7"),
    ({"workers": 1, "cores": 2, "share": 16}, Bound.CORES, "give it 14: srun --cpus-per-task 14"),
    ({"workers": 1, "cores": 1, "share": 2, "needed": None}, Bound.CORES, "1 loader process of 3 ms of CPU time an "
     "image share 1 core with the trainer, of 2 that the machine has for it; give it 2"),
    ({"workers": 3, "cores": 4, "share": 12, "ranks": 8}, Bound.CORES, "give the 8 ranks of the machine 96: srun "
     "--cpus-per-task 96, docker run --cpus 96"),
    ({"workers": 12}, Bound.CORES, "--data.workers 7"),
    ({}, Bound.DECODE, "2 ms of 4.1 ms an image, in 7 loader processes on 8 cores; more cores for each rank"),
    ({"decodes_fast": False}, Bound.DECODE, "pip install 'vir-at-scale[fast]'"),
    ({"side": 1500.0}, Bound.DECODE, "images have 1,500 pixels on their shorter side: vir-convert --resize-short 512"),
    ({"side": 500.0}, Bound.DECODE, "more cores for each rank"),
    ({"spent": spent(augment=5), "policy": "rand-m9"}, Bound.AUGMENT, "fewer operations than --augment.auto"),
    ({"spent": spent(augment=5)}, Bound.AUGMENT, "--augment.color_jitter 0"),
    ({"spent": spent(collate=5)}, Bound.COLLATE, "--data.prefetch"),
])
def test_from_figures_to_what_bounds_and_what_to_change(changes, bound, says):
    found = diagnose(replace(BASE, **changes))
    assert found.bound is bound and says in str(found)


def test_figures_of_nothing_are_no_error():
    assert diagnose(Figures(spent=Spent(), workers=1, cores=1, share=1, rate=0.0)).bound


# ---- planted and measured


def measure(data, *flags, workers=1, seconds=1.0, output="unused"):
    """Figures and bound of a loader of small images."""
    config = parse([*TINY, *PLAIN, "--data.train", str(data), "--output", str(output), "--train.global_batch_size",
                    str(BATCH), "--train.micro_batch_size", str(BATCH), "--data.workers", str(workers),
                    "--data.prefetch", "1", "--deepspeed_config", "zero0_fp32", *flags])
    figures, read = measured.measure(prepare(config), ALONE, measured.Settings(seconds=seconds, loader_only=True))
    return figures, read, diagnose(figures)


def planted(seconds):
    """From a tenth less to half as much again, where other programs have the cores, too."""
    return pytest.approx(1.2 * seconds, rel=0.25)


@contextmanager
def slow_policy(seconds):
    apply = transforms.TrainTransform.apply

    def slow(*arguments):
        time.sleep(seconds)
        return apply(*arguments)

    transforms.TrainTransform.apply = slow
    try:
        yield
    finally:
        transforms.TrainTransform.apply = apply


def test_a_slow_disk(shards, tmp_path):
    delay = 0.2
    with slow_reads(delay):
        figures, read, found = measure(shards / "train", output=tmp_path / "run")
    assert found.bound is Bound.READ
    # All reads of a batch wait at the same time.
    assert figures.each("read") == planted(delay / BATCH)
    assert 1 / figures.rate == planted(delay / BATCH)
    assert figures.each("bytes") / read.rate == pytest.approx(1.2 * delay / BATCH, rel=0.35)  # other images than those
    assert read.requests == 0 and not read.from_server()


def test_a_slow_policy(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "cores", lambda: 2)
    monkeypatch.setattr(launcher, "share_of_machine", lambda: 2)
    with slow_policy(0.05):
        figures, _, found = measure(shards / "train", output=tmp_path / "run")
    assert found.bound is Bound.AUGMENT
    assert figures.each("augment") == planted(0.05)
    assert 1 / figures.rate == planted(0.05)
    assert sum(figures.each(stage) for stage in ("read", "decode", "augment", "collate")) == pytest.approx(
        figures.each("total"))


def test_too_few_workers_and_what_the_advice_brings(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "cores", lambda: 4)
    monkeypatch.setattr(launcher, "share_of_machine", lambda: 4)
    with slow_policy(0.05):
        figures, _, found = measure(shards / "train", output=tmp_path / "run")
        assert found.bound is Bound.WORKERS and found.change == "--data.workers 3"
        more, _, _ = measure(shards / "train", workers=3, output=tmp_path / "run")
    assert more.rate == pytest.approx(3 * figures.rate, rel=0.25)  # twice, and four times, would be found


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a machine of which a part can be kept from it")
def test_one_core(shards, tmp_path):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        figures, _, found = measure(shards / "train", output=tmp_path / "run")
    finally:
        os.sched_setaffinity(0, before)
    assert found.bound is Bound.CORES and figures.cores == 1 and "srun --cpus-per-task" in found.change
    assert figures.busy < 1.1


def test_huge_images(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "cores", lambda: 2)
    monkeypatch.setattr(launcher, "share_of_machine", lambda: 2)
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((2000, 1500))
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(BATCH):
            image.save(tmp_path / "train" / name / f"{number}.jpg", quality=95)
    figures, _, found = measure(tmp_path / "train", output=tmp_path / "run")
    assert found.bound is Bound.DECODE and "vir-convert --resize-short 512" in found.change
    assert figures.side == 1500 and figures.each("decode") > 0.5 * figures.each("total")


def test_checksums_are_timed(shards):
    reader = ShardReader(shards / "train")
    assert reader.checking() == 0
    reader.read(0)
    assert 0 < reader.checking() < 0.01 and reader.checking() == 0


def test_requests_to_a_server(shards, tmp_path):
    with serving(shards / "train") as url:
        places = Places(index_dir=tmp_path / "indexes", timeout=60)
        reader = open_reader(f"{url}/0", places, first=True)
        order = SampleOrder(0, reader.shard_sizes, 4, 100)
        read = measured._read(reader, measured._requests(order, 0, BATCH, BATCH, ALONE), 1, 0.3)
    assert read.requests > 0 and read.requested >= read.total > 0
    assert f"{read.requests:,} requests of" in read.from_server() and "cache" not in read.from_server()


def test_ranks_read_what_they_would_in_the_run(shards):
    reader = ShardReader(shards / "train")
    order = SampleOrder(0, reader.shard_sizes, 4, 100)
    found = []
    for rank in range(2):
        requests = measured._requests(order, 3, 4 * BATCH, BATCH, World(rank, 2, ALONE.device))
        found += [samples for _, samples in itertools.islice(requests, 4)]
    assert {len(samples) for samples in found} == {BATCH}
    assert len(set(np.concatenate(found))) == 2 * 4 * BATCH  # none twice
    assert set(np.concatenate(found)) == set(order.samples(np.arange(3 * 4 * BATCH, 5 * 4 * BATCH)))


def test_what_is_excluded_is_not_read(shards, tmp_path, monkeypatch):
    read = worker.Worker.read

    def fails(process, reader, samples):
        if 3 in samples:
            raise DataError("a block of the disk")
        return read(process, reader, samples)

    monkeypatch.setattr(worker.Worker, "read", fails)
    (tmp_path / "excluded").write_text(ShardReader(shards / "train").key(3) + "\n")
    _, read_alone, _ = measure(shards / "train", "--data.exclude", str(tmp_path / "excluded"), seconds=0.2,
                               output=tmp_path / "run")
    assert read_alone.total > 0


def test_the_tool_under_a_launcher(shards, tmp_path, monkeypatch):
    (tmp_path / "left").mkdir()
    flags = [*TINY, *PLAIN, "--data.train", shards / "train", "--output", tmp_path / "left", "--deepspeed_config",
             "zero0_fp32", "--train.global_batch_size", "48", "--train.micro_batch_size", "12"]
    done = forked(ROOT / "tools" / "benchmark_loader.py", "--diagnose", "--seconds", "0.5", "--json",
                  tmp_path / "found.json", *flags, ranks=2)
    assert done.returncode == 0, done.stdout
    for said in ("| decode |", "| hand-over, in the trainer's process |", "Storage:", "Cores:", "What bounds it is"):
        assert done.stdout.count(said) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    figures = found["figures"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert figures["needed"] > 0 and figures["cores"] == launcher.cores() and figures["ranks"] == 2
    assert (found["bound"] == "model") == (figures["rate"] >= 0.95 * figures["needed"])
    assert not list((tmp_path / "left").iterdir())


@pytest.mark.parametrize("flags, says", [
    (["--seconds", "0"], "--seconds must be more than 0"), (["--seconds", "nan"], "finite, got nan"),
    (["--seconds", "inf"], "finite, got inf"), (["--no.such", "1"], "--no.such"),
    (["--json", "gone/x.json"], "--json gone/x.json cannot be written: No such file or directory; give")])
def test_flags_that_are_refused(flags, says):
    done = forked(ROOT / "tools" / "benchmark_loader.py", "--diagnose", *flags, ranks=1)
    assert done.returncode == 2 and says in done.stdout


# ---- in the log of a run


def metered(world):
    """A meter of steps that end where one takes up a record."""
    plan = SimpleNamespace(total_steps=1000, samples=lambda steps: BATCH * steps, forward_flops=None, peak_flops=None,
                           learning_rate=lambda step: 0.1)
    config = parse(["--data.train", "unused", "--train.log_every", "1", "--data.workers", "1"])
    assert isinstance(config, RunConfig)
    return Meter(config, plan, None, world, None, SimpleNamespace(round_trip=0.0), 0)


def step(meter, done, waits, **times):
    """One of 10 ms or more, in which the rank waits this share of the time."""
    time.sleep(0.01)
    waited = waits * (time.monotonic() - meter._interval.began)
    meter.stepped(done, StepRecord(Update.APPLIED, [torch.ones(())], [], [], waited, spent(**times)))


def test_a_run_says_why_it_waits_but_not_all_the_time(caplog):
    meter, lines = metered(ALONE), []
    with caplog.at_level(logging.INFO, logger="vir"):
        for done in range(1, 2 * _TELLS_EVERY + 3):
            step(meter, done, 0.0 if done == 2 else 0.5, read=50.0)
            lines.append([record.getMessage() for record in caplog.records if "data wait" in record.getMessage()
                          and ", by reading" in record.getMessage()])
            caplog.clear()
    told = [number for number, found in enumerate(lines, start=1) if found]
    assert told == [3, 3 + _TELLS_EVERY]  # not of the first interval, nor where nothing was waited for
    assert "loader processes wait 50 ms of 53.1 ms an image for bytes" in lines[2][0]


def steps_of_which_only_the_last_rank_waits():
    """In processes of their own: steps whose rank 1 has a slow disk, for which rank 0 waits in the collective."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    world = distributed.start()
    meter = metered(world)
    for done in (1, 2):
        meter._interval.began -= 10  # seconds; that the ranks meet takes next to nothing of them
        step(meter, done, 0.5 * world.rank, read=50.0 * world.rank)


def test_a_wait_of_another_rank_is_told_with_its_figures():
    done = forked("-c", "import test_diagnosis; test_diagnosis.steps_of_which_only_the_last_rank_waits()")
    assert done.returncode == 0, done.stdout
    (said,) = re.findall(r"data wait (\d+) %, most of all on rank 1, by reading: loader processes wait 50 ms",
                         done.stdout)
    assert 15 <= int(said) <= 25  # the mean over the ranks


def test_what_evaluation_computes_is_none_of_the_steps():
    meter = metered(ALONE)
    with meter.pause():
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    time.sleep(0.05)
    assert meter._of_loading().trainer < 0.5  # else at least 4
