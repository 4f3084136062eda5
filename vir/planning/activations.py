"""What a micro-batch takes beside weights and gradients: a forward and backward pass on tensors without memory."""

from __future__ import annotations

import copy
import itertools
import logging
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vir.config import RunConfig
from vir.engine.batch_norm import compute_in_float32
from vir.engine.stacks import recompute
from vir.errors import SettingsError
from vir.models.retention import as_on_gpu
from vir.weights.metadata import DTYPES
from vir.weights.spec import ModelSpec

_WHOLE = 4
"""Alike blocks in a row up to which all are run. Of more, the first two and the last are."""


class NotMeasuredError(SettingsError):
    """A network whose activations are not known without running it on numbers."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    saved: int
    """Live at the end of the forward pass: the inputs, and what the backward pass needs."""
    peak: int
    """The most that is live at once in both passes, beside parameters, buffers and gradients of parameters."""


def measure(network: nn.Module, spec: ModelSpec, config: RunConfig, micro_batch: int, precision: str,
            recomputes: bool, on_gpu: bool) -> Activations:
    """By one forward and backward pass of fake tensors: nothing is computed, and no memory is taken.

    As the passes run without torch.compile; compiled blocks keep less. A linear probe is measured on images: where its
    features are kept, a step takes much less. Dropout keeps a mask of a byte for each number on GPUs and a number on
    CPUs; the latter is counted.

    Args:
        network: as models.build.sketch makes it; it stays as it is.
        micro_batch: images.
        precision: fp32, bf16 or fp16, of weights and activations.
        recomputes: each block computes its activations again in the backward pass.
        on_gpu: retention takes the form that `auto` takes on a GPU.

    Raises:
        SettingsError: the network cannot be run with recomputes.
        NotMeasuredError: it computes with numbers, which fake tensors do not have, or does not take these images.
    """
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    before, torchs.disabled = torchs.disabled, True  # the error tells what it would print
    runs = _Passes(network, spec, config, micro_batch, precision, recomputes, on_gpu)
    try:
        if folded := _alike_blocks(network):
            try:
                return runs(folded)
            except _NotAlikeError:
                pass
        return runs([])
    except SettingsError:
        raise
    except Exception as error:  # whatever a network of anybody's does without numbers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotMeasuredError(f"{spec.name}: its activations are not known, because its passes cannot be run on "
                               f"tensors without numbers: {reason}; see the memory of a short run") from error
    finally:
        torchs.disabled = before


class _NotAlikeError(Exception):
    """A block does not leave what it takes, so that its like cannot be left out."""


@dataclass(frozen=True)
class _Row:
    """Blocks one after another that are alike; by their names."""

    first: str
    second: str
    left_out: tuple[str, ...]


class _Passes:
    """The passes of one micro-batch; called with the rows of which blocks are left out and counted."""

    def __init__(self, network: nn.Module, spec: ModelSpec, config: RunConfig, micro_batch: int, precision: str,
                 recomputes: bool, on_gpu: bool) -> None:
        self._network, self._spec, self._config, self._micro_batch = network, spec, config, micro_batch
        self._dtype, self._recomputes, self._on_gpu = DTYPES[precision], recomputes, on_gpu

    def __call__(self, rows: list[_Row]) -> Activations:
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(as_on_gpu() if self._on_gpu else nullcontext())
            network = _fake(self._network, self._dtype, [name for row in rows for name in row.left_out]).train()
            if self._recomputes:
                recompute(network)
            if self._dtype != torch.float32:
                compute_in_float32(network)
            storages = [x.untyped_storage() for x in itertools.chain(network.parameters(), network.buffers())]
            ledger = stack.enter_context(_Ledger(storages))
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(ledger.is_gradient)
            for row in rows:
                _fold(network, row, ledger)
            images = torch.empty(self._micro_batch, *self._spec.input.size)
            targets = torch.empty(self._micro_batch, max(len(self._spec.classes), 1))
            logits = network(images.to(self._dtype))
            loss = self._loss(logits, targets)
            del logits
            saved = ledger.live + sum(extra for extra in ledger.extras.values())
            if loss.requires_grad:
                loss.backward()
            return Activations(saved=saved, peak=ledger.peak())

    def _loss(self, logits: Any, targets: Tensor) -> Tensor:
        """What training.loss computes; of a pair of heads, which are taught apart, the sum."""
        if isinstance(logits, (tuple, list)):
            return sum((self._loss(each, targets) for each in logits), torch.zeros(()))
        if self._config.train.loss == "bce":
            return binary_cross_entropy_with_logits(logits.float(), targets)
        return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()


class _Ledger(TorchDispatchMode):
    """When which storage came and went. torch.distributed._tools.mem_tracker tells the same of each module, but takes
    107 s where this takes 2 s, for a ViR of 50 blocks: it looks through all tensors at each operator.

    Args:
        storages: those that were there before, which are not counted.
    """

    def __init__(self, storages: list[torch.UntypedStorage]) -> None:
        super().__init__()
        self.live = 0
        self.extras: dict[str, int] = {}
        """Bytes of the blocks that are left out, by the name of the one before them, from its forward pass on."""
        self._held = dict.fromkeys(map(id, storages), 0)
        self._keep = storages  # so that no other gets the id of one
        self._changes: list[tuple[int, int]] = []
        """Number of a storage, or -1 for what is in no storage, and the bytes by which live memory grew."""
        self._gradients: set[int] = set()
        self._numbers = itertools.count(1)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._came(tensor.untyped_storage())
        return out

    def _came(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held or not size:
            return
        number = self._held[key] = next(self._numbers)
        self._change(number, size)
        weakref.finalize(storage, self._went, key, number, size).atexit = False

    def _went(self, key: int, number: int, size: int) -> None:
        del self._held[key]
        self._change(number, -size)

    def _change(self, number: int, size: int) -> None:
        self.live += size
        self._changes.append((number, size))

    def is_gradient(self, parameter: Tensor) -> None:
        """Do not count the storage of this parameter's gradient."""
        assert parameter.grad is not None
        self._gradients.add(self._held[id(parameter.grad.untyped_storage())])

    def leave_out(self, name: str, size: int) -> None:
        """From now on, what blocks behind block `name` keep is live too."""
        self.extras[name] = size
        self._changes.append((-1, size))

    def reach(self, name: str) -> None:
        """The backward pass has come to block `name`: what the blocks behind it had kept is gone."""
        self._changes.append((-1, -self.extras[name]))

    def peak(self) -> int:
        return max(itertools.accumulate(size for number, size in self._changes if number not in self._gradients))


class _Through(nn.Module):
    """In the place of a block that is left out."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def _fake(network: nn.Module, dtype: torch.dtype, left_out: list[str]) -> nn.Module:
    """A copy with fake parameters of a dtype, and fake buffers in the places of those on the meta device.

    Buffers keep their dtype, as under DeepSpeed. Those with numbers keep them: a network may compute with them.

    Args:
        left_out: modules that hand on their input, by their names. In large networks they are most of all.
    """
    copies: dict[int, Any] = {id(network.get_submodule(name)): _Through() for name in left_out}
    for module in _kept(network, copies):
        for parameter in module.parameters(recurse=False):
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            copies[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), parameter.requires_grad)
        for buffer in module.buffers(recurse=False):
            copies[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer
    return copy.deepcopy(network, copies)


def _kept(network: nn.Module, left_out: Container[int]) -> Iterator[nn.Module]:
    """It and all modules in it, without those left out and what is in them."""
    yield network
    for child in network.children():
        if id(child) not in left_out:
            yield from _kept(child, left_out)


def _fold(network: nn.Module, row: _Row, ledger: _Ledger) -> None:
    """Let the ledger count for each block of a row that is left out what the second one kept."""
    before: list[int] = []

    def after_first(block: nn.Module, inputs: Any, output: Any) -> None:
        before.append(ledger.live)

    def after_second(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(before) != 1 or row.second in ledger.extras:
            return  # recomputed
        taken = inputs[0] if inputs else None
        if not isinstance(taken, Tensor) or not isinstance(output, Tensor) or (
                taken.shape, taken.dtype) != (output.shape, output.dtype):
            raise _NotAlikeError
        ledger.leave_out(row.second, len(row.left_out) * (ledger.live - before[0]))
        if output.requires_grad:
            output.register_hook(lambda gradient: ledger.reach(row.second))

    network.get_submodule(row.first).register_forward_hook(after_first)
    network.get_submodule(row.second).register_forward_hook(after_second)


def _alike_blocks(network: nn.Module) -> list[_Row]:
    """The rows of more than _WHOLE blocks, in lists of modules that are in no other row."""
    rows: list[_Row] = []
    seen: list[str] = []
    for path, owner in network.named_modules():
        if not isinstance(owner, (nn.Sequential, nn.ModuleList)) or any(path.startswith(name + ".") for name in seen):
            continue
        for _, row in itertools.groupby(owner.named_children(), lambda child: _form(child[1])):
            names = [f"{path}.{name}" if path else name for name, _ in row]
            if len(names) > _WHOLE:
                rows.append(_Row(names[0], names[1], tuple(names[2:-1])))
                seen += names
    return rows


def _form(block: nn.Module) -> tuple[Any, ...]:
    """What decides what a block keeps: classes, sizes and settings of its modules, without rates such as dropout's."""
    return tuple(
        (name, type(module), *((key, shape) for key, shape in _shapes(module)),
         *((key, value) for key, value in sorted(vars(module).items())
           if isinstance(value, (bool, int, str, tuple)) and key != "training" and _is_plain(value)))
        for name, module in block.named_modules())


def _shapes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield name, (parameter.shape, parameter.requires_grad)
    for name, buffer in module.named_buffers(recurse=False):
        yield name, buffer.shape


def _is_plain(value: Any) -> bool:
    return all(isinstance(item, (bool, int, str)) for item in value) if isinstance(value, tuple) else True
