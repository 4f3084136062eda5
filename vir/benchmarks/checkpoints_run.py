"""One launch of tools/benchmark_checkpoints.py: the ranks of an engine, its checkpoints, and their peers in turns.

    torchrun --module vir.benchmarks.checkpoints_run SETTINGS.json

measured.json beside SETTINGS.json gets a list, of what each of its tasks has found. Batches lie in memory: no loader
takes part.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import async_save
from torch.nn import functional as F

from vir import distributed
from vir import log as logs
from vir.checkpoints.info import CheckpointInfo
from vir.checkpoints.saving import Checkpointer
from vir.checkpoints.store import Kept
from vir.cluster.signals import StopRequest
from vir.config import to_dict
from vir.distributed import World
from vir.engine import ds_config
from vir.engine.engine import Engine
from vir.flags import parse
from vir.models.build import build

_CLASSES = tuple(f"class {number}" for number in range(10))
_WAYS = {"asynchronous": True, "synchronous": False}


class Trained:
    """An engine that trains on one batch, its checkpoints of both ways, and what `measured` asks of every rank.

    Args:
        model: `name`, `args`, `img_size` and `micro_batch_size`.
        folder: gets a run folder for each way.
    """

    def __init__(self, model: dict[str, Any], config: str, folder: Path, world: World, stop: StopRequest) -> None:
        self.world, self.folder, self._stop = world, folder, stop
        micro, side = model["micro_batch_size"], model["img_size"]
        settings = parse([
            "--model.name", model["name"], "--model.args", json.dumps(model["args"]), "--model.img_size", str(side),
            "--train.global_batch_size", str(micro * world.size), "--train.micro_batch_size", str(micro),
            "--augment.mixup", "0", "--augment.cutmix", "0", "--data.train", "none", "--data.val", "none",
            "--deepspeed_config", config, "--output", str(folder)])
        torch.manual_seed(0)
        network, spec = build(settings.model, _CLASSES)
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.engine = Engine(network.to(world.device), settings, ds_config.read(config), 1)
        self._settings, self._spec, self._steps = to_dict(settings), spec, 0
        self._x = torch.randn(micro, 3, side, side)  # [B, C, H, W]
        self._y = torch.randint(len(_CLASSES), (micro,))
        self.saves = {way: Checkpointer(folder / way, world, Kept(1, None), asynchronous)
                      for way, asynchronous in _WAYS.items()}
        if world.is_main:
            for way in _WAYS:
                (folder / way).mkdir(parents=True)
        for _ in range(2):  # the optimizer's state comes with the first one
            self.step()

    def step(self, saves: Checkpointer | None = None) -> None:
        """Of the loop: asks the other ranks, goes on with the checkpoint on its way, trains."""
        self.all_ready(saves)
        if saves is not None and self._stop.all_ready:
            saves.advance()
        self.engine.backward(F.cross_entropy(self.engine(self._x).float(), self._y))
        self.engine.step(1e-4, 0.05)
        self._steps += 1

    def all_ready(self, saves: Checkpointer | None) -> bool:
        """Whether the checkpoint on its way can go on. Collective."""
        self._stop.agree(saves is not None and saves.is_ready)
        return self._stop.all_ready

    def begin(self, way: str) -> Checkpointer:
        info = CheckpointInfo(
            samples_seen=self._steps * len(self._x) * self.world.size, step=self._steps, updates=self.engine.updates,
            world_size=self.world.size, zero_stage=self.engine.zero_stage, precision=self.engine.precision,
            ema=self.engine.has_ema, loss_scaler=self.engine.loss_scale.state(), metrics={}, config=self._settings,
            model=self._spec, data_fingerprint="none", teacher="")
        self.saves[way].begin(self.engine.save, info, is_best=False)
        return self.saves[way]

    def state(self) -> list[Tensor]:
        """The storages that this rank's files hold, as bytes; those that several tensors share once."""
        found: dict[int, Tensor] = {}
        content: list[Any] = []
        self.engine.save(self.folder / "none", lambda state, path: content.append(state))
        for tensor in _tensors(content):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
        return list(found.values())

    def timed(self, act: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of the slowest rank, from a common beginning, and what this rank has got. Collective."""
        distributed.barrier()
        began = time.perf_counter()
        done = act()
        return max(distributed.gather(time.perf_counter() - began)), done

    def close(self) -> None:
        for saves in self.saves.values():
            saves.close()
        self.engine.close()
        distributed.barrier()
        if self.world.is_main:
            shutil.rmtree(self.folder)


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)


def stall(trained: Trained, turns: int, written: int) -> dict[str, Any]:
    """How long a step's end is held, beside a copy of the same state in memory; seconds until it is published, beside
    a file of as many bytes.

    Args:
        turns: after the first one; in the last `written` of them all is written, in the others given up at once.
    """
    copies = [torch.zeros_like(source) for source in trained.state()]
    group = dist.new_group(backend="gloo") if trained.world.size > 1 else None
    found: dict[str, Any] = {"bytes_of_rank": distributed.gather(sum(len(copy) for copy in copies)), "stalls": [],
                             "copies": [], "writes": []}
    for turn in range(turns + 1):
        trained.step()
        held, saves = trained.timed(lambda: trained.begin("asynchronous"))
        if turn <= turns - written:
            saves.give_up()
        else:
            saves.finish()
        found["stalls"].append(held)
        found["copies"].append(_timed_copy(trained, copies))
        if turn > turns - written:
            found["writes"].append({**_written(trained, copies, group), "asynchronous": saves.saved[-1].seconds})
    found["files_bytes"] = saves.saved[-1].bytes
    if group is not None:
        dist.destroy_process_group(group)
    return found


def _timed_copy(trained: Trained, copies: list[Tensor]) -> float:
    pairs = list(zip(trained.state(), copies, strict=True))

    def copied() -> None:
        for source, copy in pairs:
            copy.copy_(source)

    return trained.timed(copied)[0]


def _written(trained: Trained, copies: list[Tensor], group: Any) -> dict[str, float]:
    """The other ways to write the same state."""
    synchronous, _ = trained.timed(lambda: trained.begin("synchronous"))
    file, folder = trained.folder / f"{trained.world.rank}.bin", trained.folder / "torch"
    plain, _ = trained.timed(lambda: _write_plainly(copies, file))
    file.unlink()
    named = {f"{trained.world.rank}.{number}": tensor for number, tensor in enumerate(trained.state())}
    began = time.perf_counter()
    torch_stall, saving = trained.timed(lambda: async_save(
        named, checkpoint_id=folder, process_group=group, no_dist=group is None))
    assert not isinstance(saving, tuple)
    saving.result()
    torch_seconds = max(distributed.gather(time.perf_counter() - began))
    if trained.world.is_main:
        shutil.rmtree(folder)
    return {"synchronous": synchronous, "plain": plain, "torch_stall": torch_stall, "torch": torch_seconds}


def _write_plainly(contents: list[Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        for content in contents:
            file.write(content.numpy().data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _busy() -> Iterator[None]:
    """Another process hashes: what two cores of this machine take from each other, whatever they do."""
    other = subprocess.Popen([sys.executable, "-c", "import hashlib\nwhile True: hashlib.sha256(bytes(1 << 24))"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def writing(trained: Trained, turns: int) -> dict[str, Any]:
    """Seconds of steps while a checkpoint is written, of as many without, and of as many beside another process."""
    found: list[dict[str, list[float]]] = []
    trained.begin("asynchronous").finish()
    for _ in range(turns):
        saves = trained.begin("asynchronous")
        beside = [trained.timed(trained.step)[0]]  # it does not go on with the checkpoint, which is what is timed
        while not trained.all_ready(saves):
            beside.append(trained.timed(trained.step)[0])
        saves.finish()
        beside = beside[:-1] or beside  # the last one has outlasted the writing
        found.append({"writing": beside, "alone": [trained.timed(trained.step)[0] for _ in beside]})
        with _busy():
            found[-1]["busy"] = [trained.timed(trained.step)[0] for _ in beside]
    return {"files_bytes": saves.saved[-1].bytes, "turns": found}


def throughput(trained: Trained, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of so many steps with a checkpoint, which is published in them, and without one."""
    for way in _WAYS:
        trained.begin(way).finish()
    ways = [None, *_WAYS]
    found: list[dict[str, float]] = []
    for turn in range(turns):
        order = ways[turn % len(ways):] + ways[:turn % len(ways)]
        found.append({way or "none": trained.timed(lambda: _steps(trained, steps, way))[0] for way in order})
    return {"files_bytes": trained.saves["asynchronous"].saved[-1].bytes, "turns": found, "steps": steps}


def _steps(trained: Trained, steps: int, way: str | None) -> None:
    saves = trained.begin(way) if way else None
    for _ in range(steps):
        trained.step(saves)
    if saves is not None:
        saves.finish()


def main(argv: list[str]) -> int:
    path = Path(argv[-1])
    given = json.loads(path.read_text())
    stop = StopRequest()
    world = distributed.start()
    stop.join()
    logs.start(world.rank)
    parts: dict[str, Callable[..., dict[str, Any]]] = {"stall": stall, "writing": writing,
                                                       "throughput": throughput}
    measured = []
    for number, task in enumerate(given["tasks"]):
        trained = Trained(task["model"], given["config"], path.parent / f"task-{number}", world, stop)
        found = parts[task["part"]](trained, **task["how"])
        measured.append({"part": task["part"], "model": task["model"], "parameters": trained.parameters,
                         "ranks": world.size, "stage": trained.engine.zero_stage,
                         "precision": trained.engine.precision, **found})
        trained.close()
        del trained
        gc.collect()
    if world.is_main:
        path.with_name("measured.json").write_text(json.dumps(measured))
    stop.close()
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
