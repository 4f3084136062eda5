"""Runs of format 2 that an earlier version left after 4 of 8 steps, and what it made of the rest: nothing may change.

tests/data/format2.tar.xz holds tiny shards, three runs of two ranks, and the losses, norms and checksums of weights and
average that the version before this layout of modules had at steps 4 and 8.
"""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from support.launchers import HANGS, ROOT
from support.processor import processor
from support.tiny_runs import launch, train_events
from vir.checkpoints.consolidate import full_tensors
from vir.checkpoints.info import newest, read_info

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

CONFIGS = ("zero0_bf16", "zero2_fp32", "zero3_bf16")
# On another processor sums round otherwise. bf16 keeps 8 bits.
TOLERANCE = {"zero0_bf16": 1e-2, "zero2_fp32": 1e-5, "zero3_bf16": 1e-2}


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("format2")
    with tarfile.open(ROOT / "tests" / "data" / "format2.tar.xz") as archive:
        archive.extractall(tmp, filter="data")
    return tmp / "format2"


@pytest.fixture(scope="module")
def expected(before) -> dict:
    return json.loads((before / "expected.json").read_text())


def digest(folder: Path, ema: bool) -> str:
    """Of every number in a checkpoint's weights or their average, with the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(full_tensors(folder, read_info(folder), ema)):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def command(config: str, before: Path) -> list[str]:
    """As the runs were begun; the DeepSpeed JSON by its name."""
    return [
        "--model.name", "vir_tiny_patch16_224", "--model.img_size", "28", "--data.workers", "1", "--data.lanes", "2",
        "--model.args", "{patch_size: 7, embed_dim: 16, depth: 1, num_heads: 2}", "--model.drop_path_rate", "0.1",
        "--data.train", str(before / "shards" / "train"), "--data.val", str(before / "shards" / "val"),
        "--output", str(before / "runs" / config), "--deepspeed_config", config, "--train.epochs", "2.56",
        "--train.global_batch_size", "16", "--train.micro_batch_size", "4", "--train.log_every", "1",
        "--schedule.warmup_epochs", "1", "--optim.lr", "1e-3", "--augment.auto_augment", "rand-m1",
        "--ema.decay", "0.9", "--eval.every_epochs", "100", "--checkpoint.every_epochs", "1.28",
        "--checkpoint.keep", "100"]


@pytest.fixture(scope="module")
def continued(before, expected, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as then
        codes, said = launch(tmp_path_factory.mktemp("launch"), [command(config, before) for config in CONFIGS])
    assert codes == [0] * len(CONFIGS), said
    return before


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_the_same_numbers_are_read_from_the_files(config, kind, before, expected):
    folder = before / "runs" / config / "checkpoints" / "step-00000004"
    assert digest(folder, kind == "ema") == expected["runs"][config]["sha256"][f"4 {kind}"]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_run_goes_on_as_it_would_have_done(config, continued, expected):
    """Bit for bit on the processor that the runs were made on."""
    events = [event for event in train_events(continued / "runs" / config) if event["step"] > 4]
    then = expected["runs"][config]
    for new, old in zip(events, then["events"], strict=True):
        exact = ("step", "samples_seen", "epoch", "lr", "loss_scale", "updates", "skipped")
        assert {key: new[key] for key in exact} == {key: old[key] for key in exact}
        for key in ("loss", "grad_norm"):
            assert new[key] == pytest.approx(old[key], rel=TOLERANCE[config]), key
    if processor() == expected["processor"]:
        assert [(event["loss"], event["grad_norm"]) for event in events] == [
            (event["loss"], event["grad_norm"]) for event in then["events"]]
        folder = newest(continued / "runs" / config)
        assert folder is not None and read_info(folder).step == 8
        assert {kind: digest(folder, kind == "ema") for kind in ("raw", "ema")} == {
            kind: then["sha256"][f"8 {kind}"] for kind in ("raw", "ema")}
