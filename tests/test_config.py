"""Settings: what is accepted, what is refused and in which words, and that no option is dead."""

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from vir import config as config_module
from vir.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EmaConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    differences,
    dump_yaml,
    parse_bytes,
    plan_accumulation,
    to_dict,
)
from vir.errors import SettingsError
from vir.flags import parse

REQUIRED = ["--deepspeed_config", "ds.json", "--output", "runs/a", "--data.train", "t", "--data.val", "v"]
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)
            if field.default_factory is not dataclasses.MISSING}


def run_config(**sections):
    sections.setdefault("data", DataConfig(train="t", val="v"))
    return RunConfig(deepspeed_config="ds.json", output="runs/a", **sections)


def write(path, text):
    path.write_text(text)
    return str(path)


OUT_OF_RANGE = [
    (ModelConfig, "model", "img_size", 0), (ModelConfig, "model", "drop_path_rate", 1.0),
    (ModelConfig, "model", "chunk_size", 0), (TrainConfig, "train", "rank_timeout", 1.0),
    (DataConfig, "data", "workers", 0), (DataConfig, "data", "prefetch", 0), (DataConfig, "data", "lanes", 0),
    (DataConfig, "data", "window", 0), (DataConfig, "data", "max_bad_fraction", 1.1),
    (DataConfig, "data", "timeout", 0.0),
    (AugmentConfig, "augment", "scale", (0.0, 1.0)), (AugmentConfig, "augment", "scale", (0.9, 0.8)),
    (AugmentConfig, "augment", "scale", (0.5, 1.5)), (AugmentConfig, "augment", "ratio", (2.0, 1.0)),
    (AugmentConfig, "augment", "interpolation", "nearest"), (AugmentConfig, "augment", "hflip", 1.5),
    (AugmentConfig, "augment", "reprob", -0.1), (AugmentConfig, "augment", "mixup_prob", 2.0),
    (AugmentConfig, "augment", "mixup_switch_prob", -1.0), (AugmentConfig, "augment", "color_jitter", -0.1),
    (AugmentConfig, "augment", "mixup", -0.1), (AugmentConfig, "augment", "cutmix", -0.1),
    (AugmentConfig, "augment", "mixup_off_epoch", -1.0),
    (OptimConfig, "optim", "lr", 0.0), (OptimConfig, "optim", "eps", 0.0), (OptimConfig, "optim", "weight_decay", -1.0),
    (OptimConfig, "optim", "betas", (0.9, 1.0)), (OptimConfig, "optim", "clip_grad", -1.0),
    (OptimConfig, "optim", "lr_base", 0.0), (OptimConfig, "optim", "lr_base_size", 0),
    (OptimConfig, "optim", "weight_decay_end", -1.0), (OptimConfig, "optim", "momentum", 1.0),
    (OptimConfig, "optim", "layer_decay", 1.5), (OptimConfig, "optim", "layer_decay", 0.0),
    (ModelConfig, "model", "std", (0.5, 0.5, 0.0)), (ModelConfig, "model", "crop_pct", 1.5),
    (ScheduleConfig, "schedule", "cooldown_epochs", -1.0), (ScheduleConfig, "schedule", "decay_epochs", 0.0),
    (ScheduleConfig, "schedule", "decay_rate", 1.5),
    (TrainConfig, "train", "profile", -1), (TrainConfig, "train", "peak_tflops", 0.0),
    (TrainConfig, "train", "bce_target_thresh", 1.0),
    (CheckpointConfig, "checkpoint", "keep_every_epochs", 0.0), (CheckpointConfig, "checkpoint", "every_minutes", 0.0),
    (ScheduleConfig, "schedule", "warmup_epochs", -1.0), (ScheduleConfig, "schedule", "warmup_lr", -1.0),
    (ScheduleConfig, "schedule", "min_lr", float("nan")),
    (TrainConfig, "train", "epochs", 0.0), (TrainConfig, "train", "global_batch_size", 0),
    (TrainConfig, "train", "micro_batch_size", 0), (TrainConfig, "train", "smoothing", 1.0),
    (TrainConfig, "train", "seed", -1), (TrainConfig, "train", "log_every", 0),
    (EmaConfig, "ema", "decay", 1.0), (DistillConfig, "distill", "alpha", 1.1),
    (DistillConfig, "distill", "temperature", 0.0),
    (EvalConfig, "eval", "every_epochs", 0.0), (EvalConfig, "eval", "batch_size", 0),
    (CheckpointConfig, "checkpoint", "every_epochs", 0.0), (CheckpointConfig, "checkpoint", "keep", 0),
]


@pytest.mark.parametrize("section, name, field, value", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_flag_value_and_limit(section, name, field, value):
    said = f"--{name}.{field} is {value!r}; it must be "
    with pytest.raises(SettingsError, match=re.escape(said) + "."):
        section(**{field: value})


def test_every_number_has_a_range_check():
    """Fields of a section whose default is a number or a pair of numbers, against the list above."""
    unchecked = {(name, field.name) for name, section in SECTIONS.items() for field in dataclasses.fields(section)
                 if isinstance(field.default, (int, float, tuple)) and not isinstance(field.default, bool)}
    unchecked -= {(name, field) for _, name, field, _ in OUT_OF_RANGE}
    assert unchecked == set()


@pytest.mark.parametrize("section, values", [
    (ModelConfig, dict(drop_path_rate=0.0, chunk_size=1, img_size=1)), (DataConfig, dict(max_bad_fraction=0.0)),
    (DataConfig, dict(max_bad_fraction=1.0, workers=1, prefetch=1, lanes=1, window=1)),
    (AugmentConfig, dict(hflip=0.0, reprob=1.0, mixup=0.0, cutmix=0.0, color_jitter=0.0, scale=(1.0, 1.0))),
    (OptimConfig, dict(weight_decay=0.0, betas=(0.0, 0.0), clip_grad=0.0)), (EmaConfig, dict(decay=0.0)),
    (ScheduleConfig, dict(warmup_epochs=0.0, warmup_lr=0.0, min_lr=0.0)), (TrainConfig, dict(smoothing=0.0, seed=0)),
])
def test_the_ends_of_the_ranges_are_accepted(section, values):
    made = section(**values)
    assert {key: getattr(made, key) for key in values} == values


@pytest.mark.parametrize("name, way_out", [("num_classes", "class list"), ("img_size", "--model.img_size"),
                                           ("drop_path_rate", "--model.drop_path_rate")])
def test_model_args_may_not_set_what_has_another_home(name, way_out):
    with pytest.raises(SettingsError, match=f"--model.args sets '{name}'.*{way_out}"):
        ModelConfig(args={name: 1})


@pytest.mark.parametrize("pattern", ["(", "blocks[", "*"])
def test_a_freeze_that_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(SettingsError, match=re.escape(f"--model.freeze is {pattern!r}; it must be a regular expr")):
        ModelConfig(freeze=pattern)


def test_another_freeze_is_a_changed_setting_and_none_is_that_of_runs_from_before_it_was_one():
    config = parse([*REQUIRED, "--model.freeze", r"patch_embed|blocks\.[0-5]\."])
    assert config.model.freeze == r"patch_embed|blocks\.[0-5]\."
    before = to_dict(run_config())
    assert differences(before, to_dict(config)) == [r"model.freeze: None -> patch_embed|blocks\.[0-5]\."]
    del before["model"]["freeze"]
    assert differences(before, to_dict(run_config())) == []


def test_settings_that_a_run_began_without_are_at_their_defaults():
    before = to_dict(run_config())
    del before["model"]["pretrained"], before["optim"]["betas"]
    assert differences(before, to_dict(run_config())) == []
    changed = run_config(model=ModelConfig(pretrained=True), optim=OptimConfig(betas=(0.8, 0.9)))
    assert differences(before, to_dict(changed)) == [
        "model.pretrained: False -> True", "optim.betas: [0.9, 0.999] -> [0.8, 0.9]"]


def test_an_odd_micro_batch_is_refused_only_where_samples_are_mixed():
    odd = TrainConfig(micro_batch_size=3)
    for augment in (AugmentConfig(mixup=0.0), AugmentConfig(cutmix=0.0)):
        with pytest.raises(SettingsError, match="--train.micro_batch_size is 3.*even.*--augment.mixup 0"):
            run_config(train=odd, augment=augment)
    assert run_config(train=odd, augment=AugmentConfig(mixup=0.0, cutmix=0.0)).train.micro_batch_size == 3


def test_accumulation_is_global_over_micro_times_ranks():
    assert plan_accumulation(1024, 128, 4) == 2
    assert plan_accumulation(6, 2, 3) == 1


@pytest.mark.parametrize("size, nearest", [(10, "8 or 16"), (3, "8"), (17, "16 or 24")])
def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do(size, nearest):
    with pytest.raises(SettingsError, match=f"global_batch_size {size} is not .* 2 x 4 ranks = 8; nearest: {nearest}$"):
        plan_accumulation(size, 2, 4)


def test_dumped_yaml_reads_back_as_the_same_run(tmp_path):
    config = run_config(model=ModelConfig(args={"patch_size": 4}), optim=OptimConfig(lr=1e-6, betas=(0.8, 0.95)),
                        augment=AugmentConfig(auto_augment=None))
    text = dump_yaml(config)
    assert parse(["--config", write(tmp_path / "c.yaml", text)]) == config
    assert differences(yaml.safe_load(text), to_dict(config)) == []


def test_differences_name_what_changes_results_and_nothing_else():
    before = to_dict(run_config(model=ModelConfig(args={"depth": 4})))
    free = run_config(model=ModelConfig(args={"depth": 4}), data=DataConfig(train="x", val="y", workers=1, prefetch=1),
                      train=TrainConfig(log_every=1), eval=EvalConfig(every_epochs=3, batch_size=1),
                      checkpoint=CheckpointConfig(every_epochs=2, keep=1))
    assert differences(before, to_dict(free)) == []
    other = run_config(model=ModelConfig(args={"depth": 6, "num_heads": 3}), optim=OptimConfig(lr=0.5),
                       data=DataConfig(train="t", val="v", lanes=2))
    assert differences(before, to_dict(other)) == [
        "data.lanes: None -> 2", "model.args.depth: 4 -> 6", "model.args.num_heads: None -> 3", "optim.lr: None -> 0.5"]


def test_a_run_from_before_there_were_teachers_had_none_and_where_a_teacher_lies_is_free():
    before = to_dict(run_config())
    del before["distill"]
    assert differences(before, to_dict(run_config())) == []
    assert differences(before, to_dict(run_config(distill=DistillConfig(teacher="a", kind="soft")))) == [
        "distill.kind: hard -> soft"]


@pytest.mark.parametrize("optim, batch, lr", [
    (OptimConfig(), 512, 1e-3), (OptimConfig(lr=0.5), 512, 0.5),
    (OptimConfig(lr_base=0.1), 1024, 0.4), (OptimConfig(lr_base=0.1, lr_base_scale="sqrt"), 1024, 0.2),
    (OptimConfig(lr_base=0.1, lr_base_size=512), 1024, 0.2),
])
def test_the_peak_rate_follows_from_lr_base_by_timms_rule(optim, batch, lr):
    assert optim.peak_lr(batch) == pytest.approx(lr)


@pytest.mark.parametrize("make, said", [
    (lambda: OptimConfig(lr=1e-3, lr_base=1e-4), "--optim.lr 0.001 and --optim.lr_base 0.0001 are both given"),
    (lambda: TrainConfig(bce_target_thresh=0.2), "bce_target_thresh 0.2 acts on bce alone"),
    (lambda: run_config(ema=EmaConfig(decay=0), checkpoint=CheckpointConfig(best="ema_top1")), "keeps no average"),
    (lambda: DistillConfig(teacher="t", temperature=2.0), "--distill.temperature 2.0 acts on soft alone; give --dist"),
    (lambda: run_config(distill=DistillConfig(alpha=0.3)), "say how a teacher teaches; name one by --distill.teacher"),
])
def test_settings_that_contradict_each_other_are_refused(make, said):
    with pytest.raises(SettingsError, match=said):
        make()


def leaves():
    """(section or None, field name, docstring or None) of every setting, from the source."""
    tree = ast.parse(Path(config_module.__file__).read_text())
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    for section, name in [(None, "RunConfig"), *((key, made.__name__) for key, made in SECTIONS.items())]:
        for node, after in zip(classes[name], classes[name][1:]):
            if isinstance(node, ast.AnnAssign) and not (section is None and node.target.id in SECTIONS):
                yield section, node.target.id, after.value.value if isinstance(after, ast.Expr) else ""


def test_leaves_finds_every_setting():
    fields = {(name, field.name) for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
    fields |= {(None, field.name) for field in dataclasses.fields(RunConfig) if field.name not in SECTIONS}
    assert fields == {(section, name) for section, name, _ in leaves()}


def test_help_shows_the_sentence_of_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for section, name, text in leaves():
        flag = f"{section}.{name}" if section else name
        assert text, f"{flag} has no docstring"
        assert f"--{flag}" in shown
        assert " ".join(text.split()) in shown, f"{flag}: its docstring is not in --help"


def test_every_setting_is_read_somewhere():
    """A setting nobody reads does nothing. Looks for `section.field` (or `config.field`) outside vir/config.py, and for
    `self.field` in what a section works out itself."""
    read = {(name, node.attr) for name, section in SECTIONS.items() for method in vars(section).values()
            if callable(method) and method.__name__ == "peak_lr"
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
            if isinstance(node, ast.Attribute)}
    for path in Path(config_module.__file__).parent.rglob("*.py"):
        if path == Path(config_module.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "attr", getattr(node.value, "id", None))
                read.add((owner, node.attr))
    dead = [f"{section}.{name}" for section, name, _ in leaves() if (section or "config", name) not in read]
    assert dead == []


@pytest.mark.parametrize("text, size", [
    ("200GB", 200 * 10**9), ("1.5 TiB", 3 << 39), ("10mb", 10**7), ("3GiB", 3 << 30), ("2TB", 2 * 10**12),
    ("64MiB", 64 << 20), ("123456", 123456), (" 7 GB ", 7 * 10**9)])
def test_sizes(text, size):
    assert parse_bytes(text, "--f") == size


@pytest.mark.parametrize("text", ["", "GB", "200QB", "-1GB", "0", "0GB", "1e9", "nan", "200 G B", "1,5GB", "5XB",
                                  "9" * 400 + "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SettingsError, match=r"^--f is .* give a number of bytes .* such as 200GB"):
        parse_bytes(text, "--f")
