"""A real Slurm on this machine: munged, a controller and nodes, each with its own host name, processes and /dev/shm.

Everything is in one temporary folder, on free ports, and ends with the block, whatever its jobs have started: a node is
a process namespace. Nothing in /etc changes: the nodes see a hosts file of their own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.launchers import HANGS, ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
needs_slurm = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="needs root and slurm (apt-get install slurmctld slurmd slurm-client munge)")

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_OF_A_RUN = re.compile("(?:SLURM_|SBATCH_).*|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|PYTHONPATH")
"""Variables that jobs must not inherit."""
_SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
_NODE = """
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
hostname {name}
slurmd -D -N {name} &
wait  # as the first process of the node, it takes over those that jobs leave
"""


class Slurm:
    """Nodes sn0, sn1, …, of two CPUs each; jobs of the partition `high` send those of `low`, the default one, back.

    Args:
        grace: seconds that these have from the first signal to their end.
        kill_wait: seconds from SIGTERM to SIGKILL, at a time limit or at `scontrol requeue`.
    """

    def __init__(self, nodes: int = 2, grace: int = 60, kill_wait: int = 30):
        self.names = [f"sn{number}" for number in range(nodes)]
        self._grace, self._kill_wait = grace, kill_wait
        self._processes: list[subprocess.Popen] = []

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: names of sockets have at most 107 characters
        self.environment = {
            **{name: value for name, value in os.environ.items() if not _OF_A_RUN.fullmatch(name)},
            "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        try:
            self._write()
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        shutil.rmtree(self.folder)

    def _write(self):
        host = os.uname().nodename.partition(".")[0]
        nodes = "\n".join(f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 "
                          "RealMemory=100000 State=UNKNOWN" for name in self.names)
        (self.folder / "slurm.conf").write_text(_SETTINGS.format(
            host=host, port=free_port(), folder=self.folder, nodes=nodes, grace=self._grace,
            kill_wait=self._kill_wait))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.names)}\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "state").mkdir()
        for name in self.names:
            (self.folder / name).mkdir()

    def _start_all(self):
        munge = self.folder / "munge"
        self._start("munged", "--foreground", "--force", f"--socket={munge}.socket", f"--key-file={munge}.key",
                    f"--pid-file={munge}.pid", f"--log-file={munge}.log", f"--seed-file={munge}.seed")
        self.wait(lambda: Path(f"{munge}.socket").exists(), "munged")
        self._controller = self._start("slurmctld", "-D", "-c")
        for name in self.names:
            self._start("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c",
                        _NODE.format(folder=self.folder, name=name))
        idle = ["idle"] * len(self.names)
        states = "sinfo", "--noheader", "--Node", "--partition=low", "--format=%t"
        self.wait(lambda: self._ask(*states).split() == idle, "idle nodes")

    def _start(self, *command: str) -> subprocess.Popen:
        # Also where the tests themselves are killed: a node ends with its first process, and that with the tests.
        bound = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with (self.folder / "daemons.txt").open("a") as log:
            self._processes.append(subprocess.Popen(bound, env=self.environment, stdout=log, stderr=log,
                                                    stdin=subprocess.DEVNULL, start_new_session=True))
        return self._processes[-1]

    def wait(self, holds, what: str, seconds: float = 60):
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                pytest.fail(f"no {what} within {seconds} s\n{self._ask('scontrol', 'show', 'job')}\n{self._logs()}")
            time.sleep(0.05)

    def _logs(self) -> str:
        """The last of what the controller and the nodes have said."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")))

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def run(self, *command: str | Path, cwd: Path = ROOT) -> str:
        """What a command of Slurm says, which must not fail."""
        done = subprocess.run(list(map(str, command)), env=self.environment, capture_output=True, text=True, cwd=cwd,
                              timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path = ROOT) -> str:
        """Hand options of sbatch, a script and its arguments in; the number of the job."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, ExitCode, Restarts, Reason, …"""
        return dict(re.findall(r"(?<!\S)([\w:/]+)=(\S*)", self._ask("scontrol", "show", "--oneliner", "job", job)))

    def wait_state(self, job: str, *states: str, seconds: float = HANGS, restarts: int = 0) -> dict[str, str]:
        """Wait until the job is in one of the states, having been started again so often; what is known of it then."""
        def is_there() -> bool:
            known = self.job(job)
            state = known.get("JobState")
            if state in _ENDED - {*states}:
                pytest.fail(f"job {job} is {state} ({known['ExitCode']}):\n{self.output(job)[-6000:]}\n{self._logs()}")
            return state in states and int(known["Restarts"]) >= restarts

        self.wait(is_there, f"{'/'.join(states)} of job {job}", seconds)
        return self.job(job)

    def start_soon(self, job: str):
        """After a requeue Slurm lets a job wait for a while, so that its nodes are free of it.

        In the very second of the requeue a start is taken for the one that was just ended, and the job fails for good
        (`Job credential revoked`).
        """
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    @contextmanager
    def silent_controller(self):
        """The controller does not answer while the block runs."""
        os.killpg(self._controller.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._controller.pid, signal.SIGCONT)

    def output(self, job: str) -> str:
        """All that the job's script and its tasks have said so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""
