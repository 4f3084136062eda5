"""A plan as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir.planning.estimate import Estimate
from vir.planning.page import PARTS, parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 60


def draw(plan: Estimate, path: Path) -> None:
    """Its ending names the format; see reports.curves.check_picture."""
    drawn(plan).savefig(path, dpi=110)


def drawn(plan: Estimate) -> Figure:
    """Memory by DeepSpeed JSON, images/s that each part allows, traffic by cache, and goodput by cadence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (memory, rates), (caches, cadence) = figure.subplots(2, 2)
    _memory(memory, plan)
    _rates(rates, plan)
    _caches(caches, plan)
    _cadence(cadence, plan)
    for axis in (memory, rates, caches, cadence):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="x-small")
    figure.suptitle(f"{plan.model}, {plan.chosen.name}, {plan.cluster.world} {plan.cluster.gpu.name}: estimates")
    return figure


def _memory(axis: Any, plan: Estimate) -> None:
    from matplotlib import colormaps

    known = {choice.name: parts(choice.memory) for choice in plan.choices if choice.memory is not None}
    left = [0.0] * len(known)
    for title, color in zip(PARTS.values(), colormaps["tab20"](range(len(PARTS)))):
        sizes = [of_choice.get(title, 0) / 1e9 for of_choice in known.values()]
        if any(sizes):
            axis.barh(list(known), sizes, left=left, color=color, label=title)
            left = [start + size for start, size in zip(left, sizes)]
    axis.axvline(plan.cluster.gpu.memory / 1e9, color="black", label="what it has")
    axis.set(title=f"memory of a GPU, micro-batches of {plan.micro_batch_size}", xlabel="GB")


def _rates(axis: Any, plan: Estimate) -> None:
    shown = {**plan.rates, **({"the run": plan.images_per_second} if plan.images_per_second else {})}
    for part, ends in shown.items():
        axis.plot(ends, [part, part], "|-", linewidth=6, markersize=16)
    axis.set(title="images/s that each part allows, from the worst to the best case",
             xscale="log" if shown else "linear")
    axis.margins(0.1, 0.2)


def _caches(axis: Any, plan: Estimate) -> None:
    if plan.traffic is not None:
        rows = plan.traffic.table
        sizes = [row.cache_bytes / 1e9 for row in rows]
        axis.plot(sizes, [row.fetched.downloads_per_shard for row in rows], "o-", label="downloads per shard")
        axis.plot(sizes, [row.fetched.in_parts for row in rows], "s--", label="share read in parts")
        axis.set(xscale="log", xlabel="cache of a node, GB", ylim=(0, None))
    axis.set(title="first epoch")


def _cadence(axis: Any, plan: Estimate) -> None:
    found = plan.checkpoints
    if found is not None:
        ends = min(found.best.interval_seconds, found.as_set.interval_seconds) / 8, 8 * max(
            found.best.interval_seconds, found.as_set.interval_seconds)
        times = [ends[0] * (ends[1] / ends[0]) ** (at / (_POINTS - 1)) for at in range(_POINTS)]
        axis.plot([time / 60 for time in times], [100 * found.goodput(time) for time in times])
        for title, one in (("best", found.best), ("as set", found.as_set)):
            axis.plot(one.interval_seconds / 60, 100 * one.goodput, "o", label=title)
        axis.set(xscale="log", xlabel="minutes of work between checkpoints", ylabel="% of the time is of use")
    axis.set(title="checkpoints and failures")


if __name__ == "__main__":
    raise SystemExit("vir.planning.picture is a part of the library; the program is vir-plan")
