"""Whether this Python has what the hour imports; else exit code 1 and one line that names all that is missing.

usage: python -m support.gpu_hour.modules
"""

import importlib
import importlib.util
import os
import sys

MODULES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "accelerate", "jsonargparse", "numpy", "PIL",
           "yaml", "safetensors", "tensorboard", "matplotlib", "tqdm", "mlxtend", "pytest", "pytest_timeout",
           "setuptools")


def missing(modules: tuple[str, ...] = MODULES) -> list[str]:
    """Those that cannot be imported, each with the reason where it is another one that it needs."""
    found = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a module of another Python, or of another torch, may raise
            known = isinstance(error, ModuleNotFoundError) and error.name == module
            found.append(module if known else f"{module} ({' '.join(str(error).split())})")
    return found


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed looks at no GPU, and says nothing about it
    if not importlib.util.find_spec("fla"):
        print("fla (of fla-core) is missing: its row in the table of the operator says so")
    if lacking := missing():
        print(f"missing in {sys.executable}: {', '.join(lacking)}")
        sys.exit(1)
