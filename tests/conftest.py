"""Which tests see a GPU. Shared by the end-to-end tests: real digits as JPEG files, converted by the real tool."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from support.launchers import call


def pytest_configure(config):
    """`pytest -m gpu` runs the tests marked so. All others are about CPUs, and compute there on every machine: they
    start more ranks than there may be GPUs, and expect the bits of a CPU. DeepSpeed's launcher gives its ranks GPUs of
    their own, but leaves them DS_ACCELERATOR."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


_TAKES_LONGEST = "test_nodes.py"
"""It begins, or all others wait for it in the end; tests/run.sh keeps this order."""


def pytest_collection_modifyitems(items):
    import torch

    items.sort(key=lambda item: item.path.name != _TAKES_LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and to be called for by -m gpu"))


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


@pytest.fixture(scope="module", autouse=True)
def environment():
    """What the tests of a file put into the environment goes with them: training in this process says there that it is
    rank 0, and launchers in tests of the next file would take that for theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def alone():
    """The device of a process group of one rank, as DeepSpeed wants it."""
    import deepspeed
    from torch.nn import functional

    from vir import distributed

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        patch.setattr(functional, "linear", functional.linear)  # ZeRO 3 puts another one there, for good
        yield distributed.start().device
        deepspeed.comm.destroy_process_group()  # with what DeepSpeed remembers of it
