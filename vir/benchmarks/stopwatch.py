"""Time and memory of runs that take turns.

All rows run once in each round, so that noise hits them alike; a time is the median over rounds. Memory is the peak
during one run above what was held before it: inputs and weights are not in it, gradients and activations are.
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
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vir.benchmarks.results import Result
from vir.errors import SettingsError
from vir.models.kernels import is_out_of_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long rows run, and how much memory they may take."""

    rounds: int = 10
    """Runs of each row beside the first, which warms up and measures memory; 0: that one is timed."""
    seconds: float = 10.0
    """No further round begins after so many seconds at one size."""
    row_seconds: float = 60.0
    """A row whose run took longer is left out at larger sizes: "over time"."""
    memory_gib: float = 8.0
    """A CPU run that needs more ends as "out of memory"."""


class Stopwatch:
    """Measures all rows at one size after the other; remembers which rows have become too slow."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.limits = limits
        self.device = device
        self.slow: set[str] = set()

    def results(self, runs: Mapping[str, Callable[[], object]], direction: str, **point: Any) -> Iterator[Result]:
        """Measure all rows at one size; `point` holds the size, batch and dtype, which each result repeats."""
        failed = dict.fromkeys(self.slow & runs.keys(), "over time")
        with torch.set_grad_enabled(direction == "training"):
            times, peaks = self._first_runs(runs, failed)
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

    def _first_runs(
        self, runs: Mapping[str, Callable[[], object]], failed: dict[str, str],
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """The times that already count, and the peaks in MiB, of each row that ran; adds to `failed` what did not."""
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        for row in runs.keys() - failed.keys():
            try:
                seconds, peaks[row] = self._first_run(runs[row])
            except (MemoryError, RuntimeError) as error:
                # After some errors CUDA computes no more in this process: then the later rows tell the same.
                failed[row] = "out of memory" if _is_out_of_memory(error) else f"failed: {_first_line(error)}"
                continue
            times[row] = [seconds] if self.limits.rounds == 0 else []
            if seconds > self.limits.row_seconds:
                self.slow.add(row)
                times[row] = [seconds]
        return times, peaks

    def _seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _first_run(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds, and MiB of memory at the peak above what was held before."""
        gc.collect()
        if self.device.type == "cuda":
            run()  # compiles kernels
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            seconds = self._seconds(run)
            return seconds, (torch.cuda.max_memory_allocated(self.device) - allocated) / 2**20
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


def _is_out_of_memory(error: Exception) -> bool:
    """An illegal access to memory raises a plain RuntimeError, too; oneDNN's lack of memory is one as well."""
    return is_out_of_memory(error) or "could not create" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SettingsError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def device() -> torch.device:
    """Where training runs unless it is told otherwise: a GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> str:
    """One line: where and with what this ran."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
        name += f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    peers = ", ".join(f"{library} {version(library)}" for library in ("timm", "deepspeed", "webdataset"))
    return f"{name}; torch {torch.__version__}, {peers}; {date.today()}"


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
