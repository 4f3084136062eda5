"""What is done in the hour, in order of value, at full size or at the smallest that still has every part."""

from __future__ import annotations

import gzip
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from support.gpu_hour.driver import Step
from vir.engine import ds_config
from vir.reports.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "vir" / "recipes"
REFERENCE = "zero0_fp32"
DIGITS = ("zero0_fp32", "zero1_fp16", "zero1_bf16", "zero2_offload_bf16", "zero3_bf16_ckpt")
"""The stages, both half precisions, offload and recomputation; fp16 and bf16 under the same stage."""

SHIPPED, COMPILED = "as shipped", "compiled"
"""Steps whose results are in two tables."""

PROFILED = 3
"""Steps in the profiler's trace."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the full hour, or of the rehearsal: numbers, and flags of vir.train and of the benchmarks."""

    device: str = "cuda"
    val_per_class: int = 100
    digits_batch: int = 128
    digits: tuple[str, ...] = ("--train.epochs", "2")
    resumed_steps: int = 40
    network: tuple[str, ...] = ()
    """Added for ViR-S, ViR-B and their peers."""
    batch: int = 128
    steps: int = 60
    log_every: int = 5
    workers: int = 12
    loader: tuple[str, ...] = ("--images", "12800")
    rounds: str = "10"
    operator: tuple[tuple[int, int], ...] = ((197, 256), (1025, 64), (4097, 16), (16385, 4))
    """(tokens, batch)."""
    model: tuple[str, ...] = ("--sizes", "224", "--batch-size", "128")


FULL = Sizes()
REHEARSAL = Sizes(
    device="cpu", val_per_class=1, digits_batch=16, digits=("--train.steps", "3"), resumed_steps=4,
    network=("--model.img_size", "32", "--model.args", "{depth: 1, embed_dim: 64, num_heads: 1}",
             "--train.peak_tflops", "0.1"),
    batch=4, steps=3, log_every=1, workers=2, loader=("--images", "16", "--made", "8", "--model.img_size", "32"),
    rounds="1", operator=((17, 1),),
    model=("--sizes", "32", "--batch-size", "2", "--model-args",
           '{"depth": 1, "embed_dim": 64, "num_heads": 1}'))


class Hour:
    """The steps, and where they leave what."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._sizes = folder, sizes
        self._shards = folder / "digits-shards"

    def steps(self) -> list[Step]:
        """All of them, in order of value."""
        step_time = self._step_time()
        return [self._environment(), self._tests(), *self._data(), *self._digits(), *self._resume(), *step_time[:2],
                *self._operator(), *self._mfu(), self._profile(), *step_time[2:], *self._models(), self._loader()]

    def _environment(self) -> Step:
        file = self._folder / "environment.json"
        return Step(name="environment", module="support.gpu_hour.environment", arguments=[str(file)], seconds=20,
                    read=partial(_json, file))

    def _tests(self) -> Step:
        file = self._folder / "tests.xml"
        # A file without such a test would cost its import.
        marked = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
        # The file is written at the end of the session, which looks at its bound between tests.
        return Step(name="tests", module="pytest", seconds=300, leaves=file, bound_flag="--session-timeout",
                    read=partial(_tests, file), arguments=[
                        "-v", "-m", "gpu", "-p", "no:cacheprovider", "--timeout=120", f"--junitxml={file}", *marked])

    def _data(self) -> list[Step]:
        images = self._folder / "digits"
        made = Step(name="data/images", module="tools.make_demo_dataset", seconds=20, leaves=images, arguments=[
            "--output", str(images), "--val-per-class", str(self._sizes.val_per_class)])
        return [made, *(Step(
            name=f"data/{split}", module="vir.convert", seconds=10, leaves=self._shards / split, arguments=[
                "--source", str(images), "--split", split, "--output", str(self._shards), "--name", "digits",
                "--workers", "2"]) for split in ("train", "val"))]

    def _digits(self) -> list[Step]:
        """Without random numbers that a GPU draws otherwise."""
        flags = [*self._digits_flags(), "--data.val", str(self._shards / "val"), *self._sizes.digits]
        on_cpu = self._train(f"digits on CPU/{REFERENCE}", REFERENCE, 60, *flags, "--device", "cpu")
        return [on_cpu, *(self._train(f"digits/{config}", config, 60 if "offload" in config else 25, *flags)
                          for config in DIGITS)]

    def _resume(self) -> list[Step]:
        """A run, the same run taken back to its middle and continued, and what differs between them."""
        total = self._sizes.resumed_steps
        flags = [*self._digits_flags(), "--train.steps", str(total), "--checkpoint.every_steps", str(total // 2),
                 "--train.deterministic", "true", "--model.drop_path_rate", "0.1", "--augment.reprob", "0.25",
                 "--augment.mixup", "0.8", "--augment.cutmix", "1.0"]
        whole, again, file = (self._folder / "resume" / name for name in ("whole", "again", "compared.json"))

        def take_back() -> None:
            shutil.copytree(whole, again)
            half = again / "checkpoints" / f"step-{total // 2:08d}"
            shutil.rmtree(again / "checkpoints" / f"step-{total:08d}")
            (half.parent / "latest").write_text(half.name)

        return [self._train("resume/whole", "zero2_bf16", 25, *flags, keep=True),
                replace(self._train("resume/again", "zero2_bf16", 25, *flags, keep=True), prepare=take_back),
                Step(name="resume/compared", module="support.gpu_hour.compare", seconds=20, read=partial(_json, file),
                     arguments=[str(whole), str(again), str(total // 2), str(file)])]

    def _digits_flags(self) -> list[str]:
        batch = self._sizes.digits_batch
        return ["--config", str(RECIPES / "quickstart.yaml"), "--train.global_batch_size", str(batch),
                "--train.micro_batch_size", str(batch // 2), "--train.log_every", "1"]

    def _step_time(self) -> list[Step]:
        """ViR-S as the recipe and the JSON say, then with one thing changed: (JSON, blocks of it, flags)."""
        changes: dict[str, tuple[str, dict[str, Any], list[str]]] = {
            SHIPPED: ("zero2_bf16", {}, []), COMPILED: ("zero2_bf16", {}, ["--model.compile", "true"]),
            "DeepSpeed's timer": ("zero2_bf16", {"timers": {"throughput": {"enabled": True}}}, []),
            "deterministic": ("zero2_bf16", {}, ["--train.deterministic", "true"]),
            "recomputed": ("zero2_bf16_ckpt", {}, []), "stage 0": ("zero0_bf16", {}, []),
            "stage 3": ("zero3_bf16", {}, []), "fp32": ("zero2_fp32", {}, []),
            "fp32 as TF32": ("zero2_fp32", {}, ["--train.tf32", "true"])}
        return [self._timed(f"step time/{name}", self._changed(name, config, change), name == COMPILED, *flags)
                for name, (config, change, flags) in changes.items()]

    def _mfu(self) -> list[Step]:
        """The same loop with ViR-B and timm's ViT, whose attention is PyTorch's (flash, on a GPU in bf16)."""
        return [self._timed(f"MFU/{name}, {how}", "zero2_bf16", how == COMPILED, "--model.name",
                            f"{name}_patch16_224", "--model.compile", str(how == COMPILED).lower())
                for name in ("vit_small", "vir_base", "vit_base") for how in ("eager", COMPILED)]

    def _operator(self) -> list[Step]:
        """Batches of about as many tokens: a small one would tell how long a launch takes, not how fast a GPU is."""
        return [self._benchmark(f"operator/{tokens}", 40, "operator", "--sizes", str(tokens), "--batch-size",
                                str(batch), "--rounds", self._sizes.rounds) for tokens, batch in self._sizes.operator]

    def _models(self) -> list[Step]:
        """Forward and backward alone, without a loop."""
        return [self._benchmark(f"model/{size}", 45, "model", "--model", f"vir_{size}_patch16_224",
                                "--rows", "vit", "auto", "free mixer",
                                "--rounds", self._sizes.rounds, *self._sizes.model) for size in ("small", "base")]

    def _loader(self) -> Step:
        folder = self._folder / "loader"
        return Step(name="loader", module="support.gpu_hour.loader", seconds=45, leaves=folder,
                    read=partial(_json, folder / "result.json"),
                    arguments=[str(folder), "--workers", str(self._sizes.workers), *self._sizes.loader])

    def _profile(self) -> Step:
        step = self._timed("profile", "zero2_bf16", False, "--train.profile", str(PROFILED))
        return replace(step, read=partial(_profile, self._folder / "profile"))

    def _loop_flags(self) -> list[str]:
        """Of the runs that are timed: cheap for the loader, which has a step of its own."""
        batch = str(self._sizes.batch)
        return ["--train.global_batch_size", batch, "--train.micro_batch_size", batch, "--augment.auto_augment", "null",
                "--augment.interpolation", "bilinear", "--data.workers", str(self._sizes.workers), "--data.lanes", "4",
                # What was loaded while the first step compiled would hide that the loader is slower.
                "--data.prefetch", "1"]

    def _timed(self, name: str, config: str, is_compiled: bool, *flags: str) -> Step:
        return self._train(
            name, config, 60 if is_compiled else 25, "--config", str(RECIPES / "vir_small_in1k.yaml"),
            *self._loop_flags(), "--train.steps", str(self._sizes.steps), "--schedule.warmup_epochs", "0",
            "--train.log_every", str(self._sizes.log_every), *self._sizes.network, *flags)

    def _train(self, name: str, config: str, seconds: float, *flags: str, keep: bool = False) -> Step:
        """A run of vir.train. Its checkpoints, GB for ViR-B, are removed unless they are to be kept."""
        run = self._folder / name
        return Step(name=name, module="vir.train", seconds=seconds, leaves=run, read=partial(_run, run, keep),
                    arguments=[*flags, "--deepspeed_config", config, "--data.train", str(self._shards / "train"),
                               "--output", str(run)])

    def _changed(self, name: str, config: str, change: dict[str, Any]) -> str:
        """The name of a shipped JSON, or the path of one that differs from it."""
        if not change:
            return config
        content = json.loads(ds_config.locate(config).read_text())
        for block, values in change.items():
            content[block] = content.get(block, {}) | values
        path = self._folder / "ds_configs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
        return str(path)

    def _benchmark(self, name: str, seconds: float, *arguments: str) -> Step:
        folder = self._folder / name
        return Step(name=name, module="tools.benchmark_model", seconds=seconds, leaves=folder,
                    read=partial(_json, folder / f"{arguments[0]}.json"), arguments=[
                        *arguments, "--dtypes", "bf16", "--device", self._sizes.device, "--output", str(folder)])


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def _tests(file: Path) -> dict[str, Any]:
    """Counts, and the names of those that did not pass."""
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    ends = {f"{case.get('classname')}.{case.get('name')}": next(
        (kinds[part.tag] for part in case if part.tag in kinds), "passed") for case in cases}
    return {**Counter(ends.values()), "not passed": [name for name, end in ends.items() if end == "failed"]}


def _run(run: Path, keep: bool) -> dict[str, Any]:
    """Losses by step, and of the later two thirds of the intervals the median time of a step without waiting."""
    events = read_metrics(run)
    if not keep:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    trained = [event for event in events if event["kind"] == "train"]
    later = trained[len(trained) // 3:]
    found: dict[str, Any] = {
        "losses": {str(event["step"]): event["loss"] for event in trained},  # as gpu.json has them
        "skipped": sum(event["skipped"] for event in trained),
        "peak_memory_gb": max(event["peak_memory_gb"] for event in trained),
        "step_ms": median(1e3 * event["samples_seen"] / event["step"] / event["images_per_second"] * (
            1 - event["data_wait"]) for event in later)}
    if later[-1]["mfu"] is not None:
        found["mfu_without_waiting"] = median(event["mfu"] / (1 - event["data_wait"]) for event in later)
    if evaluated := [event for event in events if event["kind"] == "eval"]:
        found["top1"] = evaluated[-1]["top1"]
    return found


def _profile(run: Path) -> dict[str, Any]:
    """Where the trace is, and what takes the most time in a step: kernels of a GPU, operators on CPU."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    plain = run / "profile" / "rank00000.json"
    content = plain.read_bytes()
    trace = plain.with_suffix(".json.gz")
    trace.write_bytes(gzip.compress(content, 6))  # as such it is opened by Perfetto and Chrome
    plain.unlink()
    events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    kind = "kernel" if any(event.get("cat") == "kernel" for event in events) else "cpu_op"
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == kind:
            spent[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    most = [[name, us / 1e3 / PROFILED, calls[name] / PROFILED] for name, us in spent.most_common(15)]
    return {"trace": str(trace), "kind": kind, "ms": sum(spent.values()) / 1e3 / PROFILED,
            "calls": sum(calls.values()) / PROFILED, "most": most}
