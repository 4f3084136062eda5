"""What a plan tells of a run that is about to begin, in the world that it is in."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from vir import launcher
from vir.distributed import World
from vir.models.build import sketch
from vir.planning.checkpoints import DISK_RATE, RESTART_S
from vir.planning.estimate import Estimate, Question, estimate
from vir.planning.hardware import Cluster, Gpu, gpu_of_device
from vir.planning.images import Images
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
        disk=DISK_RATE, restart=RESTART_S, teacher=teacher.bytes if teacher else 0))


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
