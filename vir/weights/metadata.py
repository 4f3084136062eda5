"""What a weights file says of itself: which model it holds, of which run and step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from vir.config import PRECISIONS
from vir.errors import SettingsError
from vir.weights.fields import (
    Rules,
    check_fields,
    is_count,
    is_list_of_texts,
    is_text,
    is_text_map,
    strict_json,
)
from vir.weights.spec import INPUT_RULES, InputSpec, ModelSpec

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16)))
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class WeightsMetadata:
    """What a weights file says of itself."""

    model: ModelSpec
    """The file is JSON, so tuples in its args are lists after loading."""

    step: int
    """Global batches that trained these weights."""

    samples_seen: int

    ema: bool
    """Whether these are the averaged weights."""

    dtype: str
    """In which the file holds the weights; load() says in which the model is."""

    config_hash: str = ""
    """SHA-256 of the settings of the run; empty where there was none."""

    data_fingerprint: str = ""
    """Of the images that trained them, and their class list; empty where unknown."""

    format_version: int = FORMAT_VERSION
    """2 added crop_mode, config_hash and data_fingerprint."""

    def to_json(self) -> str:
        """The header, flat. Raises SettingsError where from_json would not take it again."""
        fields = {
            "model_name": self.model.name, "model_args": self.model.args, "classes": self.model.classes,
            **self.model.input.timm_cfg(), "step": self.step, "samples_seen": self.samples_seen, "ema": self.ema,
            "dtype": self.dtype, "config_hash": self.config_hash, "data_fingerprint": self.data_fingerprint,
            "format_version": self.format_version}
        try:
            text = json.dumps(fields, ensure_ascii=False)
            self.from_json(text)
        except (ValueError, TypeError) as error:  # the latter of an argument that JSON has not
            raise SettingsError(f"these weights cannot be saved: {error}") from error
        return text

    @classmethod
    def from_json(cls, text: str) -> WeightsMetadata:
        """Raises ValueError, a sentence, where the text is not what to_json writes."""
        fields = strict_json(text)
        version: Any = fields.get("format_version") if isinstance(fields, dict) else None
        if is_count(version) and version > FORMAT_VERSION:
            raise FutureError(f"format_version {version}, this vir reads up to {FORMAT_VERSION}; update vir")
        check_fields(fields, _RULES, optional=_ADDED if version == 1 else ())
        image = {name: fields.pop(name) for name in ("mean", "std", "interpolation", "crop_pct")}
        image |= {"size": fields.pop("input_size"), "crop_mode": fields.pop("crop_mode", "center")}
        model = ModelSpec(name=fields.pop("model_name"), args=fields.pop("model_args"),
                          input=InputSpec.from_json(**image), classes=tuple(fields.pop("classes")))
        return cls(model=model, **fields)


class FutureError(ValueError):
    """A file of a later format."""


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _are_args(value: Any) -> bool:
    return is_text_map(value) and _is_flat(value, 16)


def _is_flat(value: Any, depth: int) -> bool:
    """Whether lists and objects stand in each other no deeper than that, and all texts are some."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    is_no_text = isinstance(value, str) and not is_text(value)
    return depth > 0 and not is_no_text and all(_is_flat(one, depth - 1) for one in inner)


_ADDED = {"crop_mode", "config_hash", "data_fingerprint"}
"""Fields that files of version 1 have not."""

MODEL_RULES: Rules = {
    "model_name": (lambda value: is_text(value) and value != "", "the name of a model"),
    "model_args": (_are_args, "an object of arguments by their names, nested 16 deep at most"),
    "classes": (is_list_of_texts, "a list of names")}  # ImageNet's in words has crane and maillot twice
"""Of the fields of a ModelSpec, but its input."""

_RULES: Rules = {
    **MODEL_RULES,
    **{"input_size" if name == "size" else name: rule for name, rule in INPUT_RULES.items()},
    "step": (is_count, "a whole number, 0 or more"),
    "samples_seen": (is_count, "a whole number, 0 or more"),
    "ema": (_is_switch, "true or false"),
    "dtype": (lambda value: value in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
    "config_hash": (is_text, "a text"),
    "data_fingerprint": (is_text, "a text"),
    "format_version": (lambda value: is_count(value) and value > 0, "a whole number, 1 or more")}
