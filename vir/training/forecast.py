"""What a plan tells of a run that is about to begin, in the world that it is in, and what it refuses."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from vir import control_groups, distributed, launcher
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
        host_memory=control_groups.available_memory()))


def check_memory_of_nodes(config: RunConfig, ds_config: dict[str, Any], engine: Engine, world: World) -> None:
    """Refuse copies of checkpoints that do not fit into what is available of memory now. Collective.

    Those of a container into what it is granted, those of a machine, which may have several, into what it has.

    Raises:
        SettingsError: they do not in one of them, which is named; on every rank.
    """
    if not config.checkpoint.asynchronous:
        return
    written = checkpoint_bytes(count_numbers(engine.module, engine.groups), ds_config, world.size, config.optim,
                               engine.has_ema)
    told = distributed.gather((_machine(), os.uname().nodename, control_groups.memory_left(),
                               psutil.virtual_memory().available))
    containers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    machines: defaultdict[str, list[int]] = defaultdict(list)
    for rank, (machine, host, _, _) in enumerate(told):  # a container has a name of its own
        containers[machine, host].append(rank)
        machines[machine].append(rank)
    for (_, host), here in containers.items():
        check_host_memory(written.of(here), min(told[rank][2] for rank in here), len(here), engine.zero_stage, host)
    for here in machines.values():
        hosts = " and ".join(dict.fromkeys(told[rank][1] for rank in here))
        check_host_memory(written.of(here), min(told[rank][3] for rank in here), len(here), engine.zero_stage, hosts)


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
