"""What a run came to, told by the first of its ranks that ends to the launch script that started it.

Launchers report an exit code as they like: torchrun 1 for any, pdsh the greatest of those of the nodes, deepspeed 0
after a launcher of its own that was killed. So the script names a file in the run folder, in VIR_STATUS, and the first
rank that ends writes why. Beside it the script leaves another one when it is asked to stop.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vir.errors import EXIT_STOPPED_BY_SIGNAL

FILE = "VIR_STATUS"
"""The variable that names the file; unset where no launch script waits for it."""
_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"
_RESTART = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Status:
    code: int
    """An exit code of docs/errors.md."""
    said: str
    """The line that the rank has ended with."""
    rank: int = 0
    host: str = ""
    restart: int = 0
    """How often torchrun's agent had started the ranks again."""
    of: int = 0
    """How often it would."""
    cause: int = 0
    """Why the run was stopped, by vir.cluster.signals: the number of a signal, or another one; 0 where it was not."""

    @property
    def goes_on(self) -> bool:
        """Whether torchrun's agent may start the ranks again: it stops them by SIGTERM when a machine joins."""
        if self.code == EXIT_STOPPED_BY_SIGNAL:
            return self.of > 0
        return self.code != 0 and self.restart < self.of


def write(code: int, said: str, cause: int = 0) -> None:
    """Leave it for the launch script, unless another rank has done so. Never raises: the rank ends anyway."""
    if not (named := os.environ.get(FILE)):
        return
    restart, of = (int(os.environ.get(name) or 0) for name in (_RESTART, _RESTARTS))
    found = Status(code, said, int(os.environ.get("RANK") or 0), socket.gethostname(), restart, of, cause)
    path = Path(f"{named}{_start()}")
    draft = path.with_name(f"{path.name}.rank-{found.rank}.draft")
    with suppress(OSError):
        draft.write_text(json.dumps(asdict(found)))
        try:
            os.link(draft, path)  # whole, and of one rank alone
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(draft, path)
        draft.unlink(missing_ok=True)


def is_awaited() -> bool:
    """Whether a launch script reads it, and not the exit code of this process."""
    return bool(os.environ.get(FILE))


def read(path: Path) -> Status | None:
    """That of the last start, where torchrun has started ranks again; None where no rank has written."""
    found, newest = None, -1
    for of_start in (path, *path.parent.glob(f"{path.name}.start-*[0-9]")):
        with suppress(OSError, ValueError, TypeError):
            if (written := of_start.stat().st_mtime_ns) > newest:
                found, newest = Status(**json.loads(of_start.read_text())), written
    return found


def stop_file(path: Path) -> Path:
    """Which the script leaves beside the status to ask this run, and no other in the folder, to stop."""
    return path.with_suffix(".stop")


def remove(path: Path) -> None:
    for left in path.parent.glob(f"{path.stem}.*"):
        with suppress(OSError):
            left.unlink()


def _start() -> str:
    """The end of the file's name: torchrun's agent starts its ranks again in the same environment, each time with
    another store. Its count stays as it is when another machine's agent was the cause."""
    return f".start-{os.environ.get('MASTER_PORT', '')}-{os.environ[_RESTART]}" if _RESTART in os.environ else ""
