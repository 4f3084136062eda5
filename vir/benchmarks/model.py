"""Speed and memory of retention and of ViR, beside named peers in the same run.

Rows take turns round by round, so that noise hits all of them alike; a time is the median over rounds. Memory is the
peak during one run above what was held before it: inputs and weights are not in it, gradients and activations are.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import create_model
from torch import Tensor, nn
from torch.nn import functional as F

from vir.errors import SettingsError
from vir.models import RETENTION_MODES, VisionRetention, retain, retention_decay

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "training")
FAILED = ("out of memory", "over time")

MODEL_ROWS = ("vit", *RETENTION_MODES, "free mixer", "stream")
OPERATOR_ROWS = ("sdpa", *RETENTION_MODES, *(f"2-D {mode}" for mode in RETENTION_MODES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One row at one size."""

    row: str
    size: int
    """Tokens of the operator, or pixels of an image side."""
    batch: int
    dtype: str
    direction: str
    """One of PASSES; training is forward and backward."""
    ms: float | None
    """Median of one run."""
    ms_quartiles: tuple[float, float] | None
    peak_mib: float | None
    failed: str | None
    """One of FAILED, and no times."""

    @property
    def per_second(self) -> float | None:
        """Images, or sequences, per second."""
        return None if self.ms is None else 1000 * self.batch / self.ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    rounds: int = 10
    """Runs of each row beside the first, which warms up and measures memory; 0: that one is timed."""
    seconds: float = 10.0
    """No further round begins after so many seconds at one size."""
    row_seconds: float = 60.0
    """A row whose run took longer is left out at larger sizes: "over time"."""
    memory_gib: float = 8.0
    """A CPU run that needs more ends as "out of memory"."""


def operator(
    tokens: list[int], rows: list[str], dtype: str, direction: str, batch: int | None, heads: int, width: int,
    device: torch.device, limits: Limits,
) -> Iterator[Result]:
    """The operator alone, on q, k and v as they come from one linear layer in a ViT: strided views of [B, N, 3 H K]."""
    decay, watch = retention_decay(heads).to(device), _Stopwatch(limits, device)
    for size in tokens:
        images = batch or max(1, round(16 * 197 / size))
        qkv = torch.randn(images, size, 3 * heads * width, device=device, dtype=DTYPES[dtype])
        qkv.requires_grad_(direction == "training")
        side = round((size - 1) ** 0.5)

        def run(form: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor = qkv) -> None:
            out = form(*qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind())
            out = out.transpose(1, 2).flatten(2)
            if direction == "training":
                torch.autograd.grad(out, qkv, torch.ones_like(out))

        forms = {"sdpa": F.scaled_dot_product_attention}
        for mode in RETENTION_MODES:
            forms[mode] = lambda q, k, v, mode=mode: retain(q, k, v, decay, None, mode)
            if side * side + 1 == size:
                grid = (side, side)
                forms[f"2-D {mode}"] = lambda q, k, v, mode=mode, grid=grid: retain(q, k, v, decay, grid, mode)
        runs = {row: lambda form=forms[row]: run(form) for row in rows if row in forms}
        yield from watch.results(runs, direction, size=size, batch=images, dtype=dtype)


def model(
    name: str, sizes: list[int], rows: list[str], dtype: str, direction: str, batch: int | None,
    model_args: dict[str, Any], device: torch.device, limits: Limits,
) -> Iterator[Result]:
    """A whole ViR, and timm's ViT of the same size: forward, or forward and backward of the cross-entropy.

    The free mixer is the same ViR with a retention that returns v: what a mixer that costs nothing would reach.
    """
    if name not in (ours := timm.list_models(module="vision_retention")):
        raise SettingsError(f"--model is {name!r}; it must be one of ours: {', '.join(ours)}")
    watch = _Stopwatch(limits, device)
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

        runs = {}
        for row in rows:
            net = _network(row, name, dict(img_size=size, **model_args)).to(device, DTYPES[dtype])
            net.train(direction == "training")
            if row != "stream":
                runs[row] = lambda net=net: run(net)
            elif direction == "forward":
                runs[row] = lambda net=net, size=size, x=x: net.forward_stream(x.split(16, dim=2), (size, size))
        yield from watch.results(runs, direction, size=size, batch=images, dtype=dtype)


def free_mixer(net: VisionRetention) -> VisionRetention:
    """The same network, with the same layers, whose retention returns v."""
    for block in net.blocks:
        block.retention = _FreeMixer(block.retention)
    return net


class _FreeMixer(nn.Module):
    def __init__(self, retention: nn.Module) -> None:
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
        return create_model(peer, **{key: value for key, value in args.items() if key not in ours})
    net = create_model(name, **args)
    if row == "free mixer":
        return free_mixer(net)
    net.set_retention_mode(row if row in RETENTION_MODES else "auto")
    return net


class _Stopwatch:
    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.limits = limits
        self.device = device
        self.slow: set[str] = set()

    def results(self, runs: dict[str, Callable[[], None]], direction: str, **point: Any) -> Iterator[Result]:
        """Measure all rows at one size."""
        with torch.set_grad_enabled(direction == "training"):
            peaks, failed, times = {}, dict.fromkeys(self.slow & runs.keys(), "over time"), {}
            for row in runs.keys() - failed.keys():
                try:
                    first, peaks[row] = self._first_run(runs[row])
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if isinstance(error, RuntimeError) and "memory" not in str(error):
                        raise
                    failed[row] = "out of memory"
                    continue
                times[row] = [first] if self.limits.rounds == 0 else []
                if first > self.limits.row_seconds:
                    self.slow.add(row)
                    times[row] = [first]
            start, taking_turns = time.perf_counter(), [row for row in times if not times[row]]
            for _ in range(self.limits.rounds):
                for row in taking_turns:
                    times[row].append(self._seconds(runs[row]))
                if time.perf_counter() - start > self.limits.seconds:
                    break
        for row in runs:
            ms = sorted(1000 * t for t in times.get(row, ()))
            quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [*ms, *ms, *ms]
            yield Result(
                row=row, direction=direction, ms=statistics.median(ms) if ms else None,
                ms_quartiles=(quartiles[0], quartiles[2]) if ms else None, peak_mib=peaks.get(row),
                failed=failed.get(row), **point)

    def _seconds(self, run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _first_run(self, run: Callable[[], None]) -> tuple[float, float]:
        """Seconds, and MiB of memory at the peak above what was held before."""
        gc.collect()
        if self.device.type == "cuda":
            run()  # compiles kernels
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            seconds = self._seconds(run)
            return seconds, (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, falls to VmRSS
        before, held = _status_mib("VmHWM"), _status_mib("VmData")
        old = resource.getrlimit(resource.RLIMIT_DATA)
        limit = int((held + 1024 * self.limits.memory_gib) * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, old[1]))
        try:
            seconds = self._seconds(run)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, old)
        return seconds, _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SettingsError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def machine(device: torch.device) -> str:
    """One line: where and with what this ran."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
        name += f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, timm {timm.__version__}; {date.today()}"


def table(results: list[Result], peer: str) -> str:
    """Markdown: times with quartiles, memory, and how many times faster than the peer and as the free mixer."""
    columns = ("size", "batch", "dtype", "pass", "row", "ms (quartiles)", "per second", f"× {peer}", "of free mixer",
               "peak MiB")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    at = {(r.row, r.size, r.dtype, r.direction): r for r in results}
    for r in results:
        start = f"| {r.size} | {r.batch} | {r.dtype} | {r.direction} | {r.row} |"
        if r.ms is None:
            lines.append(f"{start} {r.failed} | | | | |")
            continue
        ratios = []
        for other in (peer, "free mixer"):
            other = at.get((other, r.size, r.dtype, r.direction))
            ratios.append("" if other is None or other.ms is None else f"{other.ms / r.ms:.2f}")
        low, high = r.ms_quartiles
        lines.append(f"{start} {r.ms:.4g} ({low:.4g}–{high:.4g}) | {r.per_second:.4g} | {ratios[0]} | {ratios[1]} "
                     f"| {r.peak_mib:.0f} |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path, unit: str, title: str) -> None:
    """A PNG: for each precision and pass, speed above and peak memory below, against size; one line per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    columns = sorted({(r.dtype, r.direction) for r in results})
    rows = list(dict.fromkeys(r.row for r in results))
    figure, axes = plt.subplots(2, len(columns), figsize=(1 + 5 * len(columns), 8), squeeze=False,
                                layout="constrained", sharex=True)
    for column, (dtype, direction) in enumerate(columns):
        above, below = axes[:, column]
        for axis, value, label in ((above, "per_second", "images/s"), (below, "peak_mib", "peak MiB")):
            for row, color in zip(rows, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 2):
                points = [(r.size, getattr(r, value)) for r in results
                          if (r.row, r.dtype, r.direction) == (row, dtype, direction) and getattr(r, value)]
                axis.plot(*zip(*points), "o-", ms=4, label=row, color=color) if points else None
            axis.set(xscale="log", yscale="log", ylabel=label, title=f"{dtype}, {direction}")
            sizes = sorted({r.size for r in results})
            axis.xaxis.set_major_locator(FixedLocator(sizes))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticklabels([str(size) for size in sizes])
            axis.grid(alpha=0.3, which="both")
        axes[1][column].set_xlabel(unit)
    axes[0][0].legend()
    figure.suptitle(title.replace(" on ", "\non ", 1).replace("; ", "\n", 1), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check_device(name: str) -> torch.device:
    """The device of that name, or SettingsError."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device is {name!r}, which torch {torch.__version__} cannot use here: "
                            f"{str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"--device is {name!r}; it must be cpu or cuda")
    if device.type == "cpu" and sys.platform != "linux":
        raise SettingsError("on CPU, memory is measured on Linux only")
    return device
