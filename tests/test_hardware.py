"""GPUs against numbers of their data sheets, names as users type them, and what is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from vir.errors import SettingsError
from vir.planning.hardware import GPUS, Cluster, gpu_of_device, parse_gpu, parse_rate
from vir.reports.throughput import FP16_TFLOPS, PEAK_TFLOPS
from vir.training import forecast


@pytest.mark.parametrize("name, gigabytes, bf16, nvlink, gigabits", [  # data sheets: both directions of the link
    ("h100-80gb", 80, 989, 900, 400), ("H200-141GB", 141, 989, 900, 400), ("a100_40gb", 40, 312, 600, 200),
    ("b200-180gb", 180, 2250, 1800, 400), ("gb200", 186, 2500, 1800, 400), ("l40s-48gb", 48, 362, 64, 50)])
def test_a_gpu_is_as_in_its_data_sheet(name, gigabytes, bf16, nvlink, gigabits):
    gpu = parse_gpu(name)
    assert gpu.memory == gigabytes * 10**9 and gpu.peak("bf16") == gpu.peak("fp16") == bf16 * 1e12
    assert 2 * gpu.bandwidth == nvlink * 1e9 and 8 * gpu.network == gigabits * 1e9


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_is_whole_and_tells_where_its_numbers_are_from(name):
    gpu = GPUS[name]
    assert parse_gpu(name) is gpu and name == gpu.name and f"-{gpu.memory // 10**9}gb" in name
    assert 0 < gpu.tflops["fp32"] < gpu.tflops["fp16"] and gpu.network <= gpu.bandwidth
    assert gpu.source == "data sheet" and gpu.link_source.startswith(("NVLink ", "PCIe "))
    assert "assumption" in gpu.network_source or "as in" in gpu.network_source


def test_before_ampere_there_is_no_bf16_and_no_fused_kernel():
    before = [name for name, gpu in GPUS.items() if not gpu.fused]
    assert before == ["v100-32gb", "v100-16gb", "t4-16gb"]
    for name in before:
        with pytest.raises(SettingsError, match=r"no known peak in bf16, only in fp16 and fp32.*zero2_fp16"):
            parse_gpu(name).peak("bf16")


def test_the_gpu_of_this_machine_has_the_memory_that_was_found():
    gpu = gpu_of_device("NVIDIA H200", 150_000_000_000)
    assert gpu == dataclasses.replace(GPUS["h200-141gb"], memory=150_000_000_000, source=gpu.source)
    assert gpu.source == "memory as found here, peak of its data sheet"
    assert gpu_of_device("NVIDIA H200 MIG 1g.18gb", 18) is None and gpu_of_device("NVIDIA A40", 48) is None
    assert {GPUS[name].tflops["fp16"] for name in GPUS} <= {*PEAK_TFLOPS.values(), *FP16_TFLOPS.values()}


@pytest.mark.parametrize("name, capability, given, fused, source", [
    ("NVIDIA H200", (9, 0), None, True, "memory as found here, peak of its data sheet"),
    ("NVIDIA H200", (9, 0), 500.0, True, "memory as found here, peak as given"),
    ("NVIDIA A40", (8, 6), None, True, "its links are not known here"),
    ("Quadro RTX 8000", (7, 5), None, False, "its links are not known here")])
def test_a_forecast_is_for_the_gpu_of_this_machine(monkeypatch, name, capability, given, fused, source):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**11))
    gpu = forecast._device(torch.device("cuda"), given)
    assert gpu.memory == 10**11 and gpu.fused == fused and gpu.source.startswith(source)
    assert gpu.tflops.get("bf16") == (given or (989.0 if name == "NVIDIA H200" else None))


def test_a_gpu_can_be_given_by_its_numbers():
    gpu = parse_gpu("memory=80GB, tflops=989,bandwidth=450GB,network=400Gb")
    assert (gpu.memory, gpu.bandwidth, gpu.network) == (80 * 10**9, 450e9, 50e9)
    assert [gpu.peak(precision) for precision in ("bf16", "fp16", "fp32")] == [989e12] * 3
    assert [gpu.source, gpu.link_source, gpu.network_source] == ["as given"] * 3 and gpu.fused
    plain = parse_gpu("memory=24GiB,tflops=70.5,bandwidth=32 GB/s")
    assert plain.memory == 24 << 30 and plain.network == 12.5e9 and plain.network_source == "an assumption"


@pytest.mark.parametrize("text, said", [
    ("h100", "did you mean h100-80gb or "), ("h100-80", "did you mean h100-80gb"), ("a100", "a100-40gb"),
    ("4090", "rtx4090-24gb"), ("mi300x", "memory=80GB,tflops=989"), ("", "known are gb200-186gb, "),
    ("memory=80GB", "lacks tflops and bandwidth"), ("memory=80GB,tflop=1,bandwidth=1GB", "did you mean tflops="),
    ("memory=80GB,tflops=1,bandwidth=1GB,price=2", "it takes memory=…, tflops=…"),
    ("memory=80GB,tflops=1,bandwidth=1GB,fast", "'fast'; it takes memory="),
    ("memory=80GB,memory=81GB,tflops=1,bandwidth=1GB", "memory twice"),
    ("memory=much,tflops=1,bandwidth=1GB", "--gpu memory is 'much'; give a number of bytes above 0"),
    ("memory=0GB,tflops=1,bandwidth=1GB", "--gpu memory is '0GB'"),
    ("memory=80GB,tflops=1,bandwidth=-1GB", "--gpu bandwidth is '-1GB'"),
    ("memory=80GB,tflops=1,bandwidth=inf", "--gpu bandwidth is 'inf'"),
    ("memory=80GB,tflops=1,bandwidth=400gb", "GB for bytes per second or Gb for bits"),
    *((f"memory=80GB,tflops={number},bandwidth=1GB", f"--gpu tflops is '{number}'; give its dense peak")
      for number in ("0", "-3", "inf", "nan", "many", ""))])
def test_what_is_no_gpu_is_refused_with_the_way_out(text, said):
    with pytest.raises(SettingsError) as error:
        parse_gpu(text)
    assert said in str(error.value) and "--gpu" in str(error.value)


@pytest.mark.parametrize("text, rate", [("50GB", 50e9), ("400Gb", 50e9), ("400 Gbit/s", 50e9), ("100Gbps", 12.5e9),
                                        ("1.5 GiB/s", 1.5 * 2**30), ("1000", 1000)])
def test_rates_are_of_bits_or_of_bytes(text, rate):
    assert parse_rate(text, "--network") == rate


def test_a_cluster_has_a_world_and_none_is_empty():
    assert Cluster(nodes=4, gpus_per_node=8, gpu=GPUS["h100-80gb"], network=50e9).world == 32
    with pytest.raises(SettingsError, match="--nodes is 0; it must be at least 1"):
        Cluster(nodes=0, gpus_per_node=8, gpu=GPUS["h100-80gb"], network=50e9)
    with pytest.raises(SettingsError, match="--gpus-per-node is -1"):
        Cluster(nodes=1, gpus_per_node=-1, gpu=GPUS["h100-80gb"], network=50e9)
