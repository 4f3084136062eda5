"""How this process computes: exact or TF32 products of float32, and whether the same step gives the same bits twice."""

from __future__ import annotations

import os

import torch


def set_up(tf32: bool = False, deterministic: bool = False) -> None:
    """Choose the arithmetic of this process. Before the first product on a GPU: cuBLAS looks once.

    Args:
        tf32: on GPUs from Ampere on, multiply float32 in matrix products and convolutions by their first 10 bits of
            fraction: up to 8 times as fast, with errors of 1e-3 relative. Torch by itself does so in convolutions.
        deterministic: take operators that add in the same order each time; one that has no such form raises a
            RuntimeError of torch's, with its name. Repeated and resumed runs are then equal bit for bit on the same
            GPUs, world size, stage and precision. Without it that holds on CPU alone; on GPUs two runs part by the
            rounding of their sums. The cost: slower indexing and convolutions, and 32 MB of cuBLAS's workspace.
    """
    # These write the newer fp32_precision of both libraries too. Where that alone is written, torch raises an error for
    # the mix when its compiler reads allow_tf32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False  # it would take the convolution that was fastest this time
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # By itself it then writes NaN into each new buffer, which are large: a step took 50 times as long.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    if deterministic != torch.are_deterministic_algorithms_enabled():  # it imports the compiler's settings
        torch.use_deterministic_algorithms(deterministic)
