"""Images that come in strips, from top to bottom, cut anew into strips of one height; positions for some of their rows.

Dimension key: B batch.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


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


def resampling_weights(new: int, old: int) -> Tensor:
    """[new, old] float32: how much of each old place is in each new one, by the filter that timm resamples positions
    with (bicubic, antialiased)."""
    places = torch.eye(old)[None, None]  # one column for each old place
    return F.interpolate(places, size=(new, old), mode="bicubic", antialias=True)[0, 0]
