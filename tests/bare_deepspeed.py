"""The peer of tools/benchmark_training.py: the loop of DeepSpeed's tutorial, on one batch in memory, and nothing else.

usage: deepspeed … tests/bare_deepspeed.py SETTINGS.json   (times.json beside it gets what `train` returns)
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import timm
import torch
from torch.nn import functional as F

import vir.models  # noqa: F401, registers the models


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train timm's `model` with `model_args` for `steps` steps under the DeepSpeed config `deepspeed`.

    Returns:
        `times`: seconds of a clock at the end of each further `log_every` steps; `parameters`: trainable numbers;
        `optimizer`: the class that does the update.
    """
    model = timm.create_model(settings["model"], **settings["model_args"])
    if hasattr(model, "set_retention_mode"):
        model.set_retention_mode(settings["retention_mode"], settings["chunk_size"])
    size = settings["input_size"] or model.pretrained_cfg["input_size"]
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(),
                                                 config=settings["deepspeed"])
    batch = engine.train_micro_batch_size_per_gpu()
    x = torch.randn(batch, *size).to(engine.device, engine.get_data_types()[0])  # [B, C, H, W]
    y = torch.randint(settings["model_args"]["num_classes"], (batch,)).to(engine.device)
    times = []
    for step in range(settings["steps"]):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = F.cross_entropy(engine(x), y)
            engine.backward(loss)
            engine.step()
        if (step + 1) % settings["log_every"] == 0:
            deepspeed.get_accelerator().synchronize()
            times.append(time.perf_counter())
    inner = getattr(optimizer, "optimizer", optimizer)
    return {"times": times, "parameters": parameters, "optimizer": f"{type(inner).__module__}.{type(inner).__name__}"}


if __name__ == "__main__":
    path = Path(sys.argv[-1])
    found = train(json.loads(path.read_text()))
    if os.environ["RANK"] == "0":
        path.with_name("times.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
