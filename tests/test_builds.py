"""Operators that are built are told before and after, those that are there are not: with a real compiler."""

import logging
import os
import shutil
import sysconfig
import time
from pathlib import Path

import cpuinfo
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder
from deepspeed.ops.op_builder.quantizer import QuantizerBuilder
from torch.utils import cpp_extension

from vir.engine import builds
from vir.errors import SettingsError

ON_CPU = get_accelerator().device_name() == "cpu"
SOURCE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TORCH_EXTENSION_NAME_TEXT};
PyMODINIT_FUNC INITIALISER() { return PyModule_Create(&definition); }
"""


class Tiny(CPUOpBuilder):
    """An operator that a compiler makes in no time: of no function, without PyTorch's headers."""

    def __init__(self, source, name, flags=()):
        super().__init__(name=name)
        self.source, self.flags = source, flags

    def absolute_name(self):
        return self.name

    def sources(self):
        return [str(self.source)]

    def cxx_args(self):
        return ["-O0", f"-DINITIALISER=PyInit_{self.name}", f"-DTORCH_EXTENSION_NAME_TEXT='\"{self.name}\"'",
                *self.flags]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    (tmp_path / "ops").mkdir()
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    os.utime(path, (1e9, 1e9))
    return path


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "vir"]


def test_a_build_is_told_before_and_after_and_what_is_built_is_not(source, caplog):
    caplog.set_level(logging.INFO)
    builds.load([Tiny(source, "vir_tiny")])
    before, after = said(caplog)
    assert before == "DeepSpeed is building its operator vir_tiny for this machine: once, a minute or two"
    assert after.startswith("built vir_tiny in ") and after.endswith(" s")
    assert "vir_tiny" in OpBuilder._loaded_ops
    builds.load([Tiny(source, "vir_tiny")])
    assert len(said(caplog)) == 2


def test_built_is_what_was_made_of_these_sources_in_this_way(source):
    tiny = Tiny(source, "vir_tiny_again")
    assert not builds.is_built(tiny)
    builds.load([tiny])
    assert builds.is_built(tiny)
    assert not builds.is_built(Tiny(source, "vir_tiny_again", flags=("-march=another",)))
    moved = source.rename(source.with_name("moved.cpp"))
    assert not builds.is_built(Tiny(moved, "vir_tiny_again"))
    moved.rename(source)
    os.utime(source, (time.time() + 60,) * 2)
    assert not builds.is_built(tiny)


def test_a_library_that_cannot_be_loaded_is_refused_with_its_folder(source):
    """As one that was built with another torch: a symbol is missing."""
    source.write_text(SOURCE.replace("{ return", "{ of_an_older_torch(); return").replace(
        "PyMODINIT", 'extern "C" void of_an_older_torch();\nPyMODINIT'))
    builder = Tiny(source, "tiny_of_another_torch")
    for _ in range(2):  # as it is built, and later
        with pytest.raises(SettingsError, match="operator tiny_of_another_torch was built and cannot be loaded: .*"
                                                "of_an_older_torch.*; remove .*tiny_of_another_torch, and it is built"):
            builds.load([builder])


def test_a_build_that_fails_is_refused_with_the_way_out_and_the_compilers_words(source):
    source.write_text("#error no such machine\n")
    with pytest.raises(SettingsError) as raised:
        builds.load([Tiny(source, "vir_tiny_wrong")])
    assert str(raised.value).startswith("DeepSpeed cannot build its operator vir_tiny_wrong; install a C++ compiler")
    assert "no such machine" in str(raised.value)


@pytest.mark.parametrize("home, why", [
    (None, "CUDA_HOME does not exist"), ("/none", "Unable to run /none/bin/nvcc")])
def test_the_quantizer_is_refused_without_nvcc_with_its_place_and_another_json(source, monkeypatch, home, why):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    with pytest.raises(SettingsError) as raised:
        builds.load([QuantizerBuilder()])
    said = str(raised.value)
    assert said.startswith("DeepSpeed's operator quantizer, which a JSON with zero_quantized_weights or another such ")
    assert f"nvcc, the compiler of CUDA {torch.version.cuda}, is not there to build it (CUDA_HOME is {home}): " in said
    assert why in said
    assert said.endswith("or take --deepspeed_config zero3_bf16")


def test_what_a_run_needs_is_told_by_its_json_its_optimizer_and_the_device():
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    quantized = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}

    def names(config, optimizer):
        return [builder.name for builder in builds.needed(config, optimizer)]

    assert names({}, "adamw") == []
    assert names(offloaded, "adamw") == names(offloaded, "adam") == ["cpu_adam"]
    assert names(offloaded, "sgd") == []
    assert names(quantized, "adamw") == ([] if ON_CPU else ["quantizer"])


def test_the_processor_is_asked_for_once(source, monkeypatch):
    """DeepSpeed asks for each flag of an operator of its own."""
    asked = []
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda ask=cpuinfo.get_cpu_info: asked.append(True) or ask())
    builds.load([Tiny(source, "vir_tiny_too")])
    flags = [CPUAdamBuilder().cxx_args() for _ in range(2)]
    assert flags[0] == flags[1] and len(asked) == 1
    builds.load([Tiny(source, "vir_tiny_too")])
    assert CPUAdamBuilder().cxx_args() == flags[0] and len(asked) == 1


def test_the_ninja_of_this_python_is_found_before_that_of_the_machine(tmp_path, monkeypatch):
    """As on a node that was reached by ssh, whose PATH has another version, which would build everything anew."""
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    own = Path(sysconfig.get_path("scripts"), "ninja")
    if not own.is_file():
        pytest.skip("this Python has no ninja of its own (pip install ninja)")
    builds.load([])
    assert shutil.which("ninja") == str(own)
    before = os.environ["PATH"]
    builds.load([])
    assert os.environ["PATH"] == before
