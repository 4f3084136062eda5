"""What a piece of code asks of its device: operators, and waits of the host for their results.

On a GPU each operator is at least one kernel, and each wait stops the host until the device has caught up. Both can be
counted on a CPU, where the same Python runs.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
          "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::allclose"}
"""Operators whose result or its size the host must know before it goes on."""
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}
_NO_KERNEL = {"aten::view", "aten::_unsafe_view", "aten::detach", "aten::alias", "aten::t", "aten::transpose.int",
              "aten::permute", "aten::expand", "aten::slice.Tensor", "aten::select.int", "aten::unsqueeze",
              "aten::squeeze.dim", "aten::squeeze", "aten::as_strided", "aten::split.Tensor", "aten::unbind.int",
              "aten::split_with_sizes", "aten::narrow", "aten::reshape", "aten::unfold", "aten::empty.memory_format",
              "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::lift_fresh",
              "aten::set_.source_Tensor"}
"""Operators that only describe memory."""


class Dispatches(TorchDispatchMode):
    """Counts, while it is entered, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        """Operators that compute or copy."""
        return sum(count for name, count in self.operators.items() if name not in _NO_KERNEL | _READS)

    @property
    def waits(self) -> int:
        """Operators for whose result the host waits."""
        return sum(count for name, count in self.operators.items() if name.split(".")[0] in _READS)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        if schema.name in _INDEXED and any(index is not None and index.dtype is torch.bool for index in args[1]):
            self.operators["aten::nonzero"] += 1  # which it calls below where it would be seen
        self.operators[".".join(filter(None, (schema.name, schema.overload_name)))] += 1
        return func(*args, **(kwargs or {}))
