"""Which processor this is: bits of floating-point sums are promised on the same one alone."""

from pathlib import Path

import torch


def processor() -> dict[str, str]:
    """Vendor, family and model of the first core, the vector instructions that PyTorch uses, and its version."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {**{name: fields.get(name, "") for name in ("vendor_id", "cpu family", "model", "model name")},
            "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
