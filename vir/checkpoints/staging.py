"""Copies of a rank's state in host memory, from which files are written while training changes the state itself."""

from __future__ import annotations

import mmap
import pickle
from io import BytesIO
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, UntypedStorage

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
    Forked processes (loaders) do not get it: the next copy would make a second one of each page for them, and pages
    that a device writes to must not move.

    Raises:
        OSError, MemoryError: there is not as much.
    """

    def __init__(self, sizes: list[int], is_locked: bool) -> None:
        self.sizes = sizes
        places, total = [], 0
        for size in sizes:
            places.append(total)
            total += -(-size // _ALIGNED) * _ALIGNED
        self._all = mmap.mmap(-1, max(total, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._all.madvise(mmap.MADV_DONTFORK)
        self._locked_at = torch.frombuffer(self._all, dtype=torch.uint8).data_ptr() if is_locked else None
        if self._locked_at is not None and (
                code := int(torch.cuda.cudart().cudaHostRegister(self._locked_at, len(self._all), 0))):
            raise MemoryError(f"{total / 1e9:.3g} GB cannot be page-locked, CUDA error {code}")
        self.storages = [torch.frombuffer(self._all, dtype=torch.uint8, count=size, offset=place).untyped_storage()
                         if size else UntypedStorage(0) for size, place in zip(sizes, places)]

    def close(self) -> None:
        """Before the memory goes, which it does with the last storage."""
        if self._locked_at is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked_at)


class Staging:
    """Host memory for the files of one rank: allocated at the first copy of each, used again for those that follow.

    Args:
        device: where the state lies. On CUDA the memory is page-locked, so that the host need not wait for a copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory: dict[str, _Memory] = {}
        self._device, self._on_cuda = device, device.type == "cuda"

    def copy(self, name: str, state: Any) -> Callable[[], Any]:
        """Copy what `torch.save` would write into the file of this name, over the copy before.

        Tensors that share a storage share it in the copy too. On CUDA the copies are only enqueued, before what the
        device is asked for next, which may change the state (an update, a forward pass with running statistics).

        Returns:
            What puts the copy together, in any thread: with many tensors that takes as long as to copy them.

        Raises:
            OSError, MemoryError: there is not as much host memory.
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
        if not self._on_cuda:
            return lambda: None
        event = torch.cuda.Event(blocking=True)  # others would keep a core busy
        event.record()

        def wait() -> None:
            with torch.cuda.device(self._device):  # a thread begins on the first one
                event.synchronize()

        return wait

    def close(self) -> None:
        """Give the memory back, when nothing copies and nothing reads the copies any more."""
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    def _memory_of(self, name: str, sizes: list[int]) -> _Memory:
        if name in self._memory and self._memory[name].sizes != sizes:  # moments and averages come with the first steps
            self._memory.pop(name).close()
        if name not in self._memory:
            self._memory[name] = _Memory(sizes, self._on_cuda)
        return self._memory[name]


def _taken_apart(state: Any) -> tuple[bytes, list[Tensor]]:
    """A pickle of everything but the tensors, which it refers to by their numbers."""
    content = BytesIO()
    pickler = _Pickler(content, pickle.HIGHEST_PROTOCOL)
    pickler.dump(state)
    return content.getvalue(), pickler.tensors


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


def _put_together(content: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(BytesIO(content), tensors).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
