"""Train a vision backbone under DeepSpeed.

    deepspeed --module vir.train --config vir/recipes/vir_small_in1k.yaml \\
        --deepspeed_config ds_configs/zero2_bf16.json --data.train SHARDS/train --data.val SHARDS/val --output runs/a

The same module runs under `torchrun -m vir.train`, `srun python -m vir.train` and, on one device,
`python -m vir.train`. The same command again continues a run that was stopped. Exit codes: 0 done, 1 a defect, 2
settings, 3 data, 4 not finite, 5 another rank has failed or was lost, 6 loss scale at its floor, 75 stopped by a signal
after saving.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from vir import cli, launcher, status
from vir.cluster.signals import StopRequest
from vir.cluster.switches import Switches
from vir.config import TrainConfig, folder_of, trains
from vir.data.executors import Stopped
from vir.errors import EXIT_STOPPED_BY_SIGNAL, DataError, VirError
from vir.flags import PROGRAM, parse
from vir.launcher import Place
from vir.startup import StartupTimer, process_age

if TYPE_CHECKING:  # a wrong flag is told before torch is imported
    from vir.cluster.heartbeat import Heartbeat


def main(argv: list[str] | None = None) -> int:
    stop = StopRequest()  # from here on a signal is not lost
    try:
        return _main(sys.argv[1:] if argv is None else argv, stop, StartupTimer())
    finally:
        stop.close()


def _main(argv: list[str], stop: StopRequest, startup: StartupTimer) -> int:
    try:
        launcher.enter_folder()
        place = launcher.adopt()
    except VirError as error:
        status.write(error.exit_code, str(error))
        return cli.tell(error, PROGRAM)
    launcher.tell_of_missing_processes("vir.train")
    argv = [word for word in argv if not word.startswith("--local_rank=")]  # the deepspeed launcher adds it
    heartbeat, switches, at_the_door, code = None, None, True, 1
    try:
        config = parse(argv)  # before torch is imported: a wrong flag is told at once
        switches = Switches(place, folder_of(config) if trains(config) else None, stop)
        if launcher.wants_cpu(config.device):
            launcher.hide_gpus()
        heartbeat = _start_heartbeat(place, config.train.rank_timeout)
        with cli.importing():
            from vir.training.prepare import prepare

        startup.ended("imports")
        prepared = prepare(config, lambda: stop.asked)
        startup.ended("data")
        at_the_door = False
        with cli.importing():
            from vir.training.run import run

        startup.ended("imports")
        code = run(prepared, stop, heartbeat, startup)
        heartbeat.close()
        if code == 0:
            status.write(code, "done")
        else:
            status.write(code, f"stopped by {stop.cause} after saving", stop.number)
        return code
    except VirError as error:
        # At the door every rank meets it, later damaged data may have been met by one rank alone.
        code = cli.tell(error, PROGRAM, every_rank=not at_the_door and isinstance(error, DataError))
        status.write(code, str(error))
        if heartbeat is None and place.size > 1:  # the others may have other files, and wait for this rank
            with suppress(VirError):
                heartbeat = _start_heartbeat(place, TrainConfig().rank_timeout)
        if heartbeat is not None:
            heartbeat.failed(f"exit code {code}, {error}")
        return code
    except Stopped:
        stop.agree()
        said = f"stopped by {stop.cause} before the data was opened; the same command goes on"
        print(f"{PROGRAM}: {said}", file=sys.stderr)
        cli.report(said)
        code = EXIT_STOPPED_BY_SIGNAL
        status.write(code, said, stop.number)
        if heartbeat is not None:
            heartbeat.failed(f"exit code {code}, {said}")
        return code
    except Exception as error:
        if heartbeat is None:
            status.write(1, f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
        return _unforeseen(error, place, heartbeat)
    finally:
        if switches is not None:
            switches.close(heeded_stop=code == EXIT_STOPPED_BY_SIGNAL)


def _start_heartbeat(place: Place, timeout: float) -> Heartbeat:
    with cli.importing():
        from vir.cluster.heartbeat import Heartbeat

    heartbeat = Heartbeat(place, timeout)
    heartbeat.start()
    return heartbeat


def _unforeseen(error: Exception, place: Place, heartbeat: Heartbeat) -> int:
    """An error that no code of ours raises: another rank is lost, or there is a defect."""
    from vir import distributed

    where = heartbeat.where()
    if distributed.is_of_a_collective(error):
        heartbeat.wait_for_verdict()
    traceback.print_exception(error)
    said = f"rank {place.rank} {where}: {type(error).__name__}: {' '.join(str(error).split())}"
    print(f"{PROGRAM}: {said}", file=sys.stderr)
    cli.report(f"{PROGRAM}: {said}")
    status.write(1, said)
    heartbeat.failed(f"exit code 1, {said}")
    return 1


def command() -> int:
    """main() as a program of its own: the process group ends with it, and signals are heeded until the very end."""
    end = cli.QuickEnd()
    code = _main(sys.argv[1:], StopRequest(), StartupTimer(process_age()))
    if code not in (0, EXIT_STOPPED_BY_SIGNAL):
        cli.end_now(code)  # the other ranks may be waiting elsewhere, and a group ends by all of them
    from vir import distributed

    distributed.stop()
    # Launchers would kill the other ranks, or start all again; the script ends with what the status says.
    end.code = 0 if status.is_awaited() else code
    return end.code


if __name__ == "__main__":
    sys.exit(command())
