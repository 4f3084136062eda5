"""Copies of a rank's state in host memory, from which files are written while training changes the state itself."""

from __future__ import annotations

import pickle
from io import BytesIO
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from vir.log import log

_ALIGNED = 64
"""Bytes to which the place of each storage is aligned."""


class _View(NamedTuple):
    """What a tensor is beside the numbers in its storage."""

    storage: int
    """Its number."""
    dtype: torch.dtype
    offset: int | torch.SymInt
    size: torch.Size
    stride: tuple[int, ...]


class _Memory:
    """Storages of given sizes, in bytes, in one piece of host memory.

    In one piece it is page-locked at once; torch's own allocator of such memory rounds each size up to a power of two.
    """

    def __init__(self, sizes: list[int], is_locked: bool) -> None:
        self.sizes = sizes
        places, total = [], 0
        for size in sizes:
            places.append(total)
            total += -(-size // _ALIGNED) * _ALIGNED
        self._all = torch.empty(total, dtype=torch.uint8)
        self._is_locked = is_locked and total > 0
        if self._is_locked and int(torch.cuda.cudart().cudaHostRegister(self._all.data_ptr(), total, 0)):
            log.warning("%.1f GB of host memory cannot be page-locked (ulimit -l): checkpoints are copied more slowly",
                        total / 1e9)
            self._is_locked = False
        content = self._all.numpy()
        self.storages = [torch.frombuffer(content, dtype=torch.uint8, count=size, offset=place).untyped_storage()
                         if size else UntypedStorage(0) for size, place in zip(sizes, places)]

    def close(self) -> None:
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._all.data_ptr())


class Staging:
    """Host memory for the files of one rank: allocated at the first copy of each, used again for those that follow.

    Args:
        device: where the state lies. On CUDA the memory is page-locked, so that the host need not wait for a copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory: dict[str, _Memory] = {}
        self._on_cuda = device.type == "cuda"

    def copy(self, name: str, state: Any) -> Callable[[], Any]:
        """Copy what `torch.save` would write into the file of this name, over the copy before.

        Tensors that share a storage share it in the copy too. On CUDA the copies are only enqueued, before what the
        device is asked for next, which may change the state (an update, a forward pass with running statistics).

        Returns:
            What puts the copy together, in any thread: with many tensors that takes as long as to copy them.

        Raises:
            RuntimeError, MemoryError: there is not as much host memory.
        """
        content, tensors = _taken_apart(state)
        numbers: dict[tuple[int, int], int] = {}
        sources: list[UntypedStorage] = []
        views = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), storage.nbytes()
            if (number := numbers.setdefault(key, len(sources))) == len(sources):
                sources.append(storage)
            views.append(_View(number, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()))
        copies = self._memory_of(name, [size for _, size in numbers]).storages
        for copy, source in zip(copies, sources):
            copy.copy_(source, non_blocking=True)
        return lambda: _put_together(content, [
            torch.empty(0, dtype=view.dtype).set_(copies[view.storage], view.offset, view.size, view.stride)
            for view in views])

    def copied(self) -> Callable[[], None]:
        """What waits, in any thread, until what was copied so far is there."""
        return torch.cuda.current_stream().record_event().synchronize if self._on_cuda else lambda: None

    def _memory_of(self, name: str, sizes: list[int]) -> _Memory:
        memory = self._memory.get(name)
        if memory is None or memory.sizes != sizes:  # moments and averages come with the first steps
            if memory is not None:
                del self._memory[name]
                memory.close()
            memory = self._memory[name] = _Memory(sizes, self._on_cuda)
        return memory


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
