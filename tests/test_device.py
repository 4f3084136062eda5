"""Pixels and targets on the device against plain loops."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from vir.config import AugmentConfig
from vir.data import device
from vir.data.batch import Batch
from vir.data.device import Preparation
from vir.weights.spec import InputSpec

torch.set_num_threads(1)
INPUT = InputSpec(size=(3, 16, 16), mean=(0.5, 0.25, 0.1), std=(0.5, 0.2, 0.4), interpolation="bilinear",
                  crop_pct=1.0)


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def floats(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_normalize_against_a_loop():
    images = pixels(2, 3, 4, 5)
    found = device.normalize(images, INPUT)
    assert found.dtype == torch.float32
    for (b, c, y, x), value in np.ndenumerate(images.numpy()):
        expected = (int(value) / 255 - INPUT.mean[c]) / INPUT.std[c]
        assert float(found[b, c, y, x]) == pytest.approx(expected, abs=1e-6)  # float32 of numbers up to 4.5


BOXES = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 8, 8], [7, 7, 1, 1]])
SEEDS = torch.tensor([10, -11, 2**31 - 1, 3], dtype=torch.int32)


def erased(images, mode, boxes=BOXES, seeds=SEEDS):
    return device.erase(images, boxes, seeds, mode)


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
def test_erase_depends_on_the_samples_seed_not_on_the_batch(mode):
    images = floats(4, 3, 8, 8)
    together = erased(images, mode)
    torch.manual_seed(99)
    for i in range(4):
        assert torch.equal(erased(images[i:i + 1], mode, BOXES[i:i + 1], SEEDS[i:i + 1])[0], together[i])
    assert torch.equal(erased(images.flip(0), mode, BOXES.flip(0), SEEDS.flip(0)).flip(0), together)
    assert not torch.equal(erased(images, mode, seeds=SEEDS + 1), together)


# Pairs: mixup, CutMix, whole (lam 1).
LAM = torch.tensor([0.3, 0.3, 0.75, 0.75, 1.0, 1.0])
CUT = torch.tensor([[0] * 4, [0] * 4, [2, 1, 3, 4], [2, 1, 3, 4], [0] * 4, [0] * 4])


def test_mix_of_pairs_against_a_loop():
    images = floats(6, 2, 8, 6)
    found = device.mix(images, LAM, CUT)
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
        alone = device.mix(images[i:i + 2], LAM[i:i + 2], CUT[i:i + 2])
        assert torch.equal(alone, device.mix(images, LAM, CUT)[i:i + 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_against_a_loop(smoothing):
    labels = torch.tensor([0, 3, 2, 2, 4, 1])
    found = device.soft_targets(labels, LAM, 5, smoothing)
    for b in range(6):
        other = labels[b + 1 if b % 2 == 0 else b - 1]
        for k in range(5):
            own_share = (1 - smoothing) * (labels[b] == k).item() + smoothing / 5
            other_share = (1 - smoothing) * (other == k).item() + smoothing / 5
            expected = float(LAM[b]) * own_share + (1 - float(LAM[b])) * other_share
            assert float(found[b, k]) == pytest.approx(expected, abs=1e-6)
    assert found.sum(1).tolist() == pytest.approx([1] * 6, abs=1e-6)


def test_soft_targets_of_an_odd_batch_are_not_mixed():
    found = device.soft_targets(torch.tensor([1, 0, 1]), torch.ones(3), 2, 0.2)
    assert found.flatten().tolist() == pytest.approx([0.1, 0.9, 0.9, 0.1, 0.1, 0.9], abs=1e-6)


def batch(size=6, labels=3, side=8):
    """Boxes of all kinds: erased wholly, in part and not at all; mixed by a share, by a box, and whole."""
    numbers = np.random.default_rng(size)
    return Batch(images=pixels(size, 3, side, side), labels=torch.from_numpy(numbers.integers(0, labels, size)),
                 positions=torch.arange(size), valid=torch.ones(size, dtype=torch.bool),
                 erase=torch.tensor([[1, 2, 3, 4], [0, 0, side, side], [0] * 4] * size)[:size],
                 noise=torch.from_numpy(numbers.integers(-2**31, 2**31, size, dtype=np.int32)),
                 lam=LAM.repeat(size)[:size], cut=CUT.repeat(size, 1)[:size], samples=[], bad=[])


def preparation(device="cpu", **augment):
    return Preparation(model_input=INPUT, augment=AugmentConfig(**augment), smoothing=0.1, num_classes=3,
                       device=torch.device(device))


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("reprob, mixup, cutmix", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_a_batch_is_normalised_then_erased_then_mixed_where_the_settings_say_so(remode, reprob, mixup, cutmix):
    given = batch()
    expected = device.normalize(given.images, INPUT)
    if reprob:
        expected = device.erase(expected, given.erase, given.noise, remode)
    if mixup or cutmix:
        expected = device.mix(expected, given.lam, given.cut)
    found, targets = preparation(reprob=reprob, remode=remode, mixup=mixup, cutmix=cutmix)(given)
    assert torch.equal(found, expected)
    assert torch.equal(targets, device.soft_targets(given.labels, given.lam, 3, 0.1))


# ---- compiled


def compiled(backend, **settings):
    function = partial(device.prepare, smoothing=0.1, num_classes=3, **settings)
    return function, device.Compiled(function, backend)


def tensors(given):
    return (given.images, given.labels, given.erase, given.noise, given.lam, given.cut,
            *device._scale_and_shift(INPUT, given.images.device))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "vir"]


@pytest.mark.parametrize("remode, mixes, size", [
    ("pixel", True, 6), ("rand", True, 6), ("const", True, 6), (None, True, 2), ("pixel", False, 5)])
def test_it_is_one_graph_for_all_batches_of_a_run_with_the_same_numbers(remode, mixes, size):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    function, found = compiled(counting, remode=remode, mixes=mixes)
    first = batch(size)
    unmixed = replace(first, lam=torch.ones(size), cut=torch.zeros_like(first.cut), erase=torch.zeros_like(first.erase))
    for given in (first, unmixed, replace(first, images=255 - first.images, noise=first.noise + 1)):
        for ours, expected in zip(found(*tensors(given)), function(*tensors(given))):
            assert (ours - expected).abs().max() <= 1e-6  # rounding alone
    assert len(graphs) == 1


def test_where_compiling_fails_training_goes_on_after_one_warning(caplog):
    def without_a_compiler(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease set CC")

    function, found = compiled(without_a_compiler, remode="pixel", mixes=True)
    for given in (batch(), batch(4)):
        for ours, expected in zip(found(*tensors(given)), function(*tensors(given))):
            assert torch.equal(ours, expected)
    assert len(warnings(caplog)) == 1 and "RuntimeError: Failed to find C compiler." in warnings(caplog)[0]


@pytest.mark.parametrize("before, error", [
    (1, RuntimeError("an illegal access")), (0, torch.OutOfMemoryError("CUDA out of memory")),
    (0, torch.AcceleratorError("CUDA error: unspecified launch failure"))])
def test_an_error_of_the_device_is_not_taken_for_one_of_the_compiler(before, error, caplog):
    calls = []

    def failing(graph, inputs):
        def run(*inputs):
            calls.append(1)
            if len(calls) > before:
                raise error
            return graph.forward(*inputs)

        return run

    torch._dynamo.reset()
    _, found = compiled(failing, remode="pixel", mixes=True)
    for _ in range(before):
        found(*tensors(batch()))
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            found(*tensors(batch()))
    assert warnings(caplog) == []


def test_an_error_that_is_not_of_the_compiler_is_raised():
    _, found = compiled("aot_eager", remode="pixel", mixes=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape|size"):
            found(*tensors(batch(5)))  # pairs of an odd batch


@pytest.mark.gpu
@pytest.mark.parametrize("remode, mixup, cutmix, size", [
    ("pixel", 0.8, 1.0, 8), ("rand", 0.8, 0.0, 8), ("const", 0.0, 1.0, 8), ("pixel", 0.0, 0.0, 7)])
def test_cuda_compiled_and_not_against_cpu(remode, mixup, cutmix, size, caplog):
    from torch._inductor import metrics

    given, settings = batch(size, side=33), dict(remode=remode, mixup=mixup, cutmix=cutmix)
    expected = preparation(reprob=1.0, **settings)(given)
    there = given.to(torch.device("cuda"))
    metrics.reset(), torch._dynamo.reset()
    of_cuda = {"compiled": preparation("cuda", reprob=1.0, **settings)(there)}
    assert warnings(caplog) == [] and 1 <= metrics.generated_kernel_count <= 6  # of C++ on CPU they are 2 to 4
    of_cuda["eager"] = compiled("inductor", remode=remode, mixes=bool(mixup or cutmix))[0](*tensors(there))
    for name, (images, targets) in of_cuda.items():
        # erfinv of CPU and of CUDA differ in some of float32's last digits, of numbers up to 5.5
        assert (images.cpu() - expected[0]).abs().max() <= 1e-5, name
        assert (targets.cpu() - expected[1]).abs().max() <= 1e-6, name
