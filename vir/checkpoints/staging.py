"""Copies of a rank's state in host memory, from which files are written while training changes the state itself."""

from __future__ import annotations

import pickle
from io import BytesIO
from typing import Any, Callable

import torch
from torch import Tensor

from vir.log import log

_ALIGNED = 64
"""Bytes to which the place of each storage is aligned."""


class Staging:
    """Host memory for the files of one rank: allocated at the first copy of each, used again for those that follow.

    Args:
        device: where the state lies. On CUDA the memory is page-locked, and a stream of its own copies into it.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def copy(self, name: str, state: Any) -> Any:
        """A copy of what `torch.save` would write into the file of this name; it takes the place of the copy before.

        Tensors that share a storage share it in the copy too. On CUDA the copies are only enqueued: `wait` tells when
        they are there.

        Raises:
            RuntimeError, MemoryError: there is not as much host memory.
        """
        content, tensors = _taken_apart(state)
        places: dict[tuple[int, int], int] = {}
        sources: list[tuple[int, Tensor]] = []
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if _key(tensor) not in places:
                places[_key(tensor)] = len(sources)
                sources.append((size, torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)))
                size += -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        copies = self._copied(sources, self._memory_of(name, size))
        return _put_together(content, [torch.empty(0, dtype=tensor.dtype).set_(
            copies[places[_key(tensor)]].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
            for tensor in tensors])

    def wait(self) -> Callable[[], None]:
        """End the copying of a checkpoint; what is returned waits, in any thread, until the copies are there.

        What the device is asked for from now on comes after them: a step that followed at once could change the state
        before it is copied. The host does not wait.
        """
        if self._stream is None:
            return lambda: None
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._stream.record_event().synchronize

    def _memory_of(self, name: str, size: int) -> Tensor:
        if name not in self._memory or self._memory[name].numel() != size:  # moments and averages come with the steps
            self._release(name)
            self._memory[name] = torch.empty(size, dtype=torch.uint8)
            if self._stream is not None:
                _lock_pages(self._memory[name])
        return self._memory[name]

    def _release(self, name: str) -> None:
        memory = self._memory.pop(name, None)
        if memory is not None and self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def _copied(self, sources: list[tuple[int, Tensor]], memory: Tensor) -> list[Tensor]:
        """Each storage at its place of the memory, as a storage of its own, which is how torch.save writes it."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        copies = []
        with torch.cuda.stream(self._stream):
            for offset, source in sources:
                copies.append(torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=len(source), offset=offset)
                              if len(source) else torch.empty(0, dtype=torch.uint8))
                copies[-1].copy_(source, non_blocking=True)
        return copies


def _key(tensor: Tensor) -> tuple[int, int]:
    """Of its storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _lock_pages(memory: Tensor) -> None:
    """In place, because torch's allocator of such memory rounds each size up to a power of two."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)):
        log.warning("%.1f GB of host memory cannot be page-locked (ulimit -l): checkpoints are copied more slowly",
                    memory.numel() / 1e9)


def _taken_apart(state: Any) -> tuple[bytes, list[Tensor]]:
    """A pickle of everything but the tensors, which it refers to by their numbers."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, Tensor):
                return None
            tensors.append(value)
            return len(tensors) - 1

    content = BytesIO()
    Pickler(content, pickle.HIGHEST_PROTOCOL).dump(state)
    return content.getvalue(), tensors


def _put_together(content: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(BytesIO(content)).load()
