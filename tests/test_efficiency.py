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


@pytest.mark.parametrize("gpu, parameters, compiled, expected, said", [
    ("h100-80gb", 10**9, False, [27.3, 28.9], "measured on h100-80gb, eager, of a size within a factor of 8: ViT-g/14"),
    ("h200-141gb", 10**9, False, [27.3, 28.9], "measured on h100-80gb, eager, of a size within a factor of 8"),
    ("h100-80gb", 22 * 10**6, True, [22.0, 22.9], "compiled, of a size within a factor of 8: ViT-5-Small 22.0 %"),
    ("h100-80gb", 10**10, False, [27.3, 33.0], "eager, of a size within a factor of 64: ViT-g/14"),
    ("h100-80gb", 10**10, True, [22.0, 39.0], "compiled, of any size"),
    ("a100-40gb", 10**9, False, [42.7, 44.5], "measured on a100-80gb, eager, of a size within a factor of 8"),
    ("a100-80gb", 10**9, True, [42.7, 44.5], "eager, for nothing compiled is known of it, of a size within a factor"),
    ("rtx3090-24gb", 22 * 10**6, False, [41.2, 58.4], "factor of 8: ViT-S/16 41.2 %"),
    ("l40s-48gb", 10**9, False, [4.6, 60.9], "nothing measured on l40s-48gb is known; on a100-80gb, h100-80gb, "),
    ("l40s-48gb", 10**9, True, [22.0, 39.0], "nothing measured on l40s-48gb is known; on h100-80gb, compiled, of any"),
])
def test_the_nearest_measurements_are_taken_and_told(gpu, parameters, compiled, expected, said):
    mfu = mfu_range(GPUS[gpu], "bf16", parameters, compiled)
    assert percent(mfu) == expected and said in mfu.basis and mfu.basis.endswith("none of them is a ViR")
    assert all(measured.source in mfu.basis for measured in mfu.measurements)


def test_a_gpu_by_its_numbers_takes_all_and_fp32_is_said_to_be_unknown():
    mfu = mfu_range(parse_gpu("memory=80GB,tflops=500,bandwidth=100GB"), "fp32", 10**9, False)
    assert percent(mfu) == [4.6, 60.9] and mfu.basis.endswith("all in 16 bits, none is known in fp32")
