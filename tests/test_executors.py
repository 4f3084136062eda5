"""Tasks in processes of this machine, on a real dask cluster and in jobs that submitit runs here."""

import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from support import chores
from support.faults import members
from support.waiting import HANGS, wait_for
from vir.data import executors
from vir.data.convert import Settings, convert
from vir.data.executors import Stopped, check_executor, run_tasks
from vir.errors import DataError, SettingsError, VirError

TESTS = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(
    [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}


def never():
    return False


def local(function, tasks, workers=2, stop_asked=never):
    return run_tasks("local", function, tasks, workers, stop_asked, Path("unused"))


def processes(folder):
    return [int(name) for name in os.listdir(folder)]


def check_gone(folder, count):
    """The processes that `count` tasks or more have named in the folder have ended."""
    assert len(processes(folder)) >= count
    wait_for(lambda: not any(map(psutil.pid_exists, processes(folder))), "the end of the processes")


@pytest.mark.parametrize("spec", ["", "ray", "Local", "dask", "dask://", "dask://node1", "dask://node1:port",
                                  "dask://node1:99999", "dask://:8786", "dask://me@node1:8786", "dask://node1:8786/x",
                                  "tcp://node1:8786"])
def test_another_executor_is_refused(spec):
    with pytest.raises(SettingsError, match=f"^--executor must be .*dask://HOST:PORT.*, got {spec!r}$"):
        check_executor(spec)


@pytest.mark.parametrize("package, spec, extra", [("distributed", "dask://node1:8786", "dask"),
                                                  ("submitit", "slurm", "slurm")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, spec, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=rf"--executor {spec} needs the package {package} .*"
                                            rf"; pip install 'vir-at-scale\[{extra}\]'"):
        next(run_tasks(spec, chores.double, [1], 1, never, Path("unused")))


# ---- processes of this machine


@pytest.mark.parametrize("workers", [1, 3])
def test_each_task_gives_its_result_once(workers):
    assert sorted(local(chores.double, range(20), workers)) == [(number, 2 * number) for number in range(20)]


def test_no_tasks_are_no_work():
    assert list(local(chores.double, [])) == []


def check_that_results_come_as_the_tasks_end(results, folder):
    assert next(results) == (1, "second")
    (folder / "seen").touch()
    assert list(results) == [(0, "first")]


def test_results_come_as_the_tasks_end(tmp_path):
    check_that_results_come_as_the_tasks_end(local(chores.in_turn, [tmp_path / "first", tmp_path / "second"]), tmp_path)


def test_few_tasks_are_handed_over_at_a_time():
    class Tasks(list):
        taken = 0

        def __getitem__(self, part):
            self.taken += 1
            return super().__getitem__(part)

    tasks = Tasks(range(100))
    results = local(chores.double, tasks, workers=2)
    for read in range(1, 11):
        next(results)
        assert read <= tasks.taken <= 4 + read
    results.close()


def test_the_first_exception_ends_the_work(tmp_path):
    with pytest.raises(DataError, match="^image 3: the file is empty$"):
        list(local(chores.fail_third, [(number, tmp_path) for number in (1, 3)]))
    check_gone(tmp_path, 1)


def test_stopping_ends_tasks_and_processes_at_once(tmp_path):
    asked = []

    def stop_asked():
        if len(processes(tmp_path)) == 2:
            asked.append(time.monotonic())
        return bool(asked)

    with pytest.raises(Stopped):
        list(local(chores.obey, [tmp_path] * 9, stop_asked=stop_asked))
    assert time.monotonic() - asked[0] < 30  # a tenth of a second where nothing else runs
    check_gone(tmp_path, 2)


def test_a_reader_who_turns_away_ends_tasks_and_processes(tmp_path):
    results = local(chores.first_of, [tmp_path, None])
    assert next(results) == (1, None)
    wait_for(lambda: processes(tmp_path), "the other task")
    results.close()
    check_gone(tmp_path, 1)


def test_outside_of_workers_nobody_is_told_to_stop():
    assert executors.stopping() is False


def test_a_killed_worker_is_told(tmp_path):
    with pytest.raises(VirError, match="^a worker process died, perhaps out of memory; try fewer --workers$"):
        list(local(chores.die, range(5)))


@pytest.mark.parametrize("number, to_all", [(signal.SIGKILL, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_leaves_no_process(tmp_path, number, to_all):
    """A kill of the main process alone; SIGTERM to all, as a batch system does: that is no death of a worker; Ctrl-C.
    """
    main = subprocess.Popen([sys.executable, "-m", "support.chores", tmp_path], env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: len(processes(tmp_path)) == 2, "two workers")
    (os.killpg if to_all else os.kill)(main.pid, number)
    output, errors = main.communicate(timeout=HANGS)  # ends when all who hold the pipes have ended
    wait_for(lambda: not members(main.pid), "the end of the session")
    assert (main.returncode, output) == ((0, "stopped\n") if to_all else (-signal.SIGKILL, ""))
    assert "Traceback" not in errors


# ---- dask


class Cluster:
    """A dask scheduler and its workers, each a command; gone when the block ends."""

    def __init__(self, folder, **environment):
        self._folder, self.workers = folder, []
        self._environment = {**ENVIRONMENT, "DASK_TEMPORARY_DIRECTORY": str(folder), **environment}
        folder.mkdir()
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                                     "--scheduler-file", folder / "address.json")
        wait_for((folder / "address.json").exists, "the scheduler")
        wait_for((folder / "address.json").read_text, "its address")
        self.address = json.loads((folder / "address.json").read_text())["address"]
        self.spec = self.address.replace("tcp", "dask")

    def _start(self, kind, *arguments):
        with (self._folder / f"{kind}.txt").open("a") as log:
            return subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{kind}", *map(str, arguments)],
                                    env=self._environment, cwd=self._folder, stdout=log, stderr=log)

    def add_workers(self, count):
        for _ in range(count):
            self.workers.append(self._start("worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard"))

    def run(self, function, tasks, stop_asked=never):
        return run_tasks(self.spec, function, tasks, 2, stop_asked, Path("unused"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("distributed", reason="needs the extra dask")
    with Cluster(tmp_path_factory.mktemp("dask") / "two") as cluster:
        cluster.add_workers(2)
        yield cluster


def test_dask_gives_the_same_results(cluster, tmp_path):
    assert sorted(cluster.run(chores.double, range(20))) == [(number, 2 * number) for number in range(20)]
    pids = {pid for _, pid in cluster.run(chores.process, range(20))}
    assert pids <= {worker.pid for worker in cluster.workers}
    check_that_results_come_as_the_tasks_end(cluster.run(chores.in_turn, [tmp_path / "first", tmp_path / "second"]),
                                             tmp_path)


@pytest.fixture()
def images(tmp_path):
    """A source of 12 images, and the shards that processes of this machine make of it."""
    for number in range(12):
        path = tmp_path / f"src/train/{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 8)).save(path)
    convert(tmp_path / "src", "train", tmp_path / "local", Settings(samples_per_shard=2), workers=1)
    return tmp_path / "src", contents(tmp_path / "local/train")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_conversion_on_dask_writes_the_same_bytes(cluster, images, tmp_path):
    source, expected = images
    convert(source, "train", tmp_path / "dask", Settings(samples_per_shard=2), workers=2, executor=cluster.spec)
    assert contents(tmp_path / "dask/train") == expected


def test_a_conversion_in_slurm_jobs_writes_the_same_bytes(run_jobs, images, tmp_path):
    source, expected = images
    convert(source, "train", tmp_path / "slurm", Settings(samples_per_shard=2), workers=2, executor="slurm")
    assert contents(tmp_path / "slurm/train") == expected and os.listdir(tmp_path / "slurm") == ["train"]


def test_the_first_exception_on_dask_is_the_tasks_own(cluster, tmp_path):
    (tmp_path / "another").touch()
    with pytest.raises(DataError, match="^image 3: the file is empty$"):
        list(cluster.run(chores.fail_third, [(3, tmp_path)]))
    with pytest.raises(ValueError, match="a mistake of the program: 5"):
        list(cluster.run(chores.err, [5]))


def test_dask_workers_that_lack_the_code_are_told(cluster, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def work(number):\n    return number\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(VirError, match="cannot import what it is to run .*only_here.*install vir-at-scale"):
        list(cluster.run(only_here.work, [1]))


def test_dask_runs_the_task_of_a_lost_worker_again(cluster, tmp_path):
    [(_, pid)] = cluster.run(chores.die_once, [tmp_path / "died"])
    wait_for(lambda: any(worker.poll() is not None for worker in cluster.workers), "the death of a worker")
    assert pid in {worker.pid for worker in cluster.workers if worker.poll() is None}


def test_a_task_that_kills_all_dask_workers_is_told(tmp_path):
    pytest.importorskip("distributed", reason="needs the extra dask")
    with Cluster(tmp_path / "dask", DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as cluster:
        cluster.add_workers(1)
        with pytest.raises(VirError, match="the dask workers at 127.0.0.1:.* died, perhaps out of memory: .*"):
            list(cluster.run(chores.die, [1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_lost_dask_scheduler_and_one_without_workers_are_told(tmp_path, caplog, monkeypatch, number):
    pytest.importorskip("distributed", reason="needs the extra dask")
    monkeypatch.setattr(logging.getLogger("distributed.client"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("distributed.client"), "level", logging.WARNING)
    with Cluster(tmp_path / "dask") as cluster, caplog.at_level(logging.WARNING, "vir"):
        with pytest.raises(Stopped):
            list(cluster.run(chores.double, range(9), stop_asked=lambda: True))
        warning = f"the dask scheduler at {cluster.address[6:]} has no workers yet; waiting for some"
        assert caplog.messages == [warning]

        def lose():
            cluster.scheduler.send_signal(number)

        began = time.monotonic()
        with pytest.raises(VirError, match=f"^lost the dask scheduler at {cluster.address[6:]}; start it again"):
            list(cluster.run(chores.double, range(9), stop_asked=lose))
        assert time.monotonic() - began < 20
        assert caplog.messages == [warning] * 2  # and nothing of dask's


@pytest.mark.parametrize("host, reason", [("no-such-host.invalid", ".*"), ("a..b", ".*label.*")])
def test_a_dask_scheduler_without_an_address_is_told(host, reason):
    pytest.importorskip("distributed", reason="needs the extra dask")
    with pytest.raises(SettingsError, match=rf"no dask scheduler .* host {host}, port 8786 \({reason}\); start"):
        check_executor(f"dask://{host}:8786")


@pytest.mark.parametrize("listens", [False, True], ids=["nobody", "another server"])
def test_a_dask_scheduler_that_does_not_answer_is_told_in_time(monkeypatch, listens):
    pytest.importorskip("distributed", reason="needs the extra dask")
    monkeypatch.setattr(executors, "_PATIENCE", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        port = server.getsockname()[1]
        reason = "timed out" if listens else "Connection refused"
        with pytest.raises(SettingsError, match=rf"no dask scheduler answers on host 127.0.0.1, port {port} "
                                                rf"\({reason}\); start one with `dask scheduler`"):
            check_executor(f"dask://127.0.0.1:{port}")


# ---- Slurm


@pytest.fixture()
def commands(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, first in PATH. They write down what they are told, and run nothing."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, does in (("sbatch", "cat $1 >> submitted; echo Submitted batch job 7"), ("srun", ""), ("sacct", ""),
                       ("scancel", "echo $* >> cancelled")):
        (folder / name).write_text(f"#!/bin/sh\ncd {folder}\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    pytest.importorskip("submitit", reason="needs the extra slurm")
    return folder


@pytest.fixture()
def run_jobs(commands, tmp_path, monkeypatch):
    """run_tasks in submitit's own local jobs, looked for often."""
    monkeypatch.setattr(executors, "_SLURM_POLL", 0.05)
    monkeypatch.setattr(executors, "_open_slurm", functools.partial(executors._open_slurm, cluster="local"))
    return lambda function, tasks, stop_asked=never: run_tasks("slurm", function, tasks, 2, stop_asked,
                                                               tmp_path / "jobs")


def test_without_slurm_its_commands_are_named(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="--executor slurm needs Slurm's sbatch, srun, sacct, scancel, not found"):
        check_executor("slurm")


def test_slurm_jobs_share_the_tasks_and_leave_nothing(run_jobs, tmp_path):
    results = dict(run_jobs(chores.process, range(7)))
    assert sorted(results) == list(range(7))
    assert len(set(results.values())) == 2 and len({results[number] for number in range(4)}) == 1
    assert not (tmp_path / "jobs").exists()


def test_a_failed_slurm_job_ends_the_others_and_keeps_the_logs(run_jobs, tmp_path):
    (tmp_path / "works").mkdir()
    with pytest.raises(DataError, match="^image 3: the file is empty$"):
        list(run_jobs(chores.fail_third, [(number, tmp_path / "works") for number in (1, 3)]))
    check_gone(tmp_path / "works", 1)
    assert list((tmp_path / "jobs").glob("*_log.err"))


def test_a_mistake_in_a_slurm_job_is_told_with_its_trace(run_jobs):
    with pytest.raises(VirError, match=r"(?s)Slurm job \d+ failed: .*in err\n.*a mistake of the program: 5"):
        list(run_jobs(chores.err, [5]))


def test_a_killed_slurm_job_is_told(run_jobs, monkeypatch):
    from submitit.core import core

    monkeypatch.setattr(core.Job, "_results_timeout_s", 0)  # that a file may need to be seen by other machines
    with pytest.raises(VirError, match=r"(?s)Slurm job \d+ failed: .*has not produced any output"):
        list(run_jobs(chores.die, [5]))


def test_slurm_is_asked_for_jobs_and_to_cancel_them(commands, tmp_path):
    with pytest.raises(Stopped):
        list(run_tasks("slurm", chores.double, range(8), 2, lambda: True, tmp_path / "jobs"))
    submitted = (commands / "submitted").read_text()
    assert submitted.count("#SBATCH --time=240\n") == submitted.count("#SBATCH --job-name=vir-convert\n") == 2
    assert submitted.count("#SBATCH --time") == 2
    assert (commands / "cancelled").read_text() == "7\n7\n"


def test_what_slurm_says_to_a_job_it_refuses_is_told(commands, tmp_path):
    (commands / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: gpu >&2; exit 1\n")
    with pytest.raises(VirError, match="^Slurm takes no job .*: sbatch: error: invalid partition specified: gpu$"):
        list(run_tasks("slurm", chores.double, range(8), 2, never, tmp_path / "jobs"))
