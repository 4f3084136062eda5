"""A contact sheet: small pictures in rows, each with lines of text under it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vir.errors import SettingsError

MOST = 4096
"""Pictures on a sheet."""
_LEAST_SIDE = 112
"""Smaller pictures are shown in whole multiples of their pixels."""
_TEXT, _GAP = 11, 6


def check_count(count: int, output: Path) -> None:
    """Raises SettingsError where a sheet would have more than MOST pictures."""
    if count > MOST:
        raise SettingsError(f"--sheet {output} would have {count} pictures, {MOST} is the most; narrow it by --rank "
                            "and --micro")


def draw_sheet(pictures: Sequence[np.ndarray], captions: Sequence[Sequence[str]], output: Path) -> None:
    """Write the pictures, [H, W, 3] uint8 and all of one size, about as wide as high.

    Args:
        pictures: as many as check_count takes.
        captions: as many lines for each picture; what is too long is cut off in its middle.
        output: ends in .png, which keeps every pixel.

    Raises:
        SettingsError: the file cannot be written.
    """
    height, width = pictures[0].shape[:2]
    times = -(-_LEAST_SIDE // min(height, width))
    height, width, font = height * times, width * times, ImageFont.load_default(_TEXT)
    line = _TEXT + 3
    cell_width, cell_height = width + _GAP, height + _GAP + line * len(captions[0])
    columns = max(1, round((len(pictures) * cell_height / cell_width) ** 0.5))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = _GAP + number % columns * cell_width, _GAP + number // columns * cell_height
        shown = np.repeat(np.repeat(picture, times, 0), times, 1)
        sheet.paste(Image.fromarray(shown), (left, top))
        for place, text in enumerate(caption):
            draw.text((left, top + height + place * line), _fitting(text, width, font), "black", font)
    try:
        sheet.save(output)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--sheet {output} cannot be written: {getattr(error, 'strerror', None) or error}; give a "
                            "name such as sheet.png in a folder that is there") from error


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or its beginning and its end: keys differ there."""
    half = len(text) // 2
    begin, end = text[:half], text[half:]
    shown = text
    while begin and end and font.getlength(shown) > width:
        begin, end = (begin[:-1], end) if len(begin) > len(end) else (begin, end[1:])
        shown = f"{begin}…{end}"
    return shown


if __name__ == "__main__":
    raise SystemExit("vir.reports.sheet is a part of the library; the program is vir-explain")
