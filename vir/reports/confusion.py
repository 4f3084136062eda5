"""A picture of which classes a model takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np

_LETTERS = 28
"""Of a class name that are shown."""


def draw_confusion(file: IO[bytes], kind: str, names: Sequence[str], counts: np.ndarray, images: np.ndarray,
                   title: str) -> None:
    """Write the picture.

    Args:
        file, kind: to write to, as png, pdf or svg.
        names: of M classes.
        counts: [M, M] ints; row: the class, column: what its images were taken for.
        images: [M] ints, of each class, also those taken for classes that are not shown.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    share = 100 * counts / np.maximum(images, 1)[:, None]
    side = 3.2 + 0.42 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    short = [name if len(name) <= _LETTERS else name[:_LETTERS - 1] + "…" for name in names]
    as_it_is: dict[str, Any] = {"fontsize": 8, "parse_math": False}  # a name may have dollars
    axis.set_xticks(range(len(names)), short, rotation=90, **as_it_is)
    axis.set_yticks(range(len(names)), [f"{name} ({count})" for name, count in zip(short, images)], **as_it_is)
    for row, column in zip(*np.nonzero(counts)):
        is_dark, is_right = share[row, column] > 55, row == column
        axis.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=7,
                  color="white" if is_dark else "black" if is_right else "firebrick")
    axis.set_xlabel("taken for")
    axis.set_ylabel("class (images)")
    axis.set_title(title, fontsize=9, parse_math=False)
    figure.colorbar(picture, ax=axis, shrink=0.6, label="% of the images of the class")
    figure.savefig(file, format=kind, dpi=120)
