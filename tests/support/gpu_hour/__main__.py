"""The first hour on a GPU: steps in order of value, each bounded, each result kept; the same command goes on with the
steps that are not done. Started by tests/gpu.sh."""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25, help="that there are (default 25)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"),
                        help="folder for gpu.json, gpu.md, logs, runs and traces (default runs/gpu)")
    parser.add_argument("--rehearse", action="store_true", help="every step on CPU, at the smallest size")
    args = parser.parse_args()
    folder = args.output.resolve()
    earlier = _earlier(folder / "gpu.json")
    if folder.exists() and any(folder.iterdir()) and (not earlier or earlier["rehearsal"] != args.rehearse):
        parser.error(f"--output {folder} is not empty and has no gpu.json of "
                     f"{'a rehearsal' if args.rehearse else 'such an hour'}; give another folder")
    if not args.rehearse and (problem := _no_gpu()):
        parser.error(problem)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the step that runs
    if args.rehearse:
        _preload()

    from support.gpu_hour import driver
    from support.gpu_hour.page import page
    from support.gpu_hour.steps import FULL, REHEARSAL, Hour
    from vir.files import replace_text

    def report(outcomes: list[driver.Outcome]) -> None:
        replace_text(folder / "gpu.json", json.dumps({
            "rehearsal": args.rehearse, "minutes": args.minutes, "steps": [asdict(one) for one in outcomes]}, indent=1))
        replace_text(folder / "gpu.md", page(outcomes))

    folder.mkdir(parents=True, exist_ok=True)
    steps = Hour(folder, REHEARSAL if args.rehearse else FULL).steps()
    before = [driver.Outcome(**one) for one in earlier.get("steps", ())]
    report(before)  # the folder is ours from now on
    outcomes = driver.run(steps, folder, 60 * args.minutes, report, before, preloaded=args.rehearse)
    print(f"\nresults: {folder / 'gpu.md'}, {folder / 'gpu.json'}")
    return int(any(outcome.ended != "done" for outcome in outcomes))


def _earlier(file: Path) -> dict[str, Any]:
    """What an earlier call has left; nothing where there was none."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _no_gpu() -> str | None:
    """Why there is no GPU to compute on; None where there is one."""
    import torch

    from vir.distributed import check_driver
    from vir.errors import SettingsError

    try:
        check_driver()
    except SettingsError as error:
        return str(error)
    return None if torch.cuda.is_available() else "no CUDA device: give --rehearse"


def _preload() -> None:
    """Import once, on CPU, what tiny steps would take most of their time to import."""
    # One thread is quicker for what is tiny, and compiling C++ would take longer than all the rest.
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  and with it torch's compiler
    import matplotlib.pyplot  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    import vir.training.run  # noqa: F401

    get_accelerator().is_fp16_supported = lambda: True  # it computes, and scales the loss, as on a GPU


if __name__ == "__main__":
    sys.exit(main())
