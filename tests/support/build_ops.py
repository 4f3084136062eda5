"""Compile DeepSpeed's operators for CPUs once, before the tests: within them it would count against their bounds.

    python tests/support/build_ops.py

They are kept in ~/.cache/torch_extensions (or TORCH_EXTENSIONS_DIR), so that a second call takes seconds.
"""

import time

from deepspeed.accelerator import get_accelerator

began = time.monotonic()
print("== compiling DeepSpeed's operators (minutes on a new machine, once)", flush=True)
# The first is of the bare loops that ours is compared with: a run of ours does without it.
for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(name).load(verbose=False)
print(f"== compiled, or found, in {time.monotonic() - began:.0f} s", flush=True)
