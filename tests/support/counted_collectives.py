"""Engines one after another in the ranks of one launch; the bytes of their collectives in the last step are written.

usage: tests/support/counted_collectives.py JOBS.json   (as engine_runs); to collectives.json in each output
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support.engine_runs import GLOBAL_BATCH, Job, batch

COUNTED = {  # which of the arguments is the whole vector
    "all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1,
    "all_to_all_single": 0}
found: dict[str, int] = {}


def count(name: str, place: int) -> None:
    original = getattr(dist, name)

    def counting(*args, **options):
        tensors = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
        tensor = options.get({0: "tensor", 1: "input_tensor"}[place]) if not args else args[place]
        whole = max(tensors, key=torch.Tensor.numel) if tensor is None else tensor
        found[name] = found.get(name, 0) + whole.numel() * whole.element_size()
        return original(*args, **options)

    setattr(dist, name, counting)


def run(job: Job) -> None:
    from vir import distributed
    from vir.engine.engine import Engine

    world = distributed.start()
    model = job.build()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    engine = Engine(model, job.config(world.size), job.ds_config(), job.accumulation)
    micro = GLOBAL_BATCH // world.size // job.accumulation
    for step in range(job.steps):
        found.clear()
        images, targets = batch(step, job.classes)
        for index in range(job.accumulation):
            start = (world.rank * job.accumulation + index) * micro
            logits = engine(images[start:start + micro]).float()
            engine.backward(torch.nn.functional.cross_entropy(logits, targets[start:start + micro]))
            engine.step(1e-2, 0.0)
    if world.is_main:
        (Path(job.output) / "collectives.json").write_text(json.dumps({
            "bytes": found, "parameters": sum(size for size, _ in sizes),
            "trained": sum(size for size, is_trained in sizes if is_trained), "sizes": [size for size, _ in sizes]}))
    engine.close()


if __name__ == "__main__":
    for name, place in COUNTED.items():
        count(name, place)
    for fields in json.loads(Path(sys.argv[-1]).read_text()):
        run(Job(**fields))
