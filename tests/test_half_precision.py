"""How fast bf16 and fp16 are on this processor, and what is said of it: with the real one, and with less of it."""

import json
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

from support.launchers import HANGS, ROOT, call
from vir.engine import ds_config, half_precision
from vir.engine.half_precision import Speed

WITHOUT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""}
"""A processor of 2013, as far as PyTorch's matrix products know: without instructions for bf16 and fp16."""
CPU = Path("/proc/cpuinfo").read_text()
WITH = "amx_bf16" in CPU or ("avx512_bf16" in CPU and "AuthenticAMD" in CPU)
"""Intel's without AMX have instructions too, and took 1.8 times as long as in float32."""
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="takes instructions from an x86 processor")


@x86
@pytest.mark.timeout(2 * HANGS)
def test_a_processor_without_the_instructions_is_told_with_what_was_measured_and_fp32_is_recommended(tmp_path):
    jobs = [{"settings": {key: {"enabled": True}, "zero_optimization": {"stage": stage}},
             "run": {"output": str(tmp_path / key)}} for key, stage in (("bf16", 3), ("fp16", 2))]
    jobs.append({"settings": {}, "run": {"output": str(tmp_path / "fp32")}})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = call(sys.executable, "tests/support/one_engine.py", tmp_path / "jobs.json", timeout=HANGS, **WITHOUT,
                PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stdout
    of_bf16, of_fp16, of_fp32 = done.stdout.split("== ")[1:]
    (warning,) = (line for line in of_bf16.splitlines() if line.startswith("vir WARNING: "))
    found = re.fullmatch(r"vir WARNING: bf16 is ([\d.]+) times slower than fp32 on this processor \(measured: a "
                         r"linear layer takes ([\d.]+) ms instead of ([\d.]+) ms\); take --deepspeed_config zero2_fp32",
                         warning)
    times, half, full = map(float, found.groups())
    assert 1.5 < times < 1000 and times == pytest.approx(half / full, rel=0.1)
    assert "trained" in of_bf16
    assert "refused: --deepspeed_config mine.json enables fp16, which this machine's cpu does not support; " in of_fp16
    assert "; take an fp32 one, such as zero2_fp32 (bf16 is " in of_fp16
    assert "WARNING" not in of_fp32 and "trained" in of_fp32


@pytest.mark.skipif(not WITH, reason="this processor has no fast instructions for bf16")
def test_a_processor_with_the_instructions_is_not_slow():
    assert not half_precision.measure.__wrapped__("bf16").is_slow


def test_measuring_leaves_the_random_numbers_and_the_threads_as_they_are():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert half_precision.measure("bf16") is half_precision.measure("bf16")
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_slow_is_what_takes_half_as_long_again():
    assert Speed(fp32=2.0, half=3.0).is_slow and not Speed(fp32=2.0, half=2.9).is_slow
    assert Speed(fp32=2.0, half=3.0).times_slower == 1.5


@pytest.mark.parametrize("path", sorted(ds_config.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_a_gpu_before_ampere_is_pointed_from_bf16_to_a_shipped_fp16_of_the_stage(path):
    config = ds_config.read(path)
    assert half_precision.instead_of_emulation(config, (8, 0)) is None
    other = half_precision.instead_of_emulation(config, (7, 5))
    assert (other is None) is ("bf16" not in path.stem)
    if other:
        found = ds_config.read(other)
        assert ds_config.precision(found) == "fp16"
        assert ds_config.zero_stage(found) == max(1, ds_config.zero_stage(config))
