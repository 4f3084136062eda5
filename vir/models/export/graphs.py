"""What is exported of a model: graphs with names, example inputs and the sides that may change.

Dimension key: B batch, H heads, K key width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vir.errors import SettingsError
from vir.models.export.any_size import AnySize
from vir.models.export.recurrent import Read, Step, check_streams
from vir.models.vision_retention import VisionRetention

GRAPHS = {"parallel": ("model",), "recurrent": ("step", "read")}
"""The names of the graphs of each form."""

Runner = Callable[..., tuple[Tensor, ...]]
"""Runs a graph on its inputs, in their order."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A module to export, which takes and returns tensors alone."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    """Examples by name, in the order of the module's arguments; batches of two."""
    outputs: tuple[str, ...]
    batches: Mapping[str, int]
    """Which side of an input is the batch."""
    sides: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of inputs of any size, whose last two sides are height and width: what divides these."""


def graphs(model: nn.Module, size: tuple[int, int, int], form: str, dynamic_size: bool = False) -> list[Graph]:
    """The graphs of a model in eval mode, on the CPU and in float32.

    Args:
        size: [channels, height, width] of its images.
        form: One of GRAPHS.
        dynamic_size: Take images of all sizes that are whole patches; in the parallel form alone.

    Raises:
        SettingsError: The model has no such form, or takes images of one size alone.
    """
    if form == "recurrent":
        return _recurrent(_retention_of(model, "--form recurrent"))
    images = {"images": torch.zeros(2, *size)}
    if dynamic_size:
        module = AnySize(_retention_of(model, "--dynamic-size"))
        return [Graph(name="model", module=module, inputs=images, outputs=("logits",), batches={"images": 0},
                      sides={"images": module.patch_size})]
    if isinstance(model, VisionRetention):
        model.set_retention_mode("parallel")
    return [Graph(name="model", module=model, inputs=images, outputs=("logits",), batches={"images": 0})]


def _recurrent(model: VisionRetention) -> list[Graph]:
    check_streams(model)
    step, read = Step(model), Read(model)
    patches, state = torch.zeros(2, *step.patches_shape), torch.zeros(step.state_shape(2))
    more = {} if model.cls_token is not None else {"total": torch.zeros(2, model.embed_dim)}
    batches = {"patches": 0, "position": 0, "state": 1, "total": 0}
    inputs = {"patches": patches, "position": torch.zeros(2, dtype=torch.long), "state": state, **more}
    read_inputs = more or {"state": state}
    return [Graph(name="step", module=step, inputs=inputs, outputs=("next_state", *(f"next_{name}" for name in more)),
                  batches={name: batches[name] for name in inputs}),
            Graph(name="read", module=read, inputs=read_inputs, outputs=("logits",),
                  batches={name: batches[name] for name in read_inputs})]


def _retention_of(model: nn.Module, flag: str) -> VisionRetention:
    if not isinstance(model, VisionRetention):
        raise SettingsError(f"{flag} is of ViR models, and this is a {type(model).__name__}; leave it out")
    return model


def logits_of(model: nn.Module, form: str, runners: Mapping[str, Runner], images: Tensor) -> Tensor:
    """The logits [B, classes] of images [B, C, height, width] by the graphs that were made of the model.

    Args:
        runners: By the names of the graphs. Those of the recurrent form are given one token, or row, after the other.
    """
    if form == "parallel":
        return runners["model"](images)[0]
    assert isinstance(model, VisionRetention)
    step = Step(model)
    height, width = step.patches_shape[1:]
    carried: tuple[Tensor, ...] = (torch.zeros(step.state_shape(len(images))),)
    if model.cls_token is None:
        carried = (*carried, torch.zeros(len(images), model.embed_dim))
    parts = [part for rows in images.split(height, dim=2) for part in rows.split(width, dim=3)]
    for number, part in enumerate(parts):
        position = torch.full((len(images),), number, dtype=torch.long)
        carried = runners["step"](part.contiguous(), position, *carried)
    return runners["read"](carried[-1])[0]
