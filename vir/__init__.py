"""ViR at scale: Vision Retention backbones (arXiv:2310.19731) trained under DeepSpeed.

This package imports no torch: `import vir.models` registers the models with timm.
"""

__version__ = "0.1.0"
