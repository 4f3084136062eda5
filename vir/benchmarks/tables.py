"""Measured numbers as Markdown tables, and the pages that show them. Imports no torch.

In a page, `<!-- table: results/NAME.json -->` and `<!-- end -->` stand around each table, which is made from that file
beside the page. A file holds `title`, `command`, `machine` and one of these:

    kind, results     what tools/benchmark_model.py writes
    loops, checkpoints, ema     what tools/benchmark_training.py writes
    checkpointing     what tools/benchmark_checkpoints.py writes
    accuracy, pairs     what tools/benchmark_accuracy.py writes
    columns, rows     a table that no tool writes: its head and its cells, as text
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vir.benchmarks import paired
from vir.benchmarks.results import Result
from vir.errors import DataError
from vir.files import replace_text
from vir.planning.images import IMAGENET

_MARKED = re.compile(r"(?P<begin><!-- table: (?P<file>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- table:")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, without a line break at its end."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def model_table(results: list[Result], kind: str) -> str:
    """Times with quartiles, memory, and how many times faster than the peer and as the free mixer.

    Args:
        kind: `model`, whose peer is the row vit, or `operator`, whose peer is the row sdpa.
    """
    peer = "vit" if kind == "model" else "sdpa"
    columns = ("size", "batch", "dtype", "pass", "row", "ms (quartiles)", "per second", f"× {peer}", "of free mixer",
               "peak MiB")
    lines = markdown(columns, []).splitlines()
    ms_at = {(r.row, r.size, r.dtype, r.direction): r.ms for r in results}
    for r in results:
        start = f"| {r.size} | {r.batch} | {r.dtype} | {r.direction} | {r.row} |"
        if r.ms is None or r.ms_quartiles is None or r.peak_mib is None:
            lines.append(f"{start} {(r.failed or '').replace('|', '/')} | | | | |")
            continue
        ratios = []
        for other in (peer, "free mixer"):
            other_ms = ms_at.get((other, r.size, r.dtype, r.direction))
            ratios.append("" if other_ms is None else f"{other_ms / r.ms:.2f}")
        low, high = r.ms_quartiles
        lines.append(f"{start} {r.ms:.4g} ({low:.4g}–{high:.4g}) | {r.per_second:.4g} | {ratios[0]} | {ratios[1]} "
                     f"| {r.peak_mib:.0f} |")
    return "\n".join(lines) + "\n"


def training_report(result: dict[str, Any]) -> str:
    """What was measured, and a table each for the loops, checkpoints and the average of the weights."""
    loops, saved = result["loops"], result["checkpoints"]
    table_of_loops, table_of_checkpoints, *table_of_ema = training_tables(result)
    lines = [
        f"{result['model']} ({loops['parameters']:,} parameters), {result['ranks']} ranks on {result['machine']}, "
        f"{result['cores']} cores.", "",
        f"```bash\n{result['command']}\n```", "",
        table_of_loops, "",
        f"Median (least to most) of {len(loops['turns'])} turns, a turn's ratio being of medians over intervals of "
        f"{result['log_every']} steps. Ours has shards read and decoded by {result['loader_processes_per_rank']} "
        f"loader process(es) per rank, augmentation, mixup or cutmix, smoothing, schedule, "
        f"{'EMA, ' if result['ema_decay'] else ''}checks and logging; the bare loop has one batch in memory and "
        f"{loops['peer_optimizer']}. Before and after a turn other programs kept "
        f"{max(turn['others_cores'] for turn in loops['turns']):.1f} cores busy at most."]
    if result["cores"] < result["ranks"] * (1 + result["loader_processes_per_rank"]):
        lines.append(f"{result['ranks']} trainers and their loader processes share {result['cores']} cores: what the "
                     "loaders compute is taken from the steps, and only a part of that shows as waiting.")
    lines += ["", table_of_checkpoints, "",
              f"One checkpoint {'with' if result['ema_decay'] else 'without'} EMA, median of "
              f"{len(saved['seconds'])}; its share when saved after each {IMAGENET:,} images at this rate."]
    for table in table_of_ema:
        lines += ["", table]
    return "\n".join(lines)


def training_tables(result: dict[str, Any]) -> list[str]:
    """The tables of one run of tools/benchmark_training.py; that of the average only where it was measured."""
    loops, saved = result["loops"], result["checkpoints"]
    tables = [
        markdown(("ranks", "ZeRO", "batch", "bare ms", "ours ms", "overhead %", "waiting for data %",
                  "overhead without it %"),
                 [(result["ranks"], result["zero"], f"{result['global_batch_size']} of {result['micro_batch_size']}",
                   spread(loops, "bare_ms", 1), spread(loops, "ours_ms", 1), spread(loops, "overhead", 100),
                   spread(loops, "data_wait", 100), spread(loops, "overhead_without_wait", 100))]),
        markdown(("checkpoint MB", "seconds", "images/s", "an epoch of ImageNet-1k, h", "share of the time %"),
                 [(f"{saved['bytes'] / 1e6:.2f}", f"{saved['median_seconds']:.3f} "
                   f"({min(saved['seconds']):.3f}–{max(saved['seconds']):.3f})",
                   f"{saved['images_per_second']:.4g}", f"{saved['epoch_seconds'] / 3600:.2f}",
                   f"{100 * saved['share']:.3g}")])]
    if "ema" in result:
        tables.append(markdown(
            ("ZeRO", "EMA bytes of each rank", "4 x parameters / ranks", "ratio"),
            [(row["config"], ", ".join(f"{size:,}" for size in row["bytes_of_rank"]),
              f"{row['ideal_bytes']:,.0f}", f"{row['ratio']:.3f}") for row in result["ema"]]))
    return tables


def spread(loops: dict[str, Any], name: str, factor: float) -> str:
    """Median (least to most) of all turns, times the factor."""
    values = [factor * turn[name] for turn in loops["turns"]]
    return f"{factor * loops[name]:.4g} ({min(values):.4g}–{max(values):.4g})"


def checkpointing_table(tasks: Sequence[dict[str, Any]]) -> str:
    """What checkpoints cost in both ways, beside a peer in the same turns; × is the asynchronous way over the peer."""
    columns = ("measured", "run", "model, images of a rank's step", "checkpoint MB", "asynchronous", "synchronous",
               "torch's async_save", "peer", "×", "target")
    rows_of = {"stall": _rows_of_stall, "writing": _rows_of_writing, "throughput": _rows_of_throughput}
    return markdown(columns, [row for task in tasks for row in rows_of[task["part"]](task)])


def _begin_of(task: dict[str, Any]) -> list[str]:
    model = task["model"]
    count = f"{task['ranks']} rank{'s' if task['ranks'] > 1 else ''}"
    return [f"ZeRO {task['stage']}, {task['precision']}, {count}",
            f"{task['parameters'] / 1e6:.1f} M, {model['micro_batch_size']} of {model['img_size']} px",
            f"{task['files_bytes'] / 1e6:,.0f}"]


def _rows_of_stall(task: dict[str, Any]) -> Iterable[list[str]]:
    begin, stalls, copies, writes = _begin_of(task), task["stalls"], task["copies"], task["writes"]
    largest = max(task["bytes_of_rank"]) / 1e6
    yield ["a step held by the first, ms", *begin, _ms(stalls[:1]), "", "", f"copy of {largest:,.0f} MB: "
           f"{_ms(copies[:1])}", _ratio(stalls[:1], copies[:1]), ""]
    yield ["a step held by a later one, ms", *begin, _ms(stalls[1:]), _ms([one["synchronous"] for one in writes]),
           _ms([one["torch_stall"] for one in writes]), f"copy of {largest:,.0f} MB: {_ms(copies[1:])}",
           _ratio(stalls[1:], copies[1:]), "1.2"]
    ways = {way: [one[way] for one in writes] for way in ("asynchronous", "synchronous", "torch", "plain")}
    rate = sum(task["bytes_of_rank"]) / 1e6 / statistics.median(ways["plain"])
    yield ["until it is published, s", *begin, *(_between(ways[way], 1) for way in list(ways)[:3]),
           f"write and fsync: {_between(ways['plain'], 1)}, {rate:,.0f} MB/s",
           _ratio(ways["asynchronous"], ways["plain"]), ""]


def _rows_of_writing(task: dict[str, Any]) -> Iterable[list[str]]:
    of_turns = {way: [statistics.median(turn[way]) for turn in task["turns"]] for way in ("writing", "alone", "busy")}
    yield ["a step beside writing, ms", *_begin_of(task), _ms(of_turns["writing"]), "", "",
           f"not writing: {_ms(of_turns['alone'])}; beside another process that hashes: {_ms(of_turns['busy'])}, × "
           f"{_ratio(of_turns['busy'], of_turns['alone'])}", _ratio(of_turns["writing"], of_turns["alone"]), "1.03"]


def _rows_of_throughput(task: dict[str, Any]) -> Iterable[list[str]]:
    ways = {way: [turn[way] for turn in task["turns"]] for way in ("asynchronous", "synchronous", "none")}
    yield [f"{task['steps']} steps with one, s", *_begin_of(task), _between(ways["asynchronous"], 1),
           f"{_between(ways['synchronous'], 1)}, × {_ratio(ways['synchronous'], ways['none'])}", "",
           f"without one: {_between(ways['none'], 1)}", _ratio(ways["asynchronous"], ways["none"]), "1.02"]


def accuracy_table(result: dict[str, Any]) -> str:
    """For each set and model the accuracies of all seeds, and how they compare with those of the first model."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in result["accuracy"]:
        runs.setdefault((run["data"], run["model"]), []).append(run)
    first = next(iter(runs))[1]
    columns = ("images", "model", "top-1 % of each seed", "mean ± sd", "raw weights", f"more than {first}",
               "images right by one alone: this, first (p)")
    rows = []
    for (data, model), of_model in runs.items():
        accuracies = [run["ema"]["top1"] for run in of_model]
        row = [data, model, ", ".join(f"{value:.2f}" for value in accuracies), _mean_and_deviation(accuracies),
               _mean_and_deviation([run["raw"]["top1"] for run in of_model]), "", ""]
        if model != first:
            row[-2] = _more([mine - run["ema"]["top1"] for mine, run in zip(accuracies, runs[data, first])])
            row[-1] = "; ".join(
                f"{pair['only_second']}, {pair['only_first']} ({_p(pair['only_first'], pair['only_second'])})"
                for pair in result["pairs"] if (pair["data"], pair["first"], pair["second"]) == (data, first, model))
        rows.append(row)
    return markdown(columns, rows)


def _mean_and_deviation(values: Sequence[float]) -> str:
    middle = f"{statistics.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.2f}"


def _more(differences: Sequence[float]) -> str:
    """Their mean, with its 95 % interval."""
    middle = f"{statistics.mean(differences):+.2f}"
    if len(differences) == 1:
        return middle
    low, high = paired.interval(differences)
    return f"{middle} ({low:+.2f} to {high:+.2f})"


def _p(only_first: int, only_second: int) -> str:
    p = paired.mcnemar(only_first, only_second)
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _ms(seconds: Sequence[float]) -> str:
    return _between(seconds, 1000)


def _between(values: Sequence[float], factor: float) -> str:
    """Median (least–most), times the factor."""
    middle, low, high = (f"{factor * value:.4g}" for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def _ratio(values: Sequence[float], peers: Sequence[float]) -> str:
    """The median of the turns' ratios."""
    return f"{statistics.median(value / peer for value, peer in zip(values, peers, strict=True)):.3f}"


def render(path: Path) -> str:
    """The table, or the tables, of one file of results.

    Raises:
        DataError: the file is missing, is no JSON, or lacks a field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "columns" in content:
            return markdown(content["columns"], content["rows"])
        if "checkpointing" in content:
            return checkpointing_table(content["checkpointing"])
        if "accuracy" in content:
            return accuracy_table(content)
        if "loops" in content:
            return "\n\n".join(training_tables(content))
        return model_table([Result(**result) for result in content["results"]], content["kind"]).rstrip("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; put the file there, or correct its name in the "
                        f"page") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}; write it with the --output or --json of a tools/benchmark_*.py"
                        ) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} has no results that make a table ({error!r}); it needs kind and results, loops and "
                        f"checkpoints, checkpointing, accuracy and pairs, or columns and rows") from error


def with_tables(page: Path) -> str:
    """The text of a page, with each marked table made anew from its file.

    Raises:
        DataError: the page cannot be read, a marker is not closed, or a file of results is not what it should be.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {page}: {error.strerror}; name a Markdown file") from error
    for marked in _MARKED.finditer(text):
        if _MARKER.search(marked[0], len(marked["begin"])):
            raise DataError(f"{page} does not close the table of {marked['file']}; put <!-- end --> below it")
    if len(_MARKER.findall(text)) != len(_MARKED.findall(text)):
        raise DataError(f"{page} has a table that is not marked well; the lines around it are "
                        f"<!-- table: results/NAME.json --> and <!-- end -->")
    return _MARKED.sub(lambda marked: f"{marked['begin']}{render(page.parent / marked['file'])}\n{marked['end']}", text)


def write_tables(page: Path) -> None:
    """Make each marked table of a page anew. Raises DataError as with_tables does, or where the page is read-only."""
    text = with_tables(page)
    try:
        replace_text(page, text)
    except OSError as error:
        raise DataError(f"cannot write {page}: {error.strerror}; make it writable") from error


def stale_files(page: Path) -> list[str]:
    """The files of results whose table in the page is not what they give. Raises DataError as with_tables does."""
    made = with_tables(page)
    shown = page.read_text(encoding="utf-8")
    return [before["file"] for before, after in zip(_MARKED.finditer(shown), _MARKED.finditer(made))
            if before[0] != after[0]]
