"""A picture of speed and memory against size."""

from __future__ import annotations

from pathlib import Path

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
