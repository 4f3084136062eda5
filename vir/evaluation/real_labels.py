"""ImageNet's validation images by the labels that people gave them anew: ReaL, arXiv:2006.07159, from timm's list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from vir.evaluation.predictions import Predictions

_IMAGES = 50_000
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def real_accuracy(predictions: Predictions, keys: Iterable[str], names: Sequence[str]) -> dict[str, float] | None:
    """real_top1 and real_top5 in percent and real_images, of the images that have such labels: a prediction is right
    where it is one of them.

    Args:
        keys: of the images, in the order of `predictions`.
        names: of the classes.

    Returns:
        None where these are not validation images of ImageNet, with its wnids as class names.
    """
    numbers = []
    for key in keys:
        match = _NAME.search(key)
        if match is None or not 1 <= int(match[1]) <= _IMAGES:
            return None
        numbers.append(int(match[1]))
    wnids, labels = _timms_list()
    label_of = {name: label for label, name in enumerate(names)}
    if not label_of.keys() <= set(wnids):
        return None
    right = [np.isin(top, [label_of[wnids[label]] for label in labels[number - 1] if wnids[label] in label_of])
             for number, top in zip(numbers, predictions.top) if any(wnids[i] in label_of for i in labels[number - 1])]
    if not right:
        return None
    first, any_of = (100 * sum(map(bool, column)) / len(right)
                     for column in zip(*((each[0], each.any()) for each in right)))
    return {"real_top1": first, "real_top5": any_of, "real_images": len(right)}


@cache
def _timms_list() -> tuple[list[str], list[list[int]]]:
    """The wnid of each class, and the classes of each validation image in the order of their numbers."""
    from timm.data import ImageNetInfo, RealLabelsImagenet

    by_name = RealLabelsImagenet([""] * _IMAGES).real_labels
    return ImageNetInfo().label_names(), [by_name[name] for name in sorted(by_name)]
