"""A picture of one or several runs from their metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from vir.errors import DataError, SettingsError
from vir.output_folder import check_file
from vir.reports.metrics import read_metrics
from vir.run_folder import METRICS


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Write a picture with loss, accuracy, learning rate and images/s over epochs.

    Args:
        output: its ending names the format.

    Raises:
        SettingsError: `output` has no ending of a picture, or cannot be written.
        DataError: a folder that is not a run, or whose metrics are damaged.
    """
    from matplotlib.figure import Figure

    recorded = [(run, _curves(run)) for run in runs]
    check_picture("--output", output)
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2, sharex=True)
    for run, events in recorded:
        train = [event for event in events if event["kind"] == "train"]
        evals = [event for event in events if event["kind"] == "eval"]
        label = f"{run.name}: " if len(runs) > 1 else ""
        epochs = [event["epoch"] for event in train]
        eval_epochs = [event["epoch"] for event in evals]
        loss.plot(epochs, [event["loss"] for event in train], label=f"{label}training")
        for name, kind in (("loss", "validation"), ("ema_loss", "validation, EMA")):
            if any(name in event for event in evals):
                loss.plot(eval_epochs, [event.get(name, float("nan")) for event in evals], "o-", ms=3,
                          label=f"{label}{kind}")
        for name, kind in (("top1", "top-1"), ("ema_top1", "top-1, EMA")):
            if any(name in event for event in evals):
                accuracy.plot(eval_epochs, [event.get(name, float("nan")) for event in evals], "o-", ms=3,
                              label=f"{label}{kind}")
        rate.plot(epochs, [event["lr"] for event in train], label=label.rstrip(": ") or None)
        speed.plot(epochs, [event["images_per_second"] for event in train], label=label.rstrip(": ") or None)
    for axis, title in ((loss, "cross-entropy"), (accuracy, "validation accuracy, %"), (rate, "learning rate"),
                        (speed, "training images/s")):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    speed.set_ylim(bottom=0)
    for axis in (rate, speed):
        axis.set_xlabel("epoch")
    figure.suptitle(", ".join(run.name for run in runs))
    try:
        figure.savefig(output, dpi=110)
    except OSError as error:
        raise DataError(f"{output} could not be written: {error.strerror}") from error


def _curves(run: Path) -> list[dict[str, Any]]:
    """The events of training and validation, each with all that is drawn of it."""
    needed = {"train": ("epoch", "loss", "lr", "images_per_second"), "eval": ("epoch",)}
    events = [event for event in read_metrics(run) if event["kind"] in needed]
    for event in events:
        if missing := [name for name in needed[event["kind"]] if name not in event]:
            raise DataError(f"{run / METRICS}: the {event['kind']} event of step {event['step']} has no "
                            f"{', '.join(missing)}; it is not of a run of this version")
    # null: no finite loss in that interval
    return [{name: float("nan") if value is None else value for name, value in event.items()} for event in events]


def check_picture(flag: str, output: Path) -> None:
    """Raises SettingsError where it has no ending of a picture, or cannot be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix.lower().removeprefix(".") not in formats:
        raise SettingsError(f"{flag} {output} has not the ending of a picture; give a name such as "
                            f"{output.with_suffix('.png').name} (known: {', '.join(sorted(formats))})")
    check_file(flag, output)


if __name__ == "__main__":
    raise SystemExit("vir.reports.curves is a part of the library; the program is tools/plot_run.py of the sources")
