"""ViR models. Importing this package registers them with timm: timm.create_model("vir_small_patch16_224")."""

from vir.models.forms import RETENTION_MODES, retain
from vir.models.retention import (
    chunkwise_retention,
    parallel_retention,
    recurrent_retention,
    retention_decay,
    retention_step,
)
from vir.models.vision_retention import VisionRetention
from vir.models.weights import WeightsMetadata, load, read_metadata, save_weights

__all__ = [
    "RETENTION_MODES", "VisionRetention", "WeightsMetadata", "chunkwise_retention", "load", "parallel_retention",
    "read_metadata", "recurrent_retention", "retain", "retention_decay", "retention_step", "save_weights",
]
