"""Speed and memory of retention and of ViR, beside named peers in the same run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vir.benchmarks.plot import plot
from vir.benchmarks.results import Result
from vir.benchmarks.stopwatch import Limits, Stopwatch, check_device, machine
from vir.benchmarks.tables import model_table
from vir.errors import DataError, SettingsError
from vir.files import replace_text, try_to_write
from vir.models import RETENTION_MODES, VisionRetention, retain, retention_decay
from vir.models.block import Block, Retention
from vir.models.build import create
from vir.models.kernels import fla_retention, fla_supports, fused_retention, fused_supports
from vir.weights.metadata import DTYPES

MODEL_ROWS = ("vit", *RETENTION_MODES, "free mixer", "stream")
KERNEL_ROWS = ("fused", "fla", "2-D fused")
"""Each kernel at all sizes; `auto` takes one of them, or none."""
OPERATOR_ROWS = ("sdpa", *RETENTION_MODES, *(f"2-D {mode}" for mode in RETENTION_MODES), *KERNEL_ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_model.py, whose --help tells each of them."""

    kind: str
    sizes: list[int] | None
    rows: list[str] | None
    dtypes: list[str]
    passes: list[str]
    batch_size: int | None
    model: str
    model_args: dict[str, Any]
    heads: int
    width: int
    device: str
    threads: int | None
    rounds: int
    seconds: float
    row_seconds: float
    memory_gib: float
    output: Path | None


def benchmark(settings: Settings, command: str) -> str:
    """Measure, and write files where the settings ask for them; returns title, command and table."""
    known = OPERATOR_ROWS if settings.kind == "operator" else MODEL_ROWS
    if unknown := [row for row in settings.rows or () if row not in known]:
        raise SettingsError(f"--rows has {unknown[0]!r}; choose from {', '.join(known)}")
    if too_small := [size for size in settings.sizes or [] if size < 1]:
        raise SettingsError(f"--sizes has {too_small[0]}; a size is at least 1")
    device = check_device(settings.device)
    rows = settings.rows or [row for row in known if not row.endswith("recurrent")
                             and (device.type == "cuda" or row not in KERNEL_ROWS)]
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.output:
        with _told(settings.output):
            settings.output.mkdir(parents=True, exist_ok=True)
            for ending in ("md", "json", "png"):
                try_to_write(settings.output / f"{settings.kind}.{ending}")
    where = machine(device)
    title = (settings.model if settings.kind == "model" else f"{settings.heads} heads of {settings.width}")
    title += f" on {where}"
    results: list[Result] = []
    text = ""
    for result in _results(settings, rows, device):
        results.append(result)
        text = f"{title}\n\n`{command}`\n\n" + model_table(results, settings.kind)
        if settings.output:  # at once: a run that is ended, or fails, keeps what it has
            content = dict(title=title, command=command, machine=where, kind=settings.kind,
                           results=[dataclasses.asdict(r) for r in results])
            _write(settings.output, text, content)
    if settings.output:
        unit = "pixels of an image side" if settings.kind == "model" else "tokens"
        with _told(settings.output):
            plot(results, settings.output / f"{settings.kind}.png", unit, title)
    return text


def _results(settings: Settings, rows: list[str], device: torch.device) -> Iterator[Result]:
    """All results, each told on stderr as soon as it is there."""
    limits = Limits(rounds=settings.rounds, seconds=settings.seconds, row_seconds=settings.row_seconds,
                    memory_gib=settings.memory_gib)
    for dtype in settings.dtypes:
        for direction in settings.passes:
            if settings.kind == "operator":
                sizes = settings.sizes or [197, 577, 1025, 4097]
                measured = operator(sizes, rows, dtype, direction, settings.batch_size, settings.heads,
                                    settings.width, device, limits)
            else:
                sizes = settings.sizes or [224, 512, 1024]
                measured = model(settings.model, sizes, rows, dtype, direction, settings.batch_size,
                                 settings.model_args, device, limits)
            for result in measured:
                print(f"{result.size} {dtype} {direction} {result.row}: "
                      f"{result.failed or f'{result.ms:.4g} ms'}", file=sys.stderr, flush=True)
                yield result


def _write(folder: Path, text: str, content: dict[str, Any]) -> None:
    with _told(folder):
        replace_text(folder / f"{content['kind']}.md", text)
        replace_text(folder / f"{content['kind']}.json", json.dumps(content, indent=1))


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Errors in it as those of --output."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write to --output {folder}: {error.strerror}; choose another "
                        f"folder") from error


def operator(
    tokens: list[int], rows: list[str], dtype: str, direction: str, batch: int | None, heads: int, width: int,
    device: torch.device, limits: Limits,
) -> Iterator[Result]:
    """The operator alone, on q, k and v as they come from one linear layer in a ViT: strided views of [B, N, 3 H K]."""
    decay, watch = retention_decay(heads).to(device), Stopwatch(limits, device)
    for size in tokens:
        images = batch or max(1, round(16 * 197 / size))
        qkv = torch.randn(images, size, 3 * heads * width, device=device, dtype=DTYPES[dtype])
        qkv.requires_grad_(direction == "training")

        def run(form: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor = qkv) -> None:
            out = form(*qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind())
            out = out.transpose(1, 2).flatten(2)
            if direction == "training":
                torch.autograd.grad(out, qkv, torch.ones_like(out))

        forms = _forms(decay, size)
        runs = {row: partial(run, forms[row]) for row in rows if row in forms}
        yield from watch.results(runs, direction, size=size, batch=images, dtype=dtype)


def _forms(decay: Tensor, tokens: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What each row computes from q, k and v; 2-D rows only where the tokens are a square and one more."""
    side = round((tokens - 1) ** 0.5)
    forms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"sdpa": F.scaled_dot_product_attention}
    forms |= {"fused": partial(_fused, decay=decay, grid=None), "fla": partial(_fla, decay=decay)}
    for mode in RETENTION_MODES:
        forms[mode] = partial(retain, decay=decay, grid=None, mode=mode)
        if side * side + 1 == tokens:
            forms[f"2-D {mode}"] = partial(retain, decay=decay, grid=(side, side), mode=mode)
            forms["2-D fused"] = partial(_fused, decay=decay, grid=(side, side))
    return forms


def _fused(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """The kernel and nothing in its place: one that does not compile is refused from its second run on."""
    if not fused_supports(q, v):
        raise RuntimeError("the fused kernel does not support this")
    return fused_retention(q, k, v, decay, grid=grid)


def _fla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """As _fused, of flash-linear-attention."""
    if not fla_supports(q, v):
        raise RuntimeError("flash-linear-attention is not installed, or does not support this")
    return fla_retention(q, k, v, decay)[0]


def model(
    name: str, sizes: list[int], rows: list[str], dtype: str, direction: str, batch: int | None,
    model_args: dict[str, Any], device: torch.device, limits: Limits,
) -> Iterator[Result]:
    """A whole ViR, and timm's ViT of the same size: forward, or forward and backward of the cross-entropy.

    The free mixer is the same ViR with a retention that returns v: what a mixer that costs nothing would reach.
    """
    if name not in (ours := timm.list_models(module="vision_retention")):
        raise SettingsError(f"--model is {name!r}; it must be one of ours: {', '.join(ours)}")
    watch = Stopwatch(limits, device)
    for size in sizes:
        images = batch or max(1, 16 * 224**2 // size**2)
        x = torch.randn(images, 3, size, size, device=device, dtype=DTYPES[dtype])
        labels = torch.zeros(images, dtype=torch.long, device=device)

        def run(net: nn.Module, x: Tensor = x, labels: Tensor = labels) -> None:
            if direction == "training":
                F.cross_entropy(net(x).float(), labels).backward()
                net.zero_grad()
            else:
                net(x)

        runs: dict[str, Callable[[], object]] = {}
        for row in rows:
            net = _network(row, name, dict(img_size=size, **model_args)).to(device, DTYPES[dtype])
            net.train(direction == "training")
            if row != "stream":
                runs[row] = partial(run, net)
            elif direction == "forward":
                runs[row] = partial(_stream, net, x)
        yield from watch.results(runs, direction, size=size, batch=images, dtype=dtype)


def _stream(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of images [B, C, H, W] that come in strips of 16 rows of pixels."""
    assert isinstance(net, VisionRetention)
    height, width = x.shape[-2:]
    return net.forward_stream(x.split(16, dim=2), (height, width))


def free_mixer(net: VisionRetention) -> VisionRetention:
    """The same network, with the same layers, whose retention returns v."""
    for block in net.blocks:
        assert isinstance(block, Block)
        block.register_module("retention", _FreeMixer(block.retention))
    return net


class _FreeMixer(nn.Module):
    def __init__(self, retention: Retention) -> None:
        super().__init__()
        self.retention = retention

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, kept: Tensor | None = None) -> Tensor:
        layers = self.retention
        v = layers.qkv(x).chunk(3, dim=-1)[2]
        return layers.proj_drop(layers.out_proj(layers.act(layers.norm(v))))


def _network(row: str, name: str, args: dict[str, Any]) -> nn.Module:
    if row == "vit":
        peer = name.replace("vir2d_", "vit_").replace("vir_", "vit_")
        ours = ("retention_dims", "retention_norm", "init_values", "class_token_std", "chunk_size")
        return create(peer, {key: value for key, value in args.items() if key not in ours})
    net = create(name, args)
    assert isinstance(net, VisionRetention)
    if row == "free mixer":
        return free_mixer(net)
    net.set_retention_mode(row if row in RETENTION_MODES else "auto")
    return net
