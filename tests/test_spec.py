"""What a model expects of an image, as its timm default_cfg says it."""

import pytest
import timm

import vir.models  # noqa: F401  registers the models
from vir.models.spec import InputSpec, input_of

TINY = dict(embed_dim=16, depth=1, num_heads=1, patch_size=4, num_classes=2)


@pytest.mark.parametrize("img_size, size", [(28, (3, 28, 28)), ((16, 32), (3, 16, 32)), (None, (3, 224, 224))])
def test_input_of_a_vir_model_has_the_size_it_was_built_for(img_size, size):
    args = TINY if img_size else TINY | dict(patch_size=16)
    given = {} if img_size is None else {"img_size": img_size}
    found = input_of(timm.create_model("vir_tiny_patch16_224", **args, **given))
    assert found == InputSpec(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)


def test_input_of_other_timm_models():
    assert input_of(timm.create_model("test_vit", img_size=32)).size == (3, 32, 32)
    found, cfg = input_of(timm.create_model("test_resnet")), timm.get_pretrained_cfg("test_resnet")
    assert (found.size, found.mean, found.std) == (cfg.input_size, cfg.mean, cfg.std)
