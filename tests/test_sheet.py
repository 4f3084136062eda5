"""The contact sheet holds each picture's pixels."""

import numpy as np
import pytest
from PIL import Image

from vir.errors import SettingsError
from vir.reports.sheet import MOST, check_count, draw_sheet


@pytest.mark.parametrize("count, side, times", [(1, 16, 7), (7, 224, 1), (12, 100, 2)])
def test_every_picture_is_on_it_pixel_for_pixel(tmp_path, count, side, times):
    pictures = np.random.default_rng(0).integers(0, 256, (count, side, side + 1, 3), dtype=np.uint8)
    draw_sheet(list(pictures), [(f"key {number}", "a long " * 40) for number in range(count)], tmp_path / "a.png")
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    cell, found = (side * times + 6 + 2 * 14, (side + 1) * times + 6), 0
    for top in range(6, drawn.shape[0] - 6, cell[0]):
        for left in range(6, drawn.shape[1] - 6, cell[1]):
            part = drawn[top:top + side * times:times, left:left + (side + 1) * times:times]
            found += found < count and np.array_equal(part, pictures[found])
    assert found == count and (drawn == 0).any()


def test_what_is_refused(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(SettingsError, match="cannot be written: .*; give a name such as sheet.png"):
        draw_sheet([picture], [("a",)], tmp_path / "none" / "a.png")
    check_count(MOST, tmp_path / "a.png")
    with pytest.raises(SettingsError, match="would have 4097 pictures, 4096 is the most; narrow it by --rank and "):
        check_count(MOST + 1, tmp_path / "a.png")
