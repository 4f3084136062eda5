"""Shared by the end-to-end tests: real digits as JPEG files, converted by the real tool; launchers with a bound."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A network that two slow cores train in no time; what it computes is the same as at full size.
TINY = ["--model.name", "vir_tiny_patch16_224", "--model.img_size", "28", "--data.workers", "1", "--data.lanes", "4",
        "--model.args", "{patch_size: 14, embed_dim: 128, depth: 2, num_heads: 2}"]


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def call(*command, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project's root, in a process group of its own that is gone when this returns."""
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(map(str, command))} took over {timeout} s:\n{output[-4000:]}")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return subprocess.CompletedProcess(command, process.returncode, stdout=output)


def deepspeed(*arguments, ranks: int = 2, timeout: int = 400) -> subprocess.CompletedProcess:
    """The real launcher on local ranks."""
    port = free_port()
    try:
        return call(Path(sys.executable).parent / "deepspeed", "--num_accelerators", ranks, "--master_port", port,
                    *arguments, timeout=timeout)
    finally:  # DeepSpeed leaves 69 MB per rank and port behind
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """An ImageNet folder of real handwritten digits: 40 training and 13 validation images of each class."""
    folder = tmp_path_factory.mktemp("digits")
    done = call(sys.executable, "tools/make_demo_dataset.py", "--output", folder / "all")
    assert done.returncode == 0, done.stdout
    for split, count in (("train", 40), ("val", 13)):
        for of_class in sorted((folder / "all" / split).iterdir()):
            target = folder / "few" / split / of_class.name
            target.mkdir(parents=True)
            for image in sorted(of_class.iterdir())[:count]:
                shutil.copy(image, target)
    return folder / "few"


@pytest.fixture(scope="session")
def shards(digits, tmp_path_factory) -> Path:
    """Those digits as shards: 400 training images in 7 shards, 130 validation images in 2."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        done = call(sys.executable, "tools/convert_imagenet.py", "--source", digits, "--split", split, "--output",
                    folder, "--name", "digits", "--workers", "2", "--samples-per-shard", "65")
        assert done.returncode == 0, done.stdout
    return folder
