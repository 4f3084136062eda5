"""The second copy, on the disks of two nodes: how it is made, what a restart takes of it, what a disk can do to it.

Real ranks on one machine, each a node of its own. This file is also their program: test_local.py FUNCTION FOLDER
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.faults import kill_all
from support.forked import forked, of_this_session
from support.launchers import free_port
from support.small_disk import small_disk  # noqa: F401  a fixture
from support.tiny_runs import command, launch, weights
from support.waiting import wait_for
from vir import distributed
from vir.checkpoints import exchange
from vir.checkpoints.exchange import Exchange
from vir.checkpoints.info import CheckpointInfo, read_info, verify
from vir.checkpoints.local import LocalCopies, nodes_of
from vir.checkpoints.names import name_of, newest
from vir.checkpoints.recovery import shared_out
from vir.checkpoints.saving import Checkpointer
from vir.checkpoints.store import Kept, named_by
from vir.distributed import World
from vir.errors import SettingsError, VirError
from vir.weights.spec import InputSpec, ModelSpec

INFO = CheckpointInfo(
    samples_seen=0, step=0, updates=0, world_size=2, zero_stage=2, precision="bf16", ema=False, loss_scaler={},
    metrics={"loss": float("nan")}, config={}, data_fingerprint="f", model=ModelSpec(
        name="test_vit", args={}, classes=(), input=InputSpec(
            size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)))
CHUNK = 1000
AWKWARD = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
FILES = ["mp_rank_00_model_states.pt", OPTIMIZER.format(0), OPTIMIZER.format(1)]


class Scene:
    """A run of two ranks with its disk on each node.

    Args:
        size: bytes of each file.
    """

    def __init__(self, folder: Path, world: World, disk: Path | None = None, size: int = 40):
        self.run, self.disk, self.world, self.size = folder / "run", disk or folder / "disk", world, size
        if world.is_main:
            self.run.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        self.begin()

    def begin(self):
        """As each start of the run does."""
        self.local = LocalCopies(self.disk, self.run, self.world)
        self.local.bring_back()
        self.checkpointer = Checkpointer(self.run, self.world, Kept(100, None), True, self.local)
        return self

    def hand_over(self, part, take):
        distributed.barrier()
        part.mkdir(exist_ok=True)
        of_rank = FILES[0:1] * self.world.is_main + [OPTIMIZER.format(self.world.rank)]
        for name in of_rank:
            take({"of": name, "w": torch.full((self.size,), self.world.rank, dtype=torch.uint8)}, part / name)

    def save(self, step, is_best=False):
        self.checkpointer.begin(self.hand_over, replace(INFO, step=step, samples_seen=step), is_best)
        self.checkpointer.finish()
        return self

    def save_locally(self, step, is_best=False):
        """A kill comes when both disks have it and the run folder does not."""
        self.checkpointer.begin(self.hand_over, replace(INFO, step=step, samples_seen=step), is_best)
        node = self.local._nodes[self.world.rank]
        while not all(distributed.gather((self.node(node) / name_of(step)).is_dir())):
            self.advance()
        self.checkpointer.close()
        return self

    def advance(self):
        wait_for(lambda: self.checkpointer.is_ready)
        distributed.barrier()
        self.checkpointer.advance()

    def node(self, number):
        return self.local._root / f"node-{number}"

    def on_main(self, work, *arguments):
        """What is done to the files between two starts."""
        distributed.barrier()
        if self.world.is_main:
            work(*arguments)
        distributed.barrier()

    def newest(self):
        folder = newest(self.run)
        verify(folder, read_info(folder))
        return int(folder.name[5:])


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def steps(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def files_cross_over(folder, world):
    whole, exchange.CHUNK = exchange.CHUNK, CHUNK
    folder = folder / f"crossing{world.rank}"
    folder.mkdir()
    sizes = {f"of-{world.rank}-{size}": size for size in AWKWARD[:len(AWKWARD) - 2 * world.rank]}
    files = {}
    for name, size in sizes.items():
        content = bytes((3 * place + world.rank) % 251 for place in range(size))
        (folder / name).write_bytes(content)
        files[name] = {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
    of_nodes = Exchange(1 - world.rank, 1 - world.rank)
    found = {"problems": [of_nodes.swap(folder, files)], "sums": {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}}
    if world.rank:
        change(folder / f"of-1-{CHUNK}")
    else:
        (folder / f"of-0-{CHUNK + 1}").unlink()
    found["problems"].append(of_nodes.swap(folder, files))
    found["problems"].append(of_nodes.swap(folder, {} if world.rank else {"of-0-1": files["of-0-1"]}))
    exchange.CHUNK = whole
    return found


def on_a_full_disk(folder, small):
    """Of the first node; its own files have room there, but not the other's."""
    world, said = begin()
    full = Scene(folder, world, disk=small if world.is_main else None, size=600_000)
    full.save(1)
    full.save(2)
    wait_for(lambda: not list(full.node(world.rank).glob("*.part")), "the removal of what was begun")
    found = {"step": full.newest(), "said": said, "there": steps(full.node(0)),
             "free": shutil.disk_usage(small).free}
    (folder / f"found{world.rank}.json").write_text(json.dumps(found))
    distributed.stop()


def on_three_nodes(folder):
    world, said = begin()
    scene = Scene(folder, world, size=50_000).save(1).save_locally(2)
    found = {"layout": [sorted(path.name for path in (scene.node(number) / name_of(2)).iterdir())
                        for number in range(3)]}
    scene.on_main(shutil.rmtree, scene.node(1))
    found["step"] = scene.begin().newest()
    scene.save_locally(3)
    for number in (1, 2):
        scene.on_main(shutil.rmtree, scene.node(number))
    found["incomplete"] = scene.begin().newest()
    (folder / f"found{world.rank}.json").write_text(json.dumps(found | {"said": said}))
    distributed.stop()


def begin():
    """The world, and what will be said."""
    said = []
    logging.getLogger("vir").addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("vir").setLevel(logging.INFO)
    return distributed.start(), said


def as_rank(folder):
    world, said = begin()
    found = {"crossing": files_cross_over(folder, world)}

    def begins(of, name):
        """What a start makes of it."""
        said.clear()
        found[name] = {"step": of.begin().newest(), "said": [*said]}

    one = Scene(folder / "one", world).save(1).save(2)
    wait_for(lambda: steps(one.node(world.rank)) == [name_of(2)], "the removal of the older one")
    found["layout"] = {number: sorted(path.name for path in (one.node(number) / name_of(2)).iterdir())
                       for number in (0, 1)}
    found["same"] = [(one.node(number) / name_of(2) / "checkpoint.json").read_text() ==
                     (one.run / "checkpoints" / name_of(2) / "checkpoint.json").read_text() for number in (0, 1)]
    begins(one, "as new as the shared one")
    one.on_main(change, one.run / "checkpoints" / name_of(2) / FILES[1])
    begins(one, "shared one damaged")

    one.save_locally(3, is_best=True)
    one.on_main(change, one.node(0) / name_of(3) / FILES[0])
    one.on_main(change, one.node(1) / name_of(3) / FILES[2])
    begins(one, "two damaged")
    found["best"] = named_by(one.run, "best").name
    one.save_locally(4)
    one.on_main(shutil.rmtree, one.node(0))
    begins(one, "a new node")
    one.save_locally(5)
    one.on_main((one.run / "checkpoints" / "latest").write_text, name_of(3))
    begins(one, "went back")
    one.save_locally(6)
    for number in (0, 1):
        one.on_main(change, one.node(number) / name_of(6) / FILES[1])
    begins(one, "damaged on both")
    one.save_locally(7)
    one.on_main(shutil.rmtree, one.local._root)
    begins(one, "both removed")

    one.save_locally(8)
    one.on_main(shutil.rmtree, one.run)
    one.on_main(one.run.mkdir)
    one.begin()
    found["begun anew"] = newest(one.run) is None
    one.save_locally(9)
    begins(one, "before the first shared one")

    one.checkpointer.begin(one.hand_over, replace(INFO, step=10), False)
    one.advance()  # the files cross over now
    one.checkpointer.give_up()
    found["given up"] = {"step": one.newest(), "then": one.save(11).newest(), "parts": len(list(
        (one.run / "checkpoints").glob("*.part")))}

    file = folder / f"file{world.rank}"
    if world.rank:
        file.touch()
    try:
        Scene(folder / "door", world, file)
    except VirError as error:
        found["door"] = f"{type(error).__name__}: {error}"
    (folder / f"found{world.rank}.json").write_text(json.dumps(found))
    distributed.stop()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    done = forked(__file__, "as_rank", folder, nodes=2)
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


def test_files_cross_over_whole_at_awkward_sizes(found):
    first, second = (of_rank["crossing"] for of_rank in found)
    assert first["problems"][0] == second["problems"][0] == []
    assert first["sums"] == second["sums"] and len(first["sums"]) == 2 * len(AWKWARD) - 2


def test_files_that_changed_or_went_are_told_and_hold_up_nobody(found):
    first, second = ("; ".join(of_rank["crossing"]["problems"][1]) for of_rank in found)
    assert f"of-0-{CHUNK + 1}: [Errno 2]" in first and f"of-1-{CHUNK}: what has come" in first
    assert f"of-0-{CHUNK + 1}: what has come" in second and f"of-1-{CHUNK}" not in second
    assert found[0]["crossing"]["problems"][2] == found[1]["crossing"]["problems"][2] == []


def test_each_node_has_the_files_of_both_and_the_newest_alone(found):
    assert found[0]["layout"] == {number: sorted([*FILES, "checkpoint.json", "local.json"]) for number in "01"}
    assert found[0]["same"] == [True, True]


def everywhere(found, name):
    assert found[0][name]["step"] == found[1][name]["step"]
    return found[0][name]["step"], "\n".join(found[0][name]["said"])


@pytest.mark.parametrize("name, step, words", [
    ("as new as the shared one", 2, None),
    ("shared one damaged", 2, "step 2 is taken from the nodes' own disks"),
    ("two damaged", 3, "DAMAGED LOCAL FILE PASSED OVER"),
    ("a new node", 4, "step 4 is taken from the nodes' own disks"),
    ("went back", 3, None),
    ("damaged on both", 3, f"the local copies of step 6 are left out: {FILES[1]} is whole on no disk"),
    ("both removed", 3, None),
    ("before the first shared one", 9, "step 9 is taken from the nodes' own disks"),
])
def test_a_start_takes_the_newest_that_is_complete(found, name, step, words):
    taken, said = everywhere(found, name)
    assert taken == step
    assert words in said if words else said == ""


def test_what_was_the_best_is_the_best_when_it_comes_back(found):
    assert found[0]["best"] == found[1]["best"] == name_of(3)


def test_a_new_node_takes_all_from_its_neighbour(found):
    said = everywhere(found, "a new node")[1]
    assert "node-1" in said and "node-0" not in said


def test_a_run_that_was_removed_and_begun_anew_finds_nothing(found):
    assert found[0]["begun anew"] and found[1]["begun anew"]


def test_one_that_is_given_up_while_files_cross_over_holds_up_nobody(found):
    for of_rank in found:
        assert of_rank["given up"] == {"step": 9, "then": 11, "parts": 0}


def test_a_folder_that_cannot_be_written_to_is_refused_on_every_rank(found):
    assert found[0]["door"] == found[1]["door"]
    assert found[0]["door"].startswith("SettingsError: --checkpoint.local ") and "(rank 1)" in found[0]["door"]
    assert "leave it out" in found[0]["door"]


def test_a_full_disk_is_told_once_and_the_shared_copy_is_made(small_disk, tmp_path):  # noqa: F811
    done = forked(__file__, "on_a_full_disk", tmp_path, small_disk, nodes=2)
    assert done.returncode == 0, done.stdout[-6000:]
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    assert first["step"] == second["step"] == 2 and first["there"] == []
    warned = [said for said in first["said"] if "no copy of" in said]
    assert len(warned) == 1 and "No space left on device" in warned[0] and str(small_disk) in warned[0]
    assert first["free"] > 1_000_000 and not any("no copy of" in said for said in second["said"])


def test_around_three_nodes_each_has_what_is_of_the_next_one(tmp_path):
    done = forked(__file__, "on_three_nodes", tmp_path, ranks=6, nodes=3)
    assert done.returncode == 0, done.stdout[-6000:]
    told = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(6)]
    assert told[0]["layout"] == [sorted([*(OPTIMIZER.format(rank) for rank in ranks), *more, "checkpoint.json",
                                         "local.json"])
                                 for ranks, more in (((0, 1, 2, 3), FILES[:1]), ((2, 3, 4, 5), ()),
                                                     ((4, 5, 0, 1), FILES[:1]))]
    assert {of_rank["step"] for of_rank in told} == {of_rank["incomplete"] for of_rank in told} == {2}


def test_nodes_are_known_by_their_hosts_or_by_the_order_of_ranks():
    assert nodes_of([("a", 2), ("b", 2), ("a", 2), ("b", 2)]) == [0, 1, 0, 1]
    assert nodes_of([("a", 2), ("a", 2), ("b", 2), ("b", 2)]) == [0, 0, 1, 1]
    assert nodes_of([(name, 2) for name in "abcd"]) == [0, 0, 1, 1]  # a container for each rank
    assert nodes_of([("a", 1), ("a", 1)]) == [0, 1]
    assert nodes_of([("a", 8)]) == [0]


@pytest.mark.parametrize("counts", [(2, 2, 1), (2, 2, 2)])
def test_nodes_of_different_size_are_refused(counts):
    with pytest.raises(SettingsError, match="as many ranks on each node.*3 ranks in all"):
        nodes_of([(str(count), count) for count in counts])


def test_the_work_of_bringing_back_is_shared_by_the_ranks_of_nodes_that_have_a_file():
    chosen = shared_out({name: [0, 1] for name in "abcdefgh"} | {"i": [1]}, [0, 0, 1, 1])
    assert sorted(rank for _, rank in chosen.values()) == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert chosen["i"] == (0, 2)


def test_one_node_keeps_its_own_files(tmp_path):
    scene = Scene(tmp_path, World(0, 1, torch.device("cpu"))).save(1).save_locally(2)
    assert scene.newest() == 1 and scene.begin().newest() == 2


def test_a_connection_that_is_lost_while_files_cross_over_ends_nothing(tmp_path, caplog):
    def swap(folder, mine):
        raise RuntimeError("Connection closed by peer")

    scene = Scene(tmp_path, World(0, 1, torch.device("cpu"))).save(1)
    scene.local._exchange = SimpleNamespace(swap=swap)
    scene.save(2).save(3)
    assert scene.newest() == 3
    wait_for(lambda: steps(scene.node(0)) == ["step-00000001"], "the removal of what is not complete")
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "the next node's part does not come (Connection closed by peer); no later copies are made" in said
    assert said.endswith("checkpoints go to the run folder as ever")


class TwoNodes:
    """Two ranks of a program, each a node of its own."""

    def __init__(self, log: Path, *program):
        self._port = free_port()
        everyone = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port}
        self.processes = [of_this_session().start(program, log.with_name(f"{log.name}{rank}"),
                                                  {**everyone, "RANK": str(rank)}) for rank in (0, 1)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        kill_all(self.processes, self._port)


@pytest.mark.launcher
def test_a_killed_run_goes_on_from_its_local_copies_bit_for_bit(shards, tmp_path):
    steps, every = 8, 4

    def of(name):
        return command(shards, tmp_path / name, "zero2_fp32", "--checkpoint.local", str(tmp_path / "disk"),
                       steps=steps, every=every)

    run, fault = tmp_path / "a", ("shared_disk_hangs", str(every), "0")
    with TwoNodes(tmp_path / "killed", "-m", "support.befallen", *fault, *of("a")):  # killed at the end of the block
        wait_for(lambda: len([*(tmp_path / "disk").glob(f"a-*/node-*/{name_of(every)}")]) == 2, "a local copy")
    assert newest(run) is None
    shutil.rmtree(next((tmp_path / "disk").glob("a-*")) / "node-0")
    codes, said = launch(tmp_path / "again", [of("a"), of("b")], launcher=by_two_nodes)
    assert codes == [0, 0], said
    assert f"step {every} is taken from the nodes' own disks" in said
    ours, undisturbed = weights(run, steps, tmp_path), weights(tmp_path / "b", steps, tmp_path)
    assert ours.keys() == undisturbed.keys() and all(torch.equal(ours[name], undisturbed[name]) for name in ours)


def by_two_nodes(*program, ranks):
    return forked(*program, ranks=ranks, nodes=ranks)


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
