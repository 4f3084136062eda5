"""One measured row of tools/benchmark_model.py, as its JSON file holds it. Imports no torch: pages are made from it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One row at one size."""

    row: str
    size: int
    """Tokens of the operator, or pixels of an image side."""
    batch: int
    dtype: str
    direction: str
    """`forward`, or `training`: forward and backward."""
    ms: float | None
    """Median of one run."""
    ms_quartiles: tuple[float, float] | None
    peak_mib: float | None
    failed: str | None
    """`out of memory`, `over time` or `failed: ERROR`, and no times."""

    @property
    def per_second(self) -> float | None:
        """Images, or sequences, per second."""
        return None if self.ms is None else 1000 * self.batch / self.ms
