"""The operators that DeepSpeed compiles for a machine at their first use: loaded here, so that the wait is told."""

from __future__ import annotations

import os
import sysconfig
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Sequence

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import (
    CUDAMismatchException,
    CUDAOpBuilder,
    MissingCUDAException,
    installed_cuda_version,
)
from torch.torch_version import TorchVersion
from torch.utils import cpp_extension

from vir.engine import ds_config as ds
from vir.errors import SettingsError
from vir.log import log

_LOCKS_BY_FILES_BEFORE = "2.15"
"""Of torch: from then on, a build that is killed gives its lock back (seen in that version; pytorch issue 189245)."""


def needed(ds_config: dict[str, Any], optimizer: str) -> list[Any]:
    """DeepSpeed's builders of the operators that a run with this JSON uses on this device."""
    on_cpu = get_accelerator().device_name() == "cpu"
    return [get_accelerator().create_op_builder(name) for name, used in (
        ("CPUAdamBuilder", ds.takes_cpu_adam(ds_config, optimizer)),
        ("QuantizerBuilder", not on_cpu and ds.quantized(ds_config)),
    ) if used]


def load(builders: Sequence[Any]) -> None:
    """Build the operators that are not there yet, and tell of each before and after.

    DeepSpeed would do the same a moment later, without a word.

    Raises:
        SettingsError: one cannot be built; most often there is no compiler, or no nvcc for one of a GPU.
    """
    prefer_own_programs()
    _leave_out_what_training_never_calls()
    if builders:
        _ask_for_the_processor_once()
    for builder in builders:
        try:
            begin = time.monotonic()
            if not (built := is_built(builder)):
                _check_nvcc(builder)
                log.info("DeepSpeed is building its operator %s for this machine: once, a minute or two", builder.name)
            builder.load(verbose=False)
            if not built:
                log.info("built %s in %.0f s", builder.name, time.monotonic() - begin)
        except ImportError as error:  # the torch that it was built with is another one
            raise SettingsError(f"DeepSpeed's operator {builder.name} was built and cannot be loaded: {error}; remove "
                                f"{_folder(builder)}, and it is built anew") from error
        except (RuntimeError, OSError, MissingCUDAException, CUDAMismatchException) as error:
            raise SettingsError(f"DeepSpeed cannot build its operator {builder.name}; install a C++ compiler (g++), "
                                f"ninja and, on a GPU, nvcc. What the build said: {str(error)[:2000]}") from error


def prefer_own_programs() -> None:
    """Let torch find the ninja that was installed with this Python before any other, in this process from now on.

    On another node ssh gives a rank a PATH that knows nothing of a virtual environment. There torch would find no
    ninja, or one of another version, which takes what this one has built for something else and builds it again.
    """
    own, found = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if found.split(os.pathsep)[0] != own:
        os.environ["PATH"] = f"{own}{os.pathsep}{found}"


def _leave_out_what_training_never_calls() -> None:
    """Spare a CPU the build of DeepSpeed's sums in shared memory: over half a minute, before the first step.

    DeepSpeed builds them wherever it can, and calls them in inference_all_reduce alone, which splits layers over ranks.
    The collectives of training are gloo's either way, so that no result depends on this.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _ask_for_the_processor_once() -> None:
    """Let py-cpuinfo keep what it has found: it takes over a second, and DeepSpeed asks it five times in a start with
    its Adam for CPUs: twice for each set of flags of the operator, once for its optimizer."""
    with suppress(ImportError):  # then DeepSpeed asks another
        import cpuinfo  # which starts programs

        if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
            cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


def _check_nvcc(builder: Any) -> None:
    """Refuse what only nvcc can build where it is not: of what we use, the quantizer of ZeRO++ alone."""
    if not isinstance(builder, CUDAOpBuilder) or builder.is_rocm_pytorch():
        return
    try:
        installed_cuda_version()
    except MissingCUDAException as error:
        raise SettingsError(f"DeepSpeed's operator {builder.name}, which a JSON with zero_quantized_weights or another "
                            "such key needs (as zero3pp_bf16), is not built, and nvcc, the compiler of CUDA "
                            f"{torch.version.cuda}, is not there to build it (CUDA_HOME is {cpp_extension.CUDA_HOME}): "
                            f"{error}; install the CUDA toolkit and set CUDA_HOME to its folder, or take "
                            "--deepspeed_config zero3_bf16") from error


def _folder(builder: Any) -> Path:
    """Where it is built."""
    return Path(cpp_extension._get_build_directory(builder.name, False))


def is_built(builder: Any) -> bool:
    """Whether an operator is installed, or was built of these sources in this way, as ninja decides it."""
    if deepspeed.git_version_info.installed_ops.get(builder.name, False):
        return True
    folder = _folder(builder)
    library, rules = folder / f"{builder.name}.so", folder / "build.ninja"
    if not (library.is_file() and rules.is_file()):
        return False
    sources = [builder.deepspeed_src_path(source) for source in builder.strip_empty_entries(builder.sources())]
    words, built = rules.read_text(), library.stat().st_mtime
    return (all(os.stat(source).st_mtime <= built for source in sources) and
            all(word in words for word in (*sources, *builder.strip_empty_entries(builder.cxx_args()))))


def warn_of_killed_builds(torch_version: str) -> None:
    """Name the lock files for which older versions of torch would wait without a word, until someone removes them."""
    if TorchVersion(torch_version) >= _LOCKS_BY_FILES_BEFORE:
        return
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()).glob("**/lock"):
        log.warning("%s is there: another process is building this op of DeepSpeed, and this one waits for it; or a "
                    "build was killed, and this one would wait for ever: then remove the file", lock)
