"""A page of one or several runs for a browser: one file of HTML that needs nothing else."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vir import files
from vir.config import differences
from vir.errors import DataError
from vir.output_folder import writing
from vir.reports.metrics import read_metrics
from vir.reports.spikes import find_spikes
from vir.run_folder import CONFIG, DS_CONFIG, LOCK, LOG, METRICS

Explain = Callable[[Path], tuple[list[dict[str, Any]], str]]
"""From a run to its spikes as vir-explain tells them, and to what it says beside."""

KINDS = {"resumed": "continuing after step ", "checkpoint": "checkpoint ", "stopped": "stopped by ",
         "straggler": "straggler: ", "skipped steps": None, "replaced samples": None}
"""What happens to a run, and how its line in the log begins; the metrics count the others."""
_PLOTS = {"loss": {"train loss": "training", "eval loss": "validation", "eval ema_loss": "validation, EMA"},
          "top-1, %": {"eval top1": "validation", "eval ema_top1": "validation, EMA"},
          "learning rate": {"train lr": ""}, "gradient norm": {"train grad_norm": ""},
          "images/s": {"train images_per_second": ""}, "data wait": {"train data_wait": ""}, "MFU": {"train mfu": ""}}
"""By title: kind of event and name of the value, with a label."""
_DRAWN, _TOLD, _WORST, _SPIKES = 300, 100, 15, 5
"""Marks of a kind, marks in the table, classes, spikes: so the page stays small."""
_OF_CLASSES = {"class", "images", "top1", "taken_for", "taken_for_images"}
"""Columns of vir-evaluate's --per-class."""
_NONCE = secrets.token_urlsafe(16)


def watch(runs: Sequence[Path], evaluations: Sequence[Path], output: Path, explain: Explain, every: float) -> None:
    """Write the page whenever a file of the runs has changed, until all of them are done. Raises as write()."""
    seen: list[dict[str, Any]] = []
    before: object = None
    while not seen or any(run["state"] != "done" for run in seen):
        # A lock is asked for where a run has it: to ask takes one that is free, and must keep no run out.
        now: list[Any] = [files.is_locked(run["folder"] / LOCK) for run in seen if run["state"] == "running"]
        for path in (path for run in runs for path in (run / CONFIG, run / METRICS, run / LOG, *_results(run))):
            with suppress(OSError):
                now.append((path, path.stat().st_mtime_ns, path.stat().st_size))
        if now != before:
            seen, before = write(runs, evaluations, output, explain, every), now
        time.sleep(every)


def write(runs: Sequence[Path], evaluations: Sequence[Path], output: Path, explain: Explain,
          reload: float | None = None) -> list[dict[str, Any]]:
    """Write the page, and return what is told of each run.

    Args:
        evaluations: files of vir-evaluate, beside those in the run folders.
        reload: seconds after which the page loads itself anew, until all runs are done.

    Raises DataError: a folder that is no run, or whose files are damaged; the page cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    seen = [_look_at(run, explain) for run in runs]
    results, classes, problems = _read_results(evaluations, [path for run in runs for path in _results(run)])
    data = {"reload": reload if any(run["state"] != "done" for run in seen) else None, "kinds": list(KINDS),
            "plots": _plots(seen), "runs": [{"name": run["name"], "marks": _drawn(run["marks"])} for run in seen]}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "when": _when}
    page = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).render(
        nonce=_NONCE, runs=seen, results=results, classes=classes, problems=problems, kinds=list(KINDS), told=_TOLD,
        written=time.time(), data=data, differences=lambda one, other: differences(one, other, skips=()))
    with writing(output):
        files.replace_text(output, page.encode(errors="replace").decode())  # names that are no UTF-8
    return seen


def _look_at(folder: Path, explain: Explain) -> dict[str, Any]:
    """All that the folder of a run tells; it may be running meanwhile."""
    if not any((folder / name).is_file() for name in (CONFIG, METRICS, LOG, LOCK)):
        raise DataError(f"{folder} {'is no run folder' if folder.is_dir() else 'is not there'}; give the --output of a "
                        "training run")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder / CONFIG} cannot be read: {error}; copy it again") from error
    events = read_metrics(folder) if (folder / METRICS).is_file() else []
    train, evals = ([event for event in events if event["kind"] == kind] for kind in ("train", "eval"))
    log = list(_lines(folder / LOG))
    start = [said for _, said in log[max((at for at, (_, said) in enumerate(log) if said.startswith("command: ")),
                                         default=0):]]
    facts = start[:next((at for at, said in enumerate(start) if said.startswith(("step ", "continuing "))), None)]
    last = train[-1] if train else {"step": 0}
    total = last.get("total_steps") or next(
        (int(match[1]) for said in facts if (match := re.match(r"(\d+) steps of ", said))), None)
    if files.is_locked(folder / LOCK):
        state = "running"
    elif not train and not log:
        state = "not begun"
    elif any(said.startswith("done: ") for said in start):
        state = "done"
    else:
        state = "stopped" if any(said.startswith("stopped by ") for said in start) else "failed, or killed"
    pace = np.mean([event["samples_seen"] / event["step"] / event["images_per_second"] for event in train[-20:]
                    if event.get("images_per_second") and event.get("samples_seen")] or [math.nan])  # seconds a step
    spikes = find_spikes(events)
    explained, beside = explain(folder) if spikes else ([], "")
    steps = {(spike["name"], spike["last"]): spike["steps"] for spike in explained}
    return {"folder": folder, "name": folder.resolve().name, "config": config if isinstance(config, dict) else {},
            "events": events, "state": state, "last": last, "total": total,
            "left": timedelta(seconds=round((total - last["step"]) * pace)) if total and pace > 0 else None,
            "facts": facts, "marks": _marks(log, events, train), "more_spikes": len(spikes[_SPIKES:]), "beside": beside,
            "spikes": [(spike, steps.get((spike.name, spike.last), [])) for spike in spikes[:_SPIKES]],
            "best": {name: max((event for event in evals if math.isfinite(_finite(event.get(name)))),
                               key=lambda event: event[name], default=None) for name in ("top1", "ema_top1")}}


def _lines(path: Path) -> Iterator[tuple[float, str]]:
    """Time, by this machine's zone, and text of each line of a log."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, OverflowError):  # a second line of a message
                yield time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")), line[20:].rstrip("\n")


def _marks(log: Sequence[tuple[float, str]], events: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]
           ) -> list[tuple[str, float, list[float | None], str]]:
    """What has happened: kind, time, place on the axes, words; the last first."""
    logged = {int(match[1]): at for at, said in log if (match := re.match(r"step (\d+)[/:]", said))}
    apart = [_finite(event.get("time")) - logged[event["step"]] for event in events if event["step"] in logged]
    zone = 900 * round(float(np.nanmedian(apart)) / 900) if np.isfinite(apart).any() else 0  # of the run's machine
    axes, bad, step = _axes(train, events), 0, 0
    told = [(kind, at + zone, said[:300]) for at, said in log for kind, begin in KINDS.items()
            if begin and said.startswith(begin)]
    hours = np.array([max(0.0, at - _finite(events[0].get("time"))) / 3600 if events else 0.0 for _, at, _ in told])
    places = [np.interp(hours, axes[:, 2], axis) if train else 0 * hours for axis in axes.T[:2]]
    marks = [(kind, at, _plain(*place), said) for (kind, at, said), *place in zip(told, *places, hours)]
    places_of_train = iter(axes)
    for event in events:
        if event["kind"] == "start":
            bad = 0  # each start counts them anew
        if event["kind"] != "train":
            continue
        place = next(places_of_train)
        counts = {"skipped steps": event.get("skipped") or 0, "replaced samples": (event.get("bad_samples") or 0) - bad}
        marks += [(kind, _finite(event.get("time")), _plain(*place), f"{count} in steps {step + 1} to {event['step']}")
                  for kind, count in counts.items() if count > 0]
        bad, step = event.get("bad_samples") or 0, event["step"]
    return sorted(marks, key=lambda mark: -mark[1])


def _axes(some: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> np.ndarray:
    """Where some of the events lie, [N, 3]: step, epoch, hours from the first event."""
    begin = _finite(events[0].get("time")) if events else 0.0
    return np.array([(event["step"], _finite(event.get("epoch")), (_finite(event.get("time")) - begin) / 3600)
                     for event in some], float).reshape(-1, 3)


def _plots(seen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have a number, with lines of points: step, epoch, hours, value."""
    plots = []
    for title, curves in _PLOTS.items():
        lines = []
        for (number, run), (curve, (name, label)) in itertools.product(enumerate(seen), enumerate(curves.items())):
            events = [event for event in run["events"] if event["kind"] == name.split()[0]]
            values = np.array([_finite(event.get(name.split()[1])) for event in events], float)
            if np.isfinite(values).any():
                points = np.column_stack([_axes(events, run["events"]), values])[thinned(values)]
                lines.append({"run": number, "curve": curve, "label": label, "points": [_plain(*it) for it in points]})
        plots += [{"title": title, "lines": lines}] * bool(lines)
    return plots


def thinned(values: np.ndarray, buckets: int = 800) -> list[int]:
    """The places of the least and the greatest value of each bucket, and of its first one that is not finite."""
    if len(values) <= 2 * buckets:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), buckets):
        some = part[np.isfinite(values[part])]
        kept |= {*part[~np.isfinite(values[part])][:1].tolist(), *some[[values[some].argmin(), values[some].argmax()]
                                                                       if len(some) else []].tolist()}
    return sorted(kept)


def _drawn(marks: Sequence[tuple[str, float, list[float | None], str]]) -> list[list[Any]]:
    """Number of the kind, place and words; of too many of a kind, some."""
    of_kinds = [[mark for mark in marks if mark[0] == kind] for kind in KINDS]
    return [[number, *place, said] for number, some in enumerate(of_kinds)
            for _, _, place, said in some[::max(1, math.ceil(len(some) / _DRAWN))]]


def _results(run: Path) -> list[Path]:
    """What may be of vir-evaluate in a run folder."""
    return sorted({*run.glob("*.json"), *run.glob("*.csv")} - {run / DS_CONFIG})


def _read_results(given: Sequence[Path], found: Sequence[Path]) -> tuple[list[Any], list[Any], list[str]]:
    """Evaluations, worst classes, and what could not be read; what was found may be of other programs."""
    results, classes, problems = [], [], []
    for path in dict.fromkeys([*given, *found]):
        try:
            text = files.read_regular(path, 1 << 26).decode()
            if path.suffix == ".csv":
                table = list(csv.DictReader(io.StringIO(text)))
                if is_one := bool(table) and _OF_CLASSES <= table[0].keys():
                    classes.append((path, sorted(table, key=lambda row: float(row["top1"]))[:_WORST], len(table)))
            else:
                read = json.loads(text)
                rows = [(path, row) for row in (read if isinstance(read, list) else [read])]
                is_one = all(isinstance(row, dict) and {"weights", "top1", "images"} <= row.keys() for _, row in rows)
                results += rows * is_one
            if not is_one and path in given:
                problems.append(f"{path} is no result of vir-evaluate; give a file of its --json or --per-class")
        except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
            problems.append(f"{path} cannot be read: {error}; " + (
                "evaluate again" if path in given else "it is left out, as another program's or damaged"))
    return results, classes, problems


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan


def _plain(*values: float) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]  # JSON has no NaN


def _number(value: Any, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}" if math.isfinite(_finite(value)) else str(value)


def _when(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if 0 <= _finite(seconds) < 1e11 else "–"
