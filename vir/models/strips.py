"""Images that come in strips, from top to bottom, cut anew into strips of one height; positions for some of their rows.

Dimension key: B batch.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_CUBIC = -0.5
"""The parameter of the bicubic filter in antialiased resizing, of Pillow and of torch."""


def cut_strips(
    strips: Iterable[Tensor], height: int, in_chans: int, img_size: tuple[int, int]
) -> Iterator[Tensor]:
    """Strips of any height -> strips of this height; the last may have fewer rows.

    Args:
        strips: [B, in_chans, any height, image width], from top to bottom; read one at a time.
        height: Rows of pixels in each returned strip.
        img_size: (height, width) of the whole images.

    Raises:
        ValueError: The strips do not make up images of this size.
    """
    expected: list[int] | None = None
    waiting: Tensor | None = None
    seen = 0
    for strip in strips:
        expected = expected or [strip.shape[0], in_chans, img_size[1]]
        seen += strip.shape[-2]
        if [*strip.shape[:-2], strip.shape[-1]] != expected or seen > img_size[0]:
            raise ValueError(f"a strip of shape {list(strip.shape)} ends at row {seen}; strips must be "
                             f"[{expected[0]}, {expected[1]}, any height, {expected[2]}] and {img_size[0]} rows "
                             f"in all")
        waiting = strip if waiting is None else torch.cat([waiting, strip], dim=2)
        while waiting.shape[2] >= height:
            yield waiting[:, :, :height]
            waiting = waiting[:, :, height:]
    if seen < img_size[0]:
        raise ValueError(f"the strips end at row {seen} of an image of {img_size[0]} rows; give img_size=(height, "
                         f"width) of the whole image and all of its strips")
    assert waiting is not None  # else no row was seen
    if waiting.shape[2]:
        yield waiting


def resample(table: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """A table of positions [old rows, old columns, D] -> [1, rows * columns, D].

    Args:
        of_rows, of_columns: of resampling_weights, or some rows of that: the bicubic filter is one over columns of one
            over rows.
    """
    rows = torch.einsum("ij,jkd->ikd", of_rows, table)
    return torch.einsum("lk,ikd->ild", of_columns, rows).flatten(0, 1).unsqueeze(0)


def resampling_weights(new: int, old: int) -> Tensor:
    """[new, old] float32: how much of each old place is in each new one, by the filter that timm resamples positions
    with (bicubic, antialiased). In operators that torch.export takes when the numbers are symbols."""
    scale = torch.full((1,), old, dtype=torch.float32) / torch.full((1,), new, dtype=torch.float32)
    centres = (torch.arange(new)[:, None] + 0.5) * scale
    distances = ((torch.arange(old) + 0.5 - centres) / scale.clamp(min=1)).abs()
    near = ((_CUBIC + 2) * distances - (_CUBIC + 3)) * distances * distances + 1
    far = ((distances - 5) * distances + 8) * distances - 4
    weights = torch.where(distances < 1, near, torch.where(distances < 2, _CUBIC * far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)
