"""Batches from real shards: the same for every world size, worker count and starting step; damage is seen."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from support.launchers import ROOT
from vir import files, run_folder
from vir.config import AugmentConfig
from vir.data import transforms
from vir.data.convert import Settings, convert
from vir.data.loader import Patience, eval_batches, train_batches
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.shards import read_index
from vir.errors import DataError, SettingsError
from vir.weights.spec import InputSpec

torch.set_num_threads(1)
CPU = torch.device("cpu")
INPUT = InputSpec(size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
ALL_ON = AugmentConfig(reprob=0.5)  # and by default crop, flip, RandAugment, mixup and CutMix
OFF = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0, auto_augment=None,
                    interpolation="bilinear", reprob=0.0, mixup=0.0, cutmix=0.0)
IMAGES = {"train": 13, "val": 3}
SEED = 11


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """train: 13 square images of 2 classes in 3 shards; val: 3 images."""
    root = tmp_path_factory.mktemp("data")
    for split, count in IMAGES.items():
        for number in range(count):
            folder = root / "source" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number + count).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.JPEG", quality=90)
        convert(root / "source", split, root / "shards", Settings(samples_per_shard=5), workers=1)
    return root / "shards"


@pytest.fixture(scope="module")
def reader(shards):
    return ShardReader(shards / "train")


@pytest.fixture()
def damaged(shards, tmp_path):
    """A function that copies a split, flips one byte in the middle of some images, and opens it."""
    def damage(split, samples):
        folder = tmp_path / split
        shutil.copytree(shards / split, folder)
        reader = ShardReader(folder)
        index = read_index(folder)
        for i in samples:
            with open(folder / reader.where(i).split(":")[0], "r+b") as file:
                file.seek(int(index["offset"][i] + index["size"][i] // 2))
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 0xFF]))
        return ShardReader(folder)
    return damage


def loader_of(reader, augment=ALL_ON, **changed):
    """One rank's batches: 7 steps of 4 over 13 samples, so two ends of epochs lie within."""
    order = SampleOrder(SEED, reader.shard_sizes, 3, 4)
    options = dict(seed=SEED, first_step=0, last_step=7, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1,
                   workers=1, prefetch=2, device=CPU)
    return train_batches(reader, order, augment, INPUT, **options | changed)


def train(*args, **changed):
    return list(loader_of(*args, **changed))


def evaluate(reader, **changed):
    options = dict(batch_size=2, rank=0, world_size=1, workers=1, device=CPU)
    return list(eval_batches(reader, INPUT, **options | changed))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        for field in fields(a):
            if field.name == "spent":  # time
                continue
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


@pytest.fixture(scope="module")
def uninterrupted(reader):
    return train(reader)


def plain(reader, sample):
    """The 16 x 16 pixels of a sample, by Pillow alone."""
    image = Image.open(BytesIO(reader.read(sample))).convert("RGB").resize((16, 16), Image.BILINEAR)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


# ---- training


def test_training_serves_the_samples_of_the_order_each_once_per_epoch(reader):
    order, seen = SampleOrder(SEED, reader.shard_sizes, 3, 4), {}
    for batch in train(reader, OFF):
        assert batch.images.shape == (2, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.valid.all() and batch.bad == [] and (batch.lam == 1).all() and not batch.erase.any()
        for position, image, label in zip(batch.positions.tolist(), batch.images, batch.labels.tolist()):
            sample = int(order.samples(np.array([position]))[0])
            assert torch.equal(image, plain(reader, sample)) and label == reader.labels[sample]
            seen[position] = sample
    assert sorted(seen) == list(range(28))
    for epoch in range(2):
        assert sorted(seen[position] for position in range(13 * epoch, 13 * epoch + 13)) == list(range(13))


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_gives_the_same_micro_batches(reader, world):
    """Global batches of 8 in micro-batches of 2: the ranks' slices, put together, are those of one rank alone."""
    sizes = dict(global_batch_size=8, last_step=4)
    alone = train(reader, **sizes)
    ranks = [train(reader, rank=rank, world_size=world, **sizes) for rank in range(world)]
    accumulation = 8 // (2 * world)
    assert [len(batches) for batches in ranks] == [4 * accumulation] * world
    together = [batch for step in range(4) for batches in ranks
                for batch in batches[step * accumulation:(step + 1) * accumulation]]
    assert_same(together, alone)
    assert sorted(torch.cat([batch.positions for batch in together]).tolist()) == list(range(32))


def test_the_number_of_workers_and_prefetched_batches_changes_nothing(reader, uninterrupted):
    assert_same(train(reader, workers=2, prefetch=1), uninterrupted)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_starting_at_a_step_equals_the_uninterrupted_run_from_there(reader, uninterrupted, step):
    assert_same(train(reader, first_step=step), uninterrupted[2 * step:])


def test_starting_at_the_last_step_gives_no_batch(reader):
    assert train(reader, first_step=7) == []


def test_another_seed_gives_other_pixels_of_the_same_positions(reader, uninterrupted):
    other = train(reader, seed=SEED + 1)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(other, uninterrupted))
    assert not any(torch.equal(a.images, b.images) for a, b in zip(other, uninterrupted))


def test_a_sample_is_augmented_anew_in_each_epoch(reader, uninterrupted):
    order = SampleOrder(SEED, reader.shard_sizes, 3, 4)
    images = {position: image for batch in uninterrupted
              for position, image in zip(batch.positions.tolist(), batch.images)}
    first = {int(order.samples(np.array([position]))[0]): images[position] for position in range(13)}
    second = {int(order.samples(np.array([position]))[0]): images[position] for position in range(13, 26)}
    assert not any(torch.equal(first[sample], second[sample]) for sample in range(13))


def test_boxes_and_shares_are_those_of_the_positions(uninterrupted):
    for batch in uninterrupted:
        positions = batch.positions.tolist()
        assert batch.erase.tolist() == [list(transforms.erase_box(SEED, p, ALL_ON, 16, 16)) for p in positions]
        assert batch.noise.tolist() == [
            transforms.noise_seed(SEED, p) if box[2] else 0 for p, box in zip(positions, batch.erase.tolist())]
        lam, cut = transforms.mix_parameters(SEED, positions[0], ALL_ON, 16, 16)
        assert batch.lam.tolist() == pytest.approx([lam, lam]) and batch.cut.tolist() == [list(cut)] * 2


def test_mixing_ends_with_its_last_epoch(reader):
    augment = replace(OFF, mixup=1.0, mixup_off_epoch=1.0)
    for batch in train(reader, augment):
        assert (batch.lam != 1).tolist() == [int(batch.positions.max()) < 13] * 2


# ---- validation


@pytest.mark.parametrize("split", ["train", "val"])  # 13 and 3 images
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_validation_counts_every_image_once(shards, split, world):
    reader = ShardReader(shards / split)
    ranks = [evaluate(reader, rank=rank, world_size=world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-len(reader) // (2 * world))}
    counted = []
    for batch in (batch for batches in ranks for batch in batches):
        for sample, valid, image, label in zip(batch.positions.tolist(), batch.valid.tolist(), batch.images,
                                               batch.labels.tolist()):
            assert torch.equal(image, plain(reader, sample)) and label == reader.labels[sample]
            counted += [sample] if valid else []
    assert sorted(counted) == list(range(len(reader)))


# ---- damage


def test_a_damaged_sample_is_substituted_and_told_and_the_order_stays(reader, damaged):
    broken = damaged("train", [6])
    for clean, batch in zip(train(reader, OFF), train(broken, OFF)):
        samples = SampleOrder(SEED, reader.shard_sizes, 3, 4).samples(batch.positions.numpy()).tolist()
        assert torch.equal(batch.positions, clean.positions)
        expected = [next(reader.substitutes(6)) if sample == 6 else sample for sample in samples]
        assert batch.labels.tolist() == [reader.labels[sample] for sample in expected]
        assert torch.equal(batch.images, torch.stack([plain(reader, sample) for sample in expected]))
        assert len(batch.bad) == samples.count(6)
        for said in batch.bad:
            shard, key = reader.where(6).split("@")[0].split(":")
            assert shard in said and key in said and "checksum" in said


def test_a_split_of_damaged_samples_stops_with_the_first_of_them(damaged):
    with pytest.raises(DataError, match="no readable image in 13 tries, the first was imagenet1k-train.*checksum"):
        train(damaged("train", range(13)), OFF, last_step=1)


def test_a_damaged_validation_image_stops_and_is_named(damaged):
    broken = damaged("val", [1])
    with pytest.raises(DataError, match=f"{broken.where(1)} of {broken.folder}: wrong checksum.*restore it"):
        evaluate(broken)


def test_a_shard_that_disappears_stops_the_run_and_is_never_substituted(damaged, monkeypatch):
    monkeypatch.setattr(files, "RETRY_WAITS_S", (0, 0))
    broken = damaged("train", [])
    shard = broken.where(0).split(":")[0]
    (broken.folder / shard).unlink()
    with pytest.raises(DataError, match=f"cannot read {shard}.*No such file.*after 3 attempts"):
        train(broken)
    with pytest.raises(DataError, match=f"cannot open shard .*{shard}"):
        ShardReader(broken.folder)


# ---- the trainer's process


def test_loading_leaves_the_random_state_of_the_main_process_alone(shards, reader):
    def state():
        name, keys, *rest = np.random.get_state()
        return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()

    before = state()
    train(reader)
    evaluate(ShardReader(shards / "val"))
    assert state() == before


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_on_the_cpu(reader, uninterrupted):
    assert_same([batch.to(CPU) for batch in train(reader, device=torch.device("cuda", 0))], uninterrupted)


def test_a_programs_own_processes_live_on_at_its_exit(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, pathlib, time\n"
        "import vir.data.loader\n"
        "def write():\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path / 'written')!r}).touch()\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('fork').Process(target=write).start()\n")
    assert subprocess.run([sys.executable, program], timeout=60).returncode == 0
    assert (tmp_path / "written").exists()


def test_an_unknown_augmentation_policy_is_named(reader):
    with pytest.raises(SettingsError, match="--augment.auto_augment 'foo'.*rand-m9-mstd0.5-inc1"):
        train(reader, augment=replace(ALL_ON, auto_augment="foo"))


# ---- reads that take their time, workers that end


class Slow(ShardReader):
    """A reader whose reads do something else first."""

    before = staticmethod(lambda sample: None)

    def read_at_hand(self, i):
        return None

    def read(self, i):
        self.before(i)
        return super().read(i)


@pytest.fixture
def slow(shards):
    return Slow(shards / "train")


def test_the_samples_of_a_request_are_read_at_the_same_time(slow):
    together = threading.Barrier(4)
    slow.before = lambda sample: together.wait(60)  # returns when four are waiting, so never where one waits alone
    assert len(train(slow, micro_batch_size=4)) == 7


def test_what_is_at_hand_is_read_without_a_thread(shards, uninterrupted, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, into, offset, flags: preadv(number, into, offset))
    monkeypatch.setattr(ShardReader, "read_group", None)
    assert_same(train(ShardReader(shards / "train")), uninterrupted)


def test_threads_that_draw_random_numbers_change_no_pixel(slow, uninterrupted):
    """As those do that wait before a retry, in our code and in libraries."""
    def draw():
        while True:
            random.random()
            time.sleep(1e-5)

    slow.before = lambda sample: threading.Thread(target=draw, daemon=True).start()
    assert_same(train(slow), uninterrupted)


def test_while_no_batch_comes_it_is_told_who_is_waited_for_and_none_is_lost(slow, uninterrupted, tmp_path):
    held = tmp_path / "held"
    held.touch()

    def wait(sample):
        while held.exists():
            time.sleep(0.05)

    slow.before = wait
    told, gives_up = [], iter([False, True])
    patience = Patience(seconds=1.5, tell=told.append, give_up=lambda: next(gives_up, False))
    batches = loader_of(slow, patience=patience)
    try:
        assert next(batches) is None  # after 1 s and 2 s, when it was asked a second time
        held.unlink()
        assert_same(list(batches), uninterrupted)
    finally:
        batches.close()
    said = rf"no batch for \d+ s, waiting for loader process 0 at \S+.tar:\S+@\d+ of {slow.folder}; check the disk"
    assert len(told) == 1 and re.match(said, told[0]), told


@pytest.mark.parametrize("number, name", [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_worker_that_ends_is_told_with_its_signal_and_its_sample(slow, number, name):
    slow.before = lambda sample: os.kill(os.getpid(), number)
    with pytest.raises(DataError, match=rf"loader process 0( at \S+ of \S+)? was killed by {name}; SIGKILL is mostly "
                                        "the system's answer to a lack of memory: lower --data.workers"):
        train(slow)


def test_workers_end_with_the_trainer_and_hold_nothing_of_it(shards, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, socket, sys, time\n"
        "from multiprocessing import active_children\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import torch\n"
        "from test_loader import Slow, loader_of\n"
        "from vir import run_folder\n"
        "from vir.distributed import World\n"
        "ours, theirs = socket.socketpair()\n"
        f"reader = Slow({str(shards / 'train')!r})\n"
        "reader.before = lambda sample: time.sleep(1000) if sample > 5 else None\n"
        f"with run_folder.claim(Path({str(tmp_path / 'run')!r}), World(0, 1, torch.device('cpu'))):\n"
        "    batches = loader_of(reader, workers=2)\n"
        "    batches._served = batches._start()\n"
        "    time.sleep(1)\n"
        "    print(*(os.readlink(f'/proc/self/fd/{end.fileno()}') for end in (ours, theirs)))\n"
        "    print(*(child.pid for child in active_children()), flush=True)\n"
        "    time.sleep(1000)\n")
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        try:
            sockets = trainer.stdout.readline().split()
            workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
            assert len(workers) == 2
            held = [os.readlink(path) for worker in workers for path in Path(f"/proc/{worker.pid}/fd").iterdir()]
            assert len(sockets) == 2 and not set(sockets) & set(held)
            assert not [name for name in held if name.endswith(run_folder.LOCK)], held
        finally:
            trainer.kill()
        gone, left = psutil.wait_procs(workers, timeout=30)
        assert not left
