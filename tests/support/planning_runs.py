"""Engines one after another in the ranks of one launch, with what their tensors take, counted in the process.

usage: tests/support/planning_runs.py JOBS.json RESULTS.json, in each rank   (a list of Run fields; see below)
"""

import gc
import json
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vir.config import AugmentConfig, DataConfig, EmaConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Run:
    """One engine, trained for two steps."""

    name: str
    zero: dict = field(default_factory=dict)
    precision: str = "fp32"
    settings: dict = field(default_factory=dict)
    ema: float = 0.9
    optim: str = "adamw"
    accumulation: int = 1
    micro_batch: int = 4
    freeze: str | None = None
    linear_probe: bool = False
    model: str = "vir_tiny_patch16_224"
    img_size: int = 32
    args: dict = field(default_factory=lambda: dict(patch_size=8, embed_dim=64, depth=6, num_heads=2))

    def config(self, ranks: int) -> RunConfig:
        return RunConfig(
            deepspeed_config="planned", output="nowhere", data=DataConfig(train="t"),
            augment=AugmentConfig(mixup=0, cutmix=0),
            model=ModelConfig(name=self.model, img_size=self.img_size, args=self.args, freeze=self.freeze),
            train=TrainConfig(global_batch_size=self.micro_batch * ranks * self.accumulation,
                              micro_batch_size=self.micro_batch, linear_probe=self.linear_probe),
            optim=OptimConfig(name=self.optim), ema=EmaConfig(decay=self.ema))

    def ds_config(self) -> dict:
        low = {self.precision: {"enabled": True}} if self.precision != "fp32" else {}
        return {"zero_optimization": self.zero, **low, **self.settings}


class Living(TorchDispatchMode):
    """The most bytes that were held at an operator's end beyond those of its beginning; numbers of gathered weights.

    What was there before counts as nothing until it is gone, and then below nothing.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.gathered = 0
        self._known: dict[int, object] = {}
        self._sharded = [p for p in module.parameters() if hasattr(p, "ds_numel")]
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
        if self._sharded: self.gathered = max(self.gathered, sum(p.ds_numel for p in self._sharded if p.ds_status.name != "NOT_AVAILABLE"))
        return out


def held() -> dict[int, torch.Tensor]:
    """The tensors that Python knows of, one of each storage."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.untyped_storage().nbytes():
            found[thing.untyped_storage().data_ptr()] = thing
    return found


def size(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def count(run: Run, world) -> dict:
    from vir.engine.engine import Engine
    from vir.models.build import build
    from vir.training.loss import training_loss

    before = size(held())
    config = run.config(world.size)
    torch.manual_seed(0)
    network, spec = build(config.model, [str(n) for n in range(CLASSES)], linear_probe=run.linear_probe)
    engine = Engine(network, config, run.ds_config(), run.accumulation)
    found = {}
    for step in range(3):
        for micro in range(run.accumulation):
            with Living(engine.module) as passes:
                images = torch.randn(run.micro_batch, *spec.input.size)
                targets = torch.randn(run.micro_batch, CLASSES).softmax(1)
                loss = training_loss(engine(images), targets, config.train)
                engine.backward(loss)
            del images, targets, loss
            gradients = size(held()) - before
            with Living(engine.module) as update:
                engine.step(1e-3, 0.0)
            if not micro:
                found["after one backward"] = gradients
    found |= {"with gradients": gradients, "update": update.peak, "passes": passes.peak, "gathered": passes.gathered, "states": size(held()) - before}
    engine.close()
    return found


if __name__ == "__main__":
    from vir import distributed

    gc.collect()
    gc.freeze()

    world = distributed.start()
    results = {}
    for fields in json.loads(Path(sys.argv[1]).read_text()):
        run = Run(**fields)
        gc.collect()
        results[run.name] = distributed.gather(count(run, world))
        if world.is_main:
            Path(sys.argv[2]).write_text(json.dumps(results))
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))
    distributed.stop()
