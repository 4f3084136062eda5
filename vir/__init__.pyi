# The names that vir gives, for type checkers and editors; vir/__init__.py imports each when it is asked for.

from vir.config import DistillConfig, TrainConfig
from vir.evaluation.labelling import Guess, Prediction, predict_images
from vir.export import Exported, export_hub, export_model
from vir.models import VisionRetention, WeightsMetadata, initialize_from, load, read_metadata, save_weights
from vir.models.build import freeze
from vir.models.linear_probe import make_probe
from vir.training.distill import Teacher, load_teacher
from vir.training.loss import distillation_loss
from vir.weights.spec import InputSpec, ModelSpec, input_of

__version__: str

__all__ = [
    "DistillConfig", "Exported", "Guess", "InputSpec", "ModelSpec", "Prediction", "Teacher", "TrainConfig",
    "VisionRetention", "WeightsMetadata", "__version__", "distillation_loss", "export_hub", "export_model",
    "freeze", "initialize_from", "input_of", "load", "load_teacher", "make_probe", "predict_images",
    "read_metadata", "save_weights",
]
