"""tools/benchmark_model.py on tiny sizes: every peer has its row, and ratios follow from the times."""

import importlib
import json
import os
import re
import socket
import sys
import time
from urllib.request import Request, urlopen

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vir.models  # noqa: F401, registers the models
from support.launchers import ROOT, call
from vir.benchmarks import evaluation, traffic
from vir.benchmarks.file_server import Answer, answers, serving
from vir.benchmarks.model import free_mixer
from vir.benchmarks.stopwatch import Limits, Stopwatch

torch.set_num_threads(1)


def run(*args):
    """What the command prints, progress and table."""
    done = call(sys.executable, "tools/benchmark_model.py", *args)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_model").main


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    return [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines[2:]]


def assert_picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_the_model_beside_vit_and_a_free_mixer(tmp_path):
    printed = run("model", "--model", "vir_tiny_patch16_224",
                  "--model-args", '{"depth": 1, "retention_norm": "layernorm"}',
                  "--sizes", 16, 32, "--batch-size", 2, "--rounds", 2, "--threads", 1, "--dtypes", "fp32",
                  "--output", tmp_path / "out")
    table = rows_of(printed)
    assert (tmp_path / "out" / "model.md").read_text() in printed
    assert "torch " + torch.__version__ in printed and "--sizes 16 32 --batch-size 2" in printed
    names = ["vit", "auto", "parallel", "chunkwise", "free mixer"]
    assert [row["row"] for row in table] == [*names, "stream", *names, "stream", *names, *names]
    assert [row["size"] for row in table] == ["16"] * 6 + ["32"] * 6 + ["16"] * 5 + ["32"] * 5

    results = json.loads((tmp_path / "out" / "model.json").read_text())["results"]
    for row, result in zip(table, results, strict=True):
        same = [r for r in results if (r["size"], r["direction"]) == (result["size"], result["direction"])]
        vit, free = (next(r["ms"] for r in same if r["row"] == name) for name in ("vit", "free mixer"))
        assert float(row["× vit"]) == pytest.approx(vit / result["ms"], abs=0.006)
        assert float(row["of free mixer"]) == pytest.approx(free / result["ms"], abs=0.006)
        assert float(row["per second"]) == pytest.approx(2000 / result["ms"], rel=1e-3)
        low, high = result["ms_quartiles"]
        assert 0 < low <= result["ms"] <= high
    assert_picture(tmp_path / "out" / "model.png")


def test_the_operator_beside_attention(tmp_path):
    printed = run("operator", "--sizes", 17, 33, "--batch-size", 1, "--heads", 2, "--width", 8, "--rounds", 1,
                  "--passes", "training", "--rows", "sdpa", "auto", "recurrent", "2-D parallel", "--output", tmp_path)
    order = [(row["size"], row["dtype"], row["row"]) for row in rows_of(printed)]
    square, other = ("sdpa", "auto", "recurrent", "2-D parallel"), ("sdpa", "auto", "recurrent")
    assert order == [(size, dtype, row) for dtype in ("fp32", "bf16")
                     for size, rows in (("17", square), ("33", other)) for row in rows]
    assert_picture(tmp_path / "operator.png")


def test_memory_is_that_of_the_largest_moment():
    """The parallel form of 1,025 tokens holds a matrix of 4 MiB for each head."""
    printed = run("operator", "--sizes", 1025, "--batch-size", 1, "--heads", 8, "--dtypes", "fp32",
                  "--passes", "forward", "--rounds", 0, "--rows", "sdpa", "parallel", "chunkwise")
    peak = {row["row"]: float(row["peak MiB"]) for row in rows_of(printed)}
    assert 30 < peak["parallel"] < 150 and peak["chunkwise"] < peak["parallel"]


def test_runs_beyond_the_limits_are_told_and_left_out():
    printed = run("operator", "--sizes", 4097, 4098, "--batch-size", 1, "--heads", 8, "--dtypes", "fp32", "--passes",
                  "forward", "--rounds", 0, "--rows", "chunkwise", "parallel", "--memory-gib", 0.3, "--row-seconds", 0)
    table = {(row["row"], row["size"]): row["ms (quartiles)"] for row in rows_of(printed)}
    assert table["parallel", "4097"] == "out of memory"
    assert table["chunkwise", "4098"] == "over time"
    assert float(table["chunkwise", "4097"].split()[0]) > 0


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), torch.AcceleratorError("an illegal memory access"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("could not create a memory object")], ids=repr)
def test_only_a_lack_of_memory_is_told_as_one_and_no_failure_keeps_the_other_rows_back(error):
    def run():
        raise error

    watch = Stopwatch(Limits(rounds=0), torch.device("cpu"))
    bad, good = watch.results({"bad": run, "good": lambda: None}, "forward", size=1, batch=1, dtype="fp32")
    assert bad.failed == (f"failed: {error}" if "illegal" in str(error) else "out of memory") and bad.ms is None
    assert good.failed is None and good.ms > 0


def test_a_kernel_that_is_not_there_is_told_in_its_row_and_replaced_by_nothing():
    printed = run("operator", "--sizes", 17, "--batch-size", 1, "--dtypes", "fp32", "--passes", "forward",
                  "--rounds", 0, "--rows", "fla", "2-D fused", "fused", "auto")
    table = {row["row"]: row["ms (quartiles)"] for row in rows_of(printed)}
    assert table["fla"] == "failed: flash-linear-attention is not installed, or does not support this"
    assert table["fused"] == table["2-D fused"] == "failed: the fused kernel does not support this"
    assert float(table["auto"].split()[0]) > 0


def test_what_was_measured_before_an_error_is_kept(tmp_path, main):
    assert main(["model", "--sizes", "32", "33", "--batch-size", "1", "--rounds", "0", "--dtypes", "fp32", "--passes",
                 "forward", "--rows", "auto", "--model-args", '{"depth": 1}', "--output", str(tmp_path)]) == 2
    results = json.loads((tmp_path / "model.json").read_text())["results"]
    assert [result["size"] for result in results] == [32]


def test_the_free_mixer_mixes_nothing():
    model = free_mixer(timm.create_model("vir_tiny_patch16_224", img_size=32, depth=2)).eval()
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[:, :, :16, :16] += 1
    changed = (model.forward_features(other) != model.forward_features(images)).any(-1)[0]
    assert changed.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("args, message", [
    (("model", "--rows", "resnet"), "--rows has 'resnet'; choose from vit, auto"),
    (("operator", "--sizes", 0), "--sizes has 0; a size is at least 1"),
    (("model", "--model", "resnet18", "--rows", "auto", "--sizes", 32), "'resnet18'; it must be one of ours: vir2d_"),
    (("model", "--rows", "auto", "--sizes", 33), "img_size 33x33 is not divisible by patch_size 16x16"),
    (("model", "--device", "cuda:77"), "--device is 'cuda:77', which torch .* cannot use here"),
    (("model", "--device", "tpu"), "--device is 'tpu', which torch .* cannot use here"),
])
def test_errors_name_the_value_and_the_choices(args, message, main, capsys):
    assert main([str(word) for word in args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, main, capsys):
    (tmp_path / "file").touch()
    args = ["operator", "--sizes", "5", "--batch-size", "1", "--rounds", "0", "--output", str(tmp_path / "file")]
    assert main(args) == 3
    error, = capsys.readouterr().err.splitlines()  # and no time of a row: nothing was measured before
    assert error.endswith("file: File exists; choose another folder")


# ---- tools/benchmark_convert.py


def test_conversion_beside_tar_and_sha256sum(tmp_path):
    done = call(sys.executable, "tools/benchmark_convert.py", "--folder", tmp_path, "--images", 40, "--image_bytes",
                9000, "--rounds", 1, "--json", tmp_path / "convert.json")
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / "convert.json").read_text())
    assert [row[0] for row in content["rows"]] == [
        "tar cf, sha256sum", "vir-convert --workers 1", "vir-convert --workers 2", "sha256sum, 2 at a time",
        "vir-verify --jobs 2", "vir-index --jobs 1"]
    of_round, = content["seconds"]
    ratio = of_round["tar cf, sha256sum"] / of_round["vir-convert --workers 2"]
    assert content["rows"][2][1].startswith(f"{40 / of_round['vir-convert --workers 2']:,.0f} (")
    assert content["rows"][2][3] == f"{ratio:.2f}" and content["rows"][0][3] == content["rows"][3][3] == "1.00"
    assert f"| vir-convert --workers 2 | {content['rows'][2][1]} |" in done.stdout
    assert os.listdir(tmp_path) == ["convert.json"]


# ---- tools/benchmark_evaluation.py


@pytest.fixture
def benchmark_evaluation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_evaluation").main


def test_evaluation_beside_timms_loop(tmp_path, benchmark_evaluation, monkeypatch, capsys):
    words = ["--folder", str(tmp_path), "--images", "9", "--image_bytes", "9000", "--rounds", "1", "--models",
             "test_vit", "--batch_size", "4"]
    assert benchmark_evaluation([*words, "--json", str(tmp_path / "e.json")]) == 0
    content = json.loads((tmp_path / "e.json").read_text())
    assert [row[:2] for row in content["rows"]] == [["test_vit", way] for way in (
        "vir-evaluate, shards", "vir-evaluate, folder", "timm's loop, folder")]
    assert f"| {' | '.join(content['rows'][0])} |" in capsys.readouterr().out
    assert content["rows"][2][3] == "1.00" and os.listdir(tmp_path) == ["e.json"]
    monkeypatch.setattr(evaluation, "accuracy", lambda output, target, topk: (100 * torch.ones(1), torch.ones(1)))
    assert benchmark_evaluation(words) == 3
    assert "test_vit: the ways of evaluation disagree" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--images", "0"], "must be at least 1"), (["--models", "no_vit"], "timm knows no no_vit"),
    (["--folder", "nowhere"], "--folder nowhere is no folder; make it")])
def test_an_evaluation_that_cannot_be_measured_is_told(words, message, benchmark_evaluation, capsys):
    assert benchmark_evaluation(words) in (2, 3)
    assert message in capsys.readouterr().err


# ---- tools/benchmark_traffic.py


@pytest.fixture
def benchmark_traffic(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_traffic").main


def test_the_server_counts_what_it_sends(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(64 << 20))
    log = tmp_path / "log"
    with serving(tmp_path, log) as url:
        assert len(urlopen(f"{url}/0/a.tar", timeout=10).read()) == 64 << 20
        assert len(urlopen(Request(f"{url}/0/a.tar", headers={"Range": "bytes=5-14"}), timeout=10).read()) == 10
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as client:
            client.sendall(b"GET /0/a.tar HTTP/1.1\r\n\r\n")
            client.recv(1 << 16, socket.MSG_WAITALL)
        end = time.monotonic() + 10
        while not log.is_file() or len(answers(log)) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
    part, broken_off, whole = sorted(answers(log), key=lambda answer: answer.sent_bytes)
    assert part == Answer("a.tar", 10, 64 << 20) and whole == Answer("a.tar", 64 << 20, 64 << 20)
    assert 60_000 < broken_off.sent_bytes < 64 << 20


def test_downloads_per_shard_measured_beside_simulated(tmp_path, benchmark_traffic, monkeypatch, capsys):
    monkeypatch.setattr(traffic, "_BATCH", 20)
    monkeypatch.setattr("vir.planning.images.IMAGENET", 125_200)
    assert benchmark_traffic(["--folder", str(tmp_path), "--images", "250", "--image_bytes", "9000",
                              "--samples_per_shard", "10", "--step_ms", "60", "--nodes", "1,24",
                              "--json", str(tmp_path / "traffic.json")]) == 0
    content = json.loads((tmp_path / "traffic.json").read_text())
    rows = [dict(zip(traffic.COLUMNS, row, strict=True)) for row in content["rows"]]
    fetched = {(row[""], row["cache of a node"]): [float(cell) for cell in list(row.values())[-3:]] for row in rows[:8]}
    # The 13th step ends in the next epoch: 260 samples of 250.
    assert fetched["simulated", "none"] == [0, 104, 1.04] and fetched["simulated, epoch 2", "all"] == [0, 0, 0]
    assert fetched["simulated", "a third"][0] >= 1 and fetched["simulated, epoch 1", "all"] == [1, 0, 1]
    downloads, in_parts, all_bytes = fetched["measured", "none"]
    assert downloads == 0 and in_parts > 70 and all_bytes >= in_parts / 100  # the bytes of the images, and gaps
    downloads, in_parts, all_bytes = fetched["measured, epoch 1", "all"]
    assert downloads == 1 and in_parts > 0 and all_bytes == pytest.approx(1 + in_parts / 100, abs=0.05)
    assert fetched["measured, epoch 2", "all"] == [0, 0, 0]
    assert fetched["measured", "a third"][0] < 3 and fetched["measured", "a third"][2] > 0.9
    assert content["rows"][8] == ["simulated", "101 × 1,251", "200 GB", "1", "1,024", "64", "2,500", "101.0", "1.000",
                                  "0.00", "1.000"]
    assert [(row["nodes"], row["global batch"]) for row in rows[8:]] == [
        ("1", "1,024"), ("1", "1,024"), ("24", "8,184"), ("24", "8,184")] * 2
    assert all(1 <= float(row["downloads per shard"]) < 1.5 for row in rows[8:])
    assert "| measured | 25 × 10 | none | 1 | 20 | 64 | 2,500 | 25.0 | 0.000 |" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["traffic.json"]


@pytest.mark.parametrize("words, message", [
    (["--step_ms=-1"], "--step_ms must be at least 0 and finite, got -1"), (["--nodes", "0"], "must be at least 1"),
    (["--folder", "nowhere"], "--folder nowhere is no folder; make it")])
def test_traffic_that_cannot_be_measured_is_told(words, message, benchmark_traffic, capsys):
    assert benchmark_traffic(words) in (2, 3)
    assert message in capsys.readouterr().err
