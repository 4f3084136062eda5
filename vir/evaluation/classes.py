"""Which classes a model and a split have in common, and where each of them stands in both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vir.data.sources.folder import some
from vir.errors import SettingsError


@dataclass(frozen=True)
class Shared:
    """The classes that are evaluated. `label` below is an index in `names`."""

    names: tuple[str, ...]
    """In the order of the model."""
    columns: np.ndarray | None
    """[len(names)] int64, the logit of each; None: they are all its logits, in their order."""
    labels: np.ndarray
    """[classes of the data] int64, the label of each; -1 where the model does not know it."""
    said: str = ""
    """What the user should know; empty where the two lists are the same."""

    def samples(self, labels_of_data: np.ndarray) -> np.ndarray | None:
        """Indices of the samples whose class is evaluated, ascending; None for all of them."""
        known = self.labels[labels_of_data] >= 0
        return None if known.all() else np.flatnonzero(known)


def shared_classes(of_model: Sequence[str], num_logits: int, of_data: Sequence[str]) -> Shared:
    """The classes by whose names both know them.

    Images of other classes are left out, and a model chooses among the shared ones alone: this is how ImageNet-A and
    ImageNet-R are defined. Folders named 0, 1, … as those of ImageNet-V2 stand for the model's classes in their order.

    Args:
        of_model: the class of each logit; empty where unknown: then they are taken to be those of the data.

    Raises:
        SettingsError: none is shared, or a model without a class list has another number of logits.
    """
    if not of_model:
        if num_logits != len(of_data):
            raise SettingsError(f"the weights name no classes and have {num_logits} logits, the data has "
                                f"{len(of_data)} classes; give data of the classes that they were trained on")
        by_number = sorted(of_data, key=int) if all(name.isdecimal() for name in of_data) else of_data
        label_of = {name: label for label, name in enumerate(by_number)}
        return Shared(tuple(by_number), None, np.array([label_of[name] for name in of_data]),
                      f"the weights name no classes: their {num_logits} logits are taken for those of the data, in "
                      f"the order of their n{'umbers' if by_number is not of_data else 'ames'}")
    if tuple(of_model) == tuple(of_data):
        return Shared(tuple(of_model), None, np.arange(num_logits))
    numbered = all(name.isdecimal() and int(name) < num_logits for name in of_data) and not {*of_data} & {*of_model}
    names = [of_model[int(name)] for name in of_data] if numbered else of_data
    number_of = {name: number for number, name in enumerate(of_model)}
    columns = np.array(sorted({number_of[name] for name in names if name in number_of}), dtype=np.int64)
    if not len(columns):
        raise SettingsError(f"the weights know {len(of_model)} classes ({some(of_model)}), the data has {len(of_data)} "
                            f"({some(of_data)}), and none is in both; give data of classes that they were trained on")
    label_of = {of_model[column]: label for label, column in enumerate(columns.tolist())}
    labels = np.array([label_of.get(name, -1) for name in names], dtype=np.int64)
    return Shared(tuple(label_of), None if len(columns) == num_logits else columns, labels,
                  _told(of_model, of_data, [name for name in names if name not in number_of], len(columns), numbered))


def _told(of_model: Sequence[str], of_data: Sequence[str], unknown: Sequence[str], count: int, numbered: bool) -> str:
    told = [f"the data names its {len(of_data)} classes by number; they are taken for the model's, in its order"
            if numbered else f"classes are matched by name: {count} are in both"]
    if count < len(of_model):
        told.append(f"the model chooses among {count} of its {len(of_model)}")
    if unknown:
        told.append(f"images of {len(unknown)} classes that it does not know are left out ({some(unknown)})")
    return "; ".join(told)


def in_words(names: Sequence[str]) -> list[str] | None:
    """What ImageNet's wnids mean, such as "tench, Tinca tinca" of n01440764; None where not all names are of them."""
    if not names or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    from timm.data import ImageNetInfo

    words = ImageNetInfo().label_name_to_description
    try:
        return [words(name) for name in names]
    except KeyError:  # of another hierarchy
        return None
