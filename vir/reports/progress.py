"""Where a run stands, in one line that moves: from the events that it writes, for who shows nothing else of it."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Sequence, TextIO

from tqdm import tqdm

_TELLS_EVERY_S = 30.0
"""Where each line stays, as in a file; an evaluation is told at once."""
_BAR = "{percentage:3.0f} % |{bar:20}| {postfix}"


class Progress:
    """Shows the newest of the events that it is given.

    Args:
        stream: where to.
        moves: draw one line anew on a terminal; else write a line now and then, without control characters.
    """

    def __init__(self, stream: TextIO, moves: bool) -> None:
        self._stream, self._moves = stream, moves
        self._bar: tqdm[Any] | None = None
        self._told: tuple[float, str] = (-_TELLS_EVERY_S, "")

    def show(self, events: Sequence[dict[str, Any]]) -> None:
        """Take up what these processes of the run have written so far: lines of metrics.jsonl."""
        trained = [event for event in events if event["kind"] == "train"]
        if not trained:
            return
        accuracy = next((_accuracy(event) for event in reversed(events) if event["kind"] == "eval"), "")
        said = _line(trained) + accuracy
        if self._moves:
            self._draw(trained[-1], said)
        elif accuracy != self._told[1] or time.monotonic() - self._told[0] >= _TELLS_EVERY_S:
            self._told = time.monotonic(), accuracy
            print(said, file=self._stream, flush=True)

    def _draw(self, newest: dict[str, Any], said: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=newest["total_steps"], bar_format=_BAR, file=self._stream, dynamic_ncols=True)
        self._bar.n = newest["step"]
        self._bar.set_postfix_str(said)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._bar is not None:
            self._bar.close()


def _line(trained: Sequence[dict[str, Any]]) -> str:
    first, newest = trained[0], trained[-1]
    steps, total = newest["step"], newest["total_steps"]
    loss = "not finite" if newest["loss"] is None else f"{newest['loss']:.3f}"
    left = ""
    if steps > first["step"]:  # with the evaluations and checkpoints that came between
        a_step = (newest["time"] - first["time"]) / (steps - first["step"])
        left = f", {timedelta(seconds=round(a_step * (total - steps)))} left"
    return f"step {steps} of {total}, loss {loss}, {newest['images_per_second']:.0f} images/s{left}"


def _accuracy(event: dict[str, Any]) -> str:
    """Of the average of weights, where there is one: it is ahead until the learning rate is low."""
    return f", top-1 {event.get('ema_top1', event['top1']):.1f} %"
