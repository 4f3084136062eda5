"""What is told of a step is what the loader gave the run; runs with excluded samples."""

import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import assert_same
from timm.data.auto_augment import NAME_TO_OP

from support.tiny_runs import command, launch
from vir import explain
from vir.checkpoints.info import read_info
from vir.checkpoints.names import step_of
from vir.config import AugmentConfig, TrainConfig
from vir.data import explanation
from vir.data.exclusion import exclude
from vir.data.explanation import explain_step, pixels_seen
from vir.data.loader import train_batches
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.transforms import resize
from vir.flags import parse
from vir.models.build import input_for
from vir.reports import sheet
from vir.weights.spec import InputSpec

torch.set_num_threads(1)
INPUT = InputSpec(size=(3, 24, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), interpolation="bilinear", crop_pct=1.0)
TRAIN = TrainConfig(global_batch_size=48, micro_batch_size=12, seed=5)
GEOMETRIC = ("Rotate", "Shear", "Translate")
STEPS = 3


@pytest.fixture(scope="module")
def reader(shards):
    return ShardReader(shards / "train")


def order_of(reader, **more):
    return SampleOrder(TRAIN.seed, reader.shard_sizes, 4, 50, **more)


def served(reader, order, augment, step, rank=0, world=1, model_input=INPUT, train=TRAIN):
    """By loader processes."""
    return list(train_batches(
        reader, order, augment, model_input, seed=train.seed, first_step=step, last_step=step + 1,
        global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size, rank=rank,
        world_size=world, workers=1, prefetch=2, device=torch.device("cpu")))


def told(reader, order, augment, step, ranks=(0,), world=1, **more):
    return list(explain_step(reader, order, augment, INPUT, TRAIN, step, ranks, world, **more))


@pytest.mark.parametrize("world", [1, 2])
def test_the_batches_are_those_of_the_loader_and_the_samples_those_of_the_order(reader, world):
    order, augment = order_of(reader), AugmentConfig()
    found = told(reader, order, augment, 8, range(world), world)  # over the end of an epoch
    expected = [batch for rank in range(world) for batch in served(reader, order, augment, 8, rank, world)]
    assert_same([batch for batch, _ in found], expected)
    assert [(samples[0].rank, samples[0].micro) for _, samples in found] == [
        (rank, micro) for rank in range(world) for micro in range(4 // world)]
    for batch, samples in found:
        numbers = order.samples(batch.positions.numpy()).tolist()
        assert [sample.key for sample in samples] == [reader.key(number) for number in numbers]
        assert [sample.position for sample in samples] == batch.positions.tolist()
        for sample, number, label in zip(samples, numbers, batch.labels.tolist()):
            assert reader.where(number) == f"{sample.file}:{sample.key}@{sample.offset}"
            assert sample.class_name == reader.classes[label] and sample.instead_of == ()
            assert (sample.partner is None) == (sample.lam == 1)
            assert sample.partner in (None, samples[sample.place ^ 1].position)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", None])
def test_crop_flip_and_operations_make_the_pixels_that_were_served(reader, policy):
    """Done again from what is told, with timm's functions alone."""
    augment = AugmentConfig(auto_augment=policy, color_jitter=0.0)
    order, names = order_of(reader), set()
    for batch, samples in told(reader, order, augment, 2):
        for number, image, sample in zip(order.samples(batch.positions.numpy()).tolist(), batch.images, samples):
            source = Image.open(BytesIO(reader.read(number))).convert("RGB")
            assert source.size == (sample.width, sample.height)
            top, left, height, width = sample.crop.box
            pixels = np.array(source)[top:top + height, left:left + width]
            made = resize(pixels, (24, 24), sample.crop.interpolation)
            made = made.flip(-1) if sample.crop.flip else made
            names |= {op.name for op in sample.policy}
            if any(op.name.startswith(GEOMETRIC) for op in sample.policy):  # they draw a filter as well
                continue
            made = Image.fromarray(made.permute(1, 2, 0).numpy())
            for op in sample.policy:
                made = NAME_TO_OP[op.name](made, *(int(arg) if arg == int(arg) else arg for arg in op.args))
            assert torch.equal(torch.from_numpy(np.asarray(made).copy()).permute(2, 0, 1), image)
    assert bool(names) == (policy is not None)


def test_colour_jitter_is_told_in_its_order(reader):
    augment = AugmentConfig(auto_augment=None, color_jitter=0.4)
    (_, samples), *_ = told(reader, order_of(reader), augment, 0)
    assert all({op.name for op in sample.policy} == {"ColorJitter.brightness", "ColorJitter.contrast",
                                                     "ColorJitter.saturation"} for sample in samples)
    assert len({tuple(op.name for op in sample.policy) for sample in samples}) > 1


def test_the_pixels_seen_are_those_served_erased_and_mixed(reader):
    order = order_of(reader)
    plain = AugmentConfig(mixup_prob=0.0, reprob=0.0)
    for batch, _ in told(reader, order, plain, 1, micro=2):
        assert np.array_equal(pixels_seen(batch, plain, INPUT), batch.images.permute(0, 2, 3, 1).numpy())
    augment = AugmentConfig(reprob=0.5, remode="const", mixup=0.0)  # CutMix alone: pixels stay whole numbers
    (batch, samples), = told(reader, order, augment, 1, micro=2)
    images = batch.images.permute(0, 2, 3, 1).numpy().copy()
    erased = 0
    for image, sample in zip(images, samples):
        if (box := sample.erase) is not None:
            image[box.top:box.top + box.height, box.left:box.left + box.width] = np.round(np.array(INPUT.mean) * 255)
            erased += 1
    expected = images.copy()
    for sample in samples:
        if (box := sample.cut) is not None:
            part = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
            expected[sample.place][part] = images[sample.place ^ 1][part]
            assert sample.lam == pytest.approx(1 - box.height * box.width / 24 ** 2)
    seen = pixels_seen(batch, augment, INPUT)
    assert erased and np.array_equal(seen, expected) and not np.array_equal(seen, images)


def test_a_sample_in_the_place_of_an_excluded_one_says_so(reader):
    plain = order_of(reader)
    gone = np.unique(plain.samples(plain.global_batch(0, 8)))
    order = order_of(reader, exclusion=exclude(gone, reader))
    samples = [sample for _, part in told(reader, order, AugmentConfig(), 0) for sample in part]
    expected = {int(position): reader.key(int(number)) for position, number in
                zip(range(8), plain.samples(np.arange(8)))}
    assert {sample.position: sample.instead_of[0] for sample in samples if sample.instead_of} == expected
    assert not {sample.key for sample in samples} & set(expected.values())


# ---- runs


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> dict[str, Path]:
    """A run of one rank without some samples, taken up with other lists; and one of two ranks."""
    tmp = tmp_path_factory.mktemp("runs")
    reader = ShardReader(shards / "train")
    lists = {"few": [reader.key(i) for i in range(0, 400, 3)], "more": [reader.key(i) for i in range(0, 400, 2)]}
    for name, keys in lists.items():
        (tmp / name).write_text("\n".join(keys))

    def of(name, *more, steps=STEPS):
        return command(shards, tmp / name, "zero0_fp32", *more, steps=steps, every=2)

    codes, said = launch(tmp / "one", [
        of("alone", "--data.exclude", str(tmp / "few")),
        of("alone", "--data.exclude", str(tmp / "more")), of("alone"),
        of("alone", "--data.exclude", str(tmp / "more"), "--accept_config_change", "true", steps=STEPS + 2),
        of("refused", "--data.exclude", str(tmp / "none"))], ranks=1)
    assert codes == [0, 2, 2, 0, 2], said[-3000:]
    (tmp / "said").write_text(said)
    codes, more = launch(tmp / "two", [of("pair", "--data.exclude", str(tmp / "few"))])
    assert codes == [0], more[-3000:]
    return {name: tmp / name for name in ("alone", "pair", "few", "more", "said")}


def objects(capsys, *words):
    assert explain.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name, ranks, step, excluded", [
    ("alone", 1, 2, "few"), ("alone", 1, 5, "more"), ("pair", 2, 2, "few")])
def test_a_step_of_a_run_is_told_from_its_folder(runs, capsys, name, ranks, step, excluded, reader):
    said = objects(capsys, runs[name], step)  # of the first one they were changed after it
    assert (said["step"], said["ranks"], said["micro_batch_size"], len(said["samples"])) == (step, ranks, 12, 48)
    config = parse(["--config", str(runs[name] / "config.yaml")])
    gone = reader.find(runs[excluded].read_text().split())
    order = SampleOrder(config.train.seed, reader.shard_sizes, *config.data.order,
                        exclude(np.array(sorted(gone.values())), reader))
    model_input = input_for(config.model, len(reader.classes))
    expected = [batch for rank in range(ranks) for batch in served(
        reader, order, config.augment, step - 1, rank, ranks, model_input, config.train)]
    assert [sample["position"] for sample in said["samples"]] == [
        position for batch in expected for position in batch.positions.tolist()]
    assert [sample["lam"] for sample in said["samples"]] == [
        lam for batch in expected for lam in batch.lam.tolist()]
    assert not gone.keys() & {sample["key"] for sample in said["samples"]}
    assert any(sample["instead_of"] for sample in said["samples"])


def test_the_input_is_that_of_the_model_that_was_trained(runs, reader):
    config = parse(["--config", str(runs["pair"] / "config.yaml")])
    info = read_info(next((runs["pair"] / "checkpoints").glob("step-*")))
    assert input_for(config.model, len(reader.classes)) == info.model.input
    odd = replace(config.model, name="resnet18", img_size=32, args={}, std=(0.1, 0.2, 0.3))
    assert (input_for(odd, 3).size, input_for(odd, 3).std) == ((3, 32, 32), (0.1, 0.2, 0.3))


def test_text_and_sheet(runs, capsys, tmp_path):
    assert explain.main([str(runs["pair"]), "3", "--rank", "1", "--sheet", str(tmp_path / "s.png")]) == 0
    headline, *lines = capsys.readouterr().out.splitlines()
    assert headline == "step 3: positions 96 to 143, epoch 0.240; 48 samples = 2 x 12 x 2 ranks"
    assert [line for line in lines if not line.startswith("  ")] == [
        "rank 1, micro-batch 0", "rank 1, micro-batch 1", str(tmp_path / "s.png")]
    assert len(lines) == 27 and " of 28x28 " in lines[1] and " position " in lines[1]
    assert Image.open(tmp_path / "s.png").size > (400, 400)


def test_another_list_than_that_of_the_checkpoint_is_refused(runs):
    said = runs["said"].read_text()
    assert f"or without other samples than --data.exclude {runs['more']} names; give those" in said
    assert "or without other samples than --data.exclude (not given) names; give those" in said
    assert "none cannot be read: No such file or directory; give a text file" in said
    assert f"134 samples are left out, as --data.exclude {runs['few']} says" in said


@pytest.fixture()
def copy(runs, tmp_path):
    """A function that copies the run that was taken up with another list, with the checkpoints of some steps alone."""
    def copied(*steps):
        folder = shutil.copytree(runs["alone"], tmp_path / "a copy")
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if step_of(checkpoint) not in steps:
                shutil.rmtree(checkpoint)
        return folder
    return copied


def keys(said):
    return [sample["key"] for sample in said["samples"]]


def test_a_step_whose_checkpoints_are_gone_is_told_with_a_warning_and_with_the_list_that_is_given(runs, copy, capsys):
    expected, folder = keys(objects(capsys, runs["alone"], 2)), copy(4, 5)
    assert explain.main([str(folder), "2"]) == 0
    said = capsys.readouterr().err
    assert "step 2 is told with the settings of the checkpoint of step 4; none from before it" in said
    assert "give those of then as flags" in said and "other images" not in said
    assert explain.main([str(folder), "2", "--json", "--data.exclude", str(runs["few"])]) == 0
    told = capsys.readouterr()
    assert keys(json.loads(told.out)) == expected
    assert "as its checkpoint of step 4 says; step 2 is told right only if they were changed between" in told.err
    assert explain.main([str(folder), "5"]) == 0 and not capsys.readouterr().err


def test_settings_that_were_changed_since_are_those_of_then_and_named(runs, copy, capsys):
    expected, folder = keys(objects(capsys, runs["alone"], 2)), copy(2, 5)
    config = (folder / "config.yaml").read_text()
    assert "  seed: 42\n" in config
    (folder / "config.yaml").write_text(config.replace("  seed: 42\n", "  seed: 7\n"))
    assert explain.main([str(folder), "2", "--json"]) == 0
    told = capsys.readouterr()
    assert keys(json.loads(told.out)) == expected
    assert (f"step 2 is told with settings of its checkpoint of step 2, changed since: data.exclude: {runs['few']} -> "
            f"{runs['more']}; ") in told.err and "train.seed: 42 -> 7" in told.err
    assert keys(objects(capsys, folder, 2, "--train.seed", 7)) != expected


def test_spikes_before_and_after_a_change_are_told_each_as_it_was(runs, copy, capsys):
    expected = {step: keys(objects(capsys, runs["alone"], step)) for step in (2, 5)}
    folder = copy(2, 3, 4, 5)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["kind"] == "train" and event["step"] in expected:
            event["loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    def told(*more):
        return {spike["last"]: [step["keys"] for step in spike["steps"]] for spike in
                objects(capsys, folder, "--spikes", *more)}

    assert told() == {step: [keys] for step, keys in expected.items()}
    assert told("--data.exclude", runs["few"]) == {2: [expected[2]], 5: []}  # 5 is known to have had another
    assert explain.main([str(folder), "--spikes", f"--data.exclude={runs['more']}"]) == 0
    said = capsys.readouterr()
    assert "vir-explain: step 2 cannot be told: " in said.err
    assert f"vir-explain '{folder}' 2 --data.exclude={runs['more']} tells all of a step" in said.out
    assert explain.main([str(folder), "--spikes", "--data.exclude", "gone"]) == 2
    assert "--data.exclude gone cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("latest", ["", "final"])
def test_a_broken_name_of_the_newest_checkpoint_is_passed_over(copy, capsys, latest):
    folder = copy(2, 3, 4, 5)
    (folder / "checkpoints" / "latest").write_text(latest)
    assert explain.main([str(folder), "5"]) == 0 and not capsys.readouterr().err


def test_a_sheet_of_too_many_pictures_is_refused_before_any_is_made(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sheet, "MOST", 47)
    monkeypatch.setattr(explanation, "explain_step", None)
    assert explain.main([str(runs["pair"]), "2", "--sheet", str(tmp_path / "a.png")]) == 2
    assert "a.png would have 48 pictures, 47 is the most" in capsys.readouterr().err


@pytest.mark.parametrize("words, own, settings", [
    ("--data.train=/x RUN 5", "RUN 5", "--data.train=/x"), ("--data.train /x RUN 5", "RUN 5", "--data.train /x"),
    ("RUN --data.lanes 4 5 --json", "RUN 5 --json", "--data.lanes 4"),
    ("--accept_config_change RUN 5", "RUN 5", "--accept_config_change"),
    ("--accept-config-change true RUN 5", "RUN 5", "--accept-config-change true"),
    ("RUN 5 --rank 1 --optim.lr -1", "RUN 5 --rank 1", "--optim.lr -1")])
def test_flags_of_vir_train_may_stand_anywhere(words, own, settings):
    assert explain._apart(words.split()) == (own.split(), settings.split())


def test_a_spike_is_told_in_batches_of_its_own_size(runs, capsys, tmp_path, reader):
    """Of 8 samples up to step 10; then an interval of steps 25 and 26 of 16."""
    (tmp_path / "config.yaml").write_text((runs["pair"] / "config.yaml").read_text())
    sizes = [(8, step) for step in range(1, 11)] + [(16, 24), (16, 26)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(
        {"kind": "train", "step": step, "loss": None if step == 26 else 2.0, "samples_seen": size * step}) + "\n"
        for size, step in sizes))
    (found,) = objects(capsys, tmp_path, "--spikes", "--data.exclude", "")
    config = parse(["--config", str(tmp_path / "config.yaml")])
    order = SampleOrder(config.train.seed, reader.shard_sizes, *config.data.order)
    assert [(step["step"], sorted(step["keys"])) for step in found["steps"]] == [
        (step, sorted(map(reader.key, order.samples(np.arange(16 * (step - 1), 16 * step))))) for step in (25, 26)]


def test_spikes_are_told_with_their_steps(runs, capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((runs["pair"] / "config.yaml").read_text())
    losses = [2.0 + 0.01 * (n % 3) for n in range(12)] + [9.0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(
        {"kind": "train", "step": 2 * n, "loss": loss, "samples_seen": 96 * n, "epoch": n,
         "images_per_second": 10.0, "images_per_second_per_device": 5.0}) + "\n" for n, loss in enumerate(losses, 1)))
    (found,) = objects(capsys, folder, "--spikes", "--train.steps", 99)
    assert (found["first"], found["last"], found["name"], found["value"]) == (25, 26, "loss", 9.0)
    assert [step["step"] for step in found["steps"]] == [25, 26]
    whole = objects(capsys, folder, 25, "--train.steps", "99")
    assert whole["ranks"] == 2 and found["steps"][0]["keys"] == [sample["key"] for sample in whole["samples"]]
    assert explain.main([str(folder), "--spikes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("steps 25 to 26: loss 9, ") and lines[1].startswith("  step 25: 48 samples of ")


@pytest.mark.parametrize("words, message", [
    (["{pair}"], "give either the number of a STEP or --spikes"),
    (["{pair}", "0"], "STEP is 0; it must be at least 1"),
    (["{pair}", "4"], "STEP is 4; the run has 3 steps"),
    (["{pair}", "1", "--rank", "2"], "--rank is 2; there are 2, from 0"),
    (["{pair}", "1", "--micro", "2"], "--micro is 2; there are 2, from 0"),
    (["{pair}", "1", "--sheet", "a.txt"], "--sheet a.txt has not the ending .png; give a name such as a.png"),
    (["{pair}", "1", "--sheet", "a.psd"], "--sheet a.psd has not the ending .png; "),
    (["{pair}", "1", "--sheet", "a.jpg"], "--sheet a.jpg has not the ending .png; "),
    (["{pair}", "1", "--sheet", "no/a.png"], "--sheet no/a.png: there is no such folder"),
    (["{pair}", "--spikes", "--rank", "0"], "--spikes tells of whole steps in short"),
    (["{few}", "1"], "has no config.yaml: it is not a run folder"),
    (["{pair}", "1", "--ranks", "7"], "is not a multiple of"),
    (["{pair}", "2", "--data.exclude", "{more}"], "was trained on other images than "),
    (["{pair}", "1", "--optim.lrr", "3"], "--optim.lrr")])
def test_what_is_refused(runs, capsys, words, message):
    words = [word.format(**runs) for word in words]
    try:
        code = explain.main(words)
    except SystemExit as end:  # argparse's
        code = end.code
    assert code in (2, 3) and message in capsys.readouterr().err
