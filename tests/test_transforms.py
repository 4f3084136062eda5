"""Pixels and targets against plain loops, and every option by its effect at its ends."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vir.models  # noqa: F401  registers the models
from vir.config import AugmentConfig
from vir.data import transforms
from vir.data.transforms import InputConfig

torch.set_num_threads(1)
INPUT = InputConfig(size=(3, 16, 16), mean=(0.5, 0.25, 0.1), std=(0.5, 0.2, 0.4), interpolation="bilinear",
                    crop_pct=1.0)
OFF = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0, auto_augment=None,
                    interpolation="bilinear", reprob=0.0, mixup=0.0, cutmix=0.0)
NOTHING = (0, 0, 0, 0)


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def floats(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def picture(side=40):
    return Image.fromarray(pixels(side, side, 3).numpy())


def apply(augment, image, seed=0):
    """The training transform with all generators fixed."""
    import random
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return np.asarray(transforms.train_transform(augment, INPUT)(image))


# ---- in the worker


def resized(image, side=16):
    return np.asarray(image.resize((side, side), Image.BILINEAR)).transpose(2, 0, 1)


def test_with_everything_off_training_is_a_plain_resize():
    found = apply(OFF, picture())
    assert found.dtype == np.uint8 and np.array_equal(found, resized(picture()))


def test_hflip_1_mirrors():
    assert np.array_equal(apply(replace(OFF, hflip=1.0), picture()), resized(picture())[:, :, ::-1])


def test_interpolation_is_obeyed():
    bicubic = np.asarray(picture().resize((16, 16), Image.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(apply(replace(OFF, interpolation="bicubic"), picture()), bicubic)
    seen = {apply(replace(OFF, interpolation="random"), picture(), seed).tobytes() for seed in range(20)}
    assert seen == {bicubic.tobytes(), resized(picture()).tobytes()}


def test_scale_crops_that_share_of_the_image():
    """A picture whose red channel is its row: a crop of a quarter of the area spans half of the rows."""
    ramp = np.zeros((64, 64, 3), dtype=np.uint8)
    ramp[..., 0] = 4 * np.arange(64)[:, None]
    found = apply(replace(OFF, scale=(0.25, 0.25)), Image.fromarray(ramp)).astype(float)[0, :, 0]
    assert found[-1] - found[0] == pytest.approx(4 * 32 * 15 / 16, abs=4)


@pytest.mark.parametrize("option", [dict(color_jitter=0.4), dict(auto_augment="rand-m9-mstd0.5-inc1"),
                                    dict(ratio=(2.0, 2.0))], ids=str)
def test_an_option_changes_the_pixels(option):
    assert not np.array_equal(apply(replace(OFF, **option), picture()), resized(picture()))


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = Image.fromarray(pixels(40, 60, 3).numpy())
    found = np.asarray(transforms.eval_transform(replace(INPUT, crop_pct=0.8))(image))
    whole = np.asarray(image.resize((30, 20), Image.BILINEAR)).transpose(2, 0, 1)  # 16 / 0.8 = 20
    assert np.array_equal(found, whole[:, 2:18, 7:23])


# ---- numbers drawn per sample


def test_erase_box_at_probability_0_and_1():
    never, always = replace(OFF, reprob=0.0), replace(OFF, reprob=1.0)
    for position in range(200):
        assert transforms.erase_box(0, position, never, 32, 48) == NOTHING
        top, left, h, w = transforms.erase_box(0, position, always, 32, 48)
        assert 0 <= top and top + h <= 32 and 0 <= left and left + w <= 48
        assert 0.01 < h * w / (32 * 48) < 0.36  # 2 % to 1/3, sides rounded
        assert 0.25 < h / w < 4                 # 0.3 to 3.3, sides rounded
    share = np.mean([transforms.erase_box(0, p, replace(OFF, reprob=0.25), 32, 48)[2] > 0 for p in range(1000)])
    assert share == pytest.approx(0.25, abs=0.05)  # 3.6 standard deviations; the numbers are fixed


def test_boxes_and_mixes_depend_on_seed_and_position_alone():
    augment = AugmentConfig(reprob=1.0)
    for draw in (transforms.erase_box, transforms.mix_parameters):
        first = [draw(0, position, augment, 32, 32) for position in range(20)]
        assert first == [draw(0, position, augment, 32, 32) for position in reversed(range(20))][::-1]
        assert len(set(first)) > 15
        assert first != [draw(1, position, augment, 32, 32) for position in range(20)]


def mixes(augment, count=200, height=24, width=40):
    return [transforms.mix_parameters(0, 2 * pair, augment, height, width) for pair in range(count)]


def test_mixing_off_keeps_every_sample_whole():
    for augment in (replace(OFF, mixup=0.8, cutmix=1.0, mixup_prob=0.0), replace(OFF, mixup=0.0, cutmix=0.0)):
        assert mixes(augment) == [(1.0, NOTHING)] * 200


@pytest.mark.parametrize("augment", [
    replace(OFF, mixup=0.8), replace(OFF, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.0),
    replace(OFF, mixup=0.8, mixup_switch_prob=1.0)], ids=["mixup alone", "switch 0", "no cutmix to switch to"])
def test_mixup_draws_a_share_and_no_box(augment):
    found = mixes(augment)
    assert all(box == NOTHING and 0 <= lam <= 1 for lam, box in found)
    assert np.mean([lam for lam, _ in found]) == pytest.approx(0.5, abs=0.1)  # beta(a, a) is symmetric


@pytest.mark.parametrize("augment", [
    replace(OFF, cutmix=1.0), replace(OFF, mixup=0.8, cutmix=1.0, mixup_switch_prob=1.0),
    replace(OFF, cutmix=1.0, mixup_switch_prob=0.0)], ids=["cutmix alone", "switch 1", "no mixup to switch to"])
def test_cutmix_share_is_the_remaining_area(augment):
    found = mixes(augment)
    for lam, (top, left, h, w) in found:
        assert 0 <= top and top + h <= 24 and 0 <= left and left + w <= 40 and h >= 0 and w >= 0
        left_over = sum(not (top <= y < top + h and left <= x < left + w) for y in range(24) for x in range(40))
        assert lam == pytest.approx(left_over / (24 * 40), abs=1e-12)
    assert sum(h * w > 0 for _, (_, _, h, w) in found) > 150


def test_both_on_switches_between_them():
    boxes = [box for _, box in mixes(replace(OFF, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.5))]
    assert 70 < sum(box != NOTHING for box in boxes) < 130


# ---- on the device


def test_normalize_against_a_loop():
    images = pixels(2, 3, 4, 5)
    found = transforms.normalize(images, INPUT)
    assert found.dtype == torch.float32
    for (b, c, y, x), value in np.ndenumerate(images.numpy()):
        expected = (int(value) / 255 - INPUT.mean[c]) / INPUT.std[c]
        assert float(found[b, c, y, x]) == pytest.approx(expected, abs=1e-6)  # float32 of numbers up to 4.5


BOXES = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 8, 8], [7, 7, 1, 1]])
POSITIONS = torch.tensor([10, 11, 500, 3])


def erased(images, mode, seed=0, boxes=BOXES, positions=POSITIONS):
    return transforms.erase(images.clone(), boxes, positions, seed, mode)


def in_box(images):
    mask = torch.zeros_like(images, dtype=torch.bool)
    for i, (top, left, h, w) in enumerate(BOXES.tolist()):
        for y in range(top, top + h):
            for x in range(left, left + w):
                mask[i, :, y, x] = True
    return mask


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erase_changes_exactly_the_boxes(mode):
    images = floats(4, 3, 8, 8)
    found, inside = erased(images, mode), in_box(images)
    assert torch.equal(found[~inside], images[~inside]) and (found[inside] != images[inside]).all()


def test_erase_fills_in_zeros_one_colour_or_noise():
    images = floats(4, 3, 8, 8)
    assert (erased(images, "const")[in_box(images)] == 0).all()
    box = erased(images, "rand")[2]
    assert (box == box[:, :1, :1]).all() and len(box[:, 0, 0].unique()) == 3
    noise = erased(images, "pixel")[2]
    assert len(noise.unique()) == noise.numel()
    assert abs(noise.mean()) < 0.25 and abs(noise.std() - 1) < 0.25  # 192 normal numbers: 3.5 standard deviations


@pytest.mark.parametrize("mode", ["rand", "pixel"])
def test_erase_depends_on_seed_and_position_not_on_the_batch(mode):
    images = floats(4, 3, 8, 8)
    together = erased(images, mode)
    torch.manual_seed(99)
    for i in range(4):
        assert torch.equal(erased(images[i:i + 1], mode, boxes=BOXES[i:i + 1], positions=POSITIONS[i:i + 1])[0],
                           together[i])
    assert torch.equal(erased(images.flip(0), mode, boxes=BOXES.flip(0), positions=POSITIONS.flip(0)).flip(0), together)
    assert not torch.equal(erased(images, mode, seed=1), together)
    assert not torch.equal(erased(images, mode, positions=POSITIONS + 1), together)


# Pairs: mixup, CutMix, whole (lam 1).
LAM = torch.tensor([0.3, 0.3, 0.75, 0.75, 1.0, 1.0])
CUT = torch.tensor([[0] * 4, [0] * 4, [2, 1, 3, 4], [2, 1, 3, 4], [0] * 4, [0] * 4])


def test_mix_of_pairs_against_a_loop():
    images = floats(6, 2, 8, 6)
    found = transforms.mix(images, LAM, CUT)
    for (b, c, y, x), own in np.ndenumerate(images.numpy()):
        other = float(images[b + 1 if b % 2 == 0 else b - 1, c, y, x])
        top, left, h, w = CUT[b].tolist()
        if h and w:
            expected = other if top <= y < top + h and left <= x < left + w else own
        else:
            expected = float(LAM[b]) * own + (1 - float(LAM[b])) * other
        assert float(found[b, c, y, x]) == pytest.approx(expected, abs=1e-6)  # float32, one product and one sum
    assert torch.equal(found[4:], images[4:])


def test_a_pair_is_not_touched_by_the_others():
    images = floats(6, 2, 8, 6)
    for i in (0, 2, 4):
        alone = transforms.mix(images[i:i + 2], LAM[i:i + 2], CUT[i:i + 2])
        assert torch.equal(alone, transforms.mix(images, LAM, CUT)[i:i + 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_against_a_loop(smoothing):
    labels = torch.tensor([0, 3, 2, 2, 4, 1])
    found = transforms.soft_targets(labels, LAM, 5, smoothing)
    for b in range(6):
        other = labels[b + 1 if b % 2 == 0 else b - 1]
        for k in range(5):
            own_share = (1 - smoothing) * (labels[b] == k).item() + smoothing / 5
            other_share = (1 - smoothing) * (other == k).item() + smoothing / 5
            expected = float(LAM[b]) * own_share + (1 - float(LAM[b])) * other_share
            assert float(found[b, k]) == pytest.approx(expected, abs=1e-6)
    assert found.sum(1).tolist() == pytest.approx([1] * 6, abs=1e-6)


def test_soft_targets_of_an_odd_batch_are_not_mixed():
    found = transforms.soft_targets(torch.tensor([1, 0, 1]), torch.ones(3), 2, 0.2)
    assert found.flatten().tolist() == pytest.approx([0.1, 0.9, 0.9, 0.1, 0.1, 0.9], abs=1e-6)


# ---- the model's own numbers


TINY = dict(embed_dim=16, depth=1, num_heads=1, patch_size=4, num_classes=2)


@pytest.mark.parametrize("img_size, size", [(28, (3, 28, 28)), ((16, 32), (3, 16, 32)), (None, (3, 224, 224))])
def test_model_input_of_a_vir_model_has_the_size_it_was_built_for(img_size, size):
    args = TINY if img_size else TINY | dict(patch_size=16)
    given = {} if img_size is None else {"img_size": img_size}
    found = transforms.model_input_of(timm.create_model("vir_tiny_patch16_224", **args, **given))
    assert found == InputConfig(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)


def test_model_input_of_other_timm_models():
    assert transforms.model_input_of(timm.create_model("test_vit", img_size=32)).size == (3, 32, 32)
    found, cfg = transforms.model_input_of(timm.create_model("test_resnet")), timm.get_pretrained_cfg("test_resnet")
    assert (found.size, found.mean, found.std) == (cfg.input_size, cfg.mean, cfg.std)
