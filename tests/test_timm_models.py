"""Any timm model, with the same commands: an attention network, a convolutional one, one with batch norms."""

import pytest
import timm
import torch

import vir.models
from support.launchers import HANGS
from support.tiny_runs import command, launch, train_events, weights
from vir.checkpoints.consolidate import consolidate
from vir.checkpoints.names import newest
from vir.engine.batch_norm import batch_norms
from vir.evaluate import main as evaluate
from vir.reports.metrics import read_metrics

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

MODELS = {"test_vit": "zero3_bf16_ckpt", "test_convnext": "zero2_fp32", "test_resnet": "zero2_bf16"}
STEPS = 6


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("timm")
    jobs = [command(shards, tmp / name, config, "--model.name", name, "--model.img_size", "64", "--model.args", "{}",
                    "--model.drop_path_rate", "0", steps=STEPS, every=3) for name, config in MODELS.items()]
    jobs.append(command(shards, tmp / "refused", "zero3_bf16_ckpt", "--model.name", "test_resnet", "--model.img_size",
                        "64", "--model.args", "{}", "--model.drop_path_rate", "0"))
    codes, said = launch(tmp, jobs)
    assert codes == [0, 0, 0, 2], said[-5000:]
    assert "ResNet has batch norms, whose running statistics recomputation would update twice" in said
    return tmp


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_consolidates_and_evaluates(name, runs, shards, tmp_path, capsys):
    run = runs / name
    assert [event["step"] for event in train_events(run)] == list(range(1, STEPS + 1))
    seen = [event for event in read_metrics(run) if event["kind"] == "eval"][-1]
    for ema, prefix in ((False, ""), (True, "ema_")):
        consolidate(run, tmp_path / "w.safetensors", ema=ema, force=True)
        model = timm.create_model(name, num_classes=10)
        assert vir.models.load(tmp_path / "w.safetensors").state_dict().keys() == model.state_dict().keys()
        if MODELS[name].endswith("fp32"):  # in bf16 training sees the rounded weights
            assert evaluate(["--weights", str(tmp_path / "w.safetensors"), "--data", str(shards / "val"), "--workers",
                             "1"]) == 0
            assert f"top-1 {seen[prefix + 'top1']:.2f} %" in capsys.readouterr().out


def test_running_statistics_are_those_of_all_ranks_and_their_average_is_kept(runs, tmp_path):
    """Of the same step in both ranks' files, and in the consolidated average."""
    run, (raw, ema) = runs / "test_resnet", (weights(runs / "test_resnet", STEPS, tmp_path, ema=ema)
                                             for ema in (False, True))
    means = [name for name in raw if name.endswith("running_mean")]
    assert len(means) == len(batch_norms(timm.create_model("test_resnet")))
    for name in means:
        assert raw[name].dtype == torch.float32 and raw[name].abs().max() > 0
        assert not torch.equal(raw[name], ema[name]) and ema[name].abs().max() > 0
    assert int(raw[means[0].replace("running_mean", "num_batches_tracked")]) == 2 * STEPS  # two micro-batches a step
    assert newest(run).name == f"step-{STEPS:08d}"
