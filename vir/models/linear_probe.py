"""A linear probe: a model of which the classifier alone is trained, on features that may have been computed before."""

# Dimension key: B batch, C channels, H height, W width, F numbers of all classifiers' inputs, K classes.

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from vir.errors import SettingsError


class LinearProbe(nn.Module):
    """What make_probe adds to a model's class: all but the classifier stays in evaluation mode; features are taken."""

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(False)
        for head in classifiers(self):
            head.train(mode)
        return self

    def forward(self, x: Tensor) -> Any:
        """Logits [B, K] of images [B, C, H, W], or of features [B, F] as classifier_inputs gave them."""
        if x.ndim != 2:
            return super().forward(x)
        heads = classifiers(self)
        parts = x.split([_width(head) for head in heads], dim=1)
        logits = [head(part[..., None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(part)
                  for head, part in zip(heads, parts, strict=True)]
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)


def make_probe(model: nn.Module) -> None:
    """Let the classifier alone be trained: the other parameters need no gradient, and their modules never train.

    Names of parameters and buffers stay as they are.

    Raises:
        SettingsError: the model does not say which module is its classifier, or has none.
    """
    heads = classifiers(model)
    model.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)
    kind = type(model)
    model.__class__ = type(kind.__name__, (LinearProbe, kind), {"__module__": kind.__module__})
    model.train()


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The modules that make logits; distilled models have two.

    Raises:
        SettingsError: there is none.
    """
    named = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    modules = dict(model.named_modules())
    heads = [modules[name] for name in ((named,) if isinstance(named, str) else named) if name in modules]
    if not heads or not all(list(head.parameters()) for head in heads):
        raise SettingsError(f"--train.linear_probe: {type(model).__name__} " + (
            f"has no classifier {named!r}" if named else "does not say which of its modules is the classifier") +
            "; take another --model.name, or choose what to train by --model.freeze")
    return heads


@contextmanager
def classifier_inputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """What the forward passes in the block give to the classifiers, the last time, by their number; flat, [B, F]."""
    found: dict[int, Tensor] = {}

    def keep(number: int, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[number] = inputs[0].flatten(1)

    hooks = [head.register_forward_pre_hook(partial(keep, number)) for number, head in enumerate(classifiers(model))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def feature_width(model: nn.Module) -> int | None:
    """F, the numbers that the classifiers take of one image; None where they are no linear layers of one vector."""
    heads = classifiers(model)
    if not all(isinstance(head, nn.Linear) or isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1)
               for head in heads):
        return None
    return sum(map(_width, heads))


def _width(head: nn.Module) -> int:
    return int(getattr(head, "in_channels" if isinstance(head, nn.Conv2d) else "in_features"))
