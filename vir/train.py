"""Train a vision backbone under DeepSpeed.

    deepspeed --module vir.train --config vir/recipes/vir_small_in1k.yaml \\
        --deepspeed_config ds_configs/zero2_bf16.json --data.train SHARDS/train --data.val SHARDS/val --output runs/a

The same module runs under `torchrun -m vir.train` and, on one device, `python -m vir.train`. The same command again
continues a run that was stopped. Exit codes: 0 done, 2 settings, 3 data, 4 not finite, 6 loss scale at its floor,
75 stopped by a signal after saving.
"""

from __future__ import annotations

import sys

from vir import cli
from vir.cluster.signals import StopRequest
from vir.config import parse
from vir.errors import EXIT_STOPPED_BY_SIGNAL, DataError, VirError


def main(argv: list[str] | None = None) -> int:
    stop = StopRequest()  # from here on a signal is not lost
    try:
        return _main(sys.argv[1:] if argv is None else argv, stop)
    finally:
        stop.close()


def _main(argv: list[str], stop: StopRequest) -> int:
    argv = [word for word in argv if not word.startswith("--local_rank=")]  # the deepspeed launcher adds it
    try:
        config = parse(argv)  # before torch is imported: a wrong flag is told at once
        from vir.training.prepare import prepare

        prepared = prepare(config)
    except VirError as error:  # every rank meets it
        return cli.tell(error, "vir.train", every_rank=False)
    from vir.training.run import run

    try:
        return run(prepared, stop)
    except VirError as error:  # damaged data may have been met by one rank alone, the rest by all of them
        return cli.tell(error, "vir.train", every_rank=isinstance(error, DataError))


def command() -> int:
    """main() as a program of its own: the process group ends with it."""
    code = main()
    if code in (0, EXIT_STOPPED_BY_SIGNAL):  # all ranks are here; after an error the others may be waiting elsewhere
        from vir import distributed

        distributed.stop()
    return code


if __name__ == "__main__":
    sys.exit(command())
