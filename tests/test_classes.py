"""Which classes of a model and of data are evaluated, and what is told of it."""

import numpy as np
import pytest

from vir.errors import SettingsError
from vir.evaluation.classes import shared_classes

MODEL = ("ant", "bee", "cat", "dog")


def test_the_same_list_is_taken_as_it_is_without_a_word():
    found = shared_classes(MODEL, 4, list(MODEL))
    assert (found.names, found.columns, found.labels.tolist(), found.said) == (MODEL, None, [0, 1, 2, 3], "")
    assert found.samples(np.array([3, 0, 1])) is None


def test_data_of_fewer_classes_restricts_what_the_model_chooses_from():
    """As ImageNet-A and ImageNet-R are defined."""
    found = shared_classes(MODEL, 4, ("bee", "dog"))
    assert (found.names, found.columns.tolist(), found.labels.tolist()) == (("bee", "dog"), [1, 3], [0, 1])
    assert found.said == "classes are matched by name: 2 are in both; the model chooses among 2 of its 4"
    assert found.samples(np.array([1, 0])) is None


def test_shared_classes_stand_in_the_order_of_the_model():
    found = shared_classes("abcdefghi", 9, ("i", "b"))  # 8 and 1, which a set of Python would give in this order
    assert (found.names, found.columns.tolist(), found.labels.tolist()) == (("b", "i"), [1, 8], [1, 0])


def test_images_of_classes_that_the_model_does_not_know_are_left_out():
    found = shared_classes(MODEL, 4, ("ant", "ape", "bee", "cat", "dog", "eel"))
    assert (found.names, found.columns, found.labels.tolist()) == (MODEL, None, [0, -1, 1, 2, 3, -1])
    assert found.said == ("classes are matched by name: 4 are in both; images of 2 classes that it does not know are "
                          "left out ('ape', 'eel')")
    assert found.samples(np.array([5, 4, 1, 0, 2])).tolist() == [1, 3, 4]


def test_lists_that_overlap_are_evaluated_where_they_do():
    found = shared_classes(MODEL, 4, ("ape", "cat"))
    assert (found.names, found.columns.tolist(), found.labels.tolist()) == (("cat",), [2], [-1, 0])


def test_another_order_is_matched_by_name():
    found = shared_classes(MODEL, 4, ("dog", "cat", "bee", "ant"))
    assert (found.names, found.columns, found.labels.tolist()) == (MODEL, None, [3, 2, 1, 0])


def test_folders_named_by_number_are_the_models_classes_in_their_order():
    """ImageNet-V2's, which sort as text: 0, 1, 10, 11, 2."""
    names = tuple(f"n{i:02d}" for i in range(12))
    found = shared_classes(names, 12, ("0", "1", "10", "11", "2"))
    assert found.names == ("n00", "n01", "n02", "n10", "n11") and found.labels.tolist() == [0, 1, 3, 4, 2]
    assert found.columns.tolist() == [0, 1, 2, 10, 11]
    assert found.said.startswith("the data names its 5 classes by number; they are taken for the model's, in its")
    digits = shared_classes(("0", "1", "2"), 3, ("2", "1"))  # names that are numbers are names all the same
    assert digits.names == ("1", "2") and digits.labels.tolist() == [1, 0]


def test_weights_without_names_are_judged_by_their_count():
    found = shared_classes((), 3, ("x", "y", "z"))
    assert (found.names, found.columns, found.labels.tolist()) == (("x", "y", "z"), None, [0, 1, 2])
    assert found.said == ("the weights name no classes: their 3 logits are taken for those of the data, in the order "
                          "of their names")
    names = [str(number) for number in range(12)]
    numbered = shared_classes((), 12, sorted(names))  # 0, 1, 10, 11, 2, …
    assert list(numbered.names) == names and numbered.labels.tolist() == [0, 1, 10, 11, *range(2, 10)]
    assert numbered.said.endswith("in the order of their numbers")
    with pytest.raises(SettingsError, match="name no classes and have 3 logits, the data has 2 classes"):
        shared_classes((), 3, ("x", "y"))


def test_nothing_in_common_is_refused():
    with pytest.raises(SettingsError, match=r"know 4 classes \('ant', .*\), the data has 2 \('0', '9'\), and none"):
        shared_classes(MODEL, 4, ("0", "9"))
