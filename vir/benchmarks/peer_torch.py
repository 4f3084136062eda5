"""The other peer of tools/benchmark_training.py: the loop of PyTorch's tutorials, and nothing else.

    torchrun --module vir.benchmarks.peer_torch SETTINGS.json

DistributedDataParallel where there is more than one rank, no_sync while it accumulates, clipping, PyTorch's fused AdamW
with one group of parameters. The weights are float32; where the DeepSpeed config of the other sides says bf16 or fp16
the forward pass runs under autocast, for fp16 with a GradScaler. One batch in memory, or, with `loading`, the shards
read by PyTorch's DataLoader with timm's transforms and Mixup. times.json beside SETTINGS.json gets what `train`
returns.
"""

# Dimension key: B micro-batch, C channels, H height, W width, K classes.

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from vir.benchmarks.marks import Marks, bare_model
from vir.data.reader import ShardReader

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train timm's `model` with `model_args` for `steps` steps of `accumulation` micro-batches.

    Returns:
        What Marks tell after each further `log_every` steps; `parameters`: trainable numbers; `optimizer`: the class
        that does the update.
    """
    model, size, parameters = bare_model(settings)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings["adam"])
    network = DistributedDataParallel(model) if dist.get_world_size() > 1 else None
    half = _HALVES.get(settings["precision"])
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    marks, batches = Marks(), _batches(settings, size, device)
    for step in range(settings["steps"]):
        for micro in range(settings["accumulation"]):
            x, y = next(batches)
            is_last = micro + 1 == settings["accumulation"]
            with nullcontext() if is_last or network is None else network.no_sync():
                with torch.autocast(device.type, half, enabled=half is not None):
                    loss = F.cross_entropy((network or model)(x), y) / settings["accumulation"]
                scaler.scale(loss).backward()
        if settings["clip_grad"]:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), settings["clip_grad"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if (step + 1) % settings["log_every"] == 0:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.take()
    return {**marks.over_ranks(), "parameters": parameters, "optimizer": "torch.optim.adamw.AdamW"}


def _batches(settings: dict[str, Any], size: tuple[int, int, int],
             device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """[B, C, H, W] float32 with [B] labels or [B, K] targets, without end."""
    classes, batch, loading = settings["model_args"]["num_classes"], settings["micro_batch_size"], settings["loading"]
    if loading is None:
        x, y = torch.randn(batch, *size).to(device), torch.randint(classes, (batch,)).to(device)
        while True:
            yield x, y
    samples = _Samples(loading["train"], create_transform(size, is_training=True, **loading["transform"]))
    sampler: DistributedSampler[Any] = DistributedSampler(samples, drop_last=True)
    loader = DataLoader(samples, batch, sampler=sampler, num_workers=loading["workers"], drop_last=True,
                        pin_memory=device.type == "cuda", persistent_workers=True)
    mix = Mixup(**loading["mixup"], num_classes=classes) if loading["mixup"] else None
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            yield mix(x, y) if mix else (x, y)
        epoch += 1


class _Samples(Dataset[tuple[Tensor, int]]):
    """The images of a split, at random access."""

    def __init__(self, split: str, transform: Any) -> None:
        self._reader, self._transform = ShardReader(Path(split)), transform

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(io.BytesIO(self._reader.read(i))) as image:
            return self._transform(image.convert("RGB")), int(self._reader.labels[i])


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    path, here = Path(sys.argv[-1]), _device()
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    measured = train(json.loads(path.read_text()), here)
    if dist.get_rank() == 0:
        path.with_name("times.json").write_text(json.dumps(measured))
    dist.destroy_process_group()
