"""MFUs against those worked out by hand from the published speeds, and which of them a plan takes."""

import pytest

from vir.planning.efficiency import MEASURED, mfu_range
from vir.planning.hardware import GPUS, parse_gpu


def percent(mfu):
    return [round(100 * value, 1) for value in mfu.range]


@pytest.mark.parametrize("model, gpu, gpus, expected", [
    ("ViT-g/14", "a100-80gb", 8, 44.5), ("ViT-g/14", "a100-80gb", 128, 42.7), ("ViT-g/14", "h100-80gb", 8, 28.9),
    ("ViT-g/14", "h100-80gb", 128, 27.3), ("ViT-B/16", "rtx3090-24gb", 1, 58.4)])  # 3 x 2 x GMACs x rate / peak
def test_mfu_is_worked_out_from_images_per_second(model, gpu, gpus, expected):
    found = [m.mfu for m in MEASURED if (m.model, m.gpu, m.gpus) == (model, gpu, gpus)]
    assert [round(100 * mfu, 1) for mfu in found] == [expected]


def test_the_model_whose_flops_are_not_published_is_about_a_vit_s():
    """ViT-5-Small has the shape of ViT-S/16 with a few tokens more: 4.61 GMACs."""
    for measured in MEASURED:
        if measured.model == "ViT-5-Small":
            gmacs = measured.mfu * 989e12 / measured.images_per_second / 6e9
            assert gmacs == pytest.approx(4.7, rel=0.01)


GIANT = 1_012_800_000
"""Parameters of the recipe vir_giant_in1k."""


@pytest.mark.parametrize("gpu, parameters, compiled, expected, said", [
    ("h100-80gb", GIANT, False, [27.3, 28.9], "measured eager, of a size within a factor of 8: ViT-g/14 28.9 % on 8 "),
    ("h200-141gb", GIANT, False, [27.3, 28.9], "on 8 x h100-80gb, ViT-g/14 27.3 % on 128 x h100-80gb ("),
    ("h100-80gb", GIANT, True, [27.3, 28.9], "measured eager, of a size within a factor of 8: "),
    ("h100-80gb", 22 * 10**6, True, [22.0, 22.9], "measured compiled, of a size within a factor of 8: ViT-5-Small 22"),
    ("h100-80gb", 22 * 10**6, False, [4.6, 22.9], "measured compiled and eager, of a size within a factor of 8: "),
    ("h100-80gb", 10**10, False, [27.3, 28.9], "measured eager, of a size within a factor of 64: ViT-g/14"),
    ("h100-80gb", 10**12, False, [4.6, 60.9], "nothing near is known of h100-80gb; elsewhere eager, of any size"),
    ("a100-80gb", 22 * 10**6, False, [4.6, 58.4], "nothing near is known of a100-80gb; elsewhere eager, of a size"),
    ("a100-40gb", GIANT, False, [42.7, 44.5], "ViT-g/14 44.5 % on 8 x a100-80gb"),
    ("rtx3090-24gb", 22 * 10**6, False, [41.2, 58.4], "factor of 8: ViT-S/16 41.2 %"),
    ("l40s-48gb", GIANT, False, [27.3, 60.9], "nothing near is known of l40s-48gb; elsewhere eager, of a size within"),
    ("l40s-48gb", GIANT, True, [27.3, 60.9], "on 1 x rtx3090-24gb"),
])
def test_the_nearest_measurements_are_taken_and_told(gpu, parameters, compiled, expected, said):
    mfu = mfu_range(GPUS[gpu], "bf16", parameters, compiled)
    assert percent(mfu) == expected and said in mfu.basis
    sources = [mfu.basis.count(f"({source})") for source in {measured.source for measured in MEASURED}]
    assert max(sources) == 1


def test_what_none_of_the_measurements_is_is_told():
    own = parse_gpu("memory=80GB,tflops=500,bandwidth=100GB")
    assert mfu_range(own, "bf16", GIANT, False).basis.endswith("; none of them is a ViR")
    assert mfu_range(GPUS["a100-80gb"], "bf16", GIANT, True).basis.endswith("; none of them is a ViR or compiled")
    assert mfu_range(own, "fp32", GIANT, False).basis.endswith("; none of them is a ViR or in fp32")
