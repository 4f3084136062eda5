"""Checks every byte of converted shards, and names what is damaged by shard, key and offset.

    vir-verify shards
    vir-verify shards/train --jobs 16
    vir-verify shards/train --repair imagenet

The exit code is 0 if all is sound, 3 if not, 130 after Ctrl-C. --repair writes damaged shards anew, byte for byte, from
the source that they were converted from, and a damaged index from the shards; then it checks again.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from vir import cli
from vir.data.damage import Finding
from vir.data.executors import Stopped
from vir.data.shards import count_of, read_manifest
from vir.data.verify import is_repairable, repair_split, split_folders, verify_split
from vir.errors import DataError, SettingsError, VirError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    code = 0
    try:
        for folder in split_folders(args.shards):
            try:
                is_sound = _check(folder, args.jobs, args.repair)
            except SettingsError:
                raise
            except VirError as error:  # the other splits are looked at all the same
                code = cli.tell(error, "vir-verify")
            else:
                code = code if is_sound else DataError.exit_code
    except VirError as error:
        return cli.tell(error, "vir-verify")
    except _StoppedBy as stop:
        print(f"vir-verify: stopped by {stop.signal.name}; no file was replaced in part", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DataError.exit_code
    return code


class _StoppedBy(Exception):
    """A signal ended the repair."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received)
        self.signal = received


def _check(folder: Path, jobs: int, source: Path | None) -> bool:
    """Whether the split is sound, after the repair where there is a source; tells what is not."""
    began = time.monotonic()
    findings = verify_split(folder, jobs=jobs)
    if findings and source is not None:
        _report(folder, findings, time.monotonic() - began, "")
        with cli.stop_requests() as received:  # the processes that write shards end before this one
            try:
                repair_split(folder, source, findings, jobs=jobs, is_stopping=lambda: bool(received))
            except Stopped as error:
                raise _StoppedBy(received[0]) from error
        began = time.monotonic()
        findings = verify_split(folder, jobs=jobs)
    hint = "; --repair SOURCE writes what can be mended anew" if source is None and is_repairable(folder, findings) \
        else ""
    _report(folder, findings, time.monotonic() - began, hint)
    return not findings


def _report(folder: Path, findings: list[Finding], seconds: float, hint: str) -> None:
    for finding in findings:
        print(f"{folder.name}/{finding}")
    print(_summary(folder, findings, seconds) + hint, flush=True)


def _summary(folder: Path, findings: list[Finding], seconds: float) -> str:
    if findings:
        files = len({finding.shard for finding in findings})
        return (f"{folder} is NOT SOUND: {len(findings):,} {'finding' if len(findings) == 1 else 'findings'} in "
                f"{files:,} {'file' if files == 1 else 'files'}")
    manifest = read_manifest(folder)
    size = sum(shard.bytes for shard in manifest.shards)
    line = (f"{folder} is sound: {manifest.num_samples:,} images in {count_of(len(manifest.shards))}, "
            f"{size / 1e6:,.1f} MB in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
    if unread := sum(shard.sha256 is None for shard in manifest.shards):
        line += (f"; the contents of {unread:,} of them were not checked, only their tar headers, because the manifest "
                 "has no checksums of them: vir-index --checksums makes some")
    return line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vir-verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", type=Path, help="folder of a split, or a folder of splits: then all of them")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=cores, help=f"threads, each with its own shard (default {cores}: one per core)")
    add("--repair", type=Path, metavar="SOURCE", help="what the shards were converted from: damaged ones are written "
                                                      "anew (an index alone needs none: give any folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
