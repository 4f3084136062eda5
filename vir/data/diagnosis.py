"""Which part of loading bounds the images per second of a run, and what to change: from figures to a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from vir import launcher
from vir.addresses import is_remote, parts
from vir.config import RunConfig
from vir.data.jpeg import decodes_fast
from vir.data.loader import processes_for
from vir.data.stages import Spent

STAGES = ("read", "decode", "augment", "collate")
"""Those that a loader process is in one after the other."""
ENOUGH = 0.95
"""Of what is needed: a loader of this speed is not what training waits for."""
_BUSY = 0.85
"""The share of the cores above which more loader processes would only take them from each other."""
_WAITS = 0.5
"""The share of a process's time above which it is what counts: a loader process's wait for bytes, a trainer's work."""
_TRAINER = 0.8
"""The share of the time above which taking or copying batches leaves none for anything else."""
_LARGE = 512
"""Pixels of the shorter side that training at 224 has use for."""
_MORE = "more cores for each rank, or fewer ranks on the machine"


class Bound(Enum):
    """What the images per second follow from."""

    MODEL = "the model"
    READ = "reading"
    DECODE = "decoding"
    AUGMENT = "augmentation"
    COLLATE = "collation"
    HAND_OVER = "taking batches from the loader processes"
    COPY = "copying to the device"
    WORKERS = "too few loader processes"
    CORES = "too few cores"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one rank."""

    spent: Spent
    """Of its loader processes, over some batches."""
    workers: int
    cores: int
    """That this process may use, with its loader processes."""
    share: int
    """That it would have, were it not for an affinity, a container's limit or srun."""
    ranks: int = 1
    """For how many, this one among them, such a limit is."""
    rate: float
    """Images/s while `spent` was spent."""
    trainer: float = 0.0
    """CPU seconds per second of the process that took the batches meanwhile."""
    needed: float | None = None
    """Images/s with a loader that costs nothing."""
    hand_over: float = 0.0
    """Seconds per image in which the trainer takes a batch that is ready."""
    copy: float = 0.0
    """Seconds per image to the device."""
    storage: float | None = None
    """Bytes/s of reading alone."""
    side: float | None = None
    """Pixels of the shorter side of an image, in the middle."""
    is_remote: bool = False
    """The images come from a server, and are kept in no cache."""
    decodes_fast: bool = True
    """With the quickest decoder that there is."""
    policy: str | None = None
    """--augment.auto_augment."""
    micro_batch_size: int = 0

    @classmethod
    def of_run(cls, config: RunConfig) -> Figures:
        """What is known of this rank before anything is measured."""
        return cls(spent=Spent(), workers=processes_for(config.data.workers), cores=launcher.cores(),
                   share=launcher.share_of_machine(), ranks=launcher.sharing(), rate=0.0,
                   is_remote=any(map(is_remote, parts(config.data.train))) and not config.data.cache,
                   decodes_fast=decodes_fast(), policy=config.augment.auto_augment,
                   micro_batch_size=config.train.micro_batch_size)

    def each(self, stage: str) -> float:
        """Seconds of an image in a stage, or another field of Spent."""
        return float(getattr(self.spent, stage)) / max(1, self.spent.images)

    @property
    def waits(self) -> float:
        """Seconds of an image in which a loader process waits for bytes: reads them, and has no CPU time."""
        return max(0.0, min(self.each("read"), self.each("total") - self.each("cpu")))

    @property
    def busy(self) -> float:
        """Cores that loader processes and trainer keep at work."""
        return self.each("cpu") * self.rate + self.trainer

    @property
    def room(self) -> int:
        """Loader processes that the cores have room for."""
        return max(1, self.cores - 1)

    @property
    def needed_bytes(self) -> float | None:
        """Bytes/s that storage must give for what is needed."""
        return None if self.needed is None else self.needed * self.each("bytes")


@dataclass(frozen=True)
class Diagnosis:
    bound: Bound
    why: str
    """With the figures that it follows from."""
    change: str
    """What would raise the rate, as a command or a flag."""

    def __str__(self) -> str:
        return f"{self.bound.value}: {self.why}; {self.change}"


def diagnose(figures: Figures) -> Diagnosis:
    """The first of these that holds.

    The loader gives what is needed. The trainer's process is taken up by batches. Loader processes mostly wait for
    bytes. Cores are idle, and there is room for more processes. Something keeps cores of the machine from this process,
    or there are more processes than cores. Else it is the greatest stage.
    """
    f, total = figures, max(figures.each("total"), 1e-9)
    if f.needed is not None and f.rate >= ENOUGH * f.needed:
        return Diagnosis(Bound.MODEL, f"the loader gives {f.rate:,.0f} images/s, training takes {f.needed:,.0f}",
                         "nothing of the loader to change; a smaller model or a larger --train.micro_batch_size may "
                         "train faster")
    if f.copy * f.rate >= _TRAINER:
        return Diagnosis(Bound.COPY, f"{_ms(f.copy)} an image, {f.rate:,.0f} images/s",
                         "look at the link to the device (nvidia-smi -q -d PERFORMANCE, PCIe width), or lower "
                         "--model.img_size")
    if f.hand_over * f.rate >= _TRAINER and f.trainer >= _WAITS:  # else it waited for a core
        return Diagnosis(Bound.HAND_OVER, f"{_ms(f.hand_over)} an image in the trainer's process, {f.rate:,.0f} "
                                          "images/s", f"--train.micro_batch_size {2 * f.micro_batch_size}")
    if f.waits >= _WAITS * total:
        return _of_reading(f, total)
    if f.workers < f.room and f.busy < _BUSY * f.cores:
        idle = max(0.0, f.cores - f.busy)
        return Diagnosis(Bound.WORKERS, f"{_processes(f.workers)} of {_ms(total)} an image for {f.cores} cores, of "
                                        f"which {idle:.1f} are idle", f"--data.workers {_workers(f, total)}")
    if f.cores < f.share or f.workers > f.cores:
        return _of_cores(f, total)
    return _of_stage(f, total)


def _of_reading(f: Figures, total: float) -> Diagnosis:
    why = f"loader processes wait {_ms(f.waits)} of {_ms(total)} an image for bytes"
    if f.storage is not None:
        need = "" if f.needed_bytes is None else f" of {f.needed_bytes / 1e6:,.0f} needed"
        why += f"; the storage gives {f.storage / 1e6:,.0f} MB/s{need}"
    if f.is_remote:
        return Diagnosis(Bound.READ, why, "--data.cache FOLDER, on a disk of this machine")
    if f.workers < f.room and f.busy < _BUSY * f.cores:
        return Diagnosis(Bound.READ, why, f"--data.workers {_workers(f, total)} reads more at the same time; else copy "
                                          "the shards to a faster disk and name them by --data.train")
    return Diagnosis(Bound.READ, why, "copy the shards to a faster disk and name them by --data.train" + (
        f", made smaller by vir-convert --resize-short {_LARGE}" if _is_large(f) else ""))


def _of_cores(f: Figures, total: float) -> Diagnosis:
    wanted = f.workers + 1 if f.needed is None else 1 + math.ceil(f.needed * total)
    why = (f"{_processes(f.workers)} of {_ms(f.each('cpu'))} of CPU time an image share {_cores(f.cores)} with the "
           "trainer" + (f", of {f.share} that the machine has for it" if f.share > f.cores else ""))
    if f.share > f.cores:
        most = min(max(wanted, f.cores + 1), f.share)
        whom, count = "it" if f.ranks == 1 else f"the {f.ranks} ranks of the machine", most * f.ranks
        return Diagnosis(Bound.CORES, why, f"give {whom} {count}: srun --cpus-per-task {count}, docker run --cpus "
                                           f"{count}, taskset, or the limit of the pod" + _or_less(f))
    return Diagnosis(Bound.CORES, why, f"--data.workers {f.room}{_or_less(f)}")


def _or_less(f: Figures) -> str:
    """Work that could be saved, where there are no more cores."""
    found = _of_stage(f, max(f.each("total"), 1e-9))
    return f"; or less of {found.bound.value}: {found.change}"


def _of_stage(f: Figures, total: float) -> Diagnosis:
    """Of the greatest stage that takes CPU time."""
    taken = {stage: f.each(stage) - (f.waits if stage == "read" else 0.0) for stage in STAGES}
    stage = max(taken, key=taken.__getitem__)
    why = f"{_ms(taken[stage])} of {_ms(total)} an image, in {_processes(f.workers)} on {_cores(f.cores)}"
    return Diagnosis(*{
        "read": (Bound.READ, f"{why}, to copy and check bytes that are at hand", "".join(_smaller(f)) or _MORE),
        "decode": (Bound.DECODE, why, _less_decoding(f)),
        "augment": (Bound.AUGMENT, why, _less_augmentation(f)),
        "collate": (Bound.COLLATE, why, "more memory, or a lower --data.prefetch")}[stage])


def _less_decoding(f: Figures) -> str:
    ways = _smaller(f)
    if not f.decodes_fast:
        ways.append("pip install 'vir-at-scale[fast]'")
    return ", and ".join(ways) or _MORE


def _smaller(f: Figures) -> list[str]:
    if not _is_large(f):
        return []
    return [f"images have {f.side:,.0f} pixels on their shorter side: vir-convert --resize-short {_LARGE}"]


def _less_augmentation(f: Figures) -> str:
    if f.policy:
        return (f"fewer operations than --augment.auto_augment {f.policy} has, as rand-m9-n1, or null for none; or "
                "more cores for each rank")
    return "--augment.color_jitter 0 where it is not needed, or more cores for each rank"


def _is_large(f: Figures) -> bool:
    return f.side is not None and f.side > 1.25 * _LARGE


def _workers(f: Figures, total: float) -> int:
    """Enough for what is needed, where that is known; no more than there is room for."""
    enough = f.room if f.needed is None else math.ceil(f.needed * total)
    return min(f.room, max(enough, f.workers + 1))


def _processes(count: int) -> str:
    return f"{count} loader process{'' if count == 1 else 'es'}"


def _cores(count: int) -> str:
    return f"{count} core{'' if count == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
