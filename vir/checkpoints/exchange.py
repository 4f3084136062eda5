"""Files of a checkpoint between the disks of two nodes, sent by the threads of checkpoints while training goes on."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from vir.checkpoints.info import Files
from vir.distributed import TIMEOUT

CHUNK = 1 << 24
"""Bytes that are sent at a time."""


class Exchange:
    """Sends this rank's files to one rank, and takes those of another one. Collective.

    Every rank is once a rank's `to` and once its `source`. The group is its own: what is sent here never meets the
    collectives of training.
    """

    def __init__(self, to: int, source: int) -> None:
        self._to, self._source = to, source
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        # Here: a rank that lacks the memory later would leave the others waiting.
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8) for _ in range(2)]

    def swap(self, folder: Path, mine: Files) -> list[str]:
        """Send these files of the folder, and write those that come into it, flushed. On all ranks, in a thread.

        A disk that fails holds up nobody: what was announced is sent, and what comes is taken, all the same.

        Returns:
            What the disks have refused, and files that are not what was sent.

        Raises:
            RuntimeError: the other rank is gone.
        """
        theirs = self._swap_names(mine)
        problems: list[str] = []
        outgoing = _read(folder, mine, self._buffers[0], problems)
        incoming = _write(folder, theirs, self._buffers[1], problems)
        while True:
            sent, received = next(outgoing, None), next(incoming, None)
            if sent is None and received is None:
                return problems
            self._pass(sent, received)

    def _swap_names(self, mine: Files) -> Files:
        said = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        size = torch.empty(1, dtype=torch.int64)
        self._pass(torch.tensor([said.numel()]), size)
        heard = torch.empty(int(size), dtype=torch.uint8)
        self._pass(said, heard)
        files: Files = json.loads(heard.numpy().tobytes())
        return files

    def _pass(self, sent: Tensor | None, received: Tensor | None) -> None:
        """Both at the same time, or around the ring each would wait for the next."""
        waits = []
        if received is not None:
            waits.append(dist.irecv(received, self._source, group=self._group))
        if sent is not None:
            waits.append(dist.isend(sent, self._to, group=self._group))
        for wait in waits:
            assert wait is not None, "this rank is in the group"
            wait.wait()


def _sizes(size: int) -> Iterator[int]:
    """Of the pieces of a file."""
    return (min(CHUNK, size - start) for start in range(0, size, CHUNK))


def _bytes_of(piece: Tensor) -> memoryview:
    array: Any = piece.numpy()
    return memoryview(array)


def _read(folder: Path, files: Files, buffer: Tensor, problems: list[str]) -> Iterator[Tensor]:
    """The pieces of the files, each in the buffer; of a file that cannot be read as many, whatever is in them."""
    for name, told in files.items():
        with ExitStack() as stack:
            file = None
            try:
                file = stack.enter_context((folder / name).open("rb"))
            except OSError as error:
                problems.append(f"{folder / name}: {error}")
            for size in _sizes(told["bytes"]):
                piece = buffer[:size]
                try:
                    if file is not None and file.readinto(_bytes_of(piece)) != size:
                        raise OSError("the file has become shorter")
                except OSError as error:
                    problems.append(f"{folder / name}: {error}")
                    file = None
                yield piece


def _write(folder: Path, files: Files, buffer: Tensor, problems: list[str]) -> Iterator[Tensor]:
    """Pieces to fill; each is written when the next one is asked for."""
    for name, told in files.items():
        digest, problem = hashlib.sha256(), ""
        with ExitStack() as stack:
            try:
                file = stack.enter_context((folder / name).open("wb", buffering=0))
            except OSError as error:
                problem = str(error)
            for size in _sizes(told["bytes"]):
                yield buffer[:size]
                piece = _bytes_of(buffer[:size])
                digest.update(piece)
                try:
                    while piece and not problem:
                        piece = piece[file.write(piece):]
                except OSError as error:
                    problem = str(error)
            try:
                if not problem:
                    os.fsync(file.fileno())
            except OSError as error:
                problem = str(error)
        if not problem and digest.hexdigest() != told["sha256"]:
            problem = "what has come from the next node is not what was written there (sha256 differs)"
        if problem:
            problems.append(f"{folder / name}: {problem}")
