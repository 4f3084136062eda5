"""Stopping on request: a signal lets the step in hand finish on every rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any, Collection

from vir import cli, launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""From a person or a batch system, SLURM's warning before preemption, Ctrl-C, and a terminal that was closed."""
SECOND_AFTER_S = 3.0
"""Seconds from which on a Ctrl-C is a second one: torchrun passes on what the terminal has sent to its ranks too."""
STOP_FILE, LAUNCHER_GONE = 100, 101
"""Beside the numbers of signals: other causes to stop."""
_NONE = 128
"""Above all numbers of signals and causes."""
_NAMES = {signal.SIGINT: "SIGINT (Ctrl-C)", signal.SIGHUP: "SIGHUP (a closed terminal)",
          STOP_FILE: "the file STOP in the run folder", LAUNCHER_GONE: "its launcher, which has gone"}
SAVE, EVALUATE = "SAVE", "EVALUATE"
"""What else a run may be asked for: to save, to evaluate, and to go on."""


class StopRequest:
    """Remembers a signal on this rank from its making on; `agree` asks all ranks whether any has got one.

    Made before torch is imported, so that a signal during start-up is not lost. A second Ctrl-C ends the process at
    once, wherever it is. A process that was started to ignore Ctrl-C or a closed terminal (by nohup, or in a script's
    background) goes on ignoring it; launchers start their ranks anew, to heed both.
    """

    def __init__(self) -> None:
        self._number = 0
        self._asked_at = 0.0
        self._agreed = 0
        self._wishes: set[str] = set()
        self.agreed_wishes: frozenset[str] = frozenset()
        """Of SAVE and EVALUATE, what the last `agree` was also asked for, by a file in the run folder."""
        self.all_ready = False
        """Whether every rank was ready at the last `agree`."""
        self._group: Any = None
        heard = [number for number in SIGNALS if number in (signal.SIGTERM, signal.SIGUSR1)
                 or signal.getsignal(number) is not signal.SIG_IGN]
        # A handler waits for the end of a call into C, such as a collective; the number comes by this pipe at once.
        came, self._numbers = os.pipe()
        os.set_blocking(self._numbers, False)
        self._pipe_before = signal.set_wakeup_fd(self._numbers, warn_on_full_buffer=False)
        threading.Thread(target=_heed_interrupts, args=[came], daemon=True).start()
        self._before = {number: signal.signal(number, self._ask) for number in heard}

    def _ask(self, number: int, frame: Any) -> None:
        self.ask(number)  # launchers answer a Ctrl-C by a SIGTERM

    def ask(self, cause: int) -> None:
        """Stop for another cause than a signal to this process: the number of one that came elsewhere, or STOP_FILE or
        LAUNCHER_GONE."""
        self._asked_at = self._asked_at or time.monotonic()
        self._number = self._number or cause

    def wish(self, names: Collection[str]) -> None:
        """Save or evaluate after the step in hand, and go on."""
        self._wishes |= set(names)

    @property
    def asked(self) -> bool:
        """Whether this rank has got a signal, or another cause to stop."""
        return bool(self._number)

    @property
    def asked_for(self) -> float:
        """Seconds since this rank has got it; 0 where it has not."""
        return time.monotonic() - self._asked_at if self._asked_at else 0.0

    @property
    def number(self) -> int:
        """Of the signal, or of what else, for which `agree` said that a rank has got it; 0 where it said no."""
        return self._agreed

    @property
    def cause(self) -> str:
        """Its name."""
        return _NAMES.get(self._agreed) or signal.Signals(self._agreed).name

    def join(self) -> None:
        """Ask the other ranks from now on. After the process group is there."""
        from vir import distributed

        self._group = distributed.host_group()  # under NCCL the flag would cost a synchronisation of the device

    def agree(self, is_ready: bool = False) -> bool:
        """Whether to stop: the same answer on every rank, as are `agreed_wishes` and `all_ready`. Collective, once a
        step.

        Args:
            is_ready: whether this rank is, for what all must be ready for.
        """
        wishes, self._wishes = self._wishes, set()
        said = [self._number or _NONE, *(name not in wishes for name in (SAVE, EVALUATE)), is_ready]
        if self._group is not None:
            import torch
            import torch.distributed as dist

            of_all = torch.tensor(said)
            dist.all_reduce(of_all, op=dist.ReduceOp.MIN, group=self._group)
            said = of_all.tolist()
        self.all_ready = bool(said[-1])
        self._agreed = said[0] % _NONE  # Ctrl-C before the SIGTERM of a launcher that was met elsewhere
        self.agreed_wishes = frozenset(name for name, left_out in zip((SAVE, EVALUATE), said[1:-1]) if not left_out)
        return bool(self._agreed)

    def close(self) -> None:
        """Give the signals back to those who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._numbers)


class LauncherGrace:
    """Whether a launcher that has got a SIGTERM would wait for a step and a checkpoint."""

    def __init__(self) -> None:
        self._has_said, self._step = False, 0.0
        self._launcher = next(iter(launcher.launchers()), None)

    def stepped(self, seconds: float) -> None:
        """Take up a step that has taken so long."""
        self._step = max(self._step, seconds)

    def left(self, stop: StopRequest) -> float:
        """Seconds that are left to save, after what has stopped the run; infinite where nobody will kill it."""
        if self._launcher is None or stop.number in (STOP_FILE, LAUNCHER_GONE):
            return float("inf")
        return launcher.GRACE_S - stop.asked_for

    def saved(self, seconds: float) -> str:
        """Take up a checkpoint that has taken so long; what a user must know of it, once."""
        takes = self._step + seconds
        if self._has_said or self._launcher is None or takes < launcher.GRACE_S:
            return ""
        self._has_said = True
        return (f"a step and a checkpoint take {takes:.0f} s, and the launcher (process {self._launcher.pid}) kills a "
                f"rank {launcher.GRACE_S:.0f} s after a SIGTERM to the launcher: what was done since the last "
                "checkpoint would be lost. To stop this run send the signal to launch/deepspeed.sh or "
                "launch/torchrun.sh, which wait, or make a file STOP in its folder; or save more often by "
                "--checkpoint.every_steps")


def _heed_interrupts(numbers: int) -> None:
    """Answer the first Ctrl-C by a line on each machine, and end this process with the second one."""
    first = None
    with open(numbers, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != signal.SIGINT:
                continue
            if first is None:
                first = time.monotonic()
                _say("Ctrl-C: stopping as soon as what was done is saved; a second Ctrl-C ends at once")
            elif time.monotonic() - first > SECOND_AFTER_S:
                _say("ended by a second Ctrl-C, without saving")
                cli.end_now(128 + signal.SIGINT)


def _say(line: str) -> None:
    """Straight to the file: the stream may be in the middle of a write of the main thread."""
    if launcher.local_rank() == 0:
        with suppress(OSError):  # a terminal that is gone
            os.write(2, f"\n{line}\n".encode())
