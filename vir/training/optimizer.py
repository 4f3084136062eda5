"""Which parameter gets which weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, `decay` and `no_decay`, that hold every trainable parameter once, with its name.

    Vectors (biases, norms, layer scale) and what the model's no_weight_decay() lists are not decayed.

    Returns:
        Groups for a torch optimizer, with the extra keys `name` and `names`; empty ones left out.
    """
    excluded = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[str, dict[str, Any]] = {
        "decay": {"name": "decay", "weight_decay": weight_decay, "params": [], "names": []},
        "no_decay": {"name": "no_decay", "weight_decay": 0.0, "params": [], "names": []},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups["no_decay" if parameter.ndim <= 1 or name in excluded else "decay"]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]
