"""What a plan tells of a run that is about to begin, in the world that it is in, and what it refuses."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from vir import distributed, launcher
from vir.config import RunConfig
from vir.distributed import World
from vir.engine.engine import Engine
from vir.models.build import sketch
from vir.planning.checkpoints import DISK_RATE, RESTART_S
from vir.planning.estimate import Estimate, Question, estimate
from vir.planning.hardware import Cluster, Gpu, gpu_of_device
from vir.planning.images import Images
from vir.planning.memory import check_host_memory, checkpoint_bytes, count_numbers
from vir.training.distill import Teacher, make_student
from vir.training.plan import Plan
from vir.training.prepare import Prepared


def forecast(prepared: Prepared, plan: Plan, world: World, teacher: Teacher | None) -> Estimate:
    """As vir-plan makes it for such machines."""
    config = prepared.config
    network, spec = sketch(config.model, prepared.train.classes, config.train.linear_probe)
    make_student(network, spec.name, config.distill)
    gpu = _device(world.device, config.train.peak_tflops)
    return estimate(Question(
        config=config, ds_name=prepared.ds_name, ds_config=prepared.ds_config, network=network, spec=spec,
        images=Images.of(prepared.train), on_gpu=world.device.type == "cuda", total_steps=plan.total_steps,
        cluster=Cluster(nodes=launcher.nodes(), gpus_per_node=world.size // launcher.nodes(), gpu=gpu,
                        network=gpu.network),
        disk=DISK_RATE, restart=RESTART_S, teacher=teacher.bytes if teacher else 0,
        host_memory=launcher.available_memory()))


def check_memory_of_nodes(config: RunConfig, ds_config: dict[str, Any], engine: Engine, world: World) -> None:
    """Refuse copies of checkpoints that do not fit into what is available of a node's memory now. Collective.

    Raises:
        SettingsError: they do not on one of the nodes, which is named; on every rank.
    """
    if not config.checkpoint.asynchronous:
        return
    written = checkpoint_bytes(count_numbers(engine.module, engine.groups), ds_config, world.size, config.optim,
                               engine.has_ema)
    told = distributed.gather((_machine(), os.uname().nodename, launcher.available_memory()))
    for machine, name in {of_rank[0]: of_rank[1] for of_rank in told}.items():
        here = [rank for rank, of_rank in enumerate(told) if of_rank[0] == machine]
        check_host_memory(written.of(here), min(told[rank][2] for rank in here), len(here), engine.zero_stage, name)


def _machine() -> str:
    """The same for the processes of one machine alone, also where its name is that of others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return os.uname().nodename


def _device(device: torch.device, tflops: float | None) -> Gpu:
    """Of this rank. Without links, which nothing here tells, no time is planned on one that is not known."""
    if device.type != "cuda":
        share = psutil.virtual_memory().total // launcher.local_size()
        return Gpu(name="CPU", memory=share, tflops={}, bandwidth=0.0, network=0.0,
                   source="the memory of this machine, in equal parts for its ranks; no time is planned on it")
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    known = gpu_of_device(name, memory)
    if known is None:
        return Gpu(name=name, memory=memory, tflops={}, bandwidth=0.0, network=0.0,
                   source="its links are not known here, so no time is planned; vir-plan takes them by --gpu",
                   fused=torch.cuda.get_device_capability(device) >= (8, 0))
    return known if tflops is None else replace(known, tflops=dict.fromkeys(known.tflops, tflops),
                                                source="memory as found here, peak as given")
