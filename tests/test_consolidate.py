"""Checkpoint folders made by hand: what is refused, that nothing in them runs, how partitions become whole weights."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.launchers import ROOT, call
from support.payload import Payload
from vir.benchmarks.consolidation import turn
from vir.benchmarks.consolidation_run import OURS, SIDES
from vir.checkpoints.consolidate import consolidate
from vir.checkpoints.info import CheckpointInfo, sha256
from vir.checkpoints.partitions import read_file
from vir.consolidate import main
from vir.errors import CheckpointError, DataError, SettingsError
from vir.models import read_metadata
from vir.weights import tensor_files
from vir.weights.metadata import DTYPES
from vir.weights.spec import InputSpec, ModelSpec

torch.set_num_threads(1)
SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "a.bias": (1,)}  # none divides by 2 or 3 ranks
WEIGHTS = {name: torch.arange(100.0 * i, 100 * i + torch.Size(shape).numel()).view(shape)
           for i, (name, shape) in enumerate(SHAPES.items(), 1)}
AVERAGE = {name: weight + 0.5 for name, weight in WEIGHTS.items()}
GROUPS = [["a.weight", "b.weight"], ["a.bias"]]
BUFFER = torch.tensor([7.0, 8.0])
MODEL_FILE = {0: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def info(**changed):
    model = ModelSpec(name="vir_tiny_patch16_224", args={"num_classes": 2}, classes=("x", "y"), input=InputSpec(
        size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9))
    given = dict(samples_seen=640, step=10, updates=9, world_size=2, zero_stage=0, precision="fp32", ema=True,
                 model=model, data_fingerprint="f", loss_scaler={}, metrics={}, config={})
    return CheckpointInfo(**given | changed)


def write(folder, files, described=None, **changed):
    """A checkpoint folder with these torch files and its description."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        torch.save(content, folder / name)
    listed = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
    said = described or info()
    model, fields = said.model, {name: value for name, value in vars(said).items() if name not in ("model", "files")}
    description = {"format": 2, **fields, "model_name": model.name, "model_args": model.args,
                   "classes": list(model.classes), "model_input": {
                       "size": list(model.input.size), "mean": list(model.input.mean), "std": list(model.input.std),
                       "interpolation": model.input.interpolation, "crop_pct": model.input.crop_pct},
                   "files": listed} | changed
    (folder / "checkpoint.json").write_text(json.dumps(description))
    return folder


def in_run(run, files=None, **changed):
    folder = write(run / "checkpoints" / "step-00000010", stage_0() if files is None else files, **changed)
    (run / "checkpoints" / "latest").write_text(folder.name)
    return run


# ---- the three layouts of DeepSpeed, from the facts of its source, in plain cuts


def stage_0():
    numbers = {name: number for number, name in enumerate(name for group in GROUPS for name in group)}
    return {MODEL_FILE[0]: {
        "module": {**WEIGHTS, "scale": BUFFER}, "buffer_names": ["scale"],
        "optimizer": {"param_groups": [{"names": group, "params": [numbers[name] for name in group]}
                                       for group in GROUPS],
                      "state": {numbers[name]: {"ema": AVERAGE[name]} for name in numbers}}}}


def flat_partitions(values, group, ranks, padding):
    """One vector of all parameters with their paddings, its end padded, cut into one part per rank."""
    flat = torch.cat([torch.cat([values[name].flatten(), torch.full((pad,), -1.0)])
                      for name, pad in zip(group, padding)])
    size = -(-len(flat) // ranks)
    return torch.cat([flat, torch.full((size * ranks - len(flat),), -1.0)]).split(size)


def shapes():
    return [{name: torch.Size(SHAPES[name]) for name in group} for group in GROUPS]


def stage_1_2(ranks):
    paddings = [[1, 0], [3]]
    weights = [flat_partitions(WEIGHTS, group, ranks, pad) for group, pad in zip(GROUPS, paddings)]
    average = [flat_partitions(AVERAGE, group, ranks, pad) for group, pad in zip(GROUPS, paddings)]
    files = {MODEL_FILE[0]: {"module": {"scale": BUFFER}, "buffer_names": ["scale"], "param_shapes": shapes(),
                             "shared_params": {}}}
    for rank in range(ranks):
        files[f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": {
            "single_partition_of_fp32_groups": [parts[rank] for parts in weights],
            "base_optimizer_state": {"param_groups": [{}, {}],
                                     "state": {i: {"ema": parts[rank]} for i, parts in enumerate(average)}},
            "param_alignment_paddings": paddings, "zero_stage": 2, "partition_count": ranks}}
    return files


def stage_3(ranks):
    """A rank's flat group holds its piece of each parameter of the group, one after another."""
    def pieces(values, group, rank):
        found = []
        for name in group:
            piece = -(-values[name].numel() // ranks)
            padded = torch.cat([values[name].flatten(), torch.full((piece * ranks - values[name].numel(),), -1.0)])
            found.append(padded[rank * piece:(rank + 1) * piece])
        return torch.cat(found)

    files = {MODEL_FILE[3]: {"module": {"scale": BUFFER}, "buffer_names": ["scale"], "param_shapes": shapes(),
                             "shared_params": {}}}
    for rank in range(ranks):
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": {
            "fp32_flat_groups": [pieces(WEIGHTS, group, rank) for group in GROUPS],
            "zero_stage": 3, "partition_count": ranks,
            "optimizer_state_dict": {"state": {i: {"ema": pieces(AVERAGE, group, rank)}
                                               for i, group in enumerate(GROUPS)}}}}
    return files


LAYOUTS = [(0, 2), (1, 1), (1, 2), (2, 3), (3, 1), (3, 2), (3, 3), (3, 8)]


def files_of(stage, ranks):
    return stage_0() if stage == 0 else stage_3(ranks) if stage == 3 else stage_1_2(ranks)


@pytest.mark.parametrize("stage, ranks", LAYOUTS)
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_partitions_become_the_whole_weights_or_their_average(tmp_path, monkeypatch, stage, ranks, ema, dtype, piece):
    """However the pieces lie in them; buffers of whole numbers keep their type."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece)
    files, count = files_of(stage, ranks), torch.tensor([1 << 40])
    model = files[MODEL_FILE[3 if stage == 3 else 0]]
    model["module"]["count"] = count
    model["buffer_names"].append("count")
    folder = write(tmp_path / "c", files, info(zero_stage=stage, world_size=ranks))
    consolidate(folder, tmp_path / "w.safetensors", ema=ema, dtype=dtype)
    found, expected = load_file(tmp_path / "w.safetensors"), (AVERAGE if ema else WEIGHTS) | {"scale": BUFFER}
    assert found.pop("count").equal(count)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == DTYPES[dtype] and torch.equal(found[name], weight.to(DTYPES[dtype])), name


@pytest.mark.parametrize("stage, ranks", [layout for layout in LAYOUTS if layout[0]])
def test_they_are_those_of_zero_to_fp32_with_frozen_and_shared_parameters(tmp_path, stage, ranks):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    files, frozen = files_of(stage, ranks), torch.arange(7.0).bfloat16() / 3
    piece = -(-7 // ranks)
    padded = torch.cat([frozen, torch.zeros(piece * ranks - 7).bfloat16()])
    for rank in range(ranks if stage == 3 else 1):
        name = MODEL_FILE[0] if stage < 3 else f"zero_pp_rank_{rank}_{MODEL_FILE[0]}"
        files[name] = dict(files[MODEL_FILE[3 if stage == 3 else 0]]) | {
            "frozen": ["c"], "frozen_param_shapes": {"c": frozen.shape},
            "frozen_param_fragments": {"c": frozen if stage < 3 else padded[rank * piece:(rank + 1) * piece]},
            "shared_params": {"head.weight": "a.weight", "head.c": "c", "again": "head.weight", "gone": "not there"}}
        files[name]["module"] = files[name]["module"] | {"c": frozen}
    folder = write(tmp_path / "c", files, info(zero_stage=stage, world_size=ranks))
    consolidate(folder, tmp_path / "w.safetensors")
    found, expected = load_file(tmp_path / "w.safetensors"), get_fp32_state_dict_from_zero_checkpoint(tmp_path, "c")
    assert found.keys() == expected.keys() > {"head.weight", "head.c", "c", "scale"}
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape and torch.equal(tensor, expected[name].float()), name


@pytest.mark.parametrize("ema", [False, True])
def test_without_zero_a_shared_parameter_is_known_by_its_numbers(tmp_path, ema):
    (content,) = stage_0().values()
    content["module"] |= {"tied": content["module"]["b.weight"], "scale.again": content["module"]["scale"]}
    content["buffer_names"] = ["scale", "scale.again"]
    consolidate(write(tmp_path / "c", {MODEL_FILE[0]: content}), tmp_path / "w.safetensors", ema=ema)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == {*WEIGHTS, "scale", "scale.again", "tied"}
    assert torch.equal(found["tied"], (AVERAGE if ema else WEIGHTS)["b.weight"])


@pytest.mark.parametrize("stage, ranks", [(0, 2), (1, 2), (2, 3), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("ema", [False, True])
def test_frozen_weights_are_in_the_file_and_are_their_own_average(tmp_path, stage, ranks, ema):
    """Of a low precision they have no other copy; ZeRO 3 cuts them up."""
    frozen = {"c.weight": torch.arange(7.0).view(7, 1).bfloat16() / 3, "c.bias": torch.tensor([5.0]).bfloat16()}
    files = {0: stage_0, 1: lambda: stage_1_2(ranks), 2: lambda: stage_1_2(ranks), 3: lambda: stage_3(ranks)}[stage]()
    for rank in range(ranks) if stage == 3 else [None]:
        name = MODEL_FILE[0] if rank is None else f"zero_pp_rank_{rank}_{MODEL_FILE[0]}"
        content = files.setdefault(name, {})
        content["frozen"] = list(frozen)
        if rank is None:
            content["module"] |= frozen
            continue
        content["frozen_param_shapes"] = {name: tensor.shape for name, tensor in frozen.items()}
        content["frozen_param_fragments"] = {
            name: flat_partitions({name: tensor.float()}, [name], ranks, [0])[rank].bfloat16()
            for name, tensor in frozen.items()}
    folder = write(tmp_path / "c", files, info(zero_stage=stage, world_size=ranks))
    consolidate(folder, tmp_path / "w.safetensors", ema=ema)
    found, expected = load_file(tmp_path / "w.safetensors"), (AVERAGE if ema else WEIGHTS) | {"scale": BUFFER} | frozen
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight.float()), name


def test_without_zero_low_precision_takes_the_float32_masters(tmp_path):
    (content,) = stage_0().values()
    content["module"] = {name: weight.bfloat16() for name, weight in content["module"].items()}
    content["optimizer"] = {"optimizer_state_dict": content["optimizer"],
                            "fp32_groups": [[WEIGHTS[name] for name in group] for group in GROUPS]}
    folder = write(tmp_path / "c", {MODEL_FILE[0]: content}, info(precision="bf16"))
    consolidate(folder, tmp_path / "w.safetensors")
    assert all(torch.equal(load_file(tmp_path / "w.safetensors")[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_partition_that_is_too_short_is_refused(tmp_path):
    files = stage_3(2)
    state = files["zero_pp_rank_1_mp_rank_00_optim_states.pt"]["optimizer_state_dict"]
    state["fp32_flat_groups"] = [flat[:1] for flat in state["fp32_flat_groups"]]
    with pytest.raises(DataError, match="partitions hold 2 numbers, 7 are needed"):
        consolidate(write(tmp_path / "c", files, info(zero_stage=3)), tmp_path / "w.safetensors")


def test_the_file_says_what_the_checkpoint_said(tmp_path):
    consolidate(in_run(tmp_path / "run"), tmp_path / "w.safetensors", ema=True, dtype="bf16")
    said = read_metadata(tmp_path / "w.safetensors")
    assert (said.model.name, said.model.args) == ("vir_tiny_patch16_224", {"num_classes": 2})
    assert said.model.classes == ("x", "y")
    image = said.model.input
    assert (image.size, image.crop_pct, image.interpolation) == ((3, 28, 28), 0.9, "bicubic")
    assert (said.step, said.samples_seen, said.ema, said.dtype) == (10, 640, True, "bf16")
    assert load_file(tmp_path / "w.safetensors")["a.weight"].dtype == torch.bfloat16


def test_the_file_says_where_its_numbers_come_from(tmp_path):
    config = {"optim": {"lr": 0.1}, "data": {"train": "t"}}
    said = consolidate(write(tmp_path / "c", stage_0(), info(config=config)), tmp_path / "w.safetensors")
    assert said == read_metadata(tmp_path / "w.safetensors") and said.data_fingerprint == "f"
    other = consolidate(write(tmp_path / "d", stage_0(), info(config=dict(reversed(config.items())))),
                        tmp_path / "v.safetensors")
    assert said.config_hash == other.config_hash == hashlib.sha256(
        b'{"data": {"train": "t"}, "optim": {"lr": 0.1}}').hexdigest()


# ---- several files


def test_a_large_model_becomes_several_files_with_an_index(tmp_path, capsys):
    run, output = in_run(tmp_path / "run"), tmp_path / "out" / "w.safetensors"
    assert main([str(run), "--output", str(output), "--max-shard-size", "70"]) == 0
    index = json.loads((tmp_path / "out" / "w.safetensors.index.json").read_text())
    parts = sorted(set(index["weight_map"].values()))
    assert parts == [f"w-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(os.listdir(output.parent)) == [*parts, "w.safetensors.index.json"]
    total = sum((output.parent / name).stat().st_size for name in parts)
    assert capsys.readouterr().out == (f"{output}.index.json: vir_tiny_patch16_224, raw weights of step 10 in fp32, "
                                       f"{total / 1e6:.1f} MB in 2 files\n")
    found = {name: tensor for part in parts for name, tensor in load_file(output.parent / part).items()}
    assert found.keys() == index["weight_map"].keys() == {*WEIGHTS, "scale"}
    assert all(torch.equal(found[name], weight) for name, weight in WEIGHTS.items())
    assert all(read_metadata(output.parent / part).step == 10 for part in parts)


def test_what_is_no_size_is_told(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "w.safetensors"), "--max-shard-size", "5 apples"]) == 2
    assert "--max-shard-size is '5 apples'; give a number of bytes" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["w.safetensors.index.json", "w-00002-of-00009.safetensors"])
def test_any_file_of_several_is_replaced_only_by_force(tmp_path, there):
    run, output = in_run(tmp_path / "run"), tmp_path / "out" / "w.safetensors"
    output.parent.mkdir()
    (output.parent / there).write_text("precious")
    with pytest.raises(SettingsError, match=f"{there} exists; .*--force"):
        consolidate(run, output)
    assert (output.parent / there).read_text() == "precious"
    consolidate(run, output, force=True)
    assert os.listdir(output.parent) == ["w.safetensors"]


# ---- nothing in a file runs


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("victim", [MODEL_FILE[0], "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, victim, zipped):
    files, marker = stage_1_2(2), tmp_path / "it-ran"
    folder = write(tmp_path / "c", files, info(zero_stage=2))
    torch.save({**files[victim], "extra": Payload(marker)}, folder / victim, _use_new_zipfile_serialization=zipped)
    description = json.loads((folder / "checkpoint.json").read_text())
    description["files"][victim] = {"bytes": (folder / victim).stat().st_size, "sha256": sha256(folder / victim)}
    (folder / "checkpoint.json").write_text(json.dumps(description))

    with pytest.raises(DataError, match=victim):
        consolidate(folder, tmp_path / "w.safetensors")
    assert not marker.exists() and not (tmp_path / "w.safetensors").exists()
    torch.load(folder / victim, weights_only=False)
    assert marker.exists()  # the payload was a live one


def test_the_refusal_names_what_the_pickle_refers_to(tmp_path):
    folder = write(tmp_path / "c", {MODEL_FILE[0]: {"extra": Payload(tmp_path / "x")}})
    with pytest.raises(DataError, match=r"refers to (posix|os)\.mkdir, which no checkpoint of ours does"):
        consolidate(folder, tmp_path / "w.safetensors")


class Named:
    """Pickled as Python 3.11.2, that of Debian 12, pickles a member of an enum, here of a class that torch allows."""

    def __reduce__(self):
        return getattr, (OrderedDict, "fromkeys")


def test_a_member_that_is_written_by_its_name_is_read_and_nothing_is_looked_up(tmp_path):
    torch.save({"zero_stage": Named()}, tmp_path / "x.pt")
    stage = read_file(tmp_path / "x.pt")["zero_stage"]
    assert not callable(stage) and type(stage).__name__ == "_Inert"


# ---- folders that are no whole checkpoint


def test_a_missing_file_is_named(tmp_path):
    run = in_run(tmp_path / "run")
    (run / "checkpoints" / "step-00000010" / MODEL_FILE[0]).unlink()
    with pytest.raises(DataError, match=f"step-00000010 is incomplete: {MODEL_FILE[0]} is missing"):
        consolidate(run, tmp_path / "w.safetensors")


def test_a_short_file_is_named_with_both_sizes(tmp_path):
    run = in_run(tmp_path / "run")
    path = run / "checkpoints" / "step-00000010" / MODEL_FILE[0]
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=f"{MODEL_FILE[0]} has {size - 1} bytes, {size} were written"):
        consolidate(run, tmp_path / "w.safetensors")


def test_a_file_of_the_right_size_that_is_damaged_is_named(tmp_path):
    run = in_run(tmp_path / "run")
    path = run / "checkpoints" / "step-00000010" / MODEL_FILE[0]
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DataError, match=f"{MODEL_FILE[0]} has changed since it was written"):
        consolidate(run, tmp_path / "w.safetensors")


@pytest.mark.parametrize("of", ["another step", "another run"])
@pytest.mark.parametrize("stage, victim", [(0, MODEL_FILE[0]), (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
                                           (3, "zero_pp_rank_0_mp_rank_00_optim_states.pt"), (3, MODEL_FILE[3])])
def test_a_file_of_another_step_or_run_is_refused_by_name(tmp_path, monkeypatch, of, stage, victim):
    """It is as long as the right one."""
    run = in_run(tmp_path / "run", files_of(stage, 2), described=info(zero_stage=stage))
    for name in WEIGHTS:
        monkeypatch.setitem(WEIGHTS, name, WEIGHTS[name] + 1)
    monkeypatch.setattr(sys.modules[__name__], "BUFFER", BUFFER + 1)
    place = run / "checkpoints" / "step-00000009" if of == "another step" else tmp_path / "other"
    other = write(place, files_of(stage, 2), info(zero_stage=stage, step=9))
    path = run / "checkpoints" / "step-00000010" / victim
    size = path.stat().st_size
    shutil.copy(other / victim, path)
    assert path.stat().st_size == size
    with pytest.raises(DataError, match=f"{victim} has changed since it was written"):
        consolidate(path.parent, tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


# ---- what it costs


@pytest.mark.parametrize("stage", [2, 3])
def test_each_file_is_opened_as_often_whatever_it_holds_and_folders_are_listed_once_for_all_ranks(tmp_path, stage):
    def seen(ranks, more):
        names = [f"m{number}" for number in range(more)]
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                for values in (WEIGHTS, AVERAGE, SHAPES):
                    patch.setitem(values, name, (7,) if values is SHAPES else torch.ones(7))
            patch.setattr(sys.modules[__name__], "GROUPS", [*GROUPS[:1], GROUPS[1] + names] if stage == 3 else GROUPS)
            folder = write(tmp_path / f"{stage} {ranks} {more}", files_of(stage, ranks),
                           info(zero_stage=stage, world_size=ranks))
        script = ("import collections, sys\nfrom pathlib import Path\n"
                  "from vir.checkpoints.consolidate import consolidate\nseen = collections.Counter()\n"
                  "sys.addaudithook(lambda event, of: event in ('open', 'os.scandir', 'os.listdir')"
                  " and seen.update([f'{event} {of[0]}']))\n"
                  "consolidate(Path(sys.argv[1]), Path(sys.argv[2]))\n"
                  "print(*(f'{count} {what}' for what, count in seen.items() if sys.argv[1] in what), sep='\\n')")
        done = call(sys.executable, "-c", script, folder, tmp_path / f"{stage} {ranks} {more}.safetensors")
        assert done.returncode == 0, done.stdout
        lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line[0].isdigit()]
        opened = {Path(of).name: int(count) for count, event, of in lines if event == "open" and of.endswith(".pt")}
        assert len(opened) == ranks + 1
        return opened, sum(int(count) for count, event, _ in lines if event != "open")

    opened, listed = seen(2, 0)
    assert set(opened.values()) == {2} and listed <= 1  # once for its checksum, once to be mapped
    if stage == 3:
        assert seen(2, 40) == (opened, listed)
    many, listed_for_many = seen(9, 0)
    assert set(many.values()) == {2} and listed_for_many == listed


@pytest.mark.timeout(180)
def test_memory_does_not_grow_with_the_model_under_a_limit_that_the_system_holds(tmp_path):
    """Of 8 tensors of 64 MB, which would need 512 MB; the limit leaves 400 beside what the imports have reserved."""
    names = [f"w{number}" for number in range(8)]
    size, ranks = 1 << 24, 2
    flat = torch.zeros(8 * size // ranks)
    files = {MODEL_FILE[3]: {"module": {}, "buffer_names": [], "shared_params": {},
                             "param_shapes": [{name: torch.Size([size]) for name in names}]}}
    for rank in range(ranks):
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": {
            "fp32_flat_groups": [flat], "optimizer_state_dict": {"state": {}}}}
    folder = write(tmp_path / "c", files, info(zero_stage=3, world_size=ranks))
    reserved = int(call(sys.executable, "-c", "import vir.checkpoints.consolidate; print(next(line.split()[1] for line "
                        "in open('/proc/self/status') if line.startswith('VmData')))").stdout.split()[-1]) * 1024
    measured = turn(OURS, folder, tmp_path / "out", limit=reserved + 400 * 10**6)
    assert measured["peak_bytes"] - measured["import_bytes"] < 64e6
    assert load_file(tmp_path / "out" / "model.safetensors")["w7"].count_nonzero() == 0
    with pytest.raises(DataError, match="vir-consolidate ended with"):  # the limit is held
        turn(OURS, folder, tmp_path / "again", limit=reserved // 2)


def test_an_optimizer_file_of_a_rank_that_is_not_there_is_told(tmp_path):
    files = stage_1_2(2)
    del files["bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    with pytest.raises(DataError, match="has 0 optimizer files of rank 1, it must have one"):
        consolidate(write(tmp_path / "c", files, info(zero_stage=1)), tmp_path / "w.safetensors")


def test_a_folder_that_is_not_there_or_no_checkpoint_is_told(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        consolidate(tmp_path / "nowhere", tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="holds no checkpoint.json: it is not a complete checkpoint"):
        consolidate(tmp_path, tmp_path / "w.safetensors")


def test_a_run_without_a_complete_checkpoint_is_told(tmp_path):
    """What a kill leaves behind while the first checkpoint is written."""
    write(tmp_path / "checkpoints" / "step-00000010.part", stage_0())
    with pytest.raises(DataError, match="has no complete checkpoint yet"):
        consolidate(tmp_path, tmp_path / "w.safetensors")


def test_a_latest_that_points_nowhere_is_passed_over_loudly_for_what_is_there(tmp_path, caplog):
    run = in_run(tmp_path / "run")
    (run / "checkpoints" / "latest").write_text("step-00000020")
    assert consolidate(run, tmp_path / "w.safetensors").step == 10
    passed, taken = caplog.messages
    assert "DAMAGED CHECKPOINT PASSED OVER" in passed and "step-00000020 holds no checkpoint.json" in passed
    assert taken == f"continuing from the one before: {run / 'checkpoints' / 'step-00000010'}"


def test_a_damaged_newest_checkpoint_is_passed_over_as_a_resume_would(tmp_path, caplog):
    run = in_run(tmp_path / "run")
    damaged = write(run / "checkpoints" / "step-00000020", stage_0(), info(step=20))
    (run / "checkpoints" / "latest").write_text(damaged.name)
    path = damaged / MODEL_FILE[0]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert consolidate(run, tmp_path / "w.safetensors").step == 10
    assert f"{path} has changed since it was written" in caplog.text


def test_the_newest_is_the_one_that_latest_names(tmp_path):
    run = in_run(tmp_path / "run")
    write(run / "checkpoints" / "step-00000020", stage_0(), info(step=20))  # renamed, but latest was not moved yet
    assert consolidate(run, tmp_path / "w.safetensors").step == 10


@pytest.mark.parametrize("changed, said", [({"format": 1}, "format 1 is not known here"), ({"step": None}, None),
                                           ({"stepp": 1}, "checkpoint.json cannot be read.*stepp")])
def test_a_description_of_another_format_is_refused(tmp_path, changed, said):
    folder = write(tmp_path / "c", stage_0(), **changed)
    if said is None:
        description = json.loads((folder / "checkpoint.json").read_text())
        del description["step"]
        (folder / "checkpoint.json").write_text(json.dumps(description))
        said = "checkpoint.json cannot be read.*step"
    with pytest.raises(DataError, match=said):
        consolidate(folder, tmp_path / "w.safetensors")


def test_an_existing_file_is_replaced_only_by_force(tmp_path):
    run, output = in_run(tmp_path / "run"), tmp_path / "w.safetensors"
    output.write_text("precious")
    with pytest.raises(SettingsError, match="w.safetensors exists; .*--force"):
        consolidate(run, output)
    assert output.read_text() == "precious"
    consolidate(run, output, force=True)
    assert load_file(output).keys() == {*WEIGHTS, "scale"}


@pytest.mark.parametrize("output, said", [
    ("w.pt", "give --output {}/w.safetensors"), ("w.pth", "give --output {}/w.safetensors"),
    ("w.bin", "give --output {}/w.safetensors"), ("w.ckpt", "give --output {}/w.safetensors"),
    ("W.SAFETENSORS", "give --output {}/W.safetensors"),
    (250 * "a" + ".safetensors", "cannot be written: File name too long; give another file"),
    ("vir_0.5", "give --output {}/vir_0.5.safetensors"), ("weights", "give --output {}/weights.safetensors"),
    ("folder.safetensors", "cannot be written: it is a folder; give another file"),
    ("a file/w.safetensors", "cannot be written: Not a directory; give another file"),
    ("a file/new/w.safetensors", "cannot be written: Not a directory; give another file"),
    ("null.safetensors", "cannot be written: it is no regular file; give another file"),
])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, output, said, force):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "a file").touch()
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingsError) as error:
        consolidate(tmp_path / "no run", tmp_path / output, force=force)
    assert str(error.value).startswith(f"--output {tmp_path / output} ") and str(error.value).endswith(
        said.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_the_output_are_made(tmp_path):
    consolidate(in_run(tmp_path / "run"), tmp_path / "new" / "er" / "w.safetensors")
    assert os.listdir(tmp_path / "new" / "er") == ["w.safetensors"]


def test_the_best_and_any_step_can_be_taken(tmp_path, capsys):
    """By the flag, or by the path of the pointer."""
    run, output = in_run(tmp_path / "run"), tmp_path / "w.safetensors"
    root = run / "checkpoints"
    write(root / "step-00000020", stage_0(), info(step=20))
    (root / "best").write_text("step-00000010")
    (root / "latest").write_text("step-00000020")

    def step(*source):
        assert main([*map(str, source), "--output", str(output), "--force"]) == 0
        capsys.readouterr()
        return read_metadata(output).step

    assert step(run) == step(root / "latest") == step(run, "--which", "latest") == step(run, "--which", "20") == 20
    assert step(root / "best") == step(run, "--which", "best") == step(run, "--which", "10") == 10
    there = "there are the steps 10 (best), 20; --which latest takes the newest that is whole"
    for which, code, said in (("15", 3, f"step 15 of {run} is not there: no folder {root}/step-00000015; {there}"),
                              ("newest", 2, "--which newest is not latest, best or the number of a step")):
        assert main([str(run), "--which", which, "--output", str(output), "--force"]) == code
        assert said in capsys.readouterr().err


def test_a_source_that_is_none_is_told(tmp_path):
    (tmp_path / "w.pt").touch()
    in_run(tmp_path / "run")
    for source, said in (("w.pt", "w.pt: a file, and no such folder; give a run folder, one of its checkpoints/step-"),
                         ("none/checkpoints/best", f"{tmp_path}/none: no such folder"),
                         ("run/checkpoints", "checkpoints holds no checkpoint.json: it is not a complete"),
                         ("run/checkpoints/best", f"{tmp_path}/run has no best checkpoint")):
        with pytest.raises(DataError, match=said):
            consolidate(tmp_path / source, tmp_path / "w.safetensors")


def test_an_average_that_was_not_kept_is_told(tmp_path):
    with pytest.raises(SettingsError, match="without an average of weights.*leave --ema out"):
        consolidate(in_run(tmp_path / "run", described=info(ema=False)), tmp_path / "w.safetensors", ema=True)


# ---- the command


def test_the_command_says_what_it_wrote_and_returns_the_code_of_an_error(tmp_path, capsys):
    run, output = in_run(tmp_path / "run"), tmp_path / "w.safetensors"
    assert main([str(run), "--output", str(output), "--ema", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == (f"{output}: vir_tiny_patch16_224, EMA weights of step 10 in bf16, "
                                       f"{output.stat().st_size / 1e6:.1f} MB\n")
    assert main([str(run), "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"vir-consolidate: {output} exists; ")
    assert main([str(run), "--output", str(output), "--force"]) == 0
    assert ", raw weights of step 10 in fp32, " in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "other.safetensors")]) == 3
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_leaves_what_was_there_and_no_other_file(tmp_path, capsys, monkeypatch, number):
    run, output = in_run(tmp_path / "run"), tmp_path / "w.safetensors"
    output.write_text("precious")
    monkeypatch.setattr(tensor_files, "_compare", lambda *args: os.kill(os.getpid(), number))
    assert main([str(run), "--output", str(output), "--force"]) == 128 + number
    assert capsys.readouterr().err == f"vir-consolidate: interrupted before {output} was whole\n"
    assert output.read_text() == "precious" and sorted(path.name for path in tmp_path.iterdir()) == [
        "run", "w.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_number_that_fp16_cannot_hold_is_told_with_its_tensor(tmp_path):
    for name in ("a.weight", "scale"):
        (content,) = stage_0().values()
        content["module"] = dict(content["module"]) | {name: content["module"][name] * 0 + 7e4}
        folder = write(tmp_path / name, {MODEL_FILE[0]: content})
        with pytest.raises(SettingsError, match=f"no more than 65504, and {name} has 70000; give --dtype bf16"):
            consolidate(folder, tmp_path / "w.safetensors", dtype="fp16")
        assert not (tmp_path / "w.safetensors").exists()
        consolidate(folder, tmp_path / f"{name}.safetensors", dtype="bf16")


def test_a_link_that_leads_nowhere_is_something_that_exists(tmp_path):
    output = tmp_path / "w.safetensors"
    output.symlink_to(tmp_path / "unmounted" / "w.safetensors")
    with pytest.raises(SettingsError, match="w.safetensors exists; .*--force"):
        consolidate(in_run(tmp_path / "run"), output)
    assert output.is_symlink()


# ---- files of a stranger, whose checksums are right


OPTIMIZER = {1: "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", 3: "zero_pp_rank_1_mp_rank_00_optim_states.pt"}


@pytest.mark.parametrize("content", [[], "text", {}, {"module": 3, "buffer_names": 3, "param_shapes": [3]},
                                     {"module": {}, "buffer_names": [], "optimizer": 3, "param_shapes": 3},
                                     {"module": {"x": 3}, "buffer_names": ["x"]}, {"optimizer_state_dict": []}],
                         ids=str)
@pytest.mark.parametrize("stage, victim", [(0, MODEL_FILE[0]), (1, MODEL_FILE[0]), (1, OPTIMIZER[1]),
                                           (3, MODEL_FILE[3]), (3, OPTIMIZER[3])])
def test_a_file_that_holds_something_else_is_told_with_its_path(tmp_path, stage, victim, content):
    folder = write(tmp_path / "c", files_of(stage, 2) | {victim: content}, info(zero_stage=stage))
    with pytest.raises(CheckpointError, match=f"{folder / victim} does not hold what a file of a checkpoint must"):
        consolidate(folder, tmp_path / "w.safetensors")


def test_a_file_of_a_rank_without_its_share_of_the_frozen_weights_is_told_with_its_path(tmp_path):
    files, second = stage_3(2), "zero_pp_rank_1_mp_rank_00_model_states.pt"
    files[MODEL_FILE[3]] |= {"frozen": ["c"], "frozen_param_shapes": {"c": torch.Size([2])},
                             "frozen_param_fragments": {"c": torch.ones(1)}}
    folder = write(tmp_path / "c", files, info(zero_stage=3))
    with pytest.raises(CheckpointError, match=f"no model file of rank 1: checkpoint.json does not list {second}"):
        consolidate(folder, tmp_path / "w.safetensors")
    folder = write(tmp_path / "d", files | {second: {"frozen": ["c"]}}, info(zero_stage=3))
    with pytest.raises(CheckpointError, match=f"{folder / second} does not hold what a file of a checkpoint must"):
        consolidate(folder, tmp_path / "w.safetensors")


@pytest.mark.parametrize("stage", [1, 3])
def test_what_a_rank_lacks_of_a_parameter_is_told_by_name_and_folder(tmp_path, stage):
    files = files_of(stage, 2)
    saved = files[OPTIMIZER[stage]]["optimizer_state_dict"]
    saved["single_partition_of_fp32_groups" if stage == 1 else "fp32_flat_groups"] = [torch.ones(0)] * 2
    saved["base_optimizer_state" if stage == 1 else "optimizer_state_dict"]["state"] = {0: {}, 1: {}}
    folder = write(tmp_path / "c", files, info(zero_stage=stage))
    with pytest.raises(CheckpointError, match=f"^{folder}: weight of a.weight cannot be read: the partitions hold "):
        consolidate(folder, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=f"^{folder}: ema of a.(bias|weight) cannot be read: KeyError"):
        consolidate(folder, tmp_path / "w.safetensors", ema=True)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_file_that_is_not_listed_is_never_opened_and_hinders_nothing(tmp_path, stage):
    folder = write(tmp_path / "c", files_of(stage, 2), info(zero_stage=stage))
    strays = [folder / f"{kind}{OPTIMIZER[3]}" for kind in ("copy_of_", "fp16_")] + [
        folder / f"zero_pp_rank_{rank}_{MODEL_FILE[0]}" for rank in (1, 2)]
    for stray in strays:
        stray.write_bytes(b"damaged")
    consolidate(folder, tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == {*WEIGHTS, "scale"}


@pytest.mark.parametrize("stage, victim, said", [
    (0, MODEL_FILE[0], "no model file of rank 0: checkpoint.json does not list mp_rank_00_model_states.pt"),
    (3, MODEL_FILE[3], "no model file of rank 0: checkpoint.json does not list zero_pp_rank_0_mp_rank_00_model_states"),
    (1, OPTIMIZER[1], "0 optimizer files of rank 1, it must have one: checkpoint.json lists none"),
    (3, OPTIMIZER[3], "0 optimizer files of rank 1, it must have one: checkpoint.json lists none")])
def test_a_needed_file_that_lies_there_unlisted_is_not_taken(tmp_path, stage, victim, said):
    files = files_of(stage, 2)
    content = files.pop(victim)
    folder = write(tmp_path / "c", files, info(zero_stage=stage))
    torch.save(content, folder / victim)
    with pytest.raises(CheckpointError, match=f"^{folder} has {said}"):
        consolidate(folder, tmp_path / "w.safetensors")


def test_a_world_of_more_ranks_than_memory_has_room_for_is_told(tmp_path):
    folder = write(tmp_path / "c", stage_1_2(2), info(zero_stage=1, world_size=2**62))
    with pytest.raises(CheckpointError, match="has 0 optimizer files of rank 2, it must have one"):
        consolidate(folder, tmp_path / "w.safetensors")


# ---- tools/benchmark_consolidation.py


@pytest.fixture
def benchmark_consolidation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_consolidation").main


def test_the_time_and_memory_beside_zero_to_fp32(tmp_path, benchmark_consolidation, capsys):
    run, output = in_run(tmp_path / "run", files_of(2, 2), described=info(zero_stage=2)), tmp_path / "c.json"
    assert benchmark_consolidation([str(run), "--folder", str(tmp_path), "--rounds", "1", "--json", str(output)]) == 0
    content = json.loads(output.read_text())
    assert [row[3] for row in content["rows"]] == [*SIDES, f"{OURS}, RLIMIT_DATA 2000 MB"]
    (of_run,) = content["runs"]
    (measured,) = of_run["rounds"]
    assert of_run["stage"] == 2 and of_run["largest_bytes"] == 4 * 15 and measured.keys() == set(SIDES)
    assert all(0 < side["import_bytes"] <= side["peak_bytes"] for side in measured.values())
    assert f"| {' | '.join(content['rows'][0])} |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "run"]


@pytest.mark.parametrize("words, code, said", [
    (["none", "--rounds", "0"], 2, "--rounds is 0"),
    (["none", "--folder", "nowhere"], 3, "--folder nowhere is no folder; make it"),
    (["none"], 3, "none has no checkpoint; make one as the head of tools/benchmark_consolidation.py says")])
def test_what_cannot_be_measured_is_told(words, code, said, benchmark_consolidation, capsys):
    assert benchmark_consolidation(words) == code
    assert said in capsys.readouterr().err
