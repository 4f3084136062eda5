"""Words of a command line: what they set, what is said where one is wrong, help by section, and completion."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
import yaml

from support.launchers import ROOT, torchrun
from support.payload import module
from vir import flags
from vir.config import DataConfig, RunConfig, to_dict
from vir.errors import SettingsError
from vir.flags import ELSEWHERE, KINDS, SECTIONS, parse
from vir.train import main

REQUIRED = ["--deepspeed_config", "ds.json", "--output", "runs/a", "--data.train", "t", "--data.val", "v"]
RECIPES = sorted((ROOT / "vir" / "recipes").glob("*.yaml"))


def write(path, text):
    path.write_text(text)
    return str(path)


def refusal(*words):
    with pytest.raises(SettingsError) as caught:
        parse([*REQUIRED, *words])
    assert str(caught.value).count("\n") <= 1 and "class '" not in str(caught.value)
    return str(caught.value)


# What is read


def test_required_flags_alone_give_the_defaults():
    config = parse(REQUIRED)
    assert config == RunConfig(deepspeed_config="ds.json", output="runs/a", data=DataConfig(train="t", val="v"))
    assert config.optim.peak_lr(1024) == 1e-3 and config.augment.scale == (0.08, 1.0) and config.resume == "auto"


def test_yaml_sets_and_a_later_flag_wins(tmp_path):
    recipe = write(tmp_path / "r.yaml", "optim: {lr: 3.0e-4, weight_decay: 0.1}\ntrain: {epochs: 7}\n")
    config = parse(["--config", recipe, *REQUIRED, "--optim.lr", "5e-4", "--augment.scale", "[0.2, 0.9]"])
    assert (config.optim.lr, config.optim.weight_decay, config.train.epochs) == (5e-4, 0.1, 7)
    assert config.augment.scale == (0.2, 0.9) and config.optim.eps == 1e-8


def test_of_two_files_and_flags_around_them_the_later_word_wins(tmp_path):
    one = write(tmp_path / "one.yaml", "optim: {lr: 1.0, eps: 1.0e-6}\ntrain: {epochs: 1, seed: 1}\n")
    two = write(tmp_path / "two.yaml", "optim: {lr: 2.0}\ntrain: {epochs: 2}\n")
    config = parse(["--train.seed", "5", "--config", one, "--config", two, "--train.epochs", "3", *REQUIRED])
    assert (config.optim.lr, config.optim.eps, config.train.epochs, config.train.seed) == (2.0, 1e-6, 3.0, 1)


def test_model_args_and_null_are_read_as_yaml():
    config = parse([*REQUIRED, "--model.args", "{patch_size: 4, depth: 6}", "--augment.auto_augment", "null"])
    assert config.model.args == {"patch_size": 4, "depth": 6} and config.augment.auto_augment is None
    assert parse([*REQUIRED, "--model.args.depth", "3"]).model.args == {"depth": 3}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_and_sets_what_it_says(recipe):
    found, said = to_dict(parse(["--config", str(recipe), *REQUIRED])), yaml.safe_load(recipe.read_text())
    assert said
    for section, values in said.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert found[section][key] == value, f"{section}.{key}"


def test_a_shipped_recipe_is_given_by_its_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    by_path = parse(["--config", str(ROOT / "vir" / "recipes" / "vir_small_in1k.yaml"), *REQUIRED])
    assert parse(["--config", "vir_small_in1k", *REQUIRED]) == parse(["--config=vir_small_in1k", *REQUIRED]) == by_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vir_small_in1k").write_text("train: {seed: 7}\n")
    assert parse(["--config", "vir_small_in1k", *REQUIRED]).train.seed == 7


@pytest.mark.parametrize("words, dry, validate", [
    (["--dry_run"], True, False), (["--dry-run"], True, False), (["--dry-run", "true"], True, False),
    (["--dry_run", "false"], False, False), (["--dry-run=true"], True, False), (["--dry_run", "True"], True, False),
    (["--validate-only"], False, True), (["--dry_run", "no"], False, False),
    (["--dry-run", "--train.seed", "1"], True, False),
])
def test_a_switch_needs_no_value_and_takes_one(words, dry, validate):
    config = parse([*words, *REQUIRED])
    assert (config.dry_run, config.validate_only) == (dry, validate)


@pytest.mark.parametrize("words, on", [
    (["--model.compile"], True), (["--model.compile", "--train.seed", "1"], True),
    (["--model.compile", "false"], False), (["--model.compile=false"], False), ([], False),
])
def test_so_does_a_switch_of_a_section(words, on):
    assert parse([*REQUIRED, *words]).model.compile is on


def test_a_switch_that_may_be_null_is_one_too(monkeypatch):
    monkeypatch.setitem(KINDS, "model.some_switch", Optional[bool])
    assert flags._with_values(["--model.some-switch", "--x"]) == ["--model.some_switch", "true", "--x"]
    assert flags._with_values(["--model.some_switch", "null"]) == ["--model.some_switch", "null"]


# Wrong flags


@pytest.mark.parametrize("words, said", [
    ("--lr 1", "--lr (use --optim.lr)"), ("--learning-rate=1", "--learning-rate (use --optim.lr)"),
    ("--batch-size 8", "--batch-size (use --train.micro_batch_size)"),
    ("-b 8", "-b (use --train.micro_batch_size)"), ("-j 8", "-j (use --data.workers)"),
    ("--num-classes 10", "--num-classes (the class list of the training shards decides it)"),
    ("--model-ema", "--model-ema (use --ema.decay; 0 switches the average off)"),
    ("--opt-betas 0.9 0.95", "--opt-betas (use --optim.betas '[0.9, 0.999]')"),
    ("--seed 3", "--seed (use --train.seed)"), ("--epochs 3", "--epochs (use --train.epochs)"),
    ("--warmup_epochs 3", "--warmup_epochs (use --schedule.warmup_epochs)"),
    ("--optim.weight-decay 1", "--optim.weight-decay (use --optim.weight_decay)"),
    ("--interpolation x", "--interpolation (use --model.interpolation or --augment.interpolation)"),
    ("--optim.lrr 1", "--optim.lrr (did you mean --optim.lr)"),
    ("--optim.l 1", "--optim.l (vir-train --help optim lists all)"),  # no flag is shortened
    ("--train.glob 8", "--train.glob (vir-train --help train lists all)"),
    ("--train.lr 1", "--train.lr (use --optim.lr)"),
    ("--eval.epochs 1", "--eval.epochs (did you mean --eval.every_epochs)"),
    ("--checkpoint.steps 1", "--checkpoint.steps (did you mean --checkpoint.every_steps)"),
    ("--optim.decay 1", "--optim.decay (did you mean --optim.weight_decay or --optim.layer_decay)"),
    ("--data.name x", "--data.name (vir-train --help data lists all)"),
    ("--eval.loss x", "--eval.loss (vir-train --help eval lists all)"),
    ("--model.patch_size 4", "--model.patch_size (use --model.args '{patch_size: 4}')"),
    ("--patch-size 4", "--patch-size (use --model.args '{patch_size: 4}')"),
    ("--model.mlp_ratio 4", "--model.mlp_ratio (use --model.args '{mlp_ratio: 4}')"),
    ("--drop-rate 0.1", "--drop-rate (use --model.args '{drop_rate: 0.1}')"),
    ("--model.depth 6", "--model.depth (use --model.args '{depth: 6}')"),
    ("--gp avg", "--gp (use --model.args '{global_pool: avg}')"),
    ("--lr-warmup-decay 0.1", "--lr-warmup-decay (no factor here: --schedule.warmup_lr is the learning rate of the "
                              "first step)"),
    ("--warmup 5", "--warmup (use --schedule.warmup_epochs, which may be a fraction; not given: a fifteenth of the "
                   "run)"),
    ("--schedule.warmup 5", "--schedule.warmup (use --schedule.warmup_epochs, which may be a fraction; not given: a "
                            "fifteenth of the run)"),
    *((flag, f"{flag} (vir-train --help lists all)") for flag in (
        "--lr-k-decay", "--norm-weight-decay", "--bias-weight-decay", "--no-prefetcher", "--clip-grad-mode")),
    ("--model.args.a.b 3 --lr 1", "--lr (use --optim.lr)"),
    ("--deepspeed_confg x", "--deepspeed_confg (did you mean --deepspeed_config)"),
    ("--print-config", "--print-config (use --print_config)"),
    ("--zzz", "--zzz (vir-train --help lists all)"),
    ("--lr 1 --train.epochs x --zzz -b 3",
     "--lr (use --optim.lr), --zzz (vir-train --help lists all), -b (use --train.micro_batch_size)"),
])
def test_an_unknown_flag_is_told_with_what_it_is_here(words, said):
    assert refusal(*words.split()) == f"no such flag: {said}"


def test_precision_and_ranks_are_told_to_be_decided_elsewhere():
    assert "--amp (the DeepSpeed JSON decides the precision, e.g. --deepspeed_config zero2_bf16)" in refusal("--amp")
    assert "--world-size (the launcher decides it, e.g. torchrun" in refusal("--world-size", "8")


def test_every_flag_in_the_table_of_suggestions_exists():
    written = {name if name[0] == "-" else "--" + name.replace("_", "-"): said for name, said in ELSEWHERE.items()}
    told = refusal(*written)
    for flag, said in written.items():
        named = re.findall(r"--([a-z_]+\.[a-z_.]+|deepspeed_config|output|resume|validate_only)\b", said)
        assert set(named) <= KINDS.keys(), f"{flag}: {said}"
        assert named or said in (flags._RANKS, flags._CLASSES), f"{flag}: {said}"
        assert f"{flag} ({'use ' if said.startswith('--') else ''}{said})" in told, flag


def test_each_json_that_the_table_names_is_shipped():
    named = {name for said in ELSEWHERE.values() for name in re.findall(r"--deepspeed_config (\w+)", said)}
    assert named and all((ROOT / "vir" / "ds_configs" / f"{name}.json").is_file() for name in named)


# Wrong values


@pytest.mark.parametrize("words, said", [
    (["--optim.lr", "abc"], "--optim.lr is 'abc'; it must be a number or null"),
    (["--optim.lr"], "--optim.lr is given no value; it must be a number or null"),
    (["--train.global_batch_size", "1.5"], "--train.global_batch_size is '1.5'; it must be a whole number"),
    (["--train.epochs", "inf"], "--train.epochs is 'inf'; it must be a number"),
    (["--dry-run", "maybe"], "--dry_run is 'maybe'; it must be true or false"),
    (["--augment.scale", "[0.5]"], "--augment.scale is '[0.5]'; it must be 2 numbers in brackets, '[0.5, 0.9]'"),
    (["--model.mean", "0.5"], "--model.mean is '0.5'; it must be 3 numbers in brackets, '[0.5, 0.9, 0.9]' or null"),
    (["--optim.betas", "0.9", "0.95"], "--optim.betas 0.9 0.95: write it as one word, --optim.betas '[0.9, 0.95]'"),
    (["--model.std", "1", "2", "3"], "--model.std 1 2 3: write it as one word, --model.std '[1, 2, 3]'"),
    (["--train.loss", "hinge"], "--train.loss is 'hinge'; it must be cross_entropy or bce"),
    (["--model.args", "3"], "--model.args is '3'; it must be a mapping, '{patch_size: 4, depth: 6}'"),
    (["--train.seed", "1", "2"],
     "'2' after --train.seed 1 belongs to no flag; quote a value that has spaces or braces"),
    (["--model", "resnet18"], "--model is 'resnet18', but model is a section: use --model.name resnet18; "
                              "vir-train --help model lists all of it"),
    (["--data", "d"], "--data is 'd', but data is a section: use --data.train and --data.val; "
                      "vir-train --help data lists all of it"),
    (["--optim", "{lrr: 1}"], "--optim {lrr: 1}, line 1: there is no setting optim.lrr (did you mean optim.lr)"),
    (["--config"], "--config is given no value; it must be a YAML file of settings"),
    (["--config", "/nowhere/vir_small_in1k"], "--config /nowhere/vir_small_in1k: there is no such file; the recipe of "
                                              f"that name is {ROOT}/vir/recipes/vir_small_in1k.yaml"),
    (["--config", "r.yml"], f"--config r.yml: there is no such file; the recipes in {ROOT}/vir/recipes are "
                            + ", ".join(path.name for path in RECIPES)),
    (["--config", "x" * 300], f"--config {'x' * 300}: there is no such file; the recipes in {ROOT}/vir/recipes are "
                              + ", ".join(path.name for path in RECIPES)),
    (["--config", "a\0b"], f"--config a\0b: there is no such file; the recipes in {ROOT}/vir/recipes are "
                           + ", ".join(path.name for path in RECIPES)),
    (["--model", f"{{name: {'x' * 300}, foo: 1}}"],
     f"--model {{name: {'x' * 300}, foo: 1}}, line 1: there is no setting model.foo "
     "(vir-train --help model lists all)"),
    (["--config", ""], "--config is ''; it must be a YAML file of settings"),
    (["--optim", "no.yaml"], "--optim no.yaml: there is no such file"),
    (["--print_config", "foo"], "--print_config takes no value, or as --print_config=skip_default"),
    (["--config", "/"], "--config is '/', a folder; it must be a YAML file"),
])
def test_a_wrong_value_is_told_with_what_was_expected(words, said):
    assert refusal(*words) == said


def test_a_stray_word_is_told():
    with pytest.raises(SettingsError, match="^'stray' belongs to no flag; settings are given as --NAME VALUE$"):
        parse(["stray", *REQUIRED])


@pytest.mark.parametrize("words", [["--print_completion", "bash"], ["--print_completion"]])
def test_the_shells_of_completion_are_told(words):
    said = "--print_completion takes shtab-bash, shtab-zsh, shtab-tcsh, shtab-fish, shtab-powershell, jsonschema"
    assert refusal(*words) == said


def test_a_negative_number_is_a_value():
    assert refusal("--optim.lr", "-1e-3") == "--optim.lr is -0.001; it must be positive"


def test_a_range_is_checked_through_the_whole_parser():
    assert refusal("--eval.batch_size", "0") == "--eval.batch_size is 0; it must be at least 1"


def test_training_data_is_all_that_must_be_given():
    assert parse(["--data.train", "t"]) == RunConfig(data=DataConfig(train="t"))
    with pytest.raises(SettingsError, match="--data.train is not given: a folder of shards, which vir-convert makes"):
        parse(["--output", "o", "--data.val", "v"])


@pytest.mark.parametrize("words, said", [
    (["--data.val", "", "--validate_only"], "--validate_only has nothing to evaluate on: give --data.val"),
    (["--dry_run", "--validate_only"], "exclude each other; keep one"),
    (["--dry_run", "--train.fast_dev_run"], "exclude each other"),
    (["--validate_only", "--train.fast_dev_run"], "exclude each other"),
    (["--which", "best", "--validate_only", "--resume", "none"], "--which best chooses among checkpoints, and --res"),
    (["--which", "best"], "--which best names what --validate_only evaluates; to train on from a checkpoint give "
                          "--resume RUN/checkpoints/best"),
])
def test_flags_that_need_another_one_name_it(words, said):
    with pytest.raises(SettingsError, match=said):
        parse([*REQUIRED, *words])


# Wrong YAML


@pytest.mark.parametrize("text, said", [
    ("optimm: {lr: 1}", ", line 1: there is no setting optimm (did you mean optim)"),
    ("lr: 1", ", line 1: there is no setting lr (use optim.lr)"),
    ("train: {seed: 1}\noptim:\n  lr: 1e-3\n  lrr: 1",
     ", line 4: there is no setting optim.lrr (did you mean optim.lr)"),
    ("model:\n  num_classes: 3", ", line 2: there is no setting model.num_classes (the class list of the training "
                                 "shards decides it)"),
    ("optim:\n  lr: fast", ", line 2: optim.lr is fast; it must be a number or null"),
    ("optim:\n  betas:\n  - 1\n", ", line 2: optim.betas is [1]; it must be 2 numbers in brackets, '[0.5, 0.9]'"),
    ("output: 3", ", line 1: output is 3; it must be text, so in quotes"),
    ("optim: [1, 2]", ", line 1: optim is [1, 2]; it must be a mapping, or a YAML file of settings"),
    ("optim: no.yaml", ", line 1: optim is no.yaml; there is no such file"),
    (f"optim: [{', '.join('1' * 300)}]", f", line 1: optim is [{', '.join('1' * 300)}]; it must be a mapping, or a "
                                         "YAML file of settings"),
    ("optim: {<<: {lrr: 1}}", ", line 1: there is no setting optim.lrr (did you mean optim.lr)"),
    ("optim:\ntrain: {seed: 1}", ", line 1: optim is empty; it must be a mapping, or a YAML file of settings"),
    ("train: 3", ", line 1: train is 3; it must be a mapping, or a YAML file of settings"),
    ("model: resnet18", ", line 1: model is resnet18; it must be a mapping, e.g. model: {name: resnet18}, or a YAML "
                        "file of settings"),
    ("train: {seed: 1}\noptim: {lr: 1", ", line 2, column 14: this is no YAML: expected ',' or '}', but got "
                                        "'<stream end>'"),
    ("optim:\n\tlr: 1", ", line 2, column 1: this is no YAML: found character '\\t' that cannot start any token"),
    ("- 1", " has no settings; it must be YAML such as optim: {lr: 1.0e-3}"),
    ("", " has no settings; it must be YAML such as optim: {lr: 1.0e-3}"),
])
def test_wrong_yaml_is_told_with_file_line_and_key(tmp_path, text, said):
    file = write(tmp_path / "r.yaml", text)
    assert refusal("--config", file) == file + said


def test_a_file_that_is_no_text_is_told(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xfa")
    assert refusal("--config", str(tmp_path / "r.yaml")).startswith(f"--config {tmp_path}/r.yaml cannot be read: ")


def test_the_file_of_a_section_is_told_with_its_own_name(tmp_path):
    inner = write(tmp_path / "optim.yaml", "eps: 1.0e-8\nlrr: 1\n")
    said = f"{inner}, line 2: there is no setting optim.lrr (did you mean optim.lr)"
    assert refusal("--optim", inner) == said
    assert refusal("--config", write(tmp_path / "r.yaml", "optim: optim.yaml\n")) == said


def test_a_value_out_of_range_is_told_with_the_line_that_sets_it(tmp_path):
    file = write(tmp_path / "r.yaml", "train: {seed: 1}\neval:\n  batch_size: 0\n")
    said = "--eval.batch_size is 0; it must be at least 1"
    assert refusal("--config", file) == f"{said} ({file}, line 3)"
    assert refusal("--config", file, "--eval.batch_size", "0") == said  # the flag is what counts


def test_the_place_of_a_value_is_that_of_the_last_word_that_sets_it(tmp_path):
    right, wrong = write(tmp_path / "pos.yaml", "\noptim: {lr: 3}\n"), write(tmp_path / "neg.yaml", "lr: -2\n")
    said = "--optim.lr is -2.0; it must be positive"
    assert refusal("--config", right, "--optim", "{lr: -2}") == said
    assert refusal("--config", right, "--optim", wrong) == f"{said} ({wrong}, line 1)"
    assert refusal("--config", write(tmp_path / "in.yaml", "optim: neg.yaml\n")) == f"{said} ({wrong}, line 1)"
    dotted = write(tmp_path / "dotted.yaml", "train: {seed: 1}\noptim.lr: -2\n")
    assert refusal("--config", dotted) == f"{said} ({dotted}, line 2)"


def test_the_file_of_a_section_is_no_module(tmp_path, monkeypatch):
    """Also where there is one of its name, and wherever the file is named without its folder."""
    imported, _ = module(tmp_path, "section", monkeypatch)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "section.yaml", "lr: 2\n")
    write(tmp_path / "whole.yaml", "optim: section.yaml\n")
    for words in (["--optim", "section.yaml"], ["--optim=section.yaml"], ["--config", "whole.yaml"],
                  ["--config", "{optim: section.yaml}"]):
        assert parse([*REQUIRED, *words]).optim.lr == 2
    assert not imported.exists()


def test_an_anchor_that_holds_itself_is_told(tmp_path):
    file = write(tmp_path / "r.yaml", "model: &a {args: {b: *a}}\n")
    assert refusal("--config", file) == (f"--config {file}: an anchor of this YAML holds itself; write out what it "
                                         "stands for")


def test_the_program_ends_with_one_line_and_code_2(capsys, tmp_path):
    assert main([*REQUIRED, "--lr", "1"]) == 2
    assert main([*REQUIRED, "--config", write(tmp_path / "r.yaml", "optim: 3")]) == 2
    assert capsys.readouterr().err == (
        "vir-train: no such flag: --lr (use --optim.lr)\n"
        f"vir-train: {tmp_path}/r.yaml, line 1: optim is 3; it must be a mapping, e.g. optim: {{name: 3}}, or a YAML "
        "file of settings\n")


# Help and completion


def shown(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        parse(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("section", SECTIONS)
def test_help_of_a_section_shows_its_flags_alone(section, capsys):
    printed = set(re.findall(r"^  --([a-z0-9_.]+)", shown(capsys, *REQUIRED, "--help", section), re.MULTILINE))
    assert printed == {section, *(name for name in KINDS if name.startswith(section + "."))}
    assert len(printed) > 2


def test_help_of_all_names_the_sections(capsys):
    text = " ".join(shown(capsys, "--help").split())
    assert f"`vir-train --help SECTION` shows one section: {', '.join(SECTIONS)}." in text
    assert SECTIONS == ["model", "data", "augment", "train", "distill", "optim", "schedule", "ema", "eval",
                        "checkpoint"]
    assert text == " ".join(shown(capsys, "-h", "--train.seed", "1").split())


@pytest.mark.parametrize("words", [["--help", "modell"], ["--help=modell"]])
def test_help_of_an_unknown_section_tells_which_there_are(words):
    assert refusal(*words) == ("--help modell: there is no such section; there are model, data, augment, train, "
                               "distill, optim, schedule, ema, eval, checkpoint, and --help alone shows all")


@pytest.mark.parametrize("words", [["--help"], ["--help", "model"], ["--print_config"],
                                   ["--print_completion=shtab-bash"]])
def test_another_rank_than_the_first_prints_nothing(words, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"),
                        ("MASTER_PORT", "1")):  # the first rank of the second machine
        monkeypatch.setenv(name, value)
    assert shown(capsys, *REQUIRED, *words) == ""
    monkeypatch.setenv("RANK", "0")
    assert shown(capsys, *REQUIRED, *words) != ""


@pytest.mark.launcher
def test_help_under_a_launcher_is_printed_once():
    done = torchrun("-m", "vir.train", "--help", "ema")
    assert done.returncode == 0 and done.stdout.count("usage: vir-train") == 1, done.stdout


def test_the_script_for_completion_completes_flags_and_choices_in_bash(tmp_path):
    script = subprocess.run([sys.executable, "-m", "vir.train", "--print_completion", "shtab-bash"], cwd=ROOT,
                            capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    file = write(tmp_path / "completion.bash", script.stdout)
    ask = ('source "$0"; [[ "$(complete -p vir-train)" =~ -F\\ ([^ ]+) ]]; COMP_WORDS=(vir-train "$@"); '
           'COMP_CWORD=$#; "${BASH_REMATCH[1]}"; printf "%s\\n" "${COMPREPLY[@]}"')

    def completed(*words):
        done = subprocess.run(["bash", "--norc", "-c", ask, file, *words], cwd=ROOT, capture_output=True, text=True,
                              timeout=60, env={**os.environ, "TERM": "dumb"})
        return done.stdout.split()

    assert completed("--optim.lr") == ["--optim.lr", "--optim.lr_base", "--optim.lr_base_size", "--optim.lr_base_scale"]
    assert completed("--model.compile", "true", "--train.loss", "b") == ["bce"]
    assert completed("--config", "vir/recipes/quick") == [str(Path("vir/recipes/quickstart.yaml"))]


@pytest.mark.parametrize("words", [
    ["--data.train", "https://u:geheim@h/x-0.tar?sig=geheim", "https://u:geheim@h/x-1.tar?sig=geheim"],
    ["--data.workers", "https://u:geheim@h/x"], ["--dry_run", "true", "s3://u:geheim@h/x"]])
def test_no_message_repeats_the_secrets_of_a_url(words):
    with pytest.raises(SettingsError) as caught:
        parse([*REQUIRED, *words])
    assert "geheim" not in str(caught.value) and "belongs to no flag" in str(caught.value) or "whole number" in str(
        caught.value)
