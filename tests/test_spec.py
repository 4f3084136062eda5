"""What a model expects of an image, as its timm default_cfg says it."""

import json
from dataclasses import asdict, replace

import pytest
import timm

import vir.models  # noqa: F401  registers the models
from vir.weights.fields import check_fields
from vir.weights.spec import CROP_MODES, INPUT_RULES, INTERPOLATIONS, InputSpec, input_of

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


def test_the_crop_of_a_timm_model_is_its_own():
    args = dict(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2)
    assert input_of(timm.create_model("test_vit")).crop_mode == "center"
    model = timm.create_model("vit_base_patch16_clip_384", **args)
    assert input_of(model).crop_mode == timm.get_pretrained_cfg("vit_base_patch16_clip_384").crop_mode == "squash"


def test_every_crop_and_filter_of_timms_models_may_be_in_a_file():
    cfgs = [timm.get_pretrained_cfg(name) for name in timm.list_models()]
    assert {cfg.crop_mode for cfg in cfgs} == set(CROP_MODES)
    assert {cfg.interpolation for cfg in cfgs} <= set(INTERPOLATIONS)
    for name in INTERPOLATIONS:
        assert timm.data.transforms.str_to_pil_interp(name) is not None


FIELDS = dict(size=[3, 16, 24], mean=[0.1, 0.2, 0.3], std=[1, 0.5, 0.6], interpolation="bilinear", crop_pct=0.9,
              crop_mode="border")


def test_fields_of_json_come_back():
    expected = InputSpec(size=(3, 16, 24), mean=(0.1, 0.2, 0.3), std=(1, 0.5, 0.6), interpolation="bilinear",
                         crop_pct=0.9, crop_mode="border")
    assert InputSpec.from_json(**json.loads(json.dumps(asdict(expected)))) == expected == InputSpec.from_json(**FIELDS)
    old = {name: value for name, value in FIELDS.items() if name != "crop_mode"}
    assert InputSpec.from_json(**old) == replace(expected, crop_mode="center")


@pytest.mark.parametrize("changed, said", [
    ({"sise": 1}, "it has unknown fields: sise; known are size, mean, std, interpolation, crop_pct, crop_mode"),
    ({"size": [3, 16, 10**9]}, "size is .*1000000000"), ({"crop_pct": 1e-9}, "crop_pct is 1e-09; it must be"),
    ({"size": [3, 16]}, r"size is \[3, 16\]; it must be \[channels, height, width\], three whole numbers from 1"),
    ({"mean": [0.5] * 4}, "mean has 4 and std has 3 numbers for 3 channels"),
    ({"std": [0.5, -1, 0.5]}, r"std is \[0.5, -1, 0.5\]; it must be a list of numbers above 0, one of each channel"),
    ({"mean": [float("nan")] * 3}, r"mean is \[nan, nan, nan\]; it must be a list of numbers"),
    ({"crop_pct": float("inf")}, "crop_pct is inf; it must be a number from 0.01 to 10"),
    ({"crop_mode": "fill"}, "crop_mode is 'fill'; it must be one of center, squash, border"),
], ids=str)
def test_fields_that_are_none_are_told(changed, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        InputSpec.from_json(**FIELDS | changed)


def test_missing_fields_are_told():
    with pytest.raises(ValueError, match="it lacks fields: mean, std$"):
        InputSpec.from_json(**{name: value for name, value in FIELDS.items() if name not in ("mean", "std")})
    with pytest.raises(ValueError, match=r"it is \[1\], not an object of fields"):
        check_fields([1], INPUT_RULES)
