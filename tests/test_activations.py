"""Activations measured by fake tensors against those that autograd keeps in a real pass, and by other counts."""

import weakref
from functools import cache

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from vir.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from vir.engine.batch_norm import compute_in_float32
from vir.engine.stacks import recompute
from vir.errors import SettingsError
from vir.models.build import build, sketch
from vir.planning import activations
from vir.planning.activations import NotMeasuredError, measure
from vir.training.loss import training_loss
from vir.weights.metadata import DTYPES

torch.set_num_threads(1)
CLASSES = [str(n) for n in range(10)]
VIR = dict(patch_size=4, embed_dim=64, depth=6, num_heads=2)
MODELS = {
    "vir": ModelConfig(name="vir_tiny_patch16_224", img_size=32, args=VIR, drop_path_rate=0.1),
    "vir in chunks": ModelConfig(name="vir_tiny_patch16_224", img_size=64, args=VIR | {"depth": 2}),
    "vir in 2-D": ModelConfig(name="vir_tiny_patch16_224", img_size=32, args={**VIR, "retention_dims": 2}),
    "vit": ModelConfig(name="vit_tiny_patch16_224", img_size=32, args=dict(patch_size=4)),
    "resnet": ModelConfig(name="resnet18", img_size=64),
    "vir of which one block is trained": ModelConfig(name="vir_tiny_patch16_224", img_size=32, args=VIR,
                                                     freeze=r"patch_embed|.*_token|pos_embed|blocks\.[0-4]\."),
}


def config_of(model: ModelConfig, **train) -> RunConfig:
    return RunConfig(deepspeed_config="x", output="y", data=DataConfig(train="t"), model=model,
                     train=TrainConfig(**train))


@cache
def sketched(name: str):
    return sketch(MODELS[name], CLASSES)


def measured(name: str, batch: int, precision: str = "fp32", recomputes: bool = False, on_gpu: bool = False):
    network, spec = sketched(name)
    return measure(network, spec, config_of(MODELS[name]), batch, precision, recomputes, on_gpu)


def kept(name: str, batch: int, precision: str, recomputes: bool, linear_probe: bool = False) -> int:
    """Bytes of the storages that autograd still keeps after a real forward pass, beside parameters; and of float32
    images."""
    network, spec = build(MODELS[name], CLASSES, linear_probe=linear_probe)
    network.train()
    for parameter in network.parameters():
        parameter.data = parameter.to(DTYPES[precision])
    if recomputes:
        recompute(network)
    if precision != "fp32":
        compute_in_float32(network)
    before = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    storages = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    images = torch.randn(batch, *spec.input.size)
    keep(images)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        targets = torch.randn(batch, len(CLASSES)).softmax(1)
        loss = training_loss(network(images.to(DTYPES[precision])), targets, TrainConfig())
    assert loss.requires_grad
    live = {storage.data_ptr(): storage.nbytes() for storage in (found() for found in storages) if storage is not None}
    return sum(size for pointer, size in live.items() if pointer not in before)


@pytest.mark.parametrize("precision, recomputes", [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_autograd_keeps(name, precision, recomputes):
    if name == "resnet" and recomputes:
        with pytest.raises(SettingsError, match="activation_checkpointing: ResNet has batch norms"):
            measured(name, 4, precision, recomputes)
        return
    real = kept(name, 4, precision, recomputes)
    assert measured(name, 4, precision, recomputes).saved == pytest.approx(real, rel=0.05)


def test_a_linear_probe_keeps_what_its_classifier_needs():
    model = MODELS["vir"]
    network, spec = sketch(model, CLASSES, linear_probe=True)
    found = measure(network, spec, config_of(model, linear_probe=True), 4, "fp32", False, False)
    assert found.saved == pytest.approx(kept("vir", 4, "fp32", False, linear_probe=True), rel=0.05)
    assert found.saved < found.peak < measured("vir", 4).saved / 5


def test_the_peak_is_that_of_torchs_own_tracker():
    """Of recomputed blocks with small weights: their gradients have no part in its peak then."""
    network, spec = sketched("vir")
    batch = 16
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy = activations._fake(network, torch.float32, []).train()
        recompute(copy)
        tracker = MemTracker()
        tracker.track_external(copy)
        with tracker:
            images, targets = torch.empty(batch, *spec.input.size), torch.empty(batch, len(CLASSES))
            training_loss(copy(images), targets, TrainConfig()).backward()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    theirs = peak["Total"] - sum(size for kind, size in peak.items() if str(kind).split(".")[-1].lower() in (
        "parameter", "buffer", "gradient", "param", "grad"))
    assert measured("vir", batch, recomputes=True).peak == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("name", ["vir", "vir in 2-D", "vit", "resnet"])
def test_activations_are_affine_in_the_micro_batch(name):
    four, eight, twenty = (measured(name, batch, "bf16", on_gpu=True) for batch in (4, 8, 20))
    for part in ("saved", "peak"):
        low, middle, high = (getattr(found, part) for found in (four, eight, twenty))
        assert high == pytest.approx(low + 4 * (middle - low), rel=0.002)


@pytest.mark.parametrize("name, recomputes", [
    ("vir_large_patch16_224", False), ("vir_large_patch16_224", True), ("vit_small_patch16_224", True),
    ("convnext_tiny", False)])
def test_counted_blocks_take_what_all_of_them_take(name, recomputes, monkeypatch):
    model = ModelConfig(name=name, img_size=64, drop_path_rate=0.2)
    network, spec = sketch(model, CLASSES)
    run = []
    passes = activations._Passes.__call__

    def recorded(self, folded):
        run.append(len(folded))
        return passes(self, folded)

    monkeypatch.setattr(activations._Passes, "__call__", recorded)
    counted = measure(network, spec, config_of(model), 8, "bf16", recomputes, True)
    monkeypatch.setattr(activations, "_WHOLE", 10**6)
    assert counted == measure(network, spec, config_of(model), 8, "bf16", recomputes, True)
    assert run == [1, 0]


def test_a_block_of_vir_on_a_gpu_keeps_eighteen_numbers_for_each_of_a_token():
    """Beside means and deviations of its two norms: both inputs of the norms and what these make of them, q, k and v,
    the result of retention, what is scaled by both layer scales, and four times the width before and after the
    activation of the MLP."""
    batch, tokens, width = 8, 65, 64
    few, many = (sketch(ModelConfig(name="vir_tiny_patch16_224", img_size=32, args={**VIR, "depth": depth}), CLASSES)
                 for depth in (2, 3))
    block = (measure(*many, config_of(MODELS["vir"]), batch, "bf16", False, True).saved
             - measure(*few, config_of(MODELS["vir"]), batch, "bf16", False, True).saved)
    numbers = 2 * (2 + 2 + 3 + 1 + 2 + 8) * batch * tokens * width
    statistics = block - numbers
    assert 2 * 2 * batch * tokens * 2 <= statistics <= 2 * 2 * batch * tokens * 4


def test_networks_stay_as_they_are():
    network, spec = sketch(MODELS["vir"], CLASSES)
    before = {name: (id(p), p.dtype, p.device, p.requires_grad) for name, p in network.named_parameters()}
    measure(network, spec, config_of(MODELS["vir"]), 2, "bf16", True, True)
    assert before == {name: (id(p), p.dtype, p.device, p.requires_grad) for name, p in network.named_parameters()}
    assert not network.grad_checkpointing and not any(p._backward_hooks for p in network.parameters())
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in network.modules())


class Routed(nn.Module):
    """It looks at numbers to decide what to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(dim=(2, 3))
        return self.head(x) if float(x.sum().detach()) > 0 else self.head(-x)


def test_a_network_that_needs_numbers_is_told():
    spec = sketched("vir")[1]
    with torch.device("meta"):
        network = Routed()
    with pytest.raises(NotMeasuredError, match="vir_tiny_patch16_224: its activations are not known, because .* see"):
        measure(network, spec, config_of(MODELS["vir"]), 2, "fp32", False, False)


class Pairs(nn.Module):
    """Blocks that hand on more than a tensor, so that none can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(6))
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = x.mean(dim=(2, 3))
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(x + y)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(y).exp(), self.layer(x)


def test_blocks_that_cannot_be_left_out_are_all_run():
    spec = sketched("vir")[1]
    with torch.device("meta"):
        network = Pairs()
    found = measure(network, spec, config_of(MODELS["vir"]), 4, "fp32", False, False)
    inputs, chain = 4 * (3 * 32 * 32 + 10) * 4, 6 * (4 * 3 + 4 * 3) * 4  # images and targets; what each block makes
    assert found.saved >= inputs + chain
