"""FLOPs, their utilisation and slow ranks against numbers worked out by hand or published."""

import logging
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vir.models.build import create
from vir.reports.throughput import (
    PEAK_TFLOPS,
    Stopwatch,
    far_away,
    forward_flops,
    latecomers,
    network_flops,
    peak_flops,
    peak_memory,
    stragglers,
    utilisation,
)
from vir.weights.spec import InputSpec, ModelSpec


def of(name):
    return ModelSpec(name=name, args={}, classes=(), input=InputSpec(
        size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9))


@pytest.mark.parametrize("name, gmacs", [("vit_small_patch16_224", 4.61), ("vit_base_patch16_224", 17.58),
                                         ("resnet50", 4.11)])  # timm's results/benchmark-infer tables
def test_flops_are_those_that_timm_publishes(name, gmacs):
    assert forward_flops(of(name)) == pytest.approx(2e9 * gmacs, rel=0.01)


def test_retention_is_counted_in_chunks():
    """Of ViR-S with 197 tokens in four chunks: projections as in ViT-S, and less than its attention."""
    linear = 12 * 197 * (4 * 384 * 384 + 2 * 4 * 384 * 384) + 196 * 768 * 384 + 384 * 1000
    scores, states, carried = 4 * 50 * 50 * 64, 4 * 50 * 64 * 64, 4 * 4 * 64 * 64  # of each head, in chunks of 50
    assert forward_flops(of("vir_small_patch16_224")) == 2 * (linear + 12 * 6 * (2 * scores + 2 * states + carried))


def test_blocks_are_counted_by_two_of_them_and_the_network_stays_as_it_was():
    with torch.device("meta"):
        network = create("vir_tiny_patch16_224", {"depth": 5, "retention_dims": 2})
    network.set_retention_mode("parallel", 32)
    network.blocks[3].eval()
    before = [(module.training, getattr(module, "mode", "")) for module in network.modules()]
    found = network_flops(network, (3, 224, 224))
    assert [(module.training, getattr(module, "mode", "")) for module in network.modules()] == before
    network.eval().set_retention_mode("chunkwise", 64)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(torch.empty(1, 3, 224, 224))
    assert len(network.blocks) == 5 and found == counter.get_total_flops()


def test_mfu_is_three_forwards_over_the_peak():
    assert utilisation(100, 10**9, 2, 312e12) == pytest.approx(3 * 1e9 * 100 / (2 * 312e12))
    assert utilisation(100, 10**9, 2, None) is None


def test_the_peak_is_as_given_and_unknown_on_a_cpu():
    assert peak_flops(torch.device("cpu"), "bf16", None) is None
    assert peak_flops(torch.device("cpu"), "fp32", 0.5) == 0.5e12


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-40GB", 312.0), ("NVIDIA A100 80GB PCIe", 312.0), ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L40", 181.05), ("NVIDIA L4", 121.0), ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A10G", 70.0), ("NVIDIA A10", 125.0),
    ("NVIDIA H200 NVL", 835.5), ("NVIDIA H200", 989.0), ("NVIDIA H100 NVL MIG 1g.12gb", None), ("NVIDIA L40G", None),
    ("NVIDIA RTX A4000", 76.7), ("NVIDIA A40", 149.7),
])
def test_a_peak_is_that_of_the_whole_name_and_one_that_is_unknown_is_told(monkeypatch, caplog, name, peak):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if peak is None else pytest.approx(peak * 1e12)
    assert [peak_flops(torch.device("cuda"), precision, None) for precision in ("bf16", "fp16")] == [expected] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"no MFU is shown: the peak of {name} in {precision} is not known here; --train.peak_tflops tells it"
        for precision in ("bf16", "fp16") if peak is None]
    assert peak_flops(torch.device("cuda"), "fp32", None) is None
    assert peak_flops(torch.device("cuda"), "bf16", 7.0) == 7e12
    assert all(name.startswith("NVIDIA ") for name in PEAK_TFLOPS)


def test_before_ampere_the_peak_is_of_fp16_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_flops(torch.device("cuda"), "fp16", None) == 65e12
    assert peak_flops(torch.device("cuda"), "bf16", None) is None


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(100_000_000)
    assert peak_memory(torch.device("cpu")) >= max(before, held.numel() * 4)


def test_the_watch_adds_up_blocks_and_starts_anew():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            time.sleep(0.02)
    assert 0.04 <= watch.total() < 0.5 and watch.total() == 0


HOSTS = ["node-a", "node-a", "node-b", "node-b"]


@pytest.mark.parametrize("waits, forwards, said", [
    ([1, 1, 1, 4], [2, 2, 2, 2], ["rank 3 (node-b) waits for data 40 % of the time, the median rank 10 %"]),
    ([1, 1, 1, 1], [2, 6, 2, 2], ["rank 1 (node-a) computes forward 60 % of the time, the median rank 20 %"]),
    ([0.1, 0.3, 0.1], [2, 2.2, 2], []),  # a small share of the interval
    ([5, 5, 5], [1, 1, 1], []),          # all alike: slow, but nobody is behind
    ([3], [1], []),
])
def test_a_rank_that_holds_the_others_up_is_named(waits, forwards, said):
    assert stragglers(waits, forwards, HOSTS, 10.0) == said


def test_short_intervals_accuse_nobody():
    assert stragglers([0.1, 0.1, 0.5], [0, 0, 0], HOSTS, 1.0) == []


@pytest.mark.parametrize("meets, waits, said", [
    ([5, 5, 0.1, 5], [1, 1, 1, 1], ["rank 2 (node-b) begins each step 0.49 s after the median rank, 49 % of the time; "
                                    "its machine or its link is slow"]),
    ([4, 0], [1, 1], ["rank 1 (node-a) begins each step 0.40 s after the median rank, 40 % of the time; its machine or "
                      "its link is slow"]),
    ([5, 5, 0.1, 5], [1, 1, 5.9, 1], []),  # it waits for data, which is told by itself
    ([1, 1.2, 0.8, 1], [1, 1, 1, 1], []),  # a small share of the interval
    ([0.05, 0.05], [5, 5], []),  # one of them computes forward slowly: the other waits in the backward pass
    ([0], [1], [])])
def test_the_rank_that_comes_last_is_named_with_its_machine(meets, waits, said):
    assert latecomers(meets, waits, HOSTS, 10, 10.0) == said


@pytest.mark.gpu
def test_a_gpu_is_found_in_the_table_and_its_memory_is_counted():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()  # an earlier test's peak may be far above
    assert peak_flops(device, "bf16", None) is None or peak_flops(device, "bf16", None) > 5e13
    before = peak_memory(device)
    held = torch.ones(10_000_000, device=device)
    assert peak_memory(device) >= before + held.numel() * 4 - 2**21


@pytest.mark.parametrize("round_trips, named", [
    ([0.001], []), ([0.001, 0.002, 0.001], []), ([0.001, 0.2, 0.002], [1]), ([0.001, 0.04, 0.002], []),
    ([0.1, 0.2, 0.1, 0.3], []), ([0.0005, 0.15], [1])])
def test_who_is_behind_a_slow_link_is_named_with_its_host(round_trips, named):
    told = far_away(round_trips, [f"node-{letter}" for letter in "abcd"])
    assert [said.partition(" is")[0] for said in told] == [f"rank {rank} (node-{'abcd'[rank]})" for rank in named]
    assert all("ms for the median rank; the link of its machine is slow or full" in said for said in told)
