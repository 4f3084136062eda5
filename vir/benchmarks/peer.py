"""The peer of tools/benchmark_training.py: the loop of DeepSpeed's tutorial, on one batch in memory, and nothing else.

    deepspeed --module vir.benchmarks.peer SETTINGS.json

times.json beside SETTINGS.json gets what `train` returns.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.nn import functional as F

from vir.benchmarks.marks import Marks, bare_model
from vir.startup import StartupTimer, process_age


def train(settings: dict[str, Any], startup: StartupTimer) -> dict[str, Any]:
    """Train timm's `model` with `model_args` for `steps` steps under the DeepSpeed config `deepspeed`.

    Returns:
        What Marks tell after each further `log_every` steps; `parameters`: trainable numbers; `optimizer`: the class
        that does the update.

    `startup` gets the phases until the end of the first step.
    """
    model, size, parameters = bare_model(settings)
    startup.ended("model")
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(),
                                                 config=settings["deepspeed"])
    batch = engine.train_micro_batch_size_per_gpu()
    x = torch.randn(batch, *size).to(engine.device, engine.get_data_types()[0])  # [B, C, H, W]
    y = torch.randint(settings["model_args"]["num_classes"], (batch,)).to(engine.device)
    startup.ended("engine")
    marks = Marks()
    for step in range(settings["steps"]):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = F.cross_entropy(engine(x), y)
            engine.backward(loss)
            engine.step()
        if step == 0:
            startup.ended("first step")
        if (step + 1) % settings["log_every"] == 0:
            deepspeed.get_accelerator().synchronize()
            marks.take()
    inner = getattr(optimizer, "optimizer", optimizer)
    return {**marks.over_ranks(), "parameters": parameters,
            "optimizer": f"{type(inner).__module__}.{type(inner).__name__}"}


if __name__ == "__main__":
    path = Path(sys.argv[-1])
    startup = StartupTimer(age := process_age())
    process_began = time.time() - age
    startup.ended("imports")
    measured = train(json.loads(path.read_text()), startup)
    measured["startup"] = {"process_began": process_began, "seconds": startup.seconds}
    if os.environ["RANK"] == "0":
        path.with_name("times.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()
