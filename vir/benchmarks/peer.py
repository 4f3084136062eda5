"""The peer of tools/benchmark_training.py: the loop of DeepSpeed's tutorial, on one batch in memory, and nothing else.

    deepspeed --module vir.benchmarks.peer SETTINGS.json

times.json beside SETTINGS.json gets what `train` returns.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from torch.nn import functional as F

from vir.beginning import Beginning
from vir.benchmarks.marks import Marks
from vir.models import VisionRetention
from vir.models.build import create


def train(settings: dict[str, Any], beginning: Beginning) -> dict[str, Any]:
    """Train timm's `model` with `model_args` for `steps` steps under the DeepSpeed config `deepspeed`.

    Returns:
        What Marks tell after each further `log_every` steps; `parameters`: trainable numbers; `optimizer`: the class
        that does the update.

    `beginning` gets the phases until the end of the first step.
    """
    model = create(settings["model"], settings["model_args"])
    if isinstance(model, VisionRetention):
        model.set_retention_mode(settings["retention_mode"], settings["chunk_size"])
    described: Any = model.pretrained_cfg
    size = settings["input_size"] or described["input_size"]  # (C, H, W)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    beginning.ended("model")
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(),
                                                 config=settings["deepspeed"])
    batch = engine.train_micro_batch_size_per_gpu()
    x = torch.randn(batch, *size).to(engine.device, engine.get_data_types()[0])  # [B, C, H, W]
    y = torch.randint(settings["model_args"]["num_classes"], (batch,)).to(engine.device)
    beginning.ended("engine")
    marks = Marks()
    for step in range(settings["steps"]):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = F.cross_entropy(engine(x), y)
            engine.backward(loss)
            engine.step()
        if step == 0:
            beginning.ended("first step")
        if (step + 1) % settings["log_every"] == 0:
            deepspeed.get_accelerator().synchronize()
            marks.take()
    inner = getattr(optimizer, "optimizer", optimizer)
    return {**marks.over_ranks(), "parameters": parameters,
            "optimizer": f"{type(inner).__module__}.{type(inner).__name__}"}


if __name__ == "__main__":
    path = Path(sys.argv[-1])
    process_began = psutil.Process().create_time()
    beginning = Beginning(process_began)
    beginning.ended("imports")
    measured = train(json.loads(path.read_text()), beginning)
    measured["beginning"] = {"process_began": process_began, "seconds": beginning.seconds}
    if os.environ["RANK"] == "0":
        path.with_name("times.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()
