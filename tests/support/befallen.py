"""vir.train, one rank of it, to which something happens at an exact place of its checkpoints.

usage: python -m support.befallen FAULT STEP RANK ARGUMENT ...   (a name of FAULTS; at the checkpoint of this step, in
this rank; arguments of vir.train)
"""

import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

from support.launchers import HANGS
from vir.checkpoints.names import LATEST, name_of
from vir.checkpoints.store import REMOVED

KEPT = 3
"""--checkpoint.keep of the runs that are killed."""
SLOW_S = 0.15
"""Each file of a slow disk."""
_HALF = 1_000_000
"""Bytes at which a file is about half there."""


@contextmanager
def happens(owner, name, do, when=lambda *_: True, after=False):
    """`do` comes before a call, or after it, of this function of a module or class with arguments for which `when`."""
    module, _, of = owner.partition(":")
    owner = import_module(module)
    owner = getattr(owner, of) if of else owner
    real = getattr(owner, name)

    def befallen(*args):
        if not after and when(*args):
            do(*args)
        result = real(*args)
        if after and when(*args):
            do(*args)
        return result

    with patch.object(owner, name, befallen):
        yield


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_within_removal(folder):
    next(folder.glob("*.pt")).unlink()
    kill()


def defect(*_):
    raise KeyError("of nobody")


def wish_a_save(stop, *_):
    stop.wish(["SAVE"])


def in_copy(step):
    """One of two files is copied."""
    return happens("vir.checkpoints.writer:Writer", "take", kill, lambda _, __, path: (
        path.parent.name == f"{name_of(step)}.part" and "optim" in path.name))


def in_write(step):
    """Half a file is written, and hashed."""
    return happens("vir.checkpoints.writer:_Hashing", "write", kill, lambda sink, _: (
        f"{name_of(step)}.part" in sink._file.name and sink.bytes > _HALF), after=True)


def before_publication(step):
    """All files are written."""
    return happens("vir.checkpoints.store", "publish", kill, lambda part, *_: part.name == f"{name_of(step)}.part")


def described(step):
    """The description is written, the folder has its temporary name."""
    return happens("vir.checkpoints.store", "replace_text", kill, lambda path, _: (
        path.parent.name == f"{name_of(step)}.part"), after=True)


def renamed(step):
    """The folder has its name, `latest` is the one before."""
    return happens("vir.checkpoints.store", "replace_text", kill, lambda path, text: (
        path.name == LATEST and text == name_of(step)))


def in_removal(step):
    """`latest` has moved, of the one that is superfluous now a file is gone."""
    return happens("vir.checkpoints.store", "_discard", kill_within_removal, lambda folder: (
        folder.name == name_of(step - KEPT) + REMOVED))


def defect_of_writer(step):
    return happens("vir.checkpoints.writer", "write_file", defect, lambda _, path, __: name_of(step) in str(path))


def shared_disk_hangs(step):
    """Copies on the nodes' own disks, whose folders have other names until they are complete, are made."""
    return happens("vir.checkpoints.writer", "write_file", lambda *_: time.sleep(HANGS), lambda _, path, __: (
        path.parent.name == f"{name_of(step)}.part"))


@contextmanager
def slow_disk_and_wishes(_):
    """Before each step somebody asks for a checkpoint."""
    slow = happens("vir.checkpoints.writer", "write_file", lambda *_: time.sleep(SLOW_S))
    with slow, happens("vir.cluster.signals:StopRequest", "agree", wish_a_save):
        yield


FAULTS = {fault.__name__: fault for fault in (
    in_copy, in_write, before_publication, described, renamed, in_removal, defect_of_writer,
    shared_disk_hangs, slow_disk_and_wishes)}

if __name__ == "__main__":
    from vir.train import command

    fault, step, rank, *sys.argv[1:] = sys.argv[1:]
    with ExitStack() as stack:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == rank:
            stack.enter_context(FAULTS[fault](int(step)))
        sys.exit(command())
