"""ViR at scale: Vision Retention backbones (arXiv:2310.19731) trained under DeepSpeed.

This package imports no torch until one of the names below is asked for; `import vir.models` registers the models with
timm.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What docs/use.md shows, by where it is; the types are in __init__.pyi.
_HOMES = {
    "vir.config": ("DistillConfig", "TrainConfig"),
    "vir.evaluation.labelling": ("Guess", "Prediction", "predict_images"),
    "vir.export": ("Exported", "export_hub", "export_model"),
    "vir.models": ("VisionRetention", "WeightsMetadata", "initialize_from", "load", "read_metadata", "save_weights"),
    "vir.models.build": ("freeze",),
    "vir.models.linear_probe": ("make_probe",),
    "vir.training.distill": ("Teacher", "load_teacher"),
    "vir.training.loss": ("distillation_loss",),
    "vir.weights.spec": ("InputSpec", "ModelSpec", "input_of"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
