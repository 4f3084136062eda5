"""What this machine is, as one JSON object: GPU, driver, versions, compiler.

usage: python -m support.gpu_hour.environment FILE.json
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "deepspeed", "timm", "fla-core", "torchvision", "numpy", "pillow")


def describe() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0)),
        "cuda of torch": torch.version.cuda, "device": "cpu", "nvcc": shutil.which("nvcc") or "none",
        "versions": {name: _version(name) for name in PACKAGES}}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "gpus": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory GB": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "bf16 without emulation": torch.cuda.is_bf16_supported(including_emulation=False),
            "cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _driver()}
        a = torch.randn(64, 64, device="cuda", dtype=torch.float16)  # the first kernel: a wheel without this GPU fails
        torch.testing.assert_close((a @ a).cpu(), a.cpu() @ a.cpu(), rtol=1e-2, atol=1e-1)
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    return subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                          text=True, timeout=30).stdout.strip().splitlines()[0]


if __name__ == "__main__":
    Path(sys.argv[-1]).write_text(json.dumps(describe(), indent=1))
