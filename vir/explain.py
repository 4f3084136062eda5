"""Tells which samples a step of a run had and what was done to them, without training.

    vir-explain runs/a 1207
    vir-explain runs/a 1207 --rank 3 --sheet step.png
    vir-explain runs/a --spikes
    vir-explain runs/a 1207 --json --data.train /elsewhere/shards/train

STEP counts from 1, as metrics.jsonl and the log do. Settings come from the run's config.yaml, those that were changed
since from the first checkpoint that is kept from that step on; any flag of vir-train given here replaces one. Paths in
there are taken from this folder: begin where the run began, or give --data.train. Numbers of ranks and of samples in a
batch are those that metrics.jsonl has of that step; --ranks replaces the first.

--spikes lists the intervals of metrics.jsonl whose loss or gradient norm stands out, the furthest first, and their
steps in short: more than 6 robust standard deviations (1.4826 x the median distance from the median) above the median
of the 20 intervals before, or no finite loss. Keys found so go into a file for vir-train --data.exclude.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir import cli
from vir.config import FREE, SETTINGS, RunConfig, TrainConfig, differences, plan_accumulation, to_dict
from vir.errors import CheckpointError, DataError, SettingsError, VirError
from vir.flags import KINDS, parse
from vir.run_folder import CONFIG, METRICS

if TYPE_CHECKING:  # a wrong flag is told before torch is imported
    from vir.checkpoints.info import CheckpointInfo
    from vir.data.explanation import Explained
    from vir.data.order import SampleOrder
    from vir.data.reader import Reader
    from vir.reports.spikes import Spike

PROGRAM = "vir-explain"
_MOST_STEPS = 50
"""Of an interval, told one by one."""
_ELSEWHERE = FREE - {"data.exclude"}
"""Settings that change no step, such as where the images lie."""


def main(argv: list[str] | None = None) -> int:
    own, settings = _apart(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(own)
    try:
        _check(args)
        run = _open(args.run, settings)
        if args.spikes:
            _tell_spikes(run, args.most, args.json)
        else:
            _tell_step(run, args)
    except VirError as error:
        return cli.tell(error, PROGRAM)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@dataclass(frozen=True)
class _Run:
    folder: Path
    settings: Sequence[str]
    """Words of vir-train's flags."""
    config: RunConfig
    """Of config.yaml and these flags."""
    reader: Reader
    events: list[dict[str, Any]]
    checkpoints: list[CheckpointInfo]
    """Those that are kept, in the order of training."""


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of this program, and those of vir-train's flags: each with the word after it, a switch with true or
    false alone."""
    own: list[str] = []
    settings: list[str] = []
    flag = ""  # the one that has no value yet
    for word in argv:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            known = name[2:].replace("-", "_")
            flag = known if known in SETTINGS and not equals else ""
            (settings if known in SETTINGS else own).append(word)
        else:
            takes = flag and (KINDS[flag] is not bool or word.lower() in ("true", "false"))
            (settings if takes else own).append(word)
            flag = ""
    return own, settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("step", type=int, nargs="?", metavar="STEP", help="from 1")
    add("--spikes", action="store_true", help="find the steps in metrics.jsonl")
    add("--most", type=int, default=5, metavar="N", help="intervals that --spikes tells of (default 5)")
    add("--rank", type=int, metavar="R", help="its samples alone, from 0")
    add("--micro", type=int, metavar="M", help="those of this micro-batch of each rank alone, from 0")
    add("--ranks", type=int, metavar="N", help="of the run, where metrics.jsonl does not tell")
    add("--sheet", type=Path, metavar="FILE.png", help="draw what the model saw")
    add("--json", action="store_true", help="one object for machines")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.spikes == (args.step is not None):
        raise SettingsError("give either the number of a STEP or --spikes")
    for name, least in (("step", 1), ("most", 1), ("ranks", 1), ("rank", 0), ("micro", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise SettingsError(f"{'STEP' if name == 'step' else '--' + name} is {value}; it must be at least {least}")
    if args.spikes and (args.sheet or args.rank is not None or args.micro is not None):
        raise SettingsError("--spikes tells of whole steps in short; give one of them as STEP for --sheet, --rank or "
                            "--micro")
    if args.sheet is not None:
        if args.sheet.suffix.lower() != ".png":  # others lose pixels
            raise SettingsError(f"--sheet {args.sheet} has not the ending .png; give a name such as "
                                f"{args.sheet.with_suffix('.png').name}")
        if not args.sheet.absolute().parent.is_dir():
            raise SettingsError(f"--sheet {args.sheet}: there is no such folder; make it first")


def _open(folder: Path, settings: Sequence[str]) -> _Run:
    """The run, without any model."""
    if not (folder / CONFIG).is_file():
        raise SettingsError(f"{folder} has no {CONFIG}: it is not a run folder, or the run has not begun")
    config = parse(["--config", str(folder / CONFIG), *settings])
    if config.data.lanes is None or config.data.window is None:
        raise SettingsError(f"{folder / CONFIG} has no lanes and window: it was not written by a run; give "
                            "--data.lanes and --data.window")
    from vir.data.opening import open_reader, places
    from vir.reports.metrics import read_metrics

    events = read_metrics(folder) if (folder / METRICS).is_file() else []
    try:
        reader = open_reader(config.data.train, places(config.data), first=True)
    except VirError as error:
        raise type(error)(f"--data.train: {error}") from error
    return _Run(folder, settings, config, reader, events, _checkpoints(folder))


def _checkpoints(folder: Path) -> list[CheckpointInfo]:
    from vir.checkpoints.info import read_info
    from vir.checkpoints.names import candidates

    found = []
    for path in candidates(folder):
        with suppress(CheckpointError):  # one that was removed or damaged since
            found.append(read_info(path))
    return sorted(found, key=lambda info: info.samples_seen)


def _around(run: _Run, samples_seen: int) -> tuple[CheckpointInfo | None, CheckpointInfo | None]:
    """The last checkpoint before so many samples, and the first one from them on."""
    before = [info for info in run.checkpoints if info.samples_seen < samples_seen]
    since = run.checkpoints[len(before):]
    return before[-1] if before else None, since[0] if since else None


def _as_then(run: _Run, step: int, size: int) -> tuple[RunConfig, SampleOrder]:
    """The settings and the order of a step of so many samples; what is not certain of them is told on stderr.

    A checkpoint tells of the steps before it as far back as nobody has changed settings. That is known of its own step,
    and where the checkpoint before has the same ones.

    Raises:
        DataError: the images are other ones than those that the step is known to have had.
    """
    from vir.data.exclusion import read_exclusion
    from vir.data.order import SampleOrder

    before, since = _around(run, step * size)
    config, is_known = run.config, False
    if since is not None:
        then = json.dumps(_of_a_step(since.config))
        config = parse(["--config", str(run.folder / CONFIG), "--config", then, *run.settings])
        if changed := differences(to_dict(config), to_dict(run.config), skips=_ELSEWHERE):
            _note(f"step {step} is told with settings of its checkpoint of step {since.step}, changed since: "
                  f"{'; '.join(changed)}")
        is_known = since.samples_seen == step * size or (
            before is not None and before.data_fingerprint == since.data_fingerprint
            and not differences(before.config, since.config))
        if not is_known:
            _note(f"step {step} is told with the settings of the checkpoint of step {since.step}; none from before it "
                  "with the same ones is kept, so if they were changed in between, give those of then as flags")
    exclusion = read_exclusion(config.data.exclude, run.reader)
    info = since or before
    if info is not None and info.data_fingerprint != exclusion.fingerprint(run.reader.fingerprint):
        said = (f"{run.folder} was trained on other images than {run.reader.name}, or without other ones than "
                f"--data.exclude {config.data.exclude or '(not given)'} names, as its checkpoint of step {info.step} "
                "says")
        if is_known:
            raise DataError(f"{said}; give --data.train and --data.exclude as they were")
        _note(f"{said}; step {step} is told right only if they were changed between the two")
    config = replace(config, train=replace(config.train, global_batch_size=size))
    return config, SampleOrder(config.train.seed, run.reader.shard_sizes, *config.data.order, exclusion)


def _of_a_step(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Those of a checkpoint's settings that change a step."""
    return {name: _of_a_step(value, f"{prefix}{name}.") if isinstance(value, dict) and prefix + name not in SETTINGS
            else value for name, value in settings.items() if prefix + name not in _ELSEWHERE}


def _note(said: str) -> None:
    print(f"{PROGRAM}: {said}", file=sys.stderr)


def _ranks(event: dict[str, Any]) -> int | None:
    rate, per_device = event.get("images_per_second"), event.get("images_per_second_per_device")
    return round(rate / per_device) if rate and per_device else None


# A step


def _tell_step(run: _Run, args: argparse.Namespace) -> None:
    from vir.data.explanation import explain_step, pixels_seen
    from vir.models.build import input_for
    from vir.training.schedule import total_steps

    event = next((event for event in run.events if event["kind"] == "train" and event["step"] >= args.step), {})
    size = run.config.train.global_batch_size
    if "samples_seen" in event and not any(word.startswith("--train.global_batch_size") for word in run.settings):
        size = event["samples_seen"] // event["step"]
    before, since = _around(run, args.step * size)
    checkpoint = since or before
    world = args.ranks or _ranks(event) or (checkpoint.world_size if checkpoint else None)
    if world is None:
        raise SettingsError(f"{run.folder} has neither a line of metrics from step {args.step} on nor a checkpoint, "
                            "which would tell the number of ranks; give --ranks")
    config, order = _as_then(run, args.step, size)
    train = config.train
    accumulation = plan_accumulation(size, train.micro_batch_size, world)
    if args.step > (total := total_steps(train, len(run.reader))):
        raise SettingsError(f"STEP is {args.step}; the run has {total} steps")
    for name, value, limit in (("rank", args.rank, world), ("micro", args.micro, accumulation)):
        if value is not None and value >= limit:
            raise SettingsError(f"--{name} is {value}; there are {limit}, from 0")
    model_input = input_for(config.model, len(run.reader.classes))
    ranks = range(world) if args.rank is None else [args.rank]
    if args.sheet is not None:
        from vir.reports.sheet import check_count, draw_sheet

        check_count(len(ranks) * (accumulation if args.micro is None else 1) * train.micro_batch_size, args.sheet)
    told: list[Explained] = []
    pictures: list[Any] = []
    if not args.json:
        print(_headline(train, args.step, accumulation, world, len(run.reader)))
    batches = explain_step(run.reader, order, config.augment, model_input, train, args.step - 1, ranks, world,
                           micro=args.micro)
    for batch, samples in batches:
        told += samples
        if args.sheet is not None:
            pictures += list(pixels_seen(batch, config.augment, model_input))
        if not args.json:
            print(f"rank {samples[0].rank}, micro-batch {samples[0].micro}")
            for sample in samples:
                print("  " + _line(sample, samples), flush=True)
    if args.json:
        print(json.dumps({"step": args.step, "ranks": world, "global_batch_size": size,
                          "micro_batch_size": train.micro_batch_size, "samples": list(map(_plain, told))}, indent=1))
    if args.sheet is not None:
        keys = {sample.position: sample.key for sample in told}
        draw_sheet(pictures, [_caption(sample, keys) for sample in told], args.sheet)
        print(args.sheet, file=sys.stderr if args.json else sys.stdout)


def _headline(train: TrainConfig, step: int, accumulation: int, ranks: int, num_samples: int) -> str:
    size, micro = train.global_batch_size, train.micro_batch_size
    first = (step - 1) * size
    return (f"step {step}: positions {first} to {first + size - 1}, epoch {first / num_samples:.3f}; {size} "
            f"samples = {accumulation} x {micro} x {ranks} ranks")


def _line(sample: Explained, batch: Sequence[Explained]) -> str:
    """All of a sample in a line of text."""
    crop = sample.crop
    parts = [f"{sample.key} ({sample.class_name}) {sample.file}@{sample.offset} position {sample.position}"]
    parts += [f"in the place of {', '.join(sample.instead_of)}"] * bool(sample.instead_of)
    parts.append(f"{crop.box.width}x{crop.box.height}+{crop.box.left}+{crop.box.top} of {sample.width}x{sample.height} "
                 f"{crop.interpolation}{' flipped' if crop.flip else ''}")
    parts += [" ".join(f"{op.name}({', '.join(f'{arg:.4g}' for arg in op.args)})" for op in sample.policy)] * bool(
        sample.policy)
    if (box := sample.erase) is not None:
        parts.append(f"erased {box.width}x{box.height}+{box.left}+{box.top}")
    if sample.partner is not None:
        partner = batch[sample.place ^ 1]
        box = sample.cut
        how = "mixup with" if box is None else f"cutmix {box.width}x{box.height}+{box.left}+{box.top} of"
        parts.append(f"lam {sample.lam:.3f}, {how} {partner.key} ({partner.class_name})")
    return "; ".join(parts)


def _caption(sample: Explained, keys: dict[int, str]) -> tuple[str, str, str]:
    mixed = "" if sample.partner is None else (f"{sample.lam:.2f} {'mixup' if sample.cut is None else 'cutmix'} "
                                               f"{keys[sample.partner]}")
    return sample.key, f"{sample.class_name} r{sample.rank} m{sample.micro}", mixed


def _plain(sample: Explained) -> dict[str, Any]:
    """For JSON: boxes by the names of their sides."""
    def box(value: Any) -> dict[str, int] | None:
        return None if value is None else value._asdict()

    fields = asdict(sample)
    fields["crop"] = {**sample.crop._asdict(), "box": box(sample.crop.box)}
    return fields | {"erase": box(sample.erase), "cut": box(sample.cut),
                     "policy": [op._asdict() for op in sample.policy]}


# Spikes


def _tell_spikes(run: _Run, most: int, as_json: bool) -> None:
    from vir.reports.spikes import find_spikes

    spikes = find_spikes(run.events)
    shown: list[tuple[Spike, list[dict[str, Any]]]] = []
    failed = None
    for spike in spikes[:most]:
        try:
            steps = list(_in_short(run, spike))
        except VirError as error:  # another one may have had other settings
            _note(f"{_steps(spike)} cannot be told: {error}")
            failed, steps = error, []
        shown.append((spike, steps))
    if as_json:
        print(json.dumps([{**{name: _finite(value) for name, value in asdict(spike).items()}, "steps": steps}
                          for spike, steps in shown], indent=1))
    elif not spikes:
        print(f"nothing stands out in the {sum(event['kind'] == 'train' for event in run.events)} intervals of "
              f"{run.folder / METRICS}")
    else:
        _print_spikes(run, shown, len(spikes))
    if failed is not None and not any(steps for _, steps in shown):
        raise failed


def _print_spikes(run: _Run, shown: Sequence[tuple[Spike, list[dict[str, Any]]]], found: int) -> None:
    for spike, steps in shown:
        print(_spike_line(spike))
        for step in steps:
            print(f"  step {step['step']}: {step['samples']} samples of {step['classes']} classes, most of "
                  f"{step['most']['class']} ({step['most']['samples']}), of {step['shards']} shards; "
                  f"{', '.join(step['keys'][:3])}, …")
        if steps and spike.last - spike.first >= _MOST_STEPS:
            print(f"  … to step {spike.last}")
    print(shlex.join([PROGRAM, str(run.folder), str(shown[0][0].last), *run.settings]) + " tells all of a step" +
          (f"; {found - len(shown)} more intervals stand out: --most {found}" if found > len(shown) else ""))


def _spike_line(spike: Spike) -> str:
    if spike.value != spike.value:
        return f"{_steps(spike)}: no finite {spike.name}"
    return (f"{_steps(spike)}: {spike.name} {spike.value:.4g}, {spike.times:.1f} robust standard deviations above the "
            f"{spike.median:.4g} of before")


def _steps(spike: Spike) -> str:
    return f"step {spike.last}" if spike.first == spike.last else f"steps {spike.first} to {spike.last}"


def _in_short(run: _Run, spike: Spike) -> Iterator[dict[str, Any]]:
    """What the order alone says of the first steps of an interval; no image is read."""
    import numpy as np

    size, reader = spike.global_batch_size, run.reader
    _, order = _as_then(run, spike.last, size)
    for step in range(spike.first, min(spike.last, spike.first + _MOST_STEPS - 1) + 1):
        samples = order.samples(order.global_batch((step - 1) * size, size))
        classes = Counter(reader.labels[samples].tolist())
        (label, count), = classes.most_common(1)
        shards = np.unique(np.searchsorted(np.cumsum(reader.shard_sizes), samples, "right"))
        yield {"step": step, "samples": size, "classes": len(classes), "shards": len(shards),
               "most": {"class": reader.classes[label], "samples": count}, "keys": list(map(reader.key, samples))}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value  # JSON has no NaN


if __name__ == "__main__":
    sys.exit(main())
