"""What is tried again, for how long and how often: one policy for all stores."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from vir.addresses import shown
from vir.data.executors import Stopped, stopping
from vir.data.stores.store import StoreError
from vir.log import log

T = TypeVar("T")

FLOOR = 64 << 10
"""Bytes a second: a slower answer is broken off, and another is asked for."""
WINDOW = 10.0
"""Seconds over which FLOOR is measured; and the longest silence of a server within an answer."""
PROGRESS = 64 << 10
"""Bytes: an attempt that brought so many has not failed, and the time runs anew."""

PASSING = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
"""HTTP's status of answers that may be another one next time."""

_SLICE = 0.1  # seconds between two looks whether to stop
_FIRST_WAIT = 0.25
_LONGEST_WAIT = 15.0
_TELLS_EVERY_S = 60.0
_told = float("-inf")


class PassingError(Exception):
    """A fault that may be gone at the next attempt.

    Args:
        what: what the server did, to follow its URL in a sentence; no secret in it.
        after: seconds for which the server asks to be left alone.
    """

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


def persist(attempt: Callable[[float, float], T], url: str, timeout: float) -> T:
    """The result of the first attempt that has one.

    Args:
        attempt: gets the seconds that are left for it, and those of them that it may wait for the first byte, which
            are twice as many at each attempt; raises PassingError for what is worth another one.
        timeout: seconds after which no attempt begins.

    Raises:
        StoreError: the last attempt failed as well; and whatever else the attempt raises.
        Stopped: the task that this is a part of is to end.
    """
    until = time.monotonic() + timeout
    patience = WINDOW / 2

    def attempted() -> T:
        nonlocal patience
        patience *= 2
        left = max(0.05, until - time.monotonic())
        return attempt(left, min(patience, left))

    def wait(state: RetryCallState) -> float:
        assert state.outcome is not None
        error = state.outcome.exception()
        asked = error.after if isinstance(error, PassingError) else 0.0
        return max(0.0, min(max(asked, _backoff(state.attempt_number)), until - time.monotonic()))

    retrying = Retrying(retry=retry_if_exception_type(PassingError), wait=wait, reraise=True,
                        sleep=_sleep, stop=lambda state: time.monotonic() >= until,
                        before_sleep=lambda state: _tell(state, url, until - time.monotonic()))
    try:
        return retrying(attempted)
    except PassingError as error:
        raise StoreError(f"{shown(url)} {error}, and what else was tried for {timeout:g} s failed as well; see whether "
                         "the server can be reached and is well, or give it more time with --data.timeout "
                         "(--timeout of vir-evaluate and vir-index)") from error


def _sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while not stopping():
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, _SLICE))
    raise Stopped


def _tell(state: RetryCallState, url: str, left: float) -> None:
    """Once a minute: all threads of a process meet the same server."""
    global _told
    assert state.outcome is not None and state.seconds_since_start is not None
    now = time.monotonic()
    if state.seconds_since_start > WINDOW and now - _told > _TELLS_EVERY_S:
        _told = now
        log.warning("%s %s; it is tried for %.0f s more", shown(url), state.outcome.exception(), left)


def _backoff(number: int) -> float:
    """Seconds before the attempt that follows the number-th one, with jitter: ranks must not come back at once."""
    return random.uniform(0.5, 1.0) * min(_FIRST_WAIT * 2.0 ** (min(number, 20) - 1), _LONGEST_WAIT)


def retry_after(header: str | None) -> float:
    """Seconds from now that the header Retry-After means, as number or date; 0 where it is missing or nonsense."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < 1e9 else 0.0


if __name__ == "__main__":
    raise SystemExit("vir.data.stores.retries is a part of the library; the program is vir-train")
