"""The picture of the classes that are confused: it is drawn for any counts, and what is drawn follows from them."""

import io

import numpy as np
import pytest
from PIL import Image

from vir.reports.confusion import draw_confusion


def drawn(names, counts, images, kind="png"):
    file = io.BytesIO()
    draw_confusion(file, kind, names, np.array(counts), np.array(images), "a title")
    return file


@pytest.mark.parametrize("size", [1, 2, 20])
def test_it_grows_with_the_classes_and_long_names_fit(size):
    counts = np.eye(size, dtype=int) * 5
    picture = Image.open(drawn(["x" * 200] * size, counts, [5] * size))
    assert picture.width > 300 + 40 * size and picture.width < 8000


def test_a_share_is_of_all_images_of_the_class_and_names_are_text():
    """As SVG, whose texts can be read: 3 of 4 right, 1 of 4 taken for the other, 6 of 12 for one that is not shown."""
    text = drawn(["cat", "dög"], [[3, 1], [0, 6]], [4, 12], "svg").getvalue().decode()
    labels = [line.strip()[5:-4] for line in text.splitlines() if line.strip().startswith("<!-- ")]
    assert {"75", "25", "50", "cat (4)", "dög (12)", "taken for", "a title"} <= set(labels)
    assert labels.count("0") == 1  # that of the scale


def test_dollars_in_a_name_are_no_formula():
    text = drawn([r"a$\x0$", "$5"], [[1, 0], [0, 1]], [1, 1], "svg").getvalue().decode()
    assert r"<!-- a$\x0$ -->" in text and "<!-- $5 -->" in text


def test_a_class_without_images_divides_by_nothing():
    assert Image.open(drawn(["a", "b"], [[0, 0], [1, 1]], [0, 2])).size[0] > 100
