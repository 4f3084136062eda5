"""What our training loop costs beside a bare DeepSpeed loop, what checkpoints cost, and what the EMA weighs.

    python tools/benchmark_training.py --data data/digits-shards --ema --json training.json
    python tools/benchmark_training.py --data SHARDS --model vir_small_patch16_224 --ranks 1 --steps 20 --log_every 5 \\
        -- --train.global_batch_size 16 --train.micro_batch_size 16

Ours is `deepspeed --module vir.train` with vir/recipes/quickstart.yaml, mixup and cutmix on, and what follows `--`. The
peer (tests/bare_deepspeed.py) is the loop of DeepSpeed's tutorial, with the same model, batches, ZeRO settings, ranks
and threads, on one batch that lies in memory. The two take turns; prints Markdown tables.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from vir.errors import DataError, SettingsError, VirError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "vir" / "recipes" / "quickstart.yaml"
STAGES = tuple(str(ROOT / "ds_configs" / f"{name}.json")
               for name in ("zero0_fp32", "zero1_bf16", "zero2_fp32", "zero3_bf16"))
IMAGENET = 1_281_167

# glibc would give freed tensors back to the system and fault them in again: noise, and up to half of the time on CPU.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        print(benchmark(args, sys.argv[1:] if argv is None else argv))
    except VirError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def benchmark(args: argparse.Namespace, argv: list[str]) -> str:
    """Measure as the command line says; returns the tables."""
    from vir.engine import ds_config

    for flag, value, least in (("ranks", args.ranks, 1), ("repeats", args.repeats, 1), ("log_every", args.log_every, 1),
                               ("steps", args.steps, 3 * args.log_every)):
        if value < least:
            raise SettingsError(f"--{flag} is {value}; it must be at least {least}" +
                                (", three intervals of --log_every: warm-up, timed, after a checkpoint"
                                 if flag == "steps" else ""))
    for config in args.ema or ():
        ds_config.read(config)
    with tempfile.TemporaryDirectory(prefix="benchmark_training_") as scratch:
        side = Sides(args, Path(scratch))
        result = {"command": f"python tools/benchmark_training.py {shlex.join(argv)}", "machine": _machine(),
                  **side.facts()}
        result["loops"] = _loops(side, args.repeats)
        result["checkpoints"] = _checkpoints(result["loops"], result["global_batch_size"],
                                             folder_bytes(newest(side.run)))
        if args.ema is not None:
            result["ema"] = [ema_bytes(side.short_run(config), config, args.ranks, side.parameters)
                             for config in args.ema or STAGES]
    text = report(result)
    if args.json:
        try:
            args.json.write_text(json.dumps(result, indent=1))
        except OSError as error:
            raise DataError(f"cannot write --json {args.json}: {error.strerror}; choose another path") from error
    return text


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One run of our loop, after its first interval."""

    step_seconds: list[float]
    """In each interval of `log_every` steps that no checkpoint interrupts."""
    data_wait: float
    """The share of them spent waiting for data, mean over the ranks."""
    checkpoint_seconds: list[float]
    logging_seconds: float
    """Of writing one line of metrics, which is part of the steps."""


class Sides:
    """Starts our loop and the bare one with the same settings, each in a folder of its own under `scratch`."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        from vir.config import parse, plan_accumulation
        from vir.data.reader import ShardReader
        from vir.engine import ds_config

        self._args, self._scratch, self._started = args, scratch, 0
        self.parameters, self.adam, self.run = 0, "", scratch
        network = ["--model.name", args.model, "--model.args", "{}", "--model.img_size", "null"] if args.model else []
        self._flags = ["--config", str(RECIPE), *network, "--augment.mixup", "0.8", "--augment.cutmix", "1.0",
                       "--schedule.warmup_epochs", "0", "--eval.every_epochs", "1e6", *args.options,
                       "--data.train", str(args.data / "train"), "--data.val", str(args.data / "val")]
        self.config = parse([*self._flags, "--deepspeed_config", args.deepspeed_config, "--output", str(scratch)])
        self._zero = ds_config.read(args.deepspeed_config)
        self._fixed_size = _takes_img_size(self.config.model.name)
        train = ShardReader(args.data / "train")
        self._images, self._classes = len(train), len(train.classes)
        self._batch = self.config.train.global_batch_size
        self._accumulation = plan_accumulation(self._batch, self.config.train.micro_batch_size, args.ranks)

    def facts(self) -> dict[str, Any]:
        """What is measured."""
        config = self.config
        return {"model": config.model.name, "ranks": self._args.ranks, "zero": Path(self._args.deepspeed_config).stem,
                "global_batch_size": self._batch, "micro_batch_size": config.train.micro_batch_size,
                "loader_processes_per_rank": config.data.workers, "ema_decay": config.ema.decay,
                "steps": self._args.steps, "log_every": self._args.log_every, "cores": len(os.sched_getaffinity(0))}

    def bare(self) -> list[float]:
        """Seconds of a step of the bare loop, in each interval after the first."""
        folder, config, optim = self._folder(), self.config, self.config.optim
        model_args = {**config.model.args, "num_classes": self._classes, "drop_path_rate": config.model.drop_path_rate}
        side = config.model.img_size
        if side is not None and self._fixed_size:
            model_args["img_size"] = side
        adam = {"lr": optim.peak_lr(self._batch), "betas": optim.betas, "eps": optim.eps,
                "weight_decay": optim.weight_decay, "torch_adam": self._args.adam == "torch"}
        settings = {
            "model": config.model.name, "model_args": model_args, "retention_mode": config.model.retention_mode,
            "chunk_size": config.model.chunk_size, "input_size": side and (3, side, side), "steps": self._args.steps,
            "log_every": self._args.log_every, "deepspeed": {
                **self._zero, "train_batch_size": self._batch,
                "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
                "gradient_accumulation_steps": self._accumulation, "gradient_clipping": optim.clip_grad,
                "optimizer": {"type": "AdamW", "params": adam}}}
        (folder / "settings.json").write_text(json.dumps(settings))
        self._launch([str(ROOT / "tests" / "bare_deepspeed.py"), str(folder / "settings.json")])
        found = json.loads((folder / "times.json").read_text())
        self.parameters, self.adam = found["parameters"], found["optimizer"]
        return [(end - begin) / self._args.log_every for begin, end in zip(found["times"], found["times"][1:])]

    def ours(self) -> "Ours":
        """Our loop, with a checkpoint after every other interval."""
        every, images = self._args.log_every, self._args.log_every * self._batch
        folder = self.run = self._train(self._args.deepspeed_config, self._args.steps, every,
                                        "--checkpoint.every_epochs", repr(2 * images / self._images))
        timed, paused = [], []
        events = [event for event in train_events(folder) if event["step"] % every == 0]
        for before, after in zip(events, events[1:]):
            saved_between = before["step"] % (2 * every) == 0
            (paused if saved_between else timed).append((after["time"] - before["time"], after))
        # images_per_second leaves what happens between two intervals out, their distance in time does not.
        logging = statistics.median(seconds - images / event["images_per_second"] for seconds, event in timed)
        waited = sum(seconds * event["data_wait"] for seconds, event in timed)
        return Ours(step_seconds=[seconds / every for seconds, _ in timed],
                    data_wait=waited / sum(seconds for seconds, _ in timed), logging_seconds=logging,
                    checkpoint_seconds=[seconds - images / event["images_per_second"] - logging
                                        for seconds, event in paused])

    def short_run(self, config: str) -> Path:
        """The folder of two steps under another DeepSpeed config, with an average of the weights."""
        if self.config.ema.decay and Path(config).resolve() == Path(self._args.deepspeed_config).resolve():
            return self.run
        return self._train(config, 2, 1, *([] if self.config.ema.decay else ["--ema.decay", "0.99"]))

    def _train(self, config: str, steps: int, log_every: int, *more: str) -> Path:
        folder = self._folder()
        epochs = (steps - 0.5) * self._batch / self._images  # a run ends with the step that reaches them
        self._launch(["--module", "vir.train", *self._flags, "--deepspeed_config", config, "--train.epochs",
                      repr(epochs), "--train.log_every", str(log_every), "--output", str(folder), *more])
        return folder

    def _folder(self) -> Path:
        self._started += 1
        folder = self._scratch / f"{self._started:02d}"
        folder.mkdir()
        return folder

    def _launch(self, words: list[str]) -> None:
        """Run words under the deepspeed launcher on the ranks of the command line."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(self._args.ranks),
                   "--master_port", port, *words]
        try:
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        finally:  # DeepSpeed leaves 69 MB per rank and port behind
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                buffer.unlink(missing_ok=True)
        if done.returncode != 0:
            raise SettingsError(f"{shlex.join(command)} ended with code {done.returncode}; change its settings after "
                                f"`--`. It said:\n{done.stdout[-3000:]}")


def _takes_img_size(model: str) -> bool:
    """Whether timm wants to be told the size of the images, as vir.train decides it."""
    import timm

    import vir.models  # noqa: F401, registers the models

    if not timm.is_model(model):
        raise SettingsError(f"--model is {model!r}; timm.list_models() tells all names, vir_* are ours")
    return timm.get_pretrained_cfg(model).fixed_input_size


def _loops(side: Sides, repeats: int) -> dict[str, Any]:
    """Both loops in turns; a turn's ratio compares what the machine did within a minute or so."""
    turns = []
    for repeat in range(repeats):
        others = _busy_cores()
        if repeat % 2:
            ours, bare = side.ours(), side.bare()
        else:
            bare, ours = side.bare(), side.ours()
        waited = ours.data_wait
        bare_ms, ours_ms = 1e3 * statistics.median(bare), 1e3 * statistics.median(ours.step_seconds)
        turns.append({"bare_ms": bare_ms, "ours_ms": ours_ms, "data_wait": waited, "overhead": ours_ms / bare_ms - 1,
                      "others_cores": max(others, _busy_cores()),
                      "overhead_without_wait": ours_ms * (1 - waited) / bare_ms - 1,
                      "bare_intervals_ms": [1e3 * one for one in bare],
                      "ours_intervals_ms": [1e3 * one for one in ours.step_seconds],
                      "logging_seconds": ours.logging_seconds, "checkpoint_seconds": ours.checkpoint_seconds})
        print(f"turn {repeat + 1} of {repeats}: bare {bare_ms:.4g} ms, ours {ours_ms:.4g} ms, of which waiting for "
              f"data {100 * waited:.1f} %; others kept {turns[-1]['others_cores']:.1f} cores busy",
              file=sys.stderr, flush=True)
    medians = {name: statistics.median(turn[name] for turn in turns)
               for name in ("bare_ms", "ours_ms", "data_wait", "overhead", "overhead_without_wait")}
    return {**medians, "parameters": side.parameters, "peer_optimizer": side.adam, "turns": turns}


def _checkpoints(loops: dict[str, Any], global_batch_size: int, size: int) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint, and its share of the time when saved after each epoch of ImageNet-1k."""
    seconds = [one for turn in loops["turns"] for one in turn["checkpoint_seconds"]]
    took, rate = statistics.median(seconds), global_batch_size * 1e3 / loops["ours_ms"]
    return {"seconds": seconds, "median_seconds": took, "bytes": size, "images_per_second": rate,
            "epoch_seconds": IMAGENET / rate, "share": took / (took + IMAGENET / rate)}


def train_events(run: Path) -> list[dict[str, Any]]:
    from vir.reports.metrics import read_metrics

    return [event for event in read_metrics(run) if event["kind"] == "train"]


def newest(run: Path) -> Path:
    from vir.checkpoints import info

    found = info.newest(run)
    assert found is not None, "a run that ended well has a checkpoint"
    return found


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ema_bytes(run: Path, config: str, ranks: int, parameters: int) -> dict[str, Any]:
    """What the average of the weights takes on each rank, from the files that the ranks wrote.

    Without ZeRO every rank holds the same and rank 0 alone writes it.
    """
    from vir.engine import ds_config

    folder, stage = newest(run), ds_config.zero_stage(ds_config.read(config))
    found = []
    for rank in range(ranks if stage else 1):
        pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" if stage else "mp_rank_00_model_states.pt"
        averages = _values_of("ema", _read(next(folder.glob(pattern))))
        found.append(sum(average.numel() * average.element_size() for average in averages))
    ideal = 4 * parameters / ranks
    return {"config": Path(config).stem, "stage": stage, "bytes_of_rank": found if stage else found * ranks,
            "ideal_bytes": ideal, "ratio": max(found) / ideal}


def _read(path: Path) -> Any:
    """A file of a checkpoint, with something inert in the place of DeepSpeed's classes."""
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    with safe_globals([(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


class _Inert:
    def __init__(self, *args: Any) -> None:
        pass


def _values_of(key: str, saved: Any) -> Iterator[Any]:
    """All tensors that lie under a key, however deep."""
    if isinstance(saved, dict):
        for name, value in saved.items():
            if name == key and hasattr(value, "numel"):
                yield value
            else:
                yield from _values_of(key, value)
    elif isinstance(saved, (list, tuple)):
        for value in saved:
            yield from _values_of(key, value)


def _busy_cores(seconds: float = 1.0) -> float:
    """How many cores are at work now, when this tool is not: a turn beside other programs tells little."""
    def ticks() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]

    before = ticks()
    time.sleep(seconds)
    user, nice, system, idle, waiting, *rest = (after - one for one, after in zip(before, ticks()))
    return (user + nice + system + sum(rest)) / (seconds * os.sysconf("SC_CLK_TCK"))


def _machine() -> str:
    import torch

    from vir.benchmarks.model import machine

    torch.set_num_threads(1)  # as each rank has
    return machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def report(result: dict[str, Any]) -> str:
    """Markdown: what was measured, and a table each for the loops, checkpoints and the EMA."""
    loops, saved = result["loops"], result["checkpoints"]
    lines = [
        f"{result['model']} ({loops['parameters']:,} parameters), {result['ranks']} ranks on {result['machine']}, "
        f"{result['cores']} cores.", "",
        f"```bash\n{result['command']}\n```", "",
        *_table(("ranks", "ZeRO", "batch", "bare ms", "ours ms", "overhead %", "waiting for data %",
                 "overhead without it %"),
                [(result["ranks"], result["zero"], f"{result['global_batch_size']} of {result['micro_batch_size']}",
                  _spread(loops, "bare_ms", 1), _spread(loops, "ours_ms", 1), _spread(loops, "overhead", 100),
                  _spread(loops, "data_wait", 100), _spread(loops, "overhead_without_wait", 100))]), "",
        f"Median (least to most) of {len(loops['turns'])} turns, a turn's ratio being of medians over intervals of "
        f"{result['log_every']} steps. Ours has shards read and decoded by {result['loader_processes_per_rank']} "
        f"loader process(es) per rank, augmentation, mixup or cutmix, smoothing, schedule, "
        f"{'EMA, ' if result['ema_decay'] else ''}checks and logging; the bare loop has one batch in memory and "
        f"{loops['peer_optimizer']}. Before and after a turn other programs kept "
        f"{max(turn['others_cores'] for turn in loops['turns']):.1f} cores busy at most."]
    if result["cores"] < result["ranks"] * (1 + result["loader_processes_per_rank"]):
        lines.append(f"{result['ranks']} trainers and their loader processes share {result['cores']} cores: what the "
                     "loaders compute is taken from the steps, and only a part of that shows as waiting.")
    lines += ["", *_table(("checkpoint MB", "seconds", "images/s", "an epoch of ImageNet-1k, h", "share of the time %"),
                          [(f"{saved['bytes'] / 1e6:.2f}", f"{saved['median_seconds']:.3f} "
                            f"({min(saved['seconds']):.3f}–{max(saved['seconds']):.3f})",
                            f"{saved['images_per_second']:.4g}", f"{saved['epoch_seconds'] / 3600:.2f}",
                            f"{100 * saved['share']:.3g}")]), "",
              f"One checkpoint {'with' if result['ema_decay'] else 'without'} EMA, median of "
              f"{len(saved['seconds'])}; its share when saved after each {IMAGENET:,} images at this rate."]
    if "ema" in result:
        lines += ["", *_table(("ZeRO", "EMA bytes of each rank", "4 x parameters / ranks", "ratio"),
                              [(row["config"], ", ".join(f"{size:,}" for size in row["bytes_of_rank"]),
                                f"{row['ideal_bytes']:,.0f}", f"{row['ratio']:.3f}") for row in result["ema"]])]
    return "\n".join(lines)


def _spread(loops: dict[str, Any], name: str, factor: float) -> str:
    values = [factor * turn[name] for turn in loops["turns"]]
    return f"{factor * loops[name]:.4g} ({min(values):.4g}–{max(values):.4g})"


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="folder with train and val shards")
    parser.add_argument("--model", metavar="NAME", help="timm's name, at its own size (default: the recipe's model)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with one thread (default 2)")
    parser.add_argument("--deepspeed_config", default=str(ROOT / "ds_configs" / "zero2_fp32.json"), metavar="FILE",
                        help="DeepSpeed JSON of both sides (default ds_configs/zero2_fp32.json)")
    parser.add_argument("--steps", type=int, default=60, help="of each loop and turn (default 60)")
    parser.add_argument("--log_every", type=int, default=10, metavar="STEPS",
                        help="of a timed interval; the first one warms up (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of both loops (default 3)")
    parser.add_argument("--adam", choices=("deepspeed", "torch"), default="deepspeed",
                        help="the peer's AdamW: DeepSpeed's fused one, which a DeepSpeed config gets, or PyTorch's, "
                             "which ours is (default deepspeed)")
    parser.add_argument("--ema", nargs="*", metavar="FILE",
                        help="also measure the EMA on each rank, under these DeepSpeed JSONs (default: one of each "
                             "ZeRO stage)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw numbers go")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="further options of vir.train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
