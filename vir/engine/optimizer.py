"""Which optimizer, and which parameter gets which weight decay and learning rate."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from vir.config import OptimConfig
from vir.errors import SettingsError

# Under ZeRO 1 to 3 an optimizer sees one flat vector per group: only those of timm's that treat each number alone are
# right there. The cautious ones take a mean over a tensor, LAMB, LARS and NovoGrad a norm, Adafactor rows and columns.
ELEMENTWISE = {
    "adabelief", "adadelta", "adam", "adamax", "adamw", "adopt", "adoptw", "laprop", "lion", "madgrad", "madgradw",
    "momentum", "nadam", "nadamw", "nesterov", "nesterovw", "radabelief", "radam", "radamw", "rmsprop", "rmsproptf",
    "rmsproptfw", "sgd", "sgdw",
}
FUSED = {"adam", "adamw"}
"""Those that torch can do in one pass over the weights: 5 to 9 times as fast on a CPU."""
_NEVER = {"adagrad": "DeepSpeed builds it anew without its parameter groups",
          "adahessian": "it needs gradients of gradients",
          "adan": "it counts its steps per group, and ZeRO steps parts of a group apart",
          "adanw": "it counts its steps per group, and ZeRO steps parts of a group apart",
          "cadan": "it fails after its second step", "cadanw": "it fails after its second step"}


def check_name(name: str, zero_stage: int) -> None:
    """Whether an optimizer exists and is right in a ZeRO stage.

    Raises:
        SettingsError: with the reason, and names that are right.
    """
    from timm.optim import list_optimizers

    known = {str(known) for known in list_optimizers(exclude_filters=["bnb*", "fused*"])}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise SettingsError(f"--optim.name {name}: timm has no such optimizer; " + (
            f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"))
    if name in _NEVER:
        raise SettingsError(f"--optim.name {name} is not supported: {_NEVER[name]}; take adamw")
    if zero_stage > 0 and name not in ELEMENTWISE:
        raise SettingsError(f"--optim.name {name} needs whole tensors, and ZeRO stage {zero_stage} hands the optimizer "
                            f"flat pieces of them, so it would compute something else; take a stage 0 "
                            f"--deepspeed_config, or one of {', '.join(sorted(ELEMENTWISE))}")


def build(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer over `groups`, with an lr of 0 until the rates of the first step are written.

    Raises:
        SettingsError: the optimizer refuses its settings.
    """
    from timm.optim import create_optimizer_v2

    fused: dict[str, Any] = {"fused": True} if optim.name in FUSED else {}
    try:
        optimizer = create_optimizer_v2(groups, opt=optim.name, lr=1.0, weight_decay=optim.weight_decay,
                                        betas=optim.betas, momentum=optim.momentum, eps=optim.eps,
                                        **fused)
    except ValueError as error:
        raise SettingsError(f"--optim.name {optim.name} does not take these settings of --optim: {error}") from error
    for group in optimizer.param_groups:  # not all are made with a rate of 0
        group["lr"] = 0.0
    return optimizer


def copied(value: Any, device: torch.device) -> Any:
    """What an optimizer keeps beside its numbers per weight, e.g. Kron's list of matrices, with tensors of its own."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return [copied(item, device) for item in value] if isinstance(value, list) else value


def states_per_number(optim: OptimConfig) -> int:
    """How many numbers the optimizer keeps for each number of a parameter, found by a step on one small matrix."""
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.ones(2, 3)
    optimizer = build([{"params": [parameter]}], optim)
    optimizer.step()
    return sum(value.numel() == 6 for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups that hold every trainable parameter once, with its name; one for each of decay and learning rate.

    Vectors (biases, norms, layer scale) and what the model's no_weight_decay() lists are not decayed. With layer_decay
    the rate falls by that factor from each layer to the one below (BEiT, arXiv:2106.08254), layers as timm's
    group_matcher of the model counts them.

    Returns:
        Groups for a torch optimizer, with the extra keys `name`, `names`, `lr_scale` and `decays`.

    Raises:
        SettingsError: layer_decay for a model whose layers timm does not know.
    """
    excluded = set(getattr(model, "no_weight_decay", set)())
    layers = _layers(model, optim)
    top = max(layers.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and name not in excluded
        layer = layers.get(name, top)
        title = ("" if optim.layer_decay is None else f"layer_{layer}_") + ("decay" if decays else "no_decay")
        group = groups.setdefault(title, {
            "name": title, "decays": decays, "weight_decay": optim.weight_decay if decays else 0.0,
            "lr_scale": 1.0 if optim.layer_decay is None else optim.layer_decay ** (top - layer),
            "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[title] for title in sorted(groups)]


def _layers(model: nn.Module, optim: OptimConfig) -> dict[str, int]:
    """The number of the layer, counted from the input, that each parameter belongs to."""
    if optim.layer_decay is None:
        return {}
    if not hasattr(model, "group_matcher"):
        raise SettingsError(f"--optim.layer_decay {optim.layer_decay}: {type(model).__name__} does not say which "
                            "parameters form a layer (no group_matcher); leave it out")
    from timm.models import group_parameters

    return group_parameters(model, getattr(model, "group_matcher")(coarse=False), reverse=True)


def set_rates(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> None:
    """Write a step's learning rate and weight decay into an optimizer's groups."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
