"""Steps one after another, each a process of its own with a bound and a log; what they leave is kept at once."""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 3
"""A step is ended after so many times the seconds that it should take."""

_PR_SET_CHILD_SUBREAPER = 36
"""Of linux/prctl.h."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, `python -m MODULE ARGUMENTS`, whose log is OUTPUT/NAME.log."""

    name: str
    module: str
    arguments: list[str]
    seconds: float
    """That it should take, about; it is not begun where fewer are left."""
    leaves: Path | None = None
    """A file or folder, removed before it begins: of an earlier time that did not end well."""
    bound_flag: str = ""
    """The module's own flag for a bound in seconds: it gets three quarters of the step's, to end in good order."""
    prepare: Callable[[], object] = lambda: None
    """Called before it begins."""
    read: Callable[[], dict[str, Any]] = dict
    """Its result, from the files that it has left; called however it ended."""


@dataclass
class Outcome:
    """How a step went, and what it found."""

    name: str
    ended: str
    """`done`, `failed`, `over time` or `left out`."""
    seconds: float = 0.0
    said: str = ""
    """Why it is not done."""
    found: dict[str, Any] = field(default_factory=dict)


def run(steps: Sequence[Step], folder: Path, seconds: float, report: Callable[[list[Outcome]], None],
        earlier: Sequence[Outcome] = (), preloaded: bool = False) -> list[Outcome]:
    """Run all steps that fit into the time, whatever becomes of the others.

    Args:
        folder: for the logs.
        report: gets the outcomes so far, after each step.
        earlier: outcomes of an earlier call; what is done is not done again.
        preloaded: the steps' modules are run in forks of this process, which has imported what they need.
    """
    until, outcomes = time.monotonic() + seconds, {outcome.name: outcome for outcome in earlier}
    _adopt_orphans(True)
    try:
        return _run_all(steps, folder, until, report, outcomes, preloaded)
    finally:
        _adopt_orphans(False)


def _run_all(steps: Sequence[Step], folder: Path, until: float, report: Callable[[list[Outcome]], None],
             outcomes: dict[str, Outcome], preloaded: bool) -> list[Outcome]:
    for step in steps:
        if step.name in outcomes and outcomes[step.name].ended == "done":
            continue
        left = until - time.monotonic()
        if left < step.seconds:
            outcome = Outcome(step.name, "left out", said=f"takes about {step.seconds:.0f} s, {left:.0f} s were left")
        else:
            outcome = _run(step, folder / f"{step.name}.log", min(left, PATIENCE * step.seconds), preloaded)
        outcomes[step.name] = outcome
        print(f"{outcome.seconds:6.1f} s  {outcome.ended:9} {outcome.name}  {outcome.said}".rstrip(), flush=True)
        report([outcomes[one.name] for one in steps if one.name in outcomes])
    return [outcomes[one.name] for one in steps]


def _run(step: Step, log: Path, bound: float, preloaded: bool) -> Outcome:
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    outcome = Outcome(step.name, "failed")
    try:
        if step.leaves is not None:
            if step.leaves.is_dir():
                shutil.rmtree(step.leaves)
            else:
                step.leaves.unlink(missing_ok=True)
        step.prepare()
        code = _call(step, log, bound, preloaded)
        outcome.ended = {0: "done", None: "over time"}.get(code, "failed")
        if code != 0:
            outcome.said = f"ended after {bound:.0f} s" if code is None else f"code {code}: {_last_line(log)}"
        outcome.found = step.read()
    except Exception as error:  # of preparing or reading: no reason to lose the steps that follow
        if outcome.ended == "done":
            outcome.ended = "failed"
        outcome.said = outcome.said or f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - began
    return outcome


def _call(step: Step, log: Path, bound: float, preloaded: bool) -> int | None:
    """The exit code of a step, below 0 for a signal; None where it was ended at its bound. No descendant stays."""
    before = _children()
    if (child := os.fork()) == 0:
        _become(step, log, bound, preloaded)
    try:
        until = time.monotonic() + bound
        while time.monotonic() < until:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with suppress(ChildProcessError):  # it was waited for above
            os.waitpid(child, 0)
        while orphans := _children() - before:  # in sessions of their own; the children of each become ours in turn
            for orphan in orphans:
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)


def _adopt_orphans(on: bool) -> None:
    """Become the parent of descendants whose parent ends; Python has no name for this call of Linux."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            _, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def _become(step: Step, log: Path, bound: float, preloaded: bool) -> None:
    """In the fork: be the step's process. Never returns."""
    code = 1
    arguments = [*step.arguments, *([f"{step.bound_flag}={0.75 * bound:.0f}"] if step.bound_flag else [])]
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        if not preloaded:
            os.execv(sys.executable, [sys.executable, "-m", step.module, *arguments])
        sys.argv = sys.orig_argv = [step.module, *arguments]
        runpy.run_module(step.module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
