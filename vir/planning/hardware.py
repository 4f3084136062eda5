"""What GPUs have, from their data sheets: memory, dense peak, links inside and between nodes; in bytes and seconds."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from vir.config import parse_bytes
from vir.errors import SettingsError
from vir.reports.throughput import FP16_TFLOPS, PEAK_TFLOPS


class Range(NamedTuple):
    """An estimate that is known within these."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, and its share of what connects it."""

    name: str
    memory: int
    """Bytes: the GB of the data sheet, 10^9 each. PyTorch finds up to 7 % more with HBM, and up to 1.5 % less with
    GDDR6, of which error correction takes a part."""
    tflops: Mapping[str, float]
    """Dense peak by precision (bf16, fp16, fp32) in 1e12 FLOP/s; a missing one is unknown. That of fp32 is of exact
    products, without tensor cores."""
    bandwidth: float
    """Bytes/s in one direction to the other GPUs of its node."""
    network: float
    """Bytes/s in one direction of its share of the network cards that its nodes usually have."""
    source: str
    """Of memory and peak."""
    link_source: str = ""
    network_source: str = ""
    fused: bool = False
    """It has the fused kernel of retention: it is of Ampere or later."""

    def peak(self, precision: str) -> float:
        """FLOP/s.

        Raises:
            SettingsError: it has no such products, or their peak is not known here.
        """
        if precision not in self.tflops:
            raise SettingsError(f"--gpu {self.name} has no known peak in {precision}, only in "
                                f"{' and '.join(self.tflops)}; take a --deepspeed_config of one of these" + (
                                    ", such as zero2_fp16" if precision == "bf16" and "fp16" in self.tflops else ""))
        return self.tflops[precision] * 1e12


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of alike GPUs.

    Raises:
        SettingsError: a number of nodes or GPUs below 1.
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network: float
    """Bytes/s in one direction of one GPU's share to other nodes."""

    def __post_init__(self) -> None:
        for flag, number in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if number < 1:
                raise SettingsError(f"{flag} is {number}; it must be at least 1")

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


class _Sheet(NamedTuple):
    """Of one GPU; GB and GB/s are of 10^9 bytes."""

    device: str
    """As torch.cuda.get_device_name calls it; its peak is in reports.throughput."""
    gigabytes: float
    fp32: float
    """1e12 FLOP/s without tensor cores."""
    link: float
    link_is: str
    network: float
    network_is: str


_DGX, _AWS = "as in NVIDIA's DGX", "as in Amazon's"
_ASSUMED = "an assumption: nodes with it differ"
_NVLINK = "NVLink {}, half of the sum of both directions"
_PCIE = "PCIe {} x16, half of the sum of both directions"

_SHEETS = {
    "gb200-186gb": _Sheet("NVIDIA GB200", 186, 80, 900, _NVLINK.format(5), 50, f"{_DGX} GB200"),
    "b200-180gb": _Sheet("NVIDIA B200", 180, 75, 900, _NVLINK.format(5), 50, f"{_DGX} B200"),
    "h200-141gb": _Sheet("NVIDIA H200", 141, 67, 450, _NVLINK.format(4), 50, f"{_DGX} H200"),
    "h100-80gb": _Sheet("NVIDIA H100 80GB HBM3", 80, 67, 450, _NVLINK.format(4), 50, f"{_DGX} H100"),
    # A bridge of NVLink joins two of them; the others of a node are behind PCIe.
    "h100-nvl-94gb": _Sheet("NVIDIA H100 NVL", 94, 60, 64, _PCIE.format("5.0"), 12.5, _ASSUMED),
    "h100-pcie-80gb": _Sheet("NVIDIA H100 PCIe", 80, 51, 64, _PCIE.format("5.0"), 12.5, _ASSUMED),
    "a100-80gb": _Sheet("NVIDIA A100-SXM4-80GB", 80, 19.5, 300, _NVLINK.format(3), 25, f"{_DGX} A100"),
    "a100-40gb": _Sheet("NVIDIA A100-SXM4-40GB", 40, 19.5, 300, _NVLINK.format(3), 25, f"{_DGX} A100"),
    "a100-pcie-80gb": _Sheet("NVIDIA A100 80GB PCIe", 80, 19.5, 32, _PCIE.format("4.0"), 12.5, _ASSUMED),
    "a100-pcie-40gb": _Sheet("NVIDIA A100-PCIE-40GB", 40, 19.5, 32, _PCIE.format("4.0"), 12.5, _ASSUMED),
    "l40s-48gb": _Sheet("NVIDIA L40S", 48, 91.6, 32, _PCIE.format("4.0"), 6.25, f"{_AWS} g6e.48xlarge"),
    "l4-24gb": _Sheet("NVIDIA L4", 24, 30.3, 32, _PCIE.format("4.0"), 1.5625, f"{_AWS} g6.48xlarge"),
    "a10g-24gb": _Sheet("NVIDIA A10G", 24, 35, 32, _PCIE.format("4.0"), 1.5625, f"{_AWS} g5.48xlarge"),
    "a10-24gb": _Sheet("NVIDIA A10", 24, 31.2, 32, _PCIE.format("4.0"), 1.5625, _ASSUMED),
    "v100-32gb": _Sheet("Tesla V100-SXM2-32GB", 32, 15.7, 150, _NVLINK.format(2), 6.25, f"{_DGX}-1"),
    "v100-16gb": _Sheet("Tesla V100-SXM2-16GB", 16, 15.7, 150, _NVLINK.format(2), 6.25, f"{_DGX}-1"),
    "t4-16gb": _Sheet("Tesla T4", 16, 8.1, 16, _PCIE.format("3.0"), 1.5625, f"{_AWS} g4dn.metal"),
    "rtx4090-24gb": _Sheet("NVIDIA GeForce RTX 4090", 24, 82.6, 32, _PCIE.format("4.0"), 1.25, _ASSUMED),
    "rtx3090-24gb": _Sheet("NVIDIA GeForce RTX 3090", 24, 35.6, 32, _PCIE.format("4.0"), 1.25, _ASSUMED),
}
_ALIASES = {"gb200": "gb200-186gb"}


def _of_sheet(name: str, sheet: _Sheet) -> Gpu:
    device, peaks = sheet.device, {"fp32": sheet.fp32}
    if device in PEAK_TFLOPS:
        peaks["bf16"] = PEAK_TFLOPS[device]
    peaks["fp16"] = (PEAK_TFLOPS | FP16_TFLOPS)[device]
    return Gpu(name=name, memory=int(sheet.gigabytes * 1e9), tflops=dict(sorted(peaks.items())),
               bandwidth=sheet.link * 1e9, network=sheet.network * 1e9,
               source="data sheet", link_source=sheet.link_is, network_source=sheet.network_is, fused="bf16" in peaks)


GPUS: dict[str, Gpu] = {name: _of_sheet(name, sheet) for name, sheet in _SHEETS.items()}
"""By the name that users type."""

_OWN_NETWORK = 12.5e9
"""Of a GPU that is given by its numbers without one: 100 Gb/s. Such a GPU counts as one of Ampere or later."""


def parse_gpu(text: str) -> Gpu:
    """The GPU that --gpu means: a name of GPUS, or memory=80GB,tflops=989,bandwidth=450GB[,network=50GB].

    tflops is of the precision of the run, whichever it is; bandwidth and network are bytes per second in one direction.

    Raises:
        SettingsError: an unknown name, of which the nearest are told; a key or a number that is none.
    """
    name = text.strip().lower().replace("_", "-")
    name = _ALIASES.get(name, name)
    if name in GPUS:
        return GPUS[name]
    if "=" in text:
        return _by_numbers(text)
    near = difflib.get_close_matches(name, GPUS, n=3, cutoff=0.4)
    raise SettingsError(f"--gpu {text!r} is not known; " + (
        f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(GPUS)}") +
        " Any other is given by its numbers: memory=80GB,tflops=989,bandwidth=450GB,network=50GB")


def gpu_of_device(name: str, memory: int) -> Gpu | None:
    """The GPU that torch.cuda.get_device_name calls so, with the memory that it really has; None for an unknown one."""
    found = next((GPUS[ours] for ours, sheet in _SHEETS.items() if sheet.device == name), None)
    return found and replace(found, memory=memory, source="memory as found here, peak of its data sheet")


def parse_rate(text: str, flag: str) -> float:
    """Bytes per second of "50GB", "50 GB/s" (bytes) or "400Gb", "400 Gbit/s" (bits).

    Raises:
        SettingsError: anything else; the flag is named.
    """
    bits = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])b(?:it)?(?:/s|ps)?\s*", text)
    if bits:
        return parse_bytes(f"{bits[1]}{bits[2]}B", flag) / 8
    if re.search(r"[kmgt]b", text):  # of bits or of bytes?
        raise SettingsError(f"{flag} is {text!r}; write GB for bytes per second or Gb for bits per second, such as "
                            "50GB or 400Gb")
    return float(parse_bytes(re.sub(r"(/s|ps)?\s*$", "", text), flag))


def _by_numbers(text: str) -> Gpu:
    keys, given = ("memory", "tflops", "bandwidth", "network"), {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, is_set, value = part.partition("=")
        key = key.strip()
        if key not in keys or not is_set:
            near = difflib.get_close_matches(key, keys, n=1)
            raise SettingsError(f"--gpu {text!r} has {part!r}; " + (
                f"did you mean {near[0]}=…?" if near and is_set else f"it takes {'=…, '.join(keys)}=…"))
        if key in given:
            raise SettingsError(f"--gpu {text!r} gives {key} twice; keep one")
        given[key] = value.strip()
    if missing := [key for key in keys[:3] if key not in given]:
        raise SettingsError(f"--gpu {text!r} lacks {' and '.join(missing)}; give all of "
                            "memory=80GB,tflops=989,bandwidth=450GB, and network=50GB where it is known")
    tflops = _positive(given["tflops"])
    return Gpu(
        name=text, memory=parse_bytes(given["memory"], "--gpu memory"),
        tflops=dict.fromkeys(("bf16", "fp16", "fp32"), tflops),
        bandwidth=parse_rate(given["bandwidth"], "--gpu bandwidth"),
        network=parse_rate(given["network"], "--gpu network") if "network" in given else _OWN_NETWORK,
        source="as given", link_source="as given", network_source="as given" if "network" in given else "an assumption",
        fused=True)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1e-3 <= number <= 1e6:
        raise SettingsError(f"--gpu tflops is {text!r}; give its dense peak in the precision of the run in 1e12 "
                            "FLOP/s, from 0.001 to 1000000, such as 989")
    return number
