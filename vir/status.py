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
_RESERVED_BYTES = 1 << 16
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
    rank, restart, of = map(_number, ("RANK", _RESTART, _RESTARTS))
    text = json.dumps(asdict(Status(code, said, rank, socket.gethostname(), restart, of, cause)))
    path = Path(f"{named}{_start()}")
    for give_way in (False, True):
        with suppress(OSError):
            if give_way:
                _reserve(Path(named)).unlink(missing_ok=True)  # another rank may have needed it
            _publish(text, path, path.with_name(f"{path.name}.rank-{rank}.draft"))
            return


def _publish(text: str, path: Path, draft: Path) -> None:
    try:
        draft.write_text(text)
        try:
            os.link(draft, path)  # whole, and of one rank alone
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _number(variable: str) -> int:
    said = os.environ.get(variable, "")
    return int(said) if said.isdigit() else 0


def is_awaited() -> bool:
    """Whether a launch script reads it, and not the exit code of this process."""
    return bool(os.environ.get(FILE))


def read(path: Path) -> Status | None:
    """That of the last start, where torchrun has started ranks again; None where no rank has written."""
    found, newest, of_starts = None, -1, [path]
    with suppress(OSError):  # a disk that does not answer for a moment
        of_starts += path.parent.glob(f"{path.name}.start-*[0-9]")
    for of_start in of_starts:
        with suppress(OSError, ValueError, TypeError):
            if (written := of_start.stat().st_mtime_ns) > newest:
                found, newest = Status(**json.loads(of_start.read_text())), written
    return found


def make_room(path: Path) -> None:
    """For the script, before a start: what is to be written must fit also on a disk that is full by then.

    Raises:
        OSError: the folder cannot be written to.
    """
    _reserve(path).write_bytes(bytes(_RESERVED_BYTES))
    _stop_file(path).write_text("0")


def ask_to_stop(path: Path, number: int) -> None:
    """For the script: ask this run, and no other in the folder, to stop, as after a signal of that number."""
    with _stop_file(path).open("r+") as file:  # in place
        file.write(str(number))


def asked_to_stop(path: Path) -> int:
    """The number of the signal for which the script asks to stop; 0 while it does not."""
    try:
        return int(_stop_file(path).read_text())
    except (OSError, ValueError):
        return 0


def _stop_file(path: Path) -> Path:
    return path.with_suffix(".stop")


def _reserve(path: Path) -> Path:
    return path.with_suffix(".reserve")


def remove(path: Path) -> None:
    for left in path.parent.glob(f"{path.stem}.*"):
        with suppress(OSError):
            left.unlink()


def _start() -> str:
    """The end of the file's name: torchrun's agent starts its ranks again in the same environment, each time with
    another store. Its count stays as it is when another machine's agent was the cause."""
    return f".start-{os.environ.get('MASTER_PORT', '')}-{os.environ[_RESTART]}" if _RESTART in os.environ else ""
