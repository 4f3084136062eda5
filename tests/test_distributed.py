"""Two ranks on CPU: what one has reaches the other, and what one alone meets, both agree on.

This file is also the program of the ranks: python tests/test_distributed.py FOLDER
"""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_store import save
from torch import nn

from support.launchers import HANGS, ROOT, call, free_port
from vir import distributed, evaluate, run_folder
from vir.checkpoints import store
from vir.checkpoints.info import CheckpointInfo
from vir.cluster.signals import StopRequest
from vir.config import DataConfig, RunConfig
from vir.engine.batch_norm import RunningStatistics
from vir.errors import SettingsError, VirError
from vir.launcher import Place
from vir.training.prepare import prepare
from vir.weights.spec import InputSpec, ModelSpec

INFO = CheckpointInfo(
    samples_seen=0, step=1, updates=0, world_size=2, zero_stage=2, precision="bf16", ema=False, loss_scaler={},
    metrics={}, config={}, data_fingerprint="f", model=ModelSpec(name="test_vit", args={}, classes=(), input=InputSpec(
        size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)))
KEPT = store.Kept(1, None)


def told(work):
    """The text of the error that the work ends with."""
    try:
        work()
    except VirError as error:
        return f"{type(error).__name__}: {error}"


def claim(folder, world):
    with run_folder.claim(folder, world):
        return


def as_rank(folder):
    stop = StopRequest()
    world = distributed.start()
    stop.join()
    rank, found = world.rank, {"world": [world.rank, world.size, world.device.type, world.is_main]}
    found["interface"] = os.environ.get("GLOO_SOCKET_IFNAME")
    found["broadcast"] = distributed.broadcast({"from": rank})
    found["gather"] = distributed.gather({"from": rank})
    found["sum"] = distributed.sum_over_ranks([(2**52, 0.1), (1, 0.2)][rank % 2], world.device)

    found["ready"] = []
    for ranks in ((), (0,), (0, 1)):
        stop.agree(rank in ranks)
        found["ready"].append(stop.all_ready)
    found["stop"] = [stop.agree()]
    if rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    found["stop"].append(stop.agree())

    found["claim"] = told(lambda: claim(folder / "shared", world))
    found["blind"] = told(lambda: claim(folder / f"own{rank}", world))

    def write(part, take, to=""):
        part.mkdir(exist_ok=True)
        take(rank, part / to / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if world.is_main:
            take("model", part / "mp_rank_00_model_states.pt")

    run = folder / "shared"
    save(write, run, INFO, world, KEPT, False)
    found["files"] = sorted(store.select(run, world)[1].files)
    found["save"] = told(lambda: save(lambda part, take: write(part, take, "no" if rank else ""), run,
                                      replace(INFO, step=2), world, KEPT, True))
    found["left"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    distributed.barrier()
    if world.is_main:
        model = run / "checkpoints" / "step-00000001" / "mp_rank_00_model_states.pt"
        model.write_bytes(model.read_bytes().replace(b"model", b"MODEL"))
    distributed.barrier()
    found["damage"] = told(lambda: store.select(run, world))
    found["refused"] = [told(lambda: store.select(run, world, which)) for which in ("best", "7", "newest")]

    model = nn.BatchNorm1d(1, momentum=1.0)
    statistics = RunningStatistics(model, averages=True)
    model(torch.full((4, 1), 1.0 + 2 * rank))
    statistics.after_step(True, 0.5)
    found["statistics"] = [model.running_mean.item(), statistics.average["running_mean"].item()]

    def look():
        if rank:
            raise SettingsError("rank 1 alone sees it")
        return rank

    stop.close()
    found["door"] = [distributed.at_the_door(lambda: rank), told(lambda: distributed.at_the_door(look)),
                     torch.distributed.is_initialized()]
    distributed.stop()
    distributed.barrier()  # of nobody
    (folder / f"found{world.size}-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks has found."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(call, sys.executable, __file__, folder, timeout=180, RANK=f"{rank}", LOCAL_RANK=f"{rank}",
                             WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
                             CUDA_VISIBLE_DEVICES="", NCCL_SOCKET_IFNAME="=lo") for rank in range(2)]
    for rank in ranks:
        assert rank.result().returncode == 0, rank.result().stdout[-4000:]
    return [json.loads((folder / f"found2-{rank}.json").read_text()) for rank in range(2)]


def test_each_rank_knows_its_place(found):
    assert [of_rank["world"] for of_rank in found] == [[0, 2, "cpu", True], [1, 2, "cpu", False]]


def test_gloo_takes_the_interface_that_nccl_was_told_to_take(found):
    assert [of_rank["interface"] for of_rank in found] == ["lo", "lo"]


def test_rank_0_is_heard_by_all_and_all_by_each(found):
    for of_rank in found:
        assert of_rank["broadcast"] == {"from": 0}
        assert of_rank["gather"] == [{"from": 0}, {"from": 1}]


def test_sums_are_those_of_float64(found):
    for of_rank in found:
        assert of_rank["sum"] == [2**52 + 1, 0.1 + 0.2]


def test_a_signal_on_one_rank_stops_both(found):
    for of_rank in found:
        assert of_rank["stop"] == [False, True]


def test_a_folder_that_one_rank_does_not_see_is_refused_on_both(found):
    for rank, of_rank in enumerate(found):
        assert of_rank["claim"] is None
        assert of_rank["blind"].startswith("SettingsError: --output ")
        host = socket.gethostname()
        assert (f"own{rank}: ranks 1 ({host}) do not see what rank 0 ({host}) writes there; give a folder that all "
                "nodes share") in of_rank["blind"]


def test_a_checkpoint_holds_the_files_of_both_ranks(found):
    for of_rank in found:
        assert of_rank["files"] == [*(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)),
                                    "mp_rank_00_model_states.pt"]


def test_ranks_are_ready_when_all_are(found):
    assert all(of_rank["ready"] == [False, False, True] for of_rank in found)


def test_a_problem_of_one_rank_gives_the_checkpoint_up_on_both(found):
    for of_rank in found:
        assert of_rank["save"].startswith("CheckpointError: ") and "rank 1: " in of_rank["save"]
        assert "No such file" in of_rank["save"]
        assert {"latest", "step-00000001"} == set(of_rank["left"]) - {"step-00000002.part"}
    assert "step-00000002.part" not in found[0]["left"]


def test_damage_that_one_rank_finds_is_told_on_both(found):
    for of_rank in found:
        assert "mp_rank_00_model_states.pt has changed since it was written" in of_rank["damage"]


def test_a_checkpoint_that_cannot_be_chosen_is_told_on_both(found):
    """Rank 0 alone looks for it."""
    for of_rank in found:
        best, step, newest = of_rank["refused"]
        assert best.startswith("CheckpointError: ") and "has no best checkpoint" in best
        assert step.startswith("CheckpointError: the checkpoint of step 7 of ")
        assert newest.startswith("SettingsError: --which newest is not latest, best or ")


def test_running_statistics_are_the_mean_of_the_ranks(found):
    for of_rank in found:
        assert of_rank["statistics"] == [2.0, 1.0]  # (1 + 3) / 2, and half way to it from 0


def test_what_one_rank_refuses_at_the_door_all_refuse_and_the_group_is_no_more(found):
    assert [of_rank["door"] for of_rank in found] == [
        [rank, "SettingsError: rank 1 alone sees it", False] for rank in range(2)]


# ---- in this process


def test_alone_everything_is_ones_own():
    assert distributed.broadcast("a") == "a" and distributed.gather("a") == ["a"]
    assert distributed.sum_over_ranks([2**53 - 1, 0.1], torch.device("cpu")) == [2**53 - 1, 0.1]
    distributed.barrier()


@pytest.fixture
def threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID",
                 "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("environment, processes", [
    ({}, 1), ({"LOCAL_WORLD_SIZE": "2"}, 2), ({"LOCAL_SIZE": "2"}, 2), ({"LOCAL_WORLD_SIZE": "100000"}, 100000),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 2),
    ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 1)])
def test_the_processes_of_a_node_share_its_cores(threads, monkeypatch, environment, processes):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.share_cores()
    assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // processes)


@pytest.mark.parametrize("environment", [
    {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7", "TORCHELASTIC_RUN_ID": "none"}])
def test_the_threads_that_somebody_has_asked_for_are_left_as_they_are(threads, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.share_cores()
    assert torch.get_num_threads() == 3


DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\nGCC version: 9\n":
    "470.57.02",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\n":
    "580.95.05",
    "something else\n": "of unknown version",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Paths of a driver's version and of a folder of devices, on a machine with two GPUs that torch cannot use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("version", "nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).write_text(next(iter(DRIVERS)))
    return tmp_path / "version", tmp_path


@pytest.mark.parametrize("said, version", DRIVERS.items())
@pytest.mark.parametrize("built, way_out", [
    ("13.2", "it was built for CUDA 13.2; install a newer driver (nvidia-smi shows the newest CUDA that one runs), or "
             "a wheel of torch for an older CUDA (https"),
    (None, "it was built without CUDA; install a wheel of torch with CUDA (https")])
def test_gpus_that_torch_cannot_use_are_refused_with_both_versions(machine, monkeypatch, said, version, built, way_out):
    monkeypatch.setattr(torch.version, "cuda", built)
    machine[0].write_text(said)
    with pytest.raises(SettingsError) as error:
        distributed.check_driver(*machine)
    assert str(error.value).startswith(f"this machine has NVIDIA GPUs with driver {version}, but torch "
                                       f"{torch.__version__} cannot use them: {way_out}")
    assert ", or give --device cpu to compute on the CPU; torch says: " in str(error.value)


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_refused(machine, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    distributed.check_driver(*machine)


@pytest.mark.parametrize("gone", [["version"], ["nvidia0", "nvidia1"]])
def test_a_machine_without_driver_and_a_container_without_gpus_are_not_refused(machine, gone):
    for name in gone:
        (machine[1] / name).unlink()
    distributed.check_driver(*machine)


def test_gpus_that_torch_can_use_are_not_refused(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    distributed.check_driver(*machine)


def test_a_run_and_an_evaluation_ask_before_anything_else(machine, monkeypatch, capsys):
    monkeypatch.setattr(distributed.check_driver, "__defaults__", machine)
    with pytest.raises(SettingsError, match="driver 470.57.02"):
        prepare(RunConfig(data=DataConfig(train="none")))
    assert evaluate.main(["--weights", "none", "--data", "none"]) == 2
    assert "driver 470.57.02" in capsys.readouterr().err


@pytest.mark.parametrize("seen, number, gpu", [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(monkeypatch, seen, number, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("LOCAL_RANK", str(number))
    assert distributed.gpu_of(Place(11, 16, number, "node1", 29500)) == torch.device("cuda", gpu)
    assert os.environ["LOCAL_RANK"] == str(gpu)  # which DeepSpeed reads


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SettingsError, match="rank 11 is number 3 on its machine, which has 2 GPUs; start at most 2"):
        distributed.gpu_of(Place(11, 16, 3, "node1", 29500))


def test_a_port_that_another_process_has_is_named_with_the_flag_that_gives_another(monkeypatch):
    monkeypatch.setattr(distributed, "_server", None)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"^rank 0 cannot serve on port {port}, which another process has, "
                                                "maybe another run; give the launcher another --master_port, or set M"):
            distributed.serve(Place(0, 2, 0, "127.0.0.1", port))


if __name__ == "__main__":
    as_rank(Path(sys.argv[-1]))


TURNS = """
import os, socket, time
from vir import distributed, launcher

socket.gethostname = lambda: os.environ["HOST"]
place, stops = launcher.adopt(), time.monotonic() + 20
for turn in range(2):
    try:
        with distributed.first_of_machine_first(place, lambda: time.monotonic() > stops) as first:
            assert first == (place.local_rank == 0)
            print(turn, place.rank, "begins", time.monotonic(), flush=True)
            time.sleep(0.5 if first else 0)
            print(turn, place.rank, "ends", time.monotonic(), flush=True)
            if turn == 0:
                raise ValueError
    except ValueError:
        pass
time.sleep(1 if place.rank == 0 else 0)  # it serves the store
"""


def test_the_first_process_of_each_machine_goes_first_however_it_ends():
    """Ranks 0 and 1 on one machine; 2 and 3 in containers of another, which have names of their own."""
    environment = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                   "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", TURNS], stdout=subprocess.PIPE, text=True,
                              env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % 2), "HOST": host})
             for rank, host in enumerate(["a", "a", "b", "c"])]
    said = [rank.communicate(timeout=HANGS)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4
    at = {tuple(words[:3]): float(words[3]) for lines in said for words in map(str.split, lines)}
    for turn in "01":
        assert at[turn, "1", "begins"] >= at[turn, "0", "ends"] and at[turn, "3", "begins"] >= at[turn, "2", "ends"]
