"""Neither a training step nor an evaluation makes the host wait for its device on the way."""

from contextlib import contextmanager

import pytest
import torch
from tqdm import tqdm

from support.batches import Given
from support.dispatches import Dispatches
from support.tiny_models import tiny
from vir.config import AugmentConfig, TrainConfig
from vir.data.batch import Batch
from vir.data.device import Preparation, normalize
from vir.evaluation.classes import shared_classes
from vir.evaluation.classify import classify, tally
from vir.evaluation.predictions import of_shared, predict, with_mirror_images
from vir.training.loss import training_loss
from vir.weights.spec import InputSpec

CPU = torch.device("cpu")
INPUT = InputSpec(size=(3, 32, 24), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)


def batch(size=4):
    box = torch.tensor([[3, 2, 9, 7]] * size)
    return Batch(images=torch.randint(256, (size, *INPUT.size), dtype=torch.uint8), labels=torch.arange(size) % 5,
                 positions=torch.arange(size), valid=torch.arange(size) > 0, erase=box,
                 noise=torch.arange(size, dtype=torch.int32), lam=torch.full((size,), 0.7), cut=box,
                 samples=[], bad=[])


def step(model, prepare, given, train):
    images, targets = prepare(given)
    loss = training_loss(model(images), targets, train)
    loss.backward()
    return loss.detach()


def preparation(remode, device):
    return Preparation(model_input=INPUT, augment=AugmentConfig(reprob=1.0, remode=remode), smoothing=0.1,
                       num_classes=5, device=device)


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("train", [TrainConfig(), TrainConfig(loss="bce", bce_target_thresh=0.2)], ids=["ce", "bce"])
def test_no_wait_in_a_step(remode, train):
    model, prepare, given = tiny(drop_path_rate=0.1), preparation(remode, CPU), batch()
    with Dispatches() as found:
        step(model, prepare, given, train)
    assert found.waits == 0, found.operators


def test_how_many_operators_prepare_a_batch():
    """Where nothing compiles them; as many whatever is in the batch."""
    prepare = preparation("pixel", CPU)
    for size in (2, 64):
        given = batch(size)
        with Dispatches() as found:
            prepare(given)
        assert found.waits == 0 and found.launches <= 70


@pytest.mark.parametrize("number", [1, 5])
def test_no_wait_in_an_evaluation(number):
    model, given = tiny().eval(), Given(batch() for _ in range(number))
    with Dispatches() as found:
        classify(model, given, INPUT, CPU, tqdm(disable=True))
    assert found.waits == 0, found.operators
    assert found.operators["aten::topk"] == number


def test_the_records_of_single_images_are_waited_for_once_for_all_batches():
    """With fewer classes than the model has, and mirror images."""
    model, shared = tiny().eval(), shared_classes("abcde", 5, "ebdc")
    for number in (1, 4):
        given = Given(batch() for _ in range(number))
        for each in given:
            each.labels %= 4
        with Dispatches() as found:
            predict({"": with_mirror_images(of_shared(model, shared, CPU))}, given, INPUT, shared, CPU,
                    tqdm(disable=True))
        assert found.operators["aten::topk"] == number and found.waits == 0, found.operators
        assert found.operators["aten::item"] == 1  # so is a wait called in inference mode: the largest difference


@contextmanager
def refusing_to_wait():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_wait_on_cuda(dtype):
    """All kernels are compiled in a first round."""
    cuda = torch.device("cuda")
    model, prepare = tiny(drop_path_rate=0.1).to(cuda), preparation("pixel", cuda)
    here = batch().pin_memory()

    def everything():
        there = here.to(cuda)
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            loss = step(model, prepare, there, TrainConfig())
            with torch.no_grad():
                counts = tally(model(normalize(there.images, INPUT)), there.labels, there.valid)
        return loss, counts

    everything()
    with refusing_to_wait():
        loss, counts = everything()
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    assert torch.isfinite(loss) and counts[2] == 3
