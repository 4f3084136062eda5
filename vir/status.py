"""What a run came to, told by the first of its ranks that ends to the launch script that started it.

Launchers report an exit code as they like: torchrun 1 for any, pdsh the greatest of those of the nodes, deepspeed 0
after a launcher of its own that was killed. So the script names a file in the run folder, in VIR_STATUS, and the first
rank that ends writes why.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "VIR_STATUS"
"""The variable that names the file; unset where no launch script waits for it."""


@dataclass(frozen=True)
class Status:
    code: int
    """An exit code of docs/errors.md."""
    said: str
    """The line that the rank has ended with."""
    rank: int = 0
    host: str = ""


def write(code: int, said: str) -> None:
    """Leave it for the launch script, unless another rank has done so. Never raises: the rank ends anyway."""
    if (path := _path()) is None:
        return
    status = Status(code, said, int(os.environ.get("RANK") or 0), socket.gethostname())
    draft = path.with_name(f"{path.name}-{status.rank}")
    with suppress(OSError):
        draft.write_text(json.dumps(asdict(status)))
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
    return FILE in os.environ


def _path() -> Path | None:
    """torchrun's agent starts its ranks again in the same environment: each time another file."""
    if not (named := os.environ.get(FILE)):
        return None
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Path(named if again == "0" else f"{named}.{again}")


def take(path: Path) -> Status | None:
    """Read and remove it, the last one where ranks were started again in place; None where no rank has written."""
    found = None
    for attempt in sorted(path.parent.glob(f"{path.name}*"), key=_attempt):
        with suppress(OSError, ValueError, TypeError):
            if attempt.suffix[1:].isdigit() or attempt == path:
                found = Status(**json.loads(attempt.read_text()))
        with suppress(OSError):
            attempt.unlink()
    return found


def _attempt(path: Path) -> int:
    return int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0
