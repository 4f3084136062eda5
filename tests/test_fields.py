"""JSON of strangers: what is read of it at all, and what may stand in a field."""

import pytest

from vir.weights.fields import is_count, is_list_of_texts, is_text, is_text_map, some, strict_json


def test_json_is_read_as_it_is_written_here():
    text = '{"a": [1, "dög"], "b": {"a": null}}'
    assert strict_json(text) == strict_json(text.encode()) == {"a": [1, "dög"], "b": {"a": None}}


@pytest.mark.parametrize("text, said", [
    ('{"a": 1, "b": 2, "a": 1}', "it has a twice"), ("[" * 10**6, "it is nested too deeply"),
    ("[NaN]", "NaN is no number of JSON"), ("-Infinity", "-Infinity is no number of JSON"),
    ("{", "Expecting property")])
def test_what_is_no_json_is_told(text, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        strict_json(text)


def test_the_first_three_names_are_told_as_they_can_be_printed():
    assert some("cab") == "a, b, c" and some("dcab") == "a, b, c, …"
    assert some(["a", "b\n\x1b[2J"]) == r"a, 'b\n\x1b[2J'" and len(some(["x" * 10**6])) < 130


@pytest.mark.parametrize("value, count, text", [
    (0, True, False), (7, True, False), (-1, False, False), (True, False, False), (1.0, False, False),
    ("dög", False, True), ("", False, True), ("\ud800", False, False), (None, False, False)], ids=repr)
def test_counts_and_texts(value, count, text):
    assert (is_count(value), is_text(value)) == (count, text)
    assert is_list_of_texts([value]) == is_text_map({value: 1}) == text
    assert not is_list_of_texts("abc") and not is_text_map(["a"])
