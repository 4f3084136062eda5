"""What a run is going to do, in a few lines, before its first step."""

from __future__ import annotations

import math

from vir.config import RunConfig
from vir.data.transforms import InputConfig
from vir.distributed import World
from vir.engine import optimizer
from vir.engine.engine import Engine
from vir.training.loop import Plan
from vir.training.prepare import Prepared


def describe(config: RunConfig, prepared: Prepared, plan: Plan, engine: Engine, world: World,
             model_input: InputConfig) -> list[str]:
    """Lines for people: model, parameter groups, data, batches, steps, memory."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    weights, state = model_state_bytes(parameters, world.size, engine.zero_stage, engine.dtype.itemsize,
                                       optimizer.states_per_number(config.optim) + engine.has_ema)
    groups = (f"{group['name']} {len(group['names'])}" +
              ("" if group["lr_scale"] == 1 else f" lr x{group['lr_scale']:.3g}") for group in engine.groups)
    train, val = prepared.train, prepared.val
    return [
        f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {(plan.forward_flops or math.nan) / 1e9:.3g} GFLOP "
        f"forward per image of {'x'.join(map(str, model_input.size))}; ZeRO {engine.zero_stage}, {engine.precision}, "
        f"{world.size} ranks on {world.device.type}",
        f"{config.optim.name}, peak lr {config.optim.peak_lr(config.train.global_batch_size):.3g}, tensors per group: "
        + ", ".join(groups),
        f"{len(train)} training images in {len(train.shard_sizes)} shards, {len(val)} validation images, "
        f"{plan.num_classes} classes",
        f"{plan.total_steps} steps of {config.train.global_batch_size} = {plan.accumulation} x "
        f"{config.train.micro_batch_size} x {world.size} ranks; {len(plan.eval_steps)} evaluations, "
        f"{len(plan.checkpoint_steps)} checkpoints",
        f"memory per rank: {(weights + state) / 1e6:.1f} MB = {weights / 1e6:.1f} weights and gradients + "
        f"{state / 1e6:.1f} optimizer{' and EMA' if engine.has_ema else ''}, without activations",
    ]


def model_state_bytes(parameters: int, ranks: int, zero_stage: int, itemsize: int, states: int) -> tuple[int, int]:
    """Bytes per rank of weights with gradients, and of masters with `states` float32 numbers per parameter.

    Weights are sharded in stage 3, gradients from stage 2 on, the rest from stage 1 on (ZeRO, arXiv:1910.02054, table
    1); float32 weights under stage 0 are their own masters.
    """
    share = -(-parameters // ranks)
    weights = itemsize * (share if zero_stage == 3 else parameters)
    gradients = itemsize * (share if zero_stage >= 2 else parameters)
    masters = 0 if zero_stage == 0 and itemsize == 4 else 4
    return weights + gradients, (masters + 4 * states) * (share if zero_stage else parameters)
