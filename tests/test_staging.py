"""Copies of a state in host memory: as torch.save would write it then, whatever happens to the state afterwards."""

import re
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from vir.checkpoints.staging import Staging
from vir.checkpoints.writer import write_file

CPU = torch.device("cpu")


class Scaler:
    """An object with numbers that change."""

    def __init__(self):
        self.cur_scale = 8.0


def state(size=1000):
    flat = torch.randn(size, 3)
    named = OrderedDict(a=flat[5:9].t(), b=torch.nn.Parameter(flat[0]), none=torch.empty(0), one=torch.tensor(3.0))
    named._metadata = {"version": 1}
    return {"flat": [flat, flat.to(torch.bfloat16)], "named": named, "scaler": Scaler(), "step": 7,
            "bool": torch.tensor([True, False]), "big": torch.arange(2**40, 2**40 + 3)}


def same(found, expected):
    return (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride()) and (
        torch.equal(found, expected))


def tensors(of):
    return [*of["flat"], *of["named"].values(), of["bool"], of["big"]]


def test_a_copy_stays_as_the_state_was():
    live = state()
    expected = [tensor.detach().clone(memory_format=torch.preserve_format) for tensor in tensors(live)]
    put_together = Staging(CPU).copy("a.pt", live)
    with torch.no_grad():
        for tensor in tensors(live):
            tensor.zero_()
    live["scaler"].cur_scale, live["step"] = 1.0, 8
    live["named"]["new"] = 1
    copy = put_together()
    assert all(map(same, tensors(copy), expected))
    assert copy["scaler"].cur_scale == 8.0 and copy["step"] == 7 and list(copy["named"]) == ["a", "b", "none", "one"]
    assert copy["named"]._metadata == {"version": 1}


def test_tensors_of_one_storage_share_it_in_the_copy_and_in_its_file(tmp_path):
    live = state(100_000)
    copy = Staging(CPU).copy("a.pt", live)()
    flat, view = copy["flat"][0], copy["named"]["a"]
    assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert flat.untyped_storage().nbytes() == 1_200_000  # and is no part of a larger one, which would be written whole
    sizes = [write_file(one, tmp_path / "a.pt", threading.Event())["bytes"] for one in (live, copy)]
    assert abs(sizes[0] - sizes[1]) < 1000


def test_the_memory_is_allocated_once_for_each_file():
    staging = Staging(CPU)
    first = [staging.copy(name, state())() for name in ("a.pt", "b.pt")]
    places = [one["flat"][0].data_ptr() for one in first]
    assert places[0] != places[1]
    newer = state()
    again = staging.copy("a.pt", newer)()
    assert again["flat"][0].data_ptr() == places[0] and same(again["flat"][0], newer["flat"][0])
    assert not same(first[1]["flat"][0], newer["flat"][0])  # the other file's is untouched


def test_a_state_that_has_grown_gets_other_memory():
    staging = Staging(CPU)
    staging.copy("a.pt", {"weight": torch.ones(3)})
    grown = {"weight": torch.ones(3), "moment": torch.full((5,), 2.0)}
    assert all(map(same, staging.copy("a.pt", grown)().values(), grown.values()))


def test_forked_processes_do_not_get_the_memory():
    """Else each page that the next copy writes is first duplicated for loader processes."""
    flat = Staging(CPU).copy("a.pt", {"weight": torch.ones(1_000_000)})()["weight"]
    place = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            place = int(found[1], 16) <= flat.data_ptr() < int(found[2], 16)
        elif place and line.startswith("VmFlags:"):
            assert "dc" in line.split()  # do not copy area on fork
            return
    raise AssertionError("no mapping of the copy")


def test_what_torch_save_refuses_is_refused_at_once():
    with pytest.raises((AttributeError, TypeError), match="pickle|local object"):
        Staging(CPU).copy("a.pt", {"function": lambda: None})


@pytest.mark.gpu
def test_on_a_gpu_the_host_goes_on_and_the_device_changes_nothing_before_it_is_copied():
    staging = Staging(torch.device("cuda"))
    live = {"weight": torch.randn(50_000_000, device="cuda"), "step": torch.tensor(1.0)}
    expected = live["weight"].cpu()
    for _ in range(2):
        live["weight"].copy_(expected)
        put_together = staging.copy("a.pt", live)
        wait = staging.copied()
        live["weight"].zero_()
        wait()
        copy = put_together()["weight"]
        assert copy.is_pinned() and torch.equal(copy, expected)
