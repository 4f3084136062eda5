"""Ranks that are lost in every way, real processes all: the others end soon, and say who it was, where, and why.

They do nothing but wait, so several of these groups of ranks live at the same time.
"""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from support.launchers import ROOT, free_port
from vir import cli
from vir.cluster.heartbeat import _NOTHING, Heartbeat
from vir.launcher import Place

TIMEOUT = 3.0
"""Seconds of silence after which a rank is lost here: 30 beats of 0.1 s."""
BOUND = 60
SIZE = 3
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vir.cluster.heartbeat"])


def work(heartbeat):
    """Steps, and a sign in a file when this rank has heard those that it listens to."""
    ready = None
    for step in range(1, 10_000):
        heartbeat.at(f"at step {step}")
        time.sleep(0.02)
        heard = heartbeat._others[1:] if heartbeat._place.rank == 0 else heartbeat._others[:1]
        if ready is None and _NOTHING not in heard and step > 20:
            ready = Path(os.readlink("/proc/self/fd/1")).with_suffix(".ready")
            ready.touch()


def hold_the_gil(heartbeat):
    """When all have heard of each other."""
    heartbeat.at("in a library")
    folder = Path(os.readlink("/proc/self/fd/1")).parent
    while len(list(folder.glob("*.ready"))) < SIZE - 1:
        time.sleep(0.02)
    time.sleep(1)  # its beats say where it is
    ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps it, as a C extension that hangs does


def fail(heartbeat):
    heartbeat.failed("exit code 3, no such folder: /data")
    cli.end_now(3)


def in_a_folder_of_bytes(heartbeat):
    heartbeat.failed("exit code 3, no such folder: /\udcff")
    cli.end_now(3)


def finish(heartbeat):
    heartbeat.at("waiting for all ranks to end", counts=False)
    time.sleep(0.3)
    heartbeat.close()
    cli.end_now(0)


def finish_late(heartbeat):
    heartbeat.at("waiting for all ranks to end", counts=False)
    heartbeat.close()
    cli.end_now(0)


def stall(heartbeat):
    heartbeat.at("at step 7")
    time.sleep(1.5)
    heartbeat.at("at step 8")
    time.sleep(0.2)
    finish(heartbeat)


def as_rank(place, output, timeout, does, stall_after, under_agent):
    if under_agent:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    heartbeat = Heartbeat(place, timeout, stall_after)
    heartbeat.start()
    does(heartbeat)


class Group:
    """Processes that each do something beside their heartbeat."""

    def __init__(self, folder, does, timeout, port, stall_after=600.0, under_agent=False):
        self.outputs = [folder / f"{rank}.txt" for rank in range(len(does))]
        self.processes = [
            CONTEXT.Process(target=as_rank, args=(Place(rank, len(does), rank, "127.0.0.1", int(port)), output,
                                                  timeout, of_rank, stall_after, under_agent))
            for rank, (of_rank, output) in enumerate(zip(does, self.outputs)) if of_rank is not None]
        for process in self.processes:
            process.start()

    def wait_until_all_work(self):
        until = time.monotonic() + BOUND
        while not all(output.with_suffix(".ready").exists() for output in self.outputs):
            assert time.monotonic() < until, [self.said(rank) for rank in range(len(self.outputs))]
            time.sleep(0.02)

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def end(self):
        """Exit codes and what was said, when all have ended; seconds that it took."""
        began = time.monotonic()
        for process in self.processes:
            process.join(max(0, began + BOUND - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        return codes, [self.said(rank) for rank in range(len(self.outputs))], time.monotonic() - began

    def said(self, rank):
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""


@contextmanager
def group(folder, *does, timeout=TIMEOUT, port=None, **more):
    ranks = Group(folder, does, timeout, port or free_port(), **more)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join(30)


SCENARIOS = {}


def scenario(*cases):
    """Registers a function of a new folder and the values of a case, to be run beside the others."""
    def register(function):
        for case in cases or [()]:
            SCENARIOS[" ".join([function.__name__, *(str(getattr(value, "name", value)) for value in case[:1])])] = (
                function, case)
        return function

    return register


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with ThreadPoolExecutor(5) as pool:
        yield {name: pool.submit(function, tmp_path_factory.mktemp("ranks"), *case)
               for name, (function, case) in SCENARIOS.items()}


@contextmanager
def agent():
    """The port of a store that is served by none of the ranks, as by torchrun's agent."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    yield server.port


LOST = (r"^vir-train: rank {lost} \(\S+\) {where} \(process \d+\) is lost: (?:{why})\. Rank {rank} \(\S+\) at step "
        r"\d+ ends with it, exit code 5; the same command continues from the last checkpoint$")


def assert_lost(said, rank, lost, why, where=r"at step \d+"):
    lines = [line for line in said[rank].splitlines() if line.startswith("vir-train")]  # torch's store has its own
    assert len(lines) == 1 and re.search(LOST.format(lost=lost, where=where, why=why, rank=rank), lines[0]), said


@scenario()
def a_run_that_ends_well_says_nothing(tmp_path):
    with group(tmp_path, finish, finish_late, finish) as ranks:
        codes, said, seconds = ranks.end()
    assert codes == [0] * SIZE and said == [""] * SIZE and seconds < BOUND


@scenario((signal.SIGKILL, 2, "its process is gone"), (signal.SIGSTOP, 1, "silent for 3 s"))
def a_process_that_is_killed_or_stopped_which_ends_it_too(tmp_path, number, lost, why):
    with group(tmp_path, work, work, work) as ranks:
        ranks.wait_until_all_work()
        ranks.signal(lost, number)
        codes, said, _ = ranks.end()
    assert codes == [-9 if rank == lost else 5 for rank in range(SIZE)]
    for rank in set(range(SIZE)) - {lost}:
        assert_lost(said, rank, lost, why)


@scenario()
def a_process_that_keeps_the_interpreter_to_itself(tmp_path):
    with group(tmp_path, work, work, hold_the_gil) as ranks:
        codes, said, _ = ranks.end()
    assert codes == [5, 5, -9]
    for rank in (0, 1):
        assert_lost(said, rank, 2, r"silent for 3 s", where="in a library")


def assert_rank_0_is_lost(ranks, number, why):
    ranks.wait_until_all_work()
    ranks.signal(0, number)
    codes, said, _ = ranks.end()
    assert codes == [-9, 5, 5]
    for rank in (1, 2):
        assert_lost(said, rank, 0, why)


@scenario(
    (signal.SIGKILL, r"its store cannot be reached \(.*\)"),
    (signal.SIGSTOP, r"its store (has not answered for 3 s|cannot be reached \(.*\))"))  # the first to see it ends it
def rank_0_which_serves_the_store(tmp_path, number, why):
    with group(tmp_path, work, work, work) as ranks:
        assert_rank_0_is_lost(ranks, number, why)


@scenario((signal.SIGKILL, "its process is gone"), (signal.SIGSTOP, "silent for 3 s|its process is gone"))
def rank_0_where_an_agent_serves_the_store(tmp_path, number, why):
    with agent() as port, group(tmp_path, work, work, work, port=port, under_agent=True) as ranks:
        assert_rank_0_is_lost(ranks, number, why)


@scenario((0,), (2,))
def a_rank_that_fails_at_the_door_while_others_wait(tmp_path, failing):
    does = [work] * SIZE
    does[failing] = fail
    with group(tmp_path, *does) as ranks:
        codes, said, _ = ranks.end()
    assert codes == [3 if rank == failing else 5 for rank in range(SIZE)], said
    for rank in set(range(SIZE)) - {failing}:
        assert re.search(rf"rank {failing} \(\S+\) starting \(process \d+\) ended with exit code 3, no such folder: "
                         rf"/data. Rank {rank} ", said[rank]), said


@scenario()
def ranks_that_all_fail_end_with_codes_of_their_own(tmp_path):
    with group(tmp_path, fail, fail, fail) as ranks:
        codes, said, seconds = ranks.end()
    assert codes == [3, 3, 3] and said == [""] * SIZE and seconds < BOUND


@scenario()
def a_rank_that_never_begins(tmp_path):
    with group(tmp_path, work, work, None, timeout=1.0) as ranks:
        codes, said, _ = ranks.end()
    assert codes == [5, 5]
    for rank in (0, 1):
        assert re.search(r"vir-train: rank 2 has not begun within 5 s of this one; see what its node says\. Rank",
                         said[rank]), said


@scenario()
def a_rank_0_that_never_begins(tmp_path):
    with group(tmp_path, None, work, timeout=1.0) as ranks:
        codes = ranks.end()[0]
        said = ranks.said(1)
    assert codes == [5]
    assert re.search(r"rank 0 is lost: nobody answers at 127.0.0.1:\d+\. Rank 1 ", said), said


@scenario()
def a_run_that_was_suspended_as_a_whole_goes_on(tmp_path):
    """For longer than a request to the store may take at the start, and rank 0 before the others and after them."""
    with group(tmp_path, work, work, work, timeout=1.0) as ranks:
        ranks.wait_until_all_work()
        for number, order in ((signal.SIGSTOP, (0, 1, 2)), (signal.SIGCONT, (1, 2, 0))):
            for rank in order:
                ranks.signal(rank, number)
                time.sleep(0.2)
            time.sleep(6.0 if number == signal.SIGSTOP else 2.0)
        assert all(process.is_alive() for process in ranks.processes), [ranks.said(rank) for rank in range(SIZE)]


@scenario()
def without_progress_the_stacks_are_told_once_for_each_place(tmp_path):
    with group(tmp_path, stall, stall, stall_after=0.5) as ranks:
        codes, said, _ = ranks.end()
    assert codes == [0, 0]
    for rank, text in enumerate(said):
        assert len(re.findall(rf"vir-train: rank {rank} \(\S+\) at step 7: no progress for \d+ s; it goes on waiting, "
                              r"and these are the stacks of its threads:", text)) == 1, text
        assert text.count("no progress") == 1 and re.search(r'File ".*test_heartbeat.py", line \d+ in stall', text)


@scenario()
def alone_there_is_nobody_to_lose(tmp_path):
    with group(tmp_path, finish) as ranks:
        codes, said, seconds = ranks.end()
    assert codes == [0] and said == [""] and seconds < BOUND


@scenario()
def words_that_are_no_text(tmp_path):
    """A folder's name may be bytes that no encoding knows."""
    with group(tmp_path, work, in_a_folder_of_bytes) as ranks:
        ranks.end()
    assert ranks.processes[0].exitcode == 5 and re.search(r"ended with exit code 3, no such folder: /\\udcff\. Rank 0 ",
                                                          ranks.said(0)), ranks.said(0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_group_of_ranks(name, running):
    running[name].result()


class Link(HashStore):
    """A store behind a link on which each word waits as long as the next number says."""

    def __init__(self, *waits):
        super().__init__()
        self._waits = iter(waits)
        super().set("0", _NOTHING.decode())
        super().set("verdict", _NOTHING.decode())

    def set(self, key, value):
        time.sleep(next(self._waits))
        super().set(key, value)


@pytest.mark.parametrize("waits, least, most", [
    ((0.2, 0.2), 0, 0), ((0.2, 0.2, 0.2), 0.2, 5), ((0.0, 1.0, 0.0), 0, 0.9), ((0.0, 0.0, 0.2, 0.2), 0.2, 5)])
def test_a_link_is_slow_where_most_of_the_last_beats_have_waited(waits, least, most):
    heartbeat, store = Heartbeat(Place(1, 2, 1, "127.0.0.1", 0), TIMEOUT), Link(*waits)
    for _ in waits:
        heartbeat._beat(store)
    assert least <= heartbeat.round_trip <= most


def test_a_port_that_is_taken_is_told_on_one_line(monkeypatch, capsys, tmp_path):
    from vir.train import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        code = main(["--deepspeed_config", "zero2_fp32", "--output", str(tmp_path), "--data.train", "t", "--data.val",
                     "v"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vir-train")]
    assert code == 2 and len(said) == 1
    assert "rank 0 cannot serve on port" in said[0] and "give the launcher another --master_port" in said[0]


def test_a_process_ends_although_nobody_reads_what_it_says():
    program = ("import sys, threading, time\nfrom vir import cli\n"
               "threading.Timer(1, cli.end_now, [5]).start()\nwhile True: sys.stdout.write('x' * 1000)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT,
                          env=os.environ | {"PYTHONUNBUFFERED": ""}) as process:
        try:
            assert process.wait(60) == 5
        finally:
            process.kill()
