"""What workers do to an image: every option by its effect at its ends."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vir.config import AugmentConfig
from vir.data import transforms
from vir.data.decode import decode_image
from vir.data.device import normalize
from vir.data.folder_reader import FolderReader
from vir.data.loader import eval_batches
from vir.weights.spec import CROP_MODES, INTERPOLATIONS, InputSpec

torch.set_num_threads(1)
INPUT = InputSpec(size=(3, 16, 16), mean=(0.5, 0.25, 0.1), std=(0.5, 0.2, 0.4), interpolation="bilinear",
                  crop_pct=1.0)
OFF = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0, auto_augment=None,
                    interpolation="bilinear", reprob=0.0, mixup=0.0, cutmix=0.0)
NOTHING = (0, 0, 0, 0)


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def picture(side=40):
    return Image.fromarray(pixels(side, side, 3).numpy())


def sample_of(transform, image):
    crop = transform.crop(*image.size)
    top, left, height, width = crop.box
    return transform.apply(np.array(image)[top:top + height, left:left + width], crop).numpy()


def apply(augment, image, seed=0):
    """The training transform with all generators fixed."""
    transforms.seed_draws(seed, 0)
    return sample_of(transforms.TrainTransform(augment, INPUT), image)


# ---- in the worker


def resized(image, side=16):
    return np.asarray(image.resize((side, side), Image.BILINEAR)).transpose(2, 0, 1)


def is_like(found, expected):
    """Within one level. Pillow and torch round their filters' weights differently."""
    return found.shape == expected.shape and np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_with_everything_off_training_is_a_plain_resize():
    found = apply(OFF, picture())
    assert found.dtype == np.uint8 and is_like(found, resized(picture()))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_resize_is_pillows_within_one_level_in_999_of_1000_numbers(interpolation):
    """Of what torch resizes; the other filters are Pillow's own."""
    rng, off = np.random.default_rng(0), []
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).resize((500, 375), Image.BICUBIC))
    sizes = [(1, 1), (2, 500), (375, 3), (100, 100), (224, 224), (375, 500), *rng.integers(2, 375, (9, 2))]
    for height, width in sizes:
        part = smooth[375 - height:, 500 - width:]
        for size in [(224, 224), (16, 16), (97, 31)]:
            expected = Image.fromarray(part).resize(size[::-1], Image.Resampling[interpolation.upper()])
            found = transforms.resize(part.copy(), size, interpolation)
            assert found.dtype == torch.uint8 and found.shape == (3, *size)
            off.append(np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).ravel())
    off = np.concatenate(off)
    assert (off > 1).mean() < 1e-3 and off.max() <= 2
    assert interpolation in transforms._OF_TORCH or not off.any()


def test_a_resize_takes_a_part_of_an_image_as_it_lies_in_it():
    whole = pixels(40, 60, 3).numpy()
    for interpolation in ("bilinear", "bicubic"):
        assert torch.equal(transforms.resize(whole[3:21, 7:40], (16, 16), interpolation),
                           transforms.resize(whole[3:21, 7:40].copy(), (16, 16), interpolation))


def test_hflip_1_mirrors():
    assert np.array_equal(apply(replace(OFF, hflip=1.0), picture()), apply(OFF, picture())[:, :, ::-1])


def test_interpolation_is_obeyed():
    bicubic, bilinear = (apply(replace(OFF, interpolation=name), picture()) for name in ("bicubic", "bilinear"))
    assert is_like(bicubic, np.asarray(picture().resize((16, 16), Image.BICUBIC)).transpose(2, 0, 1))
    seen = {apply(replace(OFF, interpolation="random"), picture(), seed).tobytes() for seed in range(20)}
    assert seen == {bicubic.tobytes(), bilinear.tobytes()}


def test_scale_crops_that_share_of_the_image():
    """A picture whose red channel is its row: a crop of a quarter of the area spans half of the rows."""
    ramp = np.zeros((64, 64, 3), dtype=np.uint8)
    ramp[..., 0] = 4 * np.arange(64)[:, None]
    found = apply(replace(OFF, scale=(0.25, 0.25)), Image.fromarray(ramp)).astype(float)[0, :, 0]
    assert found[-1] - found[0] == pytest.approx(4 * 32 * 15 / 16, abs=4)


@pytest.mark.parametrize("option", [dict(color_jitter=0.4), dict(auto_augment="rand-m9-mstd0.5-inc1"),
                                    dict(ratio=(2.0, 2.0))], ids=str)
def test_an_option_changes_the_pixels(option):
    assert not is_like(apply(replace(OFF, **option), picture()), resized(picture()))


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = Image.fromarray(pixels(40, 60, 3).numpy())
    found = sample_of(transforms.EvalTransform(replace(INPUT, crop_pct=0.8)), image)
    whole = np.asarray(image.resize((30, 20), Image.BILINEAR)).transpose(2, 0, 1)  # 16 / 0.8 = 20
    assert is_like(found, whole[:, 2:18, 7:23])


@pytest.mark.parametrize("flat", [True, False])
def test_a_border_leaves_a_line_of_the_flattest_image(flat):
    """Of 600 x 2 pixels, which are 16 x 0.05 in the crop."""
    image = np.full((2, 600, 3) if flat else (600, 2, 3), 200, dtype=np.uint8)
    found = sample_of(transforms.EvalTransform(replace(INPUT, crop_mode="border")), Image.fromarray(image))
    assert found.shape == (3, 16, 16)
    lines = (found == 200).all(axis=2 if flat else 1).all(axis=0)
    assert lines.sum() == 1 and not (found == 200).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of images that are wide, high, square, and smaller than a crop; JPEG and PNG."""
    root = tmp_path_factory.mktemp("images")
    for number, (height, width) in enumerate([(90, 40), (33, 100), (64, 64), (20, 31), (57, 58), (31, 20)]):
        path = root / "ab"[number % 2] / f"{number}.{('jpg', 'png')[number % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(height, width, 3, seed=number).numpy()).resize((width, height)).save(path)
    return root


@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_evaluation_is_that_of_timms_validate(folder, crop_mode, crop_pct, size):
    """timm's own data set and loader, with what its validate.py gives them, on the same folder."""
    given = InputSpec(size=(3, *size), mean=(0.5, 0.25, 0.1), std=(0.5, 0.2, 0.4), interpolation="bicubic",
                      crop_pct=crop_pct, crop_mode=crop_mode)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(folder)), input_size=given.size, batch_size=4, is_training=False,
        use_prefetcher=False, interpolation=given.interpolation, mean=given.mean, std=given.std, num_workers=0,
        crop_pct=given.crop_pct, crop_mode=given.crop_mode, device=torch.device("cpu"))
    theirs, their_labels = (torch.cat(parts) for parts in zip(*loader))
    files = [path.removeprefix(f"{folder}/") for path, _ in loader.dataset.reader.samples]

    reader = FolderReader(folder)
    order = [files.index(reader.where(sample)) for sample in range(6)]
    batches = list(eval_batches(reader, given, batch_size=4, rank=0, world_size=1, workers=1,
                                device=torch.device("cpu")))
    ours = torch.cat([normalize(batch.images, given) for batch in batches])
    assert torch.equal(torch.cat([batch.labels for batch in batches]), their_labels[order])
    assert ours.shape == (6, 3, *size)
    # Levels of 255, of the least std 0.2: of these images of noise bicubic overshoots most.
    off = (ours - theirs[order]).abs() * 0.2 * 255
    assert off.max() < 2.01 and (off > 1.01).float().mean() < 1e-3 and (off > 0.01).float().mean() < 0.01
    with torch.no_grad():  # a level in 0.3 % of the numbers moves a logit by some 1e-4
        assert torch.allclose(model(ours), model(theirs[order]), rtol=0, atol=1e-3)
    other = transforms.EvalTransform(replace(given, crop_mode=CROP_MODES[CROP_MODES.index(crop_mode) - 1]))
    assert not np.array_equal(sample_of(other, decode_image(reader.read(0))), batches[0].images[0].numpy())


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


def test_seeds_of_noise_are_int32_of_seed_and_position_and_of_no_other_use():
    found = [transforms.noise_seed(0, position) for position in range(100)]
    assert len(set(found)) == 100 and min(found) < -2**30 and max(found) > 2**30
    assert all(-2**31 <= number < 2**31 for number in found)
    assert found != [transforms.noise_seed(1, position) for position in range(100)]


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
