"""Measured numbers as Markdown tables, and the pages that show them. Imports no torch.

In a page, `<!-- table: results/NAME.json -->` and `<!-- end -->` stand around each table, which is made from that file
beside the page. A file holds `title`, `command`, `machine` and one of these:

    kind, results     what tools/benchmark_model.py writes
    runs              what tools/benchmark_training.py writes
    checkpointing     what tools/benchmark_checkpoints.py writes
    accuracy, pairs   what tools/benchmark_accuracy.py writes
    end_to_end        what tools/benchmark_end_to_end.py writes
    start             what tools/benchmark_start.py writes
    columns, rows     a table: its head and its cells, as text
    beside            cells of the tables of other files, together in one table
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vir.benchmarks import paired
from vir.benchmarks.results import Result
from vir.errors import DataError
from vir.files import replace_text

_MARKED = re.compile(r"(?P<begin><!-- table: (?P<file>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- table:")
_ENGINES = {"ours": "ours", "timm": "timm's script"}


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
    """What was measured, and the tables of the loops, of checkpoints and of the average of the weights."""
    run, cores = result["runs"][0], result["cores"]
    turns = [turn for run in result["runs"] for turn in run["loops"]["turns"]]
    lines = [
        f"{run['model']} ({run['loops']['parameters']:,} parameters) on {result['machine']}, "
        f"{cores} cores.", "",
        f"```bash\n{result['command']}\n```", "",
        training_tables(result), "",
        f"Median (least to most) of {len(run['loops']['turns'])} turns; an overhead is the median of their ratios, "
        f"each of medians over intervals of {run['log_every']} steps. Ours has shards read and decoded by "
        f"{run['loader_processes_per_rank']} loader process(es) per rank, augmentation, mixup or cutmix, smoothing, "
        f"schedule, {'EMA, ' if run['ema_decay'] else ''}checks and logging; bare loops have one batch in memory, but "
        f"for the one with torch's DataLoader; bare DeepSpeed has {run['loops']['peer_optimizer']}, bare PyTorch its "
        "fused AdamW. CPU is that of one rank. Before and after a turn other programs kept "
        f"{max(turn['others_cores'] for turn in turns):.1f} cores busy at most."]
    if crowded := [run["ranks"] for run in result["runs"]
                   if cores < run["ranks"] * (1 + run["loader_processes_per_rank"])]:
        lines.append(f"At {', '.join(map(str, crowded))} ranks trainers and their loader processes share "
                     f"{cores} cores: what the loaders compute is taken from the steps, and only a part of that shows "
                     "as waiting.")
    return "\n".join(lines)


_LOOPS = {"ours": "ours", "deepspeed": "bare DeepSpeed", "torch": "bare PyTorch",
          "torch_loading": "bare PyTorch, torch's DataLoader"}


def training_tables(result: dict[str, Any]) -> str:
    """The tables of one run of tools/benchmark_training.py; that of the average only where it was measured."""
    loops = markdown(("ranks", "ZeRO", "batch", "loop", "ms a step", "steps/s", "overhead of ours %", "CPU ms, trainer",
                      "CPU ms, loaders", "waiting for data %"),
                     [row for run in result["runs"] for row in _rows_of_loops(run)])
    tables = [loops, markdown(
        ("ranks", "checkpoint MB", "seconds", "images/s", "an epoch of ImageNet-1k, h", "share of the time %"),
        [(run["ranks"], f"{saved['bytes'] / 1e6:.2f}", _between(saved["seconds"], 1),
          f"{saved['images_per_second']:.4g}", f"{saved['epoch_seconds'] / 3600:.2f}", f"{100 * saved['share']:.3g}")
         for run in result["runs"] for saved in [run["checkpoints"]]])]
    if rows := [(run["ranks"], row) for run in result["runs"] for row in run.get("ema", ())]:
        tables.append(markdown(
            ("ranks", "ZeRO", "EMA bytes of each rank", "4 x parameters / ranks", "ratio"),
            [(ranks, row["config"], ", ".join(f"{size:,}" for size in row["bytes_of_rank"]),
              f"{row['ideal_bytes']:,.0f}", f"{row['ratio']:.3f}") for ranks, row in rows]))
    return "\n\n".join(tables)


def _rows_of_loops(run: dict[str, Any]) -> Iterable[list[str]]:
    turns = [turn["loops"] for turn in run["loops"]["turns"]]
    for name, title in _LOOPS.items():
        if name not in turns[0]:
            continue
        overheads = [turn["ours"]["ms"] / turn[name]["ms"] - 1 for turn in turns]
        waits = [turn[name]["data_wait"] for turn in turns]
        yield [str(run["ranks"]), run["zero"] if name in ("ours", "deepspeed") else "",
               f"{run['global_batch_size']} of {run['micro_batch_size']}", title,
               _between([turn[name]["ms"] for turn in turns], 1),
               f"{1000 / statistics.median(turn[name]['ms'] for turn in turns):.4g}",
               "" if name == "ours" else _between(overheads, 100),
               _between([turn[name]["trainer_cpu"] for turn in turns], 1000),
               _between([turn[name]["loader_cpu"] for turn in turns], 1000),
               "" if None in waits else _between(waits, 100)]


def checkpointing_table(tasks: Sequence[dict[str, Any]]) -> str:
    """What checkpoints cost in both ways, beside a peer in the same turns; × is the asynchronous way over the peer."""
    columns = ("measured", "run", "model, images of a rank's step", "checkpoint MB", "asynchronous", "synchronous",
               "torch's async_save", "peer", "×", "target")
    rows_of = {"stall": _rows_of_stall, "writing": _rows_of_writing, "throughput": _rows_of_throughput}
    return markdown(columns, [row for task in tasks for row in rows_of[task["part"]](task)])


def end_to_end_table(sides: Sequence[dict[str, Any]]) -> str:
    """Medians (least to most) over the turns; × is our engine's rate over that of timm's script in the same turn.

    Ours stands beside the model itself under timm's script, a ViR beside the ViT of its size.
    """
    columns = ("model", "engine", "images/s", "× timm's script", "waiting for data %", "first step, s", "peak MiB",
               "turns")
    timms = {side["model"]: side["turns"] for side in sides if side["engine"] == "timm"}
    rows = []
    for side in sides:
        turns, peer = side["turns"], timms.get(peer_of(side["model"]))
        ratio = ""
        if side["engine"] == "ours" and peer is not None:
            ratio = _ratio(*([turn["images_per_second"] for turn in of_one] for of_one in (turns, peer)))
        rows.append([side["model"], _ENGINES[side["engine"]], _of_turns(turns, "images_per_second", 1), ratio,
                     _of_turns(turns, "data_wait", 100), _of_turns(turns, "first_step_seconds", 1),
                     _of_turns(turns, "peak_bytes", 2**-20), len(turns)])
    return markdown(columns, rows)


def end_to_end_bars(sides: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The values of all turns, by what was measured and by side."""
    measured = {"images/s": ("images_per_second", 1), "seconds to the first step": ("first_step_seconds", 1),
                "peak memory, MiB": ("peak_bytes", 2**-20), "waiting for data, %": ("data_wait", 100)}
    return {title: {f"{side['model']}\n{_ENGINES[side['engine']]}": [factor * turn[name] for turn in side["turns"]]
                    for side in sides} for title, (name, factor) in measured.items()}


def peer_of(model: str) -> str:
    """The ViT of a ViR's size; any other model itself."""
    return re.sub("^vir(2d)?_", "vit_", model)


def _of_turns(turns: Sequence[dict[str, Any]], name: str, factor: float) -> str:
    return _between([turn[name] for turn in turns], factor)


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


def start_table(start: dict[str, Any]) -> str:
    """Seconds from a command to the end of its first step, by phases; × is over the bare script of the same turn."""
    turns, sides = start["turns"], list(start["turns"][0])
    totals = {side: [sum(turn[side].values()) for turn in turns] for side in sides}
    phases = list(dict.fromkeys(phase for side in sides for phase in turns[0][side]))
    rows = [("**all, s**", *(_between(totals[side], 1) for side in sides)),
            ("**× bare**", *(_ratio(totals[side], totals["bare"]) for side in sides))]
    for phase in phases:
        rows.append((phase, *("" if phase not in turns[0][side] else
                              f"{statistics.median(turn[side][phase] for turn in turns):.2f}" for side in sides)))
    return markdown((f"{start['model']}, {start['ranks']} ranks, {start['zero']}", *sides), rows)


def beside_table(beside: Sequence[dict[str, Any]], folder: Path) -> str:
    """Ratios to peers that stand in the tables of other files.

    Args:
        beside: of each row `what` is done, the `peer`, the `target`, the `file` in the folder, and where the ratio
            stands in its table: its `column`, and what other cells of its `row` are.

    Raises:
        DataError: a file cannot be read, or not exactly one row is such a one.
    """
    rows = []
    for one in beside:
        path = folder / one["file"]
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in render(path).splitlines()
                           if line.startswith("|")]
        found = [line for line in lines if len(line) == len(head) and
                 one["row"].items() <= dict(zip(head, line)).items()]
        if len(found) != 1 or one["column"] not in head:
            raise DataError(f"{path} has {len(found)} rows of {one['row']}, and the columns {head}; name one row and "
                            f"the column of its ratio, not {one['column']!r}")
        ratio = found[0][head.index(one["column"])]
        missed = " (missed)" if _is_missed(ratio, one["target"]) else ""
        rows.append((one["what"], one["peer"], ratio, one["target"] + missed,
                     json.loads(path.read_text())["machine"]))
    return markdown(("what", "peer", "ours to the peer's", "target", "machine, versions, date"), rows)


def _is_missed(ratio: str, target: str) -> bool:
    """A target is empty, `≥ 0.8` or `≤ 1.2`; a ratio may have its least and most in brackets behind it."""
    if not target:
        return False
    sign, bound = target.split()
    value = float(ratio.split()[0])
    return value < float(bound) if sign == "≥" else value > float(bound)


def _between(values: Sequence[float], factor: float) -> str:
    """Median (least–most), times the factor."""
    middle, low, high = (f"{factor * value:.4g}" for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def _ratio(values: Sequence[float], peers: Sequence[float]) -> str:
    """The median of the turns' ratios."""
    return f"{statistics.median(value / peer for value, peer in zip(values, peers, strict=True)):.3f}"


_TABLES: dict[str, Callable[[Any], str]] = {
    "checkpointing": checkpointing_table, "start": start_table, "end_to_end": end_to_end_table}
"""By the field that they are made from."""


def render(path: Path) -> str:
    """The table, or the tables, of one file of results.

    Raises:
        DataError: the file is missing, is no JSON, or lacks a field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; put the file there, or correct its name in the "
                        f"page") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}; write it with the --output or --json of a tools/benchmark_*.py"
                        ) from error
    try:
        if "columns" in content:
            return markdown(content["columns"], content["rows"])
        for kind, table in _TABLES.items():
            if kind in content:
                return table(content[kind])
        if "beside" in content:
            return beside_table(content["beside"], path.parent)
        if "accuracy" in content:
            return accuracy_table(content)
        if "runs" in content:
            return training_tables(content)
        return model_table([Result(**result) for result in content["results"]], content["kind"]).rstrip("\n")
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise DataError(f"{path} has no results that make a table ({error!r}); it needs kind and results, runs, "
                        f"checkpointing, end_to_end, start, accuracy and pairs, beside, or columns and rows") from error


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
