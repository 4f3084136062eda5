"""ViR models. Importing this package registers them with timm: timm.create_model("vir_small_patch16_224")."""

from vir.models.build import load
from vir.models.forms import RETENTION_MODES, retain
from vir.models.initialize import initialize_from
from vir.models.retention import (
    chunkwise_retention,
    parallel_retention,
    recurrent_retention,
    retention_decay,
    retention_step,
)
from vir.models.retention_2d import chunkwise_retention_2d, parallel_retention_2d, recurrent_retention_2d
from vir.models.vision_retention import VisionRetention
from vir.weights.metadata import WeightsMetadata
from vir.weights.portable import read_metadata, save_weights

__all__ = [
    "RETENTION_MODES", "VisionRetention", "WeightsMetadata", "chunkwise_retention", "chunkwise_retention_2d",
    "initialize_from", "load", "parallel_retention", "parallel_retention_2d", "read_metadata",
    "recurrent_retention", "recurrent_retention_2d", "retain", "retention_decay", "retention_step", "save_weights",
]
