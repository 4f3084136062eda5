"""launch/torchrun.sh: the command it makes, the node ranges it refuses, and two real agents on this machine."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch

from support.faults import ranks_of
from support.launchers import HANGS, ROOT, free_port
from support.tiny_runs import command as tiny
from support.tiny_runs import steps_done, train_events, weights
from vir import launch, status
from vir.checkpoints.names import newest
from vir.cluster import torchrun
from vir.config import TrainConfig
from vir.errors import SettingsError

STEPS, EVERY = 48, 8
THREADS = "2"
"""Of each rank. A 1 is also what torchrun writes by itself, and then each rank takes its share of the cores: half of
them under one agent, all under one of two, which think that each has the machine; sums round otherwise."""


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    torchrun.add_options(parser)
    parser.add_argument("--max-restarts", default=0)
    return parser.parse_args(words)


def test_one_machine_needs_no_meeting_place():
    assert torchrun.command(options(), range(1, 2), 8, ["--train.steps", "1"]) == [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:1", "--nproc_per_node", "8", "--max_restarts",
        "0", "--standalone", "-m", "vir.train", "--train.steps", "1"]


@pytest.mark.parametrize("said, meant", [
    ("node1", "node1:29400"), ("node1:7", "node1:7"), ("[fe80::1]", "[fe80::1]:29400"), ("[fe80::1]:7", "[fe80::1]:7")])
def test_machines_meet_where_they_are_told(said, meant):
    given = options("--rdzv_endpoint", said, "--rdzv-id", "a", "--local_addr", "10.0.0.1", "--max-restarts", "3")
    words = torchrun.command(given, range(2, 5), 1, [])
    assert words[3:-2] == ["--nnodes", "2:4", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_backend", "c10d",
                           "--rdzv_endpoint", meant, "--rdzv_id", "a", "--local_addr", "10.0.0.1"]


def test_several_machines_without_a_meeting_place_are_refused():
    with pytest.raises(SettingsError, match=r"--nnodes 2:4 needs --rdzv_endpoint HOST\[:PORT\]"):
        torchrun.command(options(), range(2, 5), 1, [])


@pytest.mark.parametrize("said, nodes", [("1", [1]), ("2:4", [2, 3, 4]), ("3:3", [3])])
def test_a_range_of_machines(said, nodes):
    assert list(torchrun.node_range(said)) == nodes


@pytest.mark.parametrize("said, message", [
    ("0", "--nnodes is '0'; it must be a number from 1 on, or a range as 2:4"), ("x", "is 'x'"), ("2:", "is ''"),
    ("4:2", "--nnodes is 4:2; a range begins with its smaller number: 2:4")])
def test_what_is_no_range_is_refused(said, message):
    with pytest.raises(SettingsError, match=message):
        torchrun.node_range(said)


@pytest.mark.parametrize("nodes, per_node, refused, fit", [
    (range(1, 3), 2, "", ""), (range(2, 5), 2, "6, 8", "1:2"), (range(3, 4), 1, "3", "1:2, 4"),
    (range(1, 2), 5, "5", "lower --train.micro_batch_size or --nproc_per_node")])
def test_every_world_of_a_range_divides_the_batch(nodes, per_node, refused, fit):
    """Of 48 in micro-batches of 12, so 1, 2 or 4 ranks."""
    train = TrainConfig(global_batch_size=48, micro_batch_size=12)
    if not refused:
        torchrun.check_worlds(nodes, per_node, train)
        return
    with pytest.raises(SettingsError) as error:
        torchrun.check_worlds(nodes, per_node, train)
    assert f"allows for worlds of {refused} ranks" in str(error.value) and str(error.value).endswith(fit)


@pytest.mark.parametrize("said, gpus, ranks", [("", 8, 8), ("", 0, 1), ("gpu", 4, 4), ("auto", 4, 4), ("3", 8, 3),
                                               ("auto", 0, os.cpu_count()), ("cpu", 4, os.cpu_count())])
def test_ranks_of_a_machine(said, gpus, ranks):
    assert torchrun.ranks_per_node(said, gpus) == ranks


@pytest.mark.parametrize("said, message", [("gpu", "sees no GPU here"), ("xpu", "is 'xpu'; it must be a number, gpu"),
                                           ("0", "a number from 1 on")])
def test_what_is_no_number_of_ranks_is_refused(said, message):
    with pytest.raises(SettingsError, match=message):
        torchrun.ranks_per_node(said, 0)


def test_a_port_that_something_else_has_is_refused(monkeypatch):
    """torchrun itself would wait for its word for minutes."""
    monkeypatch.setattr(torchrun, "_ANSWERS_WITHIN_S", 1)
    monkeypatch.setattr(torchrun, "_IMPORTS_S", 9)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"127.0.0.1:{port}: what answers at port {port} is no agent"):
            torchrun.check_endpoint(f"127.0.0.1:{port}")


def test_where_nobody_or_an_agents_store_answers_all_is_well():
    torchrun.check_endpoint(f"127.0.0.1:{free_port()}")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun.check_endpoint(f"127.0.0.1:{store.port}")


def test_a_range_that_does_not_divide_ends_before_anything_starts(tmp_path, capsys):
    words = ["torchrun", "--nnodes", "1:3", "--nproc_per_node", "1", "--rdzv_endpoint", "localhost",
             "--data.train", "x", "--output", str(tmp_path / "run"), "--train.global_batch_size", "48",
             "--train.micro_batch_size", "12"]
    assert launch.main(words) == 2
    assert "--nnodes may be 1:2, 4" in capsys.readouterr().err and not (tmp_path / "run").exists()


class Scripts:
    """Launch scripts in one run folder, all gone in the end."""

    def __init__(self, run, logs):
        self._run, self._logs, self.processes, self.began = run, logs, [], time.time()

    def start(self, *words):
        log = self._logs / f"script-{len(self.processes)}.txt"
        with log.open("w") as file:
            self.processes.append(subprocess.Popen(
                ["bash", ROOT / "launch" / "torchrun.sh", *map(str, words)], cwd=self._logs, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": THREADS}))

    def said(self):
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self._logs.glob("script-*.txt")))

    def wait_until(self, holds, what):
        until = time.monotonic() + HANGS
        while not holds():
            ended = [process.poll() for process in self.processes]
            assert time.monotonic() < until and ended == [None] * len(ended), f"{what}: {ended}\n{self.said()}"
            time.sleep(0.01)

    def steps(self):
        """Those done since the last start that the log tells of."""
        return steps_done(self._run, self.began)

    def codes(self):
        return [process.wait(timeout=HANGS) for process in self.processes]

    def end(self):
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(status.FILE, "").startswith(str(self._run)):
                    process.kill()
        for process in self.processes:
            process.kill()
            process.wait(timeout=30)


@contextmanager
def two_agents(run, logs, *words):
    """The same command twice, as on two machines."""
    logs.mkdir()
    scripts, port = Scripts(run, logs), free_port()
    try:
        for _ in range(2):
            scripts.start("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", f"localhost:{port}",
                          "--local_addr", "127.0.0.1", *words)
        yield scripts
    finally:
        scripts.end()


@pytest.mark.launcher
@pytest.mark.timeout(3 * HANGS)
def test_two_agents_with_a_rank_killed_and_a_stop_end_with_the_bits_of_one_undisturbed_agent(shards, tmp_path):
    """The killed rank is started again by --max-restarts, a SIGTERM to one of the scripts stops both after saving, and
    the same command goes on."""
    def words(run):
        return tiny(shards, run, "zero2_fp32", steps=STEPS, every=EVERY)

    (tmp_path / "one").mkdir()
    alone = Scripts(tmp_path / "alone", tmp_path / "one")
    try:
        alone.start("--nproc_per_node", "2", *words(tmp_path / "alone"))
        assert alone.codes() == [0], alone.said()
    finally:
        alone.end()

    run = tmp_path / "a run"
    with two_agents(run, tmp_path / "first", "--max-restarts", "1", *words(run)) as scripts:
        scripts.wait_until(lambda: newest(run) and any(step > EVERY for step in scripts.steps()),
                           "steps after a checkpoint")
        (rank,) = ranks_of(psutil.Process(scripts.processes[1].pid))
        scripts.began = time.time()
        rank.kill()
        scripts.wait_until(scripts.steps, "a step after the rank was started again")
        assert min(scripts.steps()) % EVERY == 1 and min(scripts.steps()) > EVERY
        scripts.processes[0].send_signal(signal.SIGTERM)
        assert scripts.codes() == [75, 75], scripts.said()
        assert scripts.said().count("exit code 75, told by rank") == 2
    with two_agents(run, tmp_path / "second", "--max-restarts", "1", *words(run)) as scripts:
        assert scripts.codes() == [0, 0], scripts.said()
    assert not list(run.glob(".status*"))

    undisturbed = {event["step"]: event["loss"] for event in train_events(tmp_path / "alone")}
    assert {event["step"]: event["loss"] for event in train_events(run)} == undisturbed
    assert len(undisturbed) == STEPS
    expected, found = (weights(folder, STEPS, tmp_path) for folder in (tmp_path / "alone", run))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
