"""Engines one after another in the ranks of one launch, with what their tensors take, counted in the process.

usage: tests/support/planning_runs.py RUNS.json RESULTS.json, in each rank   (a list of Run fields; see below)
"""

import gc
import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vir.config import AugmentConfig, DataConfig, EmaConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Run:
    """One engine, trained for two steps."""

    name: str
    stage: int
    zero: dict = field(default_factory=dict)
    precision: str = "bf16"
    settings: dict = field(default_factory=dict)
    ema: float = 0.9
    optim: str = "adamw"
    accumulation: int = 1
    freeze: str | None = None
    micro_batch: int = 2

    def config(self, ranks: int) -> RunConfig:
        return RunConfig(
            deepspeed_config="planned", output="nowhere", data=DataConfig(train="t"),
            augment=AugmentConfig(mixup=0, cutmix=0), ema=EmaConfig(decay=self.ema),
            model=ModelConfig(name="vir_tiny_patch16_224", img_size=16, freeze=self.freeze, args=dict(
                patch_size=8, embed_dim=64, depth=4, num_heads=2)),
            train=TrainConfig(global_batch_size=self.micro_batch * ranks * self.accumulation,
                              micro_batch_size=self.micro_batch), optim=OptimConfig(name=self.optim))

    def ds_config(self) -> dict:
        low = {self.precision: {"enabled": True}} if self.precision != "fp32" else {}
        buckets = {"reduce_bucket_size": 20000} if self.stage else {}
        return {"zero_optimization": {"stage": self.stage, **buckets, **self.zero}, **low, **self.settings}


class Living(TorchDispatchMode):
    """The most bytes that were there beyond those of the beginning, and the most weights that were gathered."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.gathered = 0
        self._known: dict[int, object] = {}
        self._sharded = [p for p in module.parameters() if hasattr(p, "ds_status")]
        for tensor in held().values():
            self._came(tensor.untyped_storage())
        self.now = 0

    def _came(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            size = storage.nbytes()
            self._known[id(storage)] = weakref.finalize(storage, self._gone, id(storage), size)
            self.now += size

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._came(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        if self._sharded:
            self.gathered = max(self.gathered, sum(
                p.ds_numel for p in self._sharded if p.ds_status.name != "NOT_AVAILABLE"))
        return out


def held() -> dict[int, torch.Tensor]:
    """The tensors that Python knows of, one of each storage."""
    return {thing.untyped_storage().data_ptr(): thing for thing in gc.get_objects()
            if issubclass(type(thing), torch.Tensor) and not thing.is_meta and thing.untyped_storage().nbytes()}


def size() -> int:
    gc.collect(1)
    return sum(tensor.untyped_storage().nbytes() for tensor in held().values())


def watch_reduction(optimizer, found: list[int]) -> None:
    """Count when ZeRO 1 or 2 has begun to copy gradients into this rank's part, and before it lets go of buckets."""
    copy, release = optimizer.copy_grads_in_partition, optimizer._release_ipg_buffers
    begun = []

    def copied(*args, **kwargs):
        copy(*args, **kwargs)
        if not begun:
            begun.append(True)
            found.append(size())

    def released():
        found.append(size())
        begun.clear()
        release()

    optimizer.copy_grads_in_partition, optimizer._release_ipg_buffers = copied, released


def count(run: Run, world) -> tuple[dict, dict]:
    from vir.engine.engine import Engine
    from vir.models.build import build
    from vir.training.loss import training_loss

    gc.collect()
    before = size()
    config = run.config(world.size)
    torch.manual_seed(0)
    network, spec = build(config.model, [str(n) for n in range(CLASSES)])
    engine = Engine(network, config, run.ds_config(), run.accumulation)
    reducing = []
    if run.stage in (1, 2):
        watch_reduction(engine.deepspeed.optimizer, reducing)
    for last in (False, True):  # in the first step optimizers make their states, and stage 3 learns what to fetch ahead
        for _ in range(run.accumulation):
            with Living(engine.module) if last else nullcontext() as passes:
                images = torch.randn(run.micro_batch, *spec.input.size)
                targets = torch.randn(run.micro_batch, CLASSES).softmax(1)
                loss = training_loss(engine(images), targets, config.train)
                engine.backward(loss)
            del images, targets, loss
            gc.collect()  # DeepSpeed leaves cycles without ZeRO
            reducing.append(size())
            with Living(engine.module) if last else nullcontext() as update:
                engine.step(1e-3, 0.0)
    found = {"states": size() - before, "passes": passes.peak, "gathered": passes.gathered, "update": update.peak}
    found["reducing"] = max(reducing) - before
    files = written(engine.deepspeed)
    engine.close()
    return found, files


def written(deepspeed) -> dict[str, int]:
    """Bytes of the tensors in the files that this rank would leave of a checkpoint, as torch.save writes them."""
    sizes = {}

    def save(state_dict, path):
        file = BytesIO()
        torch.save(state_dict, file)
        sizes[Path(path).name] = sum(one.file_size for one in ZipFile(file).infolist() if "/data/" in one.filename)

    deepspeed.checkpoint_engine.save = save
    with TemporaryDirectory() as folder:
        deepspeed.save_checkpoint(folder, tag="step", save_latest=False)
    return sizes


if __name__ == "__main__":
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from vir import distributed

    world = distributed.start()
    gc.collect()
    gc.freeze()  # so that what is imported is not looked through
    runs = {run.name: distributed.gather(count(run, world))
            for run in (Run(**fields) for fields in json.loads(Path(sys.argv[1]).read_text()))}
    if world.is_main:
        defaults = DeepSpeedZeroConfig().model_dump(by_alias=True).items()
        Path(sys.argv[2]).write_text(json.dumps({
            "runs": {name: [found for found, _ in ranks] for name, ranks in runs.items()},
            "files": {name: [files for _, files in ranks] for name, ranks in runs.items()},
            "defaults": {key: value for key, value in defaults
                         if isinstance(value, (bool, int, float)) or value is None}}))
    distributed.stop()
