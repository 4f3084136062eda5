"""The second copy of the newest checkpoint, on the nodes' own disks.

DIR/NAME-ID/node-0/step-00001000/ has the files of that node's ranks and those of the next node's, so that each file is
on two nodes, checkpoint.json, which lists the files of all ranks, and local.json. NAME is that of the run folder; ID is
in RUN/checkpoints/local-id: a folder that was removed and is begun anew finds nothing of old.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from vir import distributed, launcher
from vir.checkpoints import recovery
from vir.checkpoints.exchange import Exchange
from vir.checkpoints.info import DESCRIPTION, CheckpointInfo
from vir.checkpoints.names import STEPS, name_of, newest
from vir.checkpoints.recovery import LOCAL, NODES
from vir.checkpoints.writer import Work, Writer, Written, do, done
from vir.distributed import World
from vir.errors import CheckpointError, SettingsError
from vir.files import flush, refused, replace_text, try_to_write
from vir.log import log
from vir.run_folder import CHECKPOINTS

ID = "local-id"


class LocalCopies:
    """Keeps the newest checkpoint of a run on each node's own disk, and brings it back. Collective.

    Args:
        folder: on that disk, at the same path on every node.
        run: the run folder.

    Raises:
        SettingsError: it cannot be written to on one of the nodes, or nodes have different numbers of ranks.
    """

    def __init__(self, folder: Path, run: Path, world: World) -> None:
        self._asked, self._run, self._world = folder, run, world
        self._nodes = nodes_of(distributed.gather((socket.gethostname(), launcher.local_size())))
        same = [[rank for rank, node in enumerate(self._nodes) if node == of] for of in range(max(self._nodes) + 1)]
        ranks, node = same[self._nodes[world.rank]], self._nodes[world.rank]
        self._is_first = world.rank == ranks[0]
        self._root = folder / f"{run.resolve().name}-{self._id()}"
        self._folder = self._root / NODES.replace("*", str(node))
        self._check()
        self._exchange = None
        if len(same) > 1:
            of_node = ranks.index(world.rank)
            self._exchange = Exchange(same[node - 1][of_node], same[(node + 1) % len(same)][of_node])
        self._count, self._is_apart = 0, False
        self._has_warned = False

    def bring_back(self) -> Path | None:
        """As recovery.bring_back. Collective."""
        return recovery.bring_back(self._root, self._run, self._world, self._nodes)

    def make(self, writer: Writer, info: CheckpointInfo, is_best: bool) -> Iterator[Work[Any]]:
        """The course of a copy, from what the writer has taken. Collective between what it yields.

        The exchange begins on all ranks or on none, for they come here together: no rank waits for one that has given
        the checkpoint up. What fails is told once and ends nothing.
        """
        if self._is_apart:
            return
        self._count += 1
        part = self._folder / f"{name_of(info.step)}.{self._count}.part"
        yield (writing := self._write(writer, part))
        mine = writing.result()
        yield (exchanging := self._swap(part, mine))
        problem = next(iter([*mine.problems, *exchanging.result()]), "")
        told = distributed.gather((problem, mine.files, self._latest() if self._world.is_main else "", self._is_apart))
        self._is_apart = any(is_apart for *_, is_apart in told)
        if self._has_failed([problem for problem, *_ in told], part):
            return
        text = info.with_files(files for _, files, *_ in told).to_json()
        after = json.dumps({"after": told[0][2], "is_best": is_best})
        yield (publishing := self._on_first(lambda: self._publish(part, info.step, text, after)))
        if not self._has_failed(distributed.gather(publishing.result()), part):
            self._remove_older(info.step)

    def _write(self, writer: Writer, part: Path) -> Work[Written]:
        try:
            part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return done(Written([str(error)], {}))
        return writer.write(part)

    def _swap(self, part: Path, mine: Written) -> Work[list[str]]:
        exchange = self._exchange
        if exchange is None:
            return done([])

        def swap() -> list[str]:
            try:
                return exchange.swap(part, {} if mine.problems else mine.files)
            except RuntimeError as error:  # of gloo; the heartbeat tells whether the other rank is lost
                self._is_apart = True
                return [f"the next node's part does not come ({error}); no later copies are made"]

        return do(swap, in_background=True)

    def _on_first(self, work: Callable[[], None]) -> Work[str]:
        """Have the first rank of each node do this, and find out what the system has refused."""
        return do(lambda: refused(work), in_background=True) if self._is_first else done("")

    def _publish(self, part: Path, step: int, text: str, after: str) -> None:
        folder = self._folder / name_of(step)
        replace_text(part / LOCAL, after)
        replace_text(part / DESCRIPTION, text)
        if folder.exists():
            folder.rename(part.with_suffix(".replaced.part"))
        part.rename(folder)
        flush(self._folder)

    def _remove_older(self, step: int) -> None:
        """When every node has the newer one: until then the older ones may be all that is complete.

        The numbers of nodes may have changed since they were made.
        """
        if not self._is_first:
            return
        try:
            old = [path for path in self._root.glob(f"{NODES}/{STEPS}") if path.name != name_of(step)]
            old += self._folder.glob("*.part")
        except OSError:  # said when it is written to
            return
        _remove_in_background(old)

    def _has_failed(self, problems: Sequence[str], part: Path) -> bool:
        """Leave the copy out where a rank has met something. The same on every rank."""
        said = next(((rank, problem) for rank, problem in enumerate(problems) if problem), None)
        if said is None:
            return False
        if self._is_first:
            _remove_in_background([part])
        if not self._has_warned and self._world.is_main:
            log.warning("--checkpoint.local %s: no copy of %s was kept there: rank %d: %s; checkpoints go to the run "
                        "folder as ever%s", self._asked, part.name.split(".")[0], *said,
                        "" if self._is_apart else ", and each later one is tried here too")
        self._has_warned = True
        return True

    def _latest(self) -> str:
        try:
            latest = newest(self._run)
        except CheckpointError:
            return "?"
        return latest.name if latest else ""

    def _id(self) -> str:
        """The run's, made where it is missing. Collective."""
        path, found, problem = self._run / CHECKPOINTS / ID, "", ""
        if self._world.is_main:
            try:
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    replace_text(path, secrets.token_hex(4))
                found = path.read_text().strip()
                if Path(found).name != found or not found:
                    problem = "it holds no name; remove it"
            except (OSError, ValueError) as error:
                problem = f"{error}; free some space or give another --output"
        found, problem = distributed.broadcast((found, problem))
        if problem:
            raise SettingsError(f"--checkpoint.local: {path} cannot be used: {problem}")
        return found

    def _check(self) -> None:
        """Make the folder, without what a kill has left in it. Collective."""
        problem = ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try_to_write(self._folder / LOCAL)
            for stale in self._folder.glob("*.part") if self._is_first else ():
                shutil.rmtree(stale, ignore_errors=True)
        except OSError as error:
            problem = (f"--checkpoint.local {self._asked} cannot be written to on {socket.gethostname()} (rank "
                       f"{self._world.rank}): {error.strerror}; give a folder on a disk that each node has, or leave "
                       "it out")
        if problem := next(filter(None, distributed.gather(problem)), ""):
            raise SettingsError(problem)


def _remove_in_background(folders: Sequence[Path]) -> None:
    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    do(remove, in_background=True)


def nodes_of(told: Sequence[tuple[str, int]]) -> list[int]:
    """The number of each rank's node.

    By the names of the hosts, where these tell as many nodes; ranks of a node may then be any. Otherwise (containers
    have names of their own) ranks of a node follow one another.

    Args:
        told: by each rank: its host, and how many ranks are on its node.

    Raises:
        SettingsError: not as many on each.
    """
    counts = sorted({min(count, len(told)) for _, count in told})
    if len(counts) > 1 or len(told) % counts[0]:
        raise SettingsError(f"--checkpoint.local needs as many ranks on each node, and there are nodes of "
                            f"{' and '.join(map(str, counts))}, {len(told)} ranks in all; start as many on each, or "
                            "leave it out")
    on_host = Counter(host for host, _ in told)
    if set(on_host.values()) == set(counts):
        return [list(on_host).index(host) for host, _ in told]
    return [rank // counts[0] for rank in range(len(told))]
