"""JSON that a stranger may have written: read strictly, and its fields checked by rules."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")

Rules = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Of each field of a JSON object: whether a value may stand there, and what it must be, in words."""


def check_fields(fields: Any, rules: Rules, optional: Collection[str] = ()) -> None:
    """Raises ValueError, a sentence, where a field is missing, unknown, or of another kind than its rule says."""
    if not isinstance(fields, dict):
        raise ValueError(f"it is {reprlib.repr(fields)}, not an object of fields")
    if unknown := fields.keys() - rules.keys():
        raise ValueError(f"it has unknown fields: {some(unknown)}; known are {', '.join(rules)}")
    if missing := rules.keys() - fields.keys() - set(optional):
        raise ValueError(f"it lacks fields: {some(missing)}")
    for name, value in fields.items():
        holds, what = rules[name]
        if not holds(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}; it must be {what}")


def some(names: Iterable[str]) -> str:
    """The first three of them, as far as a line takes them."""
    first = sorted(names)
    shown = [name if len(name) <= 120 and name.isprintable() else reprlib.repr(name) for name in first[:3]]
    return ", ".join(shown) + (", …" if len(first) > 3 else "")


def is_count(value: Any) -> bool:
    """A whole number, 0 or more; JSON's true is none."""
    return type(value) is int and value >= 0


def is_text(value: Any) -> bool:
    """That can be printed and stored: JSON can spell halves of characters."""
    return isinstance(value, str) and not _HALF.search(value)


def is_list_of_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_text, value))


def is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_text, value))


def strict_json(text: str | bytes) -> Any:
    """Raises ValueError, a sentence, where it is not JSON as we write it."""
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError(f"it has {some(Counter(name for name, _ in pairs) - Counter(fields.keys()))} twice")
        return fields

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=distinct)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
