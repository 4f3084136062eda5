"""Pictures of what was measured: speed and memory against size, rates and other figures beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vir.benchmarks.results import Result


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


def plot_rates(rates: Mapping[tuple[str, int, str], Sequence[float]], path: Path, unit: str, title: str) -> None:
    """A PNG: for each augmentation a panel of bars, in groups by workers; medians, with lines from least to most.

    Args:
        rates: of all rounds, by augmentation, workers and loader.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(panel for panel, _, _ in rates))
    groups = list(dict.fromkeys(workers for _, workers, _ in rates))
    loaders = list(dict.fromkeys(loader for _, _, loader in rates))
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels):
        for number, loader in enumerate(loaders):
            measured = [rates[panel, workers, loader] for workers in groups]
            middles = [statistics.median(of_rounds) for of_rounds in measured]
            ends = [[middle - min(of_rounds) for middle, of_rounds in zip(middles, measured)],
                    [max(of_rounds) - middle for middle, of_rounds in zip(middles, measured)]]
            places = [group + (number - (len(loaders) - 1) / 2) * 0.8 / len(loaders) for group in range(len(groups))]
            bars = axis.bar(places, middles, 0.75 / len(loaders), yerr=ends, capsize=2, label=loader)
            axis.bar_label(bars, fmt="%.0f", fontsize="x-small", padding=2)
        axis.set(title=panel, ylabel=unit, xticks=range(len(groups)),
                 xticklabels=[f"{workers} worker{'s' * (workers > 1)}" for workers in groups])
        axis.grid(alpha=0.3, axis="y")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title.replace(", of which", ",\nof which", 1), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, title: str) -> None:
    """A PNG: a panel of bars for each thing that was measured; medians, with lines from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 3.2 * len(panels), 4.5), squeeze=False,
                                layout="constrained", sharey=True)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (panel, measured) in zip(axes[0], panels.items()):
        middles = [statistics.median(values) for values in measured.values()]
        ends = [[middle - min(values) for middle, values in zip(middles, measured.values())],
                [max(values) - middle for middle, values in zip(middles, measured.values())]]
        engines = [name.rpartition("\n")[2] for name in measured]
        places = list(dict.fromkeys(engines))
        bars = axis.barh(list(measured), middles, xerr=ends, capsize=2,
                         color=[colors[places.index(engine)] for engine in engines])
        axis.bar_label(bars, labels=[f"{middle:.3g}" if middle < 1000 else f"{middle:,.0f}" for middle in middles],
                       fontsize="small", padding=3)
        axis.set(title=panel, xlim=(0, 1.25 * max(max(values) for values in measured.values()) or 1))
        axis.grid(alpha=0.3, axis="x")
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_learning(runs: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A PNG: for each set the loss of training above and held-out accuracy below, against epochs; a colour per model,
    a thin line per seed.

    Args:
        runs: each with `data`, `model`, and pairs of an epoch and a value in `loss` and `top1`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets, models = (list(dict.fromkeys(run[key] for run in runs)) for key in ("data", "model"))
    figure, axes = plt.subplots(2, len(sets), figsize=(1 + 5 * len(sets), 7), squeeze=False, sharex="col",
                                layout="constrained")
    for run in runs:
        column, number = sets.index(run["data"]), models.index(run["model"])
        for axis, name, mark in ((axes[0][column], "loss", "-"), (axes[1][column], "top1", "o-")):
            axis.plot(*zip(*run[name]), mark, ms=3, lw=1, alpha=0.7, color=f"C{number}")
    for column, data in enumerate(sets):
        axes[0][column].set(title=data, ylabel="training loss")
        axes[1][column].set(xlabel="epochs", ylabel="held-out top-1 %, average of weights")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    figure.legend([plt.Line2D([], [], color=f"C{number}") for number in range(len(models))], models,
                  loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)
