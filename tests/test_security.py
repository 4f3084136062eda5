"""Nothing in data and settings runs, and nothing that a run keeps has a secret: what SECURITY.md says, which also names
the tests of weights and checkpoints.

Each payload makes a folder. That it is a live one is seen by letting it run at the end.
"""

import ast
import importlib
import io
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from support.http_server import HttpServer
from support.launchers import ROOT
from support.payload import Payload, module
from support.tiny_runs import alone, command
from vir import flags
from vir.config import DataConfig, ModelConfig, RunConfig
from vir.data.convert import Settings, convert
from vir.data.decode import FOREIGN, FORMATS, decode_image
from vir.data.foreign import index_shards
from vir.data.reader import ShardReader
from vir.errors import DataError, SettingsError
from vir.models.build import build
from vir.run_folder import CONFIG
from vir.training.prepare import prepare

TINY = ModelConfig(name="vir_tiny_patch16_224", img_size=28,
                   args=dict(patch_size=14, embed_dim=16, depth=1, num_heads=2))
REQUIRED = ["--deepspeed_config", "zero2_fp32", "--output", "runs/a", "--data.train", "t"]


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "it-ran"


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


# ---- settings


CALL = "{class_path: %s.Thing, init_args: {a: 1}}"


@pytest.mark.parametrize("place, text", [
    ("file", "model: {args: {x: %s}}"), ("file", "model: {args: {x: [%s]}}"), ("file", "model: %s"), ("file", "%s"),
    ("file", "augment: {auto_augment: %s}"), ("section", "args: {x: %s}"), ("flag", "--model.args={x: %s}"),
    ("flag", "--model.args.x=%s"), ("flag", "--model=%s"), ("flag", "--model.args.class_path=%s.Thing")])
def test_no_class_that_settings_name_is_imported_or_built(place, text, tmp_path, monkeypatch):
    name = f"payload{abs(hash((place, text)))}"
    imported, built = module(tmp_path, name, monkeypatch)
    said = text % (name if text.endswith(".Thing") else CALL % name)
    (tmp_path / "settings.yaml").write_text(said)
    words = {"file": ["--config", str(tmp_path / "settings.yaml")], "flag": [said],
             "section": ["--model", str(tmp_path / "settings.yaml")]}[place]
    try:
        config = flags.parse([*REQUIRED, *words])
    except SettingsError:
        pass
    else:  # text and numbers, which timm refuses as arguments
        with pytest.raises(SettingsError):
            build(config.model, ["a", "b"])
    assert not imported.exists() and not built.exists()
    importlib.import_module(name).Thing()
    assert imported.exists() and built.exists()


def test_no_tag_of_yaml_is_obeyed(marker, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"data: !!python/object/apply:os.mkdir [{marker}]\n")
    with pytest.raises(SettingsError):
        flags.parse([*REQUIRED, "--config", str(tmp_path / "settings.yaml")])
    assert not marker.exists()
    yaml.unsafe_load((tmp_path / "settings.yaml").read_text())
    assert marker.exists()


def test_the_settings_that_a_run_folder_keeps_are_read_as_data(marker, tmp_path):
    split = make_split(tmp_path)
    index_shards(str(split))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(f"data: !!python/object/apply:os.mkdir [{marker}]\n")
    with pytest.raises(SettingsError, match=f"{CONFIG} cannot be read"):
        prepare(RunConfig(output=str(tmp_path / "run"), deepspeed_config="zero2_fp32", model=TINY,
                          data=DataConfig(train=str(split))))
    assert not marker.exists()


@pytest.mark.parametrize("spec", ["pipe:mkdir {0}", "|mkdir {0}", "mkdir {0} |", "exec:mkdir {0}"])
def test_no_command_in_the_place_of_data_is_run(spec, marker, tmp_path):
    with pytest.raises(SettingsError, match="asks to run a command"):
        prepare(RunConfig(output=str(tmp_path / "run"), deepspeed_config="zero2_fp32", model=TINY,
                          data=DataConfig(train=spec.format(marker))))
    assert not marker.exists()


# ---- data


def make_split(folder: Path, more: dict[str, bytes] = {}) -> Path:
    """A tar of eight images in two classes, each with `more` beside it, by the ends of their names."""
    split = folder / "train"
    split.mkdir()
    with tarfile.open(split / "train-000000.tar", "w") as tar:
        for number in range(8):
            for end, data in {"jpg": jpeg(number), "cls": b"%d" % (number % 2), **more}.items():
                member = tarfile.TarInfo(f"{number:03d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return split


def read_all(split: Path) -> int:
    reader = ShardReader(split)
    return sum(len(reader.read(number)) > 0 for number in range(len(reader)))


def test_no_pickle_in_a_shard_runs(marker, tmp_path):
    """The webdataset library unpickles these, by the ends of their names."""
    content = pickle.dumps(Payload(marker))
    file = io.BytesIO()
    torch.save(Payload(marker), file)
    split = make_split(tmp_path, {"pyd": content, "pickle": content, "pth": file.getvalue()})
    index_shards(str(split))
    assert read_all(split) == 8 and not marker.exists()


def test_no_pickle_in_the_place_of_an_index_runs(marker, tmp_path):
    split = make_split(tmp_path)
    index_shards(str(split))
    np.save(split / "index.npy", np.array([Payload(marker)]), allow_pickle=True)
    with pytest.raises(DataError, match="is no index of shards"):
        read_all(split)
    assert not marker.exists()
    np.load(split / "index.npy", allow_pickle=True)
    assert marker.exists()


def test_no_pickle_in_the_marks_of_a_conversion_runs(marker, tmp_path, monkeypatch):
    for number in range(4):
        folder = tmp_path / "images" / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(jpeg(number))

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vir.data.convert.write_split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "images", "train", tmp_path / "shards", Settings(samples_per_shard=2), workers=1)
    marks = list((tmp_path / "shards").rglob("*.done"))
    assert marks
    for mark in marks:
        with open(mark, "wb") as file:
            np.savez(file, rows=np.array([Payload(marker)]), states=np.zeros(1), about=np.zeros(1, np.uint8))
    convert(tmp_path / "images", "train", tmp_path / "shards", Settings(samples_per_shard=2), workers=1)
    assert not marker.exists() and read_all(tmp_path / "shards" / "train") == 4


def test_no_program_is_started_to_decode_an_image(marker, tmp_path, monkeypatch):
    """Pillow would have Ghostscript draw an EPS, whatever its name."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir -p {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for formats in (FORMATS, FORMATS + FOREIGN):
        with pytest.raises(DataError, match="neither JPEG, PNG"):
            decode_image(eps, formats)
    assert not marker.exists()
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    try:
        Image.open(io.BytesIO(eps)).load()
    except OSError:
        pass  # it drew nothing
    assert marker.exists()


# ---- what a run keeps


def test_no_file_of_a_run_and_no_line_of_it_has_a_secret_of_its_urls(shards, tmp_path):
    """User, password and signature: where all goes well, and where the shards are gone."""
    content = {f"/{path.relative_to(shards)}": path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    with HttpServer(content, login="me:geheim") as server:
        urls = [server.url(f"/{split}", user="me:geheim") + "?X-Amz-Signature=geheim" for split in ("train", "val")]
        words = command(shards, tmp_path / "run", steps=2, every=2)
        words += ["--schedule.warmup_epochs", "0", "--data.train", urls[0], "--data.val", urls[1],
                  "--data.timeout", "3", "--data.index_dir", str(tmp_path / "indexes"),
                  "--data.cache", str(tmp_path / "cache"), "--data.cache_bytes", "1GB"]
        done = alone(*words)
        assert done.returncode == 0, done.stdout[-3000:]
        assert any("geheim" in request.path for request in server.requests)
        server.content.clear()
        lost = alone(*[word.replace(str(tmp_path), str(tmp_path / "lost")) for word in words])
    assert lost.returncode != 0
    assert "geheim" not in done.stdout + lost.stdout and f"127.0.0.1:{server.port}/train" in lost.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "log.txt", "metrics.jsonl", "checkpoint.json"} <= {path.name for path in files}
    assert [path for path in files if b"geheim" in path.read_bytes()] == []
    assert [path for path in files if "geheim" in str(path)] == []


# ---- no other door


DOORS = {
    "pickle.loads": {"vir/data/executors.py"},  # a task that this program has sent to itself, by dask
    "torch.export.load": {"vir/models/export/program.py"},  # the file that it has just written
    "importlib.import_module": {"vir/data/executors.py", "vir/data/jpeg.py", "vir/data/transforms.py"},  # names of ours
    "import_module": {"vir/__init__.py"},  # likewise
}
FORBIDDEN = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.Unpickler",
             "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "torch.hub.load", "torch.jit.load",
             "joblib.load", "Image.open", *DOORS)
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "timm.models.load_state_dict":
        ("weights_only", True)}


def test_no_other_call_could_run_what_it_reads():
    """What such calls are given has been looked at above; a new one must be looked at, too."""
    found = set()
    for path in sorted([*(ROOT / "vir").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        if "benchmarks" in path.parts:
            continue
        name = str(path.relative_to(ROOT))
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            said, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            if said in SAFE and given.get(SAFE[said][0]) != str(SAFE[said][1]):
                found.add(f"{name}: {said} without {SAFE[said][0]}={SAFE[said][1]}")
            if said in FORBIDDEN and name not in DOORS.get(said, ()):
                found.add(f"{name}: {said}")
            found |= {f"{name}: {word}" for word in ("shell", "trust_remote_code") if word in given}
            if said.endswith((".extractall", ".extract", ".load_checkpoint")):
                found.add(f"{name}: {said}")
    assert found == set()


def test_every_test_that_the_note_names_is_there():
    named = re.findall(r"`(test_\w+\.py)`:\s`(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) >= 15
    missing = [(file, name) for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []
