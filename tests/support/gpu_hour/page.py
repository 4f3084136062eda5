"""The results as one page of Markdown tables; what is not there yet, or failed, is a dash."""

from __future__ import annotations

from typing import Any

from support.gpu_hour.driver import Outcome
from support.gpu_hour.steps import COMPILED, DIGITS, REFERENCE, SHIPPED
from vir.benchmarks.results import Result
from vir.benchmarks.tables import markdown, model_table

NONE = "–"


def page(outcomes: list[Outcome]) -> str:
    found = {outcome.name: outcome.found for outcome in outcomes}
    parts = ["# The first hour on a GPU", _environment(found), "## Steps", markdown(
        ("step", "ended", "seconds", ""),
        [(one.name, one.ended, f"{one.seconds:.0f}", one.said.replace("|", "/")) for one in outcomes])]
    for title, table in (("Tests marked gpu", _tests), ("Digits", _digits), ("fp16 beside bf16", _curves),
                         ("Resumed under --train.deterministic", _resume), ("Time of a step", _step_time),
                         ("MFU", _mfu), ("The operator", _operator),
                         ("Forward and backward alone", _models), ("The loader", _loader), ("Profile", _profile)):
        parts += [f"## {title}", table(found)]
    return "\n\n".join(parts) + "\n"


Found = dict[str, dict[str, Any]]


def _environment(found: Found) -> str:
    about = found.get("environment", {})
    versions = ", ".join(" ".join(pair) for pair in about.get("versions", {}).items())
    return "\n".join(f"- {name}: {value}" for name, value in {**about, "versions": versions}.items())


def _tests(found: Found) -> str:
    tests = found.get("tests", {})
    return ", ".join(f"{value} {name}" for name, value in tests.items() if name != "not passed") + "".join(
        f"\n- {name}" for name in tests.get("not passed", ())) or NONE


def _digits(found: Found) -> str:
    """Each configuration beside float32 on CPU: all of them see the same batches and pixels."""
    reference = found.get(f"digits on CPU/{REFERENCE}", {})
    rows = []
    for name, run in (("on CPU", reference), *((config, found.get(f"digits/{config}", {})) for config in DIGITS)):
        losses, beside = run.get("losses", {}), reference.get("losses", {})
        early = {step: loss for step, loss in losses.items() if int(step) <= 10}
        last = max(losses, key=int, default=None)
        rows.append((name, _number(losses.get(last), ".4f"), _percent(_apart(early, beside)),
                     _percent(_apart(losses, beside)), _number(run.get("top1"), ".2f"), run.get("skipped", NONE),
                     _number(run.get("step_ms"), ".1f"), _number(run.get("peak_memory_gb"), ".2f")))
    return markdown(("configuration", "last loss", "from CPU's, 10 steps, %", "all steps, %", "top-1", "skipped",
                     "ms a step", "peak GB"), rows)


def _curves(found: Found) -> str:
    half, brain = (found.get(f"digits/zero1_{name}", {}).get("losses", {}) for name in ("fp16", "bf16"))
    steps = sorted(half.keys() & brain.keys(), key=int)
    shown = steps[::max(1, len(steps) // 12)]
    return markdown(("step", "fp16", "bf16"), [(step, _number(half[step], ".4f"), _number(brain[step], ".4f"))
                                               for step in shown]) + (
        f"\n\nLargest difference over {len(steps)} steps: {_percent(_apart(half, brain))} %.")


def _resume(found: Found) -> str:
    compared = found.get("resume/compared", {})
    return markdown(list(compared) or [NONE], [[len(value) if isinstance(value, list) else value
                                                for value in compared.values()]] if compared else [])


def _step_time(found: Found) -> str:
    first = found.get(f"step time/{SHIPPED}", {}).get("step_ms")
    rows = []
    for name, run in _under("step time/", found):
        ms = run.get("step_ms")
        rows.append((name, _number(ms, ".2f"), _percent(ms / first - 1 if ms and first else None),
                     _percent(run.get("mfu_without_waiting")), _number(run.get("peak_memory_gb"), ".2f")))
    return markdown(("ViR-S", "ms a step, without waiting", f"beside {SHIPPED}, %", "MFU, %", "peak GB"), rows)


def _mfu(found: Found) -> str:
    runs = [(f"vir_small, {how}", found.get(f"step time/{name}", {})) for how, name in (
        ("eager", SHIPPED), ("compiled", COMPILED))]
    return markdown(("model", "ms a step, without waiting", "MFU, %", "peak GB"), [
        (name, _number(run.get("step_ms"), ".2f"), _percent(run.get("mfu_without_waiting")),
         _number(run.get("peak_memory_gb"), ".2f")) for name, run in (*runs, *_under("MFU/", found))])


def _operator(found: Found) -> str:
    return "\n\n".join(_benchmark(result) for _, result in _under("operator/", found)) or NONE


def _models(found: Found) -> str:
    return "\n\n".join(f"{name}:\n\n{_benchmark(result)}" for name, result in _under("model/", found)) or NONE


def _benchmark(result: dict[str, Any]) -> str:
    if "results" not in result:
        return NONE
    return model_table([Result(**row) for row in result["results"]], result["kind"]).rstrip("\n")


def _loader(found: Found) -> str:
    loader, step = found.get("loader", {}), found.get(f"step time/{SHIPPED}", {})
    need = 1e3 * loader["batch"] / step["step_ms"] if "batch" in loader and "step_ms" in step else None
    return markdown(("workers", "images/s alone", "images/s that ViR-S takes"), [(
        loader.get("workers", NONE), _number(loader.get("images_per_second"), ".0f"), _number(need, ".0f"))])


def _profile(found: Found) -> str:
    profile = found.get("profile", {})
    if not profile:
        return NONE
    kind = profile["kind"]
    return (f"`{profile['trace']}`. A step has {profile['calls']:.0f} × {kind}, {profile['ms']:.1f} ms.\n\n" + markdown(
        (kind, "ms a step", "calls a step"), [(name[:80].replace("|", "/"), f"{ms:.2f}", f"{calls:.3g}")
                                              for name, ms, calls in profile["most"]]))


def _under(start: str, found: Found) -> list[tuple[str, dict[str, Any]]]:
    return [(name.removeprefix(start), value) for name, value in found.items() if name.startswith(start)]


def _apart(losses: dict[Any, Any], beside: dict[Any, Any]) -> float | None:
    """The largest relative difference over the steps that both have."""
    return max((abs(loss / beside[step] - 1) for step, loss in losses.items()
                if loss is not None and beside.get(step)), default=None)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g}"
