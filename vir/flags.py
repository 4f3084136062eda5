"""From the words of a command line to a RunConfig: flags and YAML files, help by section, and a word for a wrong one.

jsonargparse reads the words and decides what is accepted. Where it refuses, `_complaint` goes through them again and
says what was expected: the name here of a flag that other training scripts have, the line of a YAML file.
"""

from __future__ import annotations

import difflib
import functools
import os.path
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import yaml

from vir import launcher
from vir.addresses import shown
from vir.config import RunConfig
from vir.errors import SettingsError

PROGRAM = "vir-train"
_RECIPES = Path(__file__).resolve().parent / "recipes"
_YAML = (".yaml", ".yml")
_HELP = ("-h", "--help")
_PRINTING = (*_HELP, "--print_config", "--print_completion")
"""Flags that print and end the program."""
_COMPLETIONS = ("shtab-bash", "shtab-zsh", "shtab-tcsh", "shtab-fish", "shtab-powershell", "jsonschema")


def _kinds(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type of each setting and section under a dataclass, e.g. optim.lr: Optional[float]."""
    found: dict[str, Any] = {}
    for name, inner in get_type_hints(kind).items():
        found[prefix + name] = inner
        if is_dataclass(inner):
            found |= _kinds(inner, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


KINDS = _kinds(RunConfig)
SECTIONS = [name for name, kind in KINDS.items() if is_dataclass(kind)]

_ACCUMULATION = "it follows: --train.global_batch_size / (--train.micro_batch_size x ranks)"
_PRECISION = "the DeepSpeed JSON decides the precision, e.g. --deepspeed_config zero2_bf16"
_RANKS = f"the launcher decides it, e.g. torchrun --nproc_per_node 8 -m vir.train; plain {PROGRAM} is one process"
_SHARDS = "use --data.train and --data.val: folders of shards or of images, or URLs of shards"
_CLASSES = "the class list of the training shards decides it"
_RECOMPUTE = "the DeepSpeed JSON decides it, e.g. --deepspeed_config zero2_bf16_ckpt"
_OFFLOAD = "the DeepSpeed JSON decides it, e.g. --deepspeed_config zero2_offload_bf16"
_WARMUP = "--schedule.warmup_epochs, which may be a fraction; not given: a fifteenth of the run"
_ZERO = "the DeepSpeed JSON decides it, e.g. --deepspeed_config zero3_bf16"

ELSEWHERE = {
    # batch and length
    "-b": "--train.micro_batch_size", "batch_size": "--train.micro_batch_size",
    "per_device_train_batch_size": "--train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "--train.micro_batch_size", "train_batch_size": "--train.global_batch_size",
    "total_batch_size": "--train.global_batch_size", "validation_batch_size": "--eval.batch_size",
    "per_device_eval_batch_size": "--eval.batch_size", "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accum_steps": _ACCUMULATION, "accum_iter": _ACCUMULATION, "update_freq": _ACCUMULATION,
    "num_epochs": "--train.epochs", "num_train_epochs": "--train.epochs", "max_epochs": "--train.epochs",
    "max_steps": "--train.steps", "max_train_steps": "--train.steps",
    # optimizer
    "lr": "--optim.lr", "learning_rate": "--optim.lr", "blr": "--optim.lr_base", "base_lr": "--optim.lr_base",
    "lr_base": "--optim.lr_base", "opt": "--optim.name", "optimizer": "--optim.name", "opt_eps": "--optim.eps",
    "opt_betas": "--optim.betas '[0.9, 0.999]'", "wd": "--optim.weight_decay", "weight_decay": "--optim.weight_decay",
    "clip_grad": "--optim.clip_grad", "clip_grad_norm": "--optim.clip_grad", "max_grad_norm": "--optim.clip_grad",
    "gradient_clipping": "--optim.clip_grad",
    # schedule
    "sched": "--schedule.name", "scheduler": "--schedule.name", "lr_scheduler": "--schedule.name",
    "lr_scheduler_type": "--schedule.name", "warmup_epochs": "--schedule.warmup_epochs",
    "lr_warmup_epochs": "--schedule.warmup_epochs", "warmup": _WARMUP, "warmup_steps": _WARMUP,
    "warmup_iters": _WARMUP, "warmup_ratio": _WARMUP,
    "lr_warmup_decay": "no factor here: --schedule.warmup_lr is the learning rate of the first step",
    "lr_min": "--schedule.min_lr", "lr_step_size": "--schedule.decay_epochs",
    "lr_gamma": "--schedule.decay_rate",
    # model
    "-a": "--model.name", "arch": "--model.name", "model_kwargs": "--model.args",
    "input_size": "--model.img_size", "image_size": "--model.img_size", "img_size": "--model.img_size",
    "train_crop_size": "--model.img_size", "val_crop_size": "--model.img_size and --model.crop_pct",
    "val_resize_size": "--model.img_size and --model.crop_pct", "num_classes": _CLASSES, "nb_classes": _CLASSES,
    "drop_path": "--model.drop_path_rate", "drop": "--model.args '{drop_rate: 0.1}'",
    "drop_rate": "--model.args '{drop_rate: 0.1}'", "patch_size": "--model.args '{patch_size: 4}'",
    "embed_dim": "--model.args '{embed_dim: 384}'", "depth": "--model.args '{depth: 6}'",
    "num_heads": "--model.args '{num_heads: 6}'", "mlp_ratio": "--model.args '{mlp_ratio: 4}'",
    "gp": "--model.args '{global_pool: avg}'", "global_pool": "--model.args '{global_pool: avg}'",
    "in_chans": "no setting: images are RGB, so --model.args keeps in_chans at 3",
    "initial_checkpoint": "--model.init_from", "finetune": "--model.init_from", "weights": "--model.init_from",
    "torchcompile": "--model.compile", "torch_compile": "--model.compile",
    # data and augmentation
    "data_dir": _SHARDS, "data_path": _SHARDS, "dataset": _SHARDS, "dataset_path": _SHARDS, "root": _SHARDS,
    "train_dir": "--data.train", "val_dir": "--data.val", "-j": "--data.workers", "num_workers": "--data.workers",
    "dataloader_num_workers": "--data.workers", "aa": "--augment.auto_augment",
    "ra_magnitude": "--augment.auto_augment",
    "random_erase": "--augment.reprob", "mixup": "--augment.mixup", "mixup_alpha": "--augment.mixup",
    "cutmix": "--augment.cutmix", "cutmix_alpha": "--augment.cutmix", "train_interpolation": "--augment.interpolation",
    "label_smoothing": "--train.smoothing", "bce_loss": "--train.loss bce",
    # average of weights
    "model_ema": "--ema.decay; 0 switches the average off", "model_ema_decay": "--ema.decay",
    "ema_decay": "--ema.decay", "model_ema_warmup": "--ema.warmup",
    # precision, memory and ranks
    "amp": _PRECISION, "amp_dtype": _PRECISION, "fp16": _PRECISION, "bf16": _PRECISION, "precision": _PRECISION,
    "mixed_precision": _PRECISION, "deepspeed": "--deepspeed_config", "zero_stage": _ZERO, "stage": _ZERO,
    "offload": _OFFLOAD, "grad_checkpointing": _RECOMPUTE, "gradient_checkpointing": _RECOMPUTE,
    "world_size": _RANKS, "nproc_per_node": _RANKS, "nnodes": _RANKS, "num_gpus": _RANKS, "gpus": _RANKS,
    "gpu": _RANKS, "devices": _RANKS, "local_rank": _RANKS, "dist_url": _RANKS, "dist_backend": _RANKS,
    # the run
    "-o": "--output", "output_dir": "--output", "log_interval": "--train.log_every", "print_freq": "--train.log_every",
    "logging_steps": "--train.log_every", "steps_per_print": "--train.log_every", "log_wandb": "--train.wandb",
    "eval_every": "--eval.every_epochs", "eval_interval": "--eval.every_epochs", "eval_freq": "--eval.every_epochs",
    "eval_steps": "--eval.every_steps", "save_every": "--checkpoint.every_epochs",
    "save_freq": "--checkpoint.every_epochs", "save_steps": "--checkpoint.every_steps",
    "checkpoint_hist": "--checkpoint.keep", "save_total_limit": "--checkpoint.keep", "test_only": "--validate_only",
    "eval_only": "--validate_only", "evaluate": "--validate_only", "resume_from": "--resume",
    "resume_from_checkpoint": "--resume",
}
"""What the flags of timm's train.py, torchvision's references, DeepSpeed's JSON, transformers and the launchers are
called here, or where that is decided; long names without dashes, with underscores. A last part that is the same here,
such as epochs or seed, needs no line."""


def parse(argv: list[str]) -> RunConfig:
    """Read flags and `--config FILE.yaml`, or a recipe's name (flags given after it win), into a RunConfig.

    Raises:
        SettingsError: an unknown flag or key, a value of the wrong type or out of range, a required one missing. One
            line, and for YAML with file, line and key.
        SystemExit: after --help, --print_config or --print_completion, which rank 0 alone prints.
    """
    if any(word.partition("=")[0] in _PRINTING for word in argv) and launcher.adopt().rank > 0:
        raise SystemExit(0)
    if section := _section_asked(argv):
        _print_help(section)
        raise SystemExit(0)
    from jsonargparse import ArgumentError, auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)
    _import_nothing()
    words = _with_values(argv)
    try:
        return auto_cli(
            RunConfig, args=words, prog=PROGRAM, usage=f"{PROGRAM} [--config RECIPE|FILE.yaml] [--NAME VALUE ...]",
            description=("Train a vision backbone under DeepSpeed. "
                         f"`{PROGRAM} --help SECTION` shows one section: {', '.join(SECTIONS)}."),
            exit_on_error=False, allow_abbrev=False)
    except SettingsError as error:
        raise SettingsError(f"{error}{_origin(words, str(error))}") from error
    except (ArgumentError, TypeError, ValueError, OSError, RecursionError) as error:  # jsonargparse lets each through
        said = _complaint(words)
        if said is None and not isinstance(error, ArgumentError):
            raise
        raise SettingsError(said or f"{' '.join(str(error).split())}\n{PROGRAM} --help lists every flag, its unit and "
                            "default") from error


@functools.cache
def _import_nothing() -> None:
    """Keep jsonargparse from what it does otherwise: to call the class that a class_path names, in model.args, which
    take any value; and to import the module `optim` where a section is given as optim.yaml, before it looks for a file.
    """
    from jsonargparse import get_loader, set_loader, set_parsing_settings

    load = get_loader("yaml")

    def load_with_paths(text: str) -> Any:
        found = load(text)
        return {key: _as_path(value) if key in SECTIONS else value for key, value in found.items()
                } if isinstance(found, dict) else found

    set_loader("yaml", load_with_paths, (yaml.YAMLError,))
    set_parsing_settings(import_path_denylist=["*"], instantiate_subclass_spec_in_any=False)


def _as_path(section: Any) -> Any:
    """The value of a section; where it is a YAML file, one that cannot be taken for the name of a module."""
    is_bare = isinstance(section, str) and section.endswith(_YAML) and os.path.basename(section) == section
    return os.path.join(os.curdir, section) if is_bare else section


def _with_values(argv: list[str]) -> list[str]:
    """`--dry_run`, also written `--dry-run`, alone means `--dry_run true`; so for every switch.

    A flag and a negative number after it become one word, as argparse takes -1e-3 for a flag. YAML files of sections
    are given as _as_path does, and the name of a shipped recipe as its path.
    """
    switches = {"--" + name for name, kind in KINDS.items() if kind in (bool, Optional[bool])}
    words: list[str] = []
    for at, word in enumerate(argv):
        name, equals, value = word.partition("=")
        flag = "--" + name[2:].replace("-", "_")
        if word.startswith("--") and flag in switches:
            words.append(flag + equals + value)
            words += ["true"] if not equals and (at + 1 == len(argv) or _is_flag(argv[at + 1])) else []
        elif re.match(r"-\.?\d", word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += "=" + word
        elif name[2:] in SECTIONS and os.path.isfile(value):
            words.append(f"{name}={_as_path(value)}")
        elif words and words[-1][2:] in SECTIONS and os.path.isfile(word):
            words.append(_as_path(word))
        elif name == "--config" and equals:
            words.append(f"{name}={_recipe(value)}")
        elif words and words[-1] == "--config":
            words.append(_recipe(word))
        else:
            words.append(word)
    return words


def _recipe(given: str) -> str:
    """The path of a shipped recipe, where its name is given: vir_small_in1k."""
    path = _RECIPES / f"{given}.yaml"
    return str(path) if not os.path.isfile(given) and path in _RECIPES.glob("*.yaml") else given


def _is_flag(word: str) -> bool:
    return re.match(r"-(?!\.?\d)", word) is not None  # -1 and -.5 are values


# Help


def _section_asked(argv: list[str]) -> str:
    """The section of `--help SECTION`, or nothing."""
    for word, after in zip(argv, [*argv[1:], ""]):
        flag, equals, value = word.partition("=")
        if flag in _HELP:
            return value if equals else "" if _is_flag(after) else after
    return ""


def _print_help(section: str) -> None:
    if section not in SECTIONS:
        raise SettingsError(f"--help {section}: there is no such section; there are {', '.join(SECTIONS)}, and --help "
                            "alone shows all")
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=False)
    parser = ArgumentParser(prog=PROGRAM, add_help=False, usage=f"{PROGRAM} [--{section}.NAME VALUE ...]")
    parser.add_class_arguments(KINDS[section], section, sub_configs=True)
    parser.print_help()


# What is wrong with words that were refused


def _complaint(words: list[str]) -> str | None:
    """One line on the first of the words that cannot be read, or on all unknown flags together; None: none is found."""
    groups = _groups(words)
    unknown = [f"{flag} ({_suggestion(flag)})" for flag, _ in groups if flag and not _is_known(flag)]
    if unknown:
        return f"no such flag: {', '.join(unknown)}"
    for flag, values in groups:
        try:
            said = _complaint_of_flag(flag, values)
        except RecursionError:
            said = f"{flag} {' '.join(values)}: an anchor of this YAML holds itself; write out what it stands for"
        if said:
            return said
    return None


def _groups(words: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words up to the next one; those before the first flag have an empty one."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if _is_flag(word):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        else:
            groups[-1][1].append(word)
    return groups


def _is_known(flag: str) -> bool:
    name = flag.removeprefix("--")
    return flag in (*_PRINTING, "--config") or flag.startswith("--") and (
        name in KINDS or any(kind == dict[str, Any] and name.startswith(f"{key}.") for key, kind in KINDS.items()))


def _complaint_of_flag(flag: str, values: list[str]) -> str | None:
    told = list(map(shown, values))
    if flag == "--print_completion":
        return None if values and values[0] in _COMPLETIONS else f"{flag} takes {', '.join(_COMPLETIONS)}"
    if flag == "--print_config" and values:
        return None if values[0].startswith("skip_") else f"{flag} takes no value, or as {flag}=skip_default"
    if not flag or flag in _PRINTING:
        return f"{told[0]!r} belongs to no flag; settings are given as --NAME VALUE" if values else None
    name = flag[2:]
    kind = KINDS.get(name)  # None: --config, or an entry of a mapping
    if not values:
        return f"{flag} is given no value; it must be {_in_words(kind)}"
    if len(values) > 1:
        if _of_optional(kind) is not tuple:
            return f"{told[1]!r} after {flag} {told[0]} belongs to no flag; quote a value that has spaces or braces"
        return f"{flag} {' '.join(told)}: write it as one word, {flag} '[{', '.join(told)}]'"
    if flag == "--config" or name in SECTIONS:
        return _complaint_of_mapping(flag, values[0])
    if kind is not None and not _fits(kind, yaml.ScalarNode("tag:yaml.org,2002:str", values[0])):
        return f"{flag} is {told[0]!r}; it must be {_in_words(kind)}"
    return None


def _complaint_of_mapping(flag: str, value: str) -> str | None:
    """On what --config or a section is given: a YAML file, or YAML itself."""
    prefix = "" if flag == "--config" else flag[2:] + "."
    if os.path.isfile(value):  # False also for what can be no path; pathlib raises
        return _complaint_of_yaml(value, _read(Path(value)), prefix)
    if value.lstrip().startswith("{"):
        return _complaint_of_yaml(f"{flag} {value}", value, prefix)
    if prefix and value.endswith(_YAML):
        return f"{flag} {value}: there is no such file"
    if prefix:
        return f"{flag} is {value!r}, but {flag[2:]} is a section: {_of_section(flag[2:], value)}"
    if not value:
        return f"--config is ''; it must be {_in_words(None)}"
    if os.path.isdir(value):
        return f"--config is {value!r}, a folder; it must be a YAML file"
    recipes = sorted(_RECIPES.glob("*.yaml"))
    same = [str(path) for path in recipes if path.stem == Path(value).stem]
    return f"--config {value}: there is no such file; " + (
        f"the recipe of that name is {same[0]}" if same else
        f"the recipes in {_RECIPES} are {', '.join(path.name for path in recipes)}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _complaint_of_yaml(place: str, text: str, prefix: str) -> str | None:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{place}{where}: this is no YAML: {error.problem or error.context}"
    except yaml.YAMLError as error:  # bytes that no text has
        return f"{place}: this is no YAML: {' '.join(str(error).split())}"
    if not isinstance(node, yaml.MappingNode):
        return f"{place} has no settings; it must be YAML such as optim: {{lr: 1.0e-3}}"
    return _complaint_of_node(place, node, prefix)


def _complaint_of_node(place: str, node: yaml.MappingNode, prefix: str) -> str | None:
    for key, value in node.value:
        line, name = f"{place}, line {key.start_mark.line + 1}", prefix + _shown(key)
        kind = KINDS.get(name)
        if kind is None and not key.tag.endswith(":merge"):
            return f"{line}: there is no setting {name} ({_suggestion(name)})"
        if kind is None or is_dataclass(kind):
            if said := _complaint_of_section(place, line, name if kind else prefix.rstrip("."), value):
                return said
        elif not _fits(kind, value):
            expected = _in_words(kind)
            return (f"{line}: {name} is {_shown(value)}; it must be {expected}"
                    f"{', so in quotes' if expected.startswith('text') else ''}")
    return None


def _complaint_of_section(place: str, line: str, section: str, node: yaml.Node) -> str | None:
    if isinstance(node, yaml.MappingNode):
        return _complaint_of_node(place, node, section + ".")
    file = Path(place).parent / _shown(node)
    if os.path.isfile(file):
        return _complaint_of_yaml(str(file), _read(file), section + ".")
    scalar = isinstance(node, yaml.ScalarNode) and node.value
    if scalar and scalar.endswith(_YAML):
        return f"{line}: {section} is {scalar}; there is no such file"
    example = f", e.g. {section}: {{name: {scalar}}}" if scalar and section + ".name" in KINDS else ""
    return f"{line}: {section} is {_shown(node)}; it must be a mapping{example}, or a YAML file of settings"


def _shown(node: yaml.Node) -> str:
    """A part of a YAML file on one line."""
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = True
        return yaml.serialize(node, width=10000).strip()
    return str(node.value) or "empty"


def _fits(kind: Any, value: yaml.Node) -> bool:
    """Whether jsonargparse takes the value for a setting of that type."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        if value.start_mark is None:  # a word
            parser.parse_args([f"--value={value.value}"])
        else:
            key = yaml.ScalarNode("tag:yaml.org,2002:str", "value")
            parser.parse_string(yaml.serialize(yaml.MappingNode("tag:yaml.org,2002:map", [(key, value)])))
    except ArgumentError:
        return False
    return True


def _of_section(section: str, value: str) -> str:
    """Flags of a section that may be meant where it is given a single value itself."""
    name = f"{section}.name"
    inside = [f"--{setting}" for setting in KINDS if setting.startswith(section + ".")]
    use = f"--{name} {value}" if name in KINDS else " and ".join(inside[:2])
    return f"use {use}; {PROGRAM} --help {section} lists all of it"


def _in_words(kind: Any) -> str:
    """What a value of that type must be; None: of --config."""
    arguments = get_args(kind)
    if get_origin(kind) is Union:
        return " or ".join("null" if inner is type(None) else _in_words(inner) for inner in arguments)
    if get_origin(kind) is Literal:
        return " or ".join([", ".join(arguments[:-1]), arguments[-1]])
    if get_origin(kind) is tuple:
        return f"{len(arguments)} numbers in brackets, '[{', '.join(['0.5', '0.9', '0.9'][:len(arguments)])}]'"
    if get_origin(kind) is dict:
        return "a mapping, '{patch_size: 4, depth: 6}'"
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return simple.get(kind, "a YAML file of settings")


def _of_optional(kind: Any) -> Any:
    """What a type is but for None: tuple for Optional[tuple[float, float]]."""
    parts = get_args(kind) if get_origin(kind) is Union else (kind,)
    return next(get_origin(part) or part for part in parts if part is not type(None))


# Which setting is meant


def _suggestion(flag: str) -> str:
    """What to use in place of an unknown flag or YAML key."""
    name = flag.lstrip("-").replace("-", "_").lower()
    section, _, last = name.rpartition(".")
    if name in KINDS:
        return f"use {_as_given(flag, [name])}"
    if f"--{name}" in _PRINTING:
        return f"use --{name}"
    if said := ELSEWHERE.get(flag) or ELSEWHERE.get(last):
        said = said if flag.startswith("-") else re.sub(r"--(?=[a-z_]+\.)", "", said)
        return f"use {said}" if said.split()[0].lstrip("-").rstrip(";,") in KINDS else said
    if section in SECTIONS:  # the last part alone means another thing in another section
        inside = [other for other in KINDS if other.startswith(section + ".")]
        if close := _close(last, inside, 0.7) or [other for other in inside if other.endswith("_" + last)]:
            return f"did you mean {_as_given(flag, close)}"
        return f"{PROGRAM} --help {section} lists all"
    if same := [other for other in KINDS if other.rpartition(".")[2] == last]:
        return f"use {_as_given(flag, same)}"
    if close := _close(name, list(KINDS), 0.85):
        return f"did you mean {_as_given(flag, close)}"
    return f"{PROGRAM} --help lists all"


def _close(name: str, among: list[str], least: float) -> list[str]:
    """Up to three settings that are written much like that, or their last part where it has no dot."""
    alike = {other: difflib.SequenceMatcher(None, name, other if "." in name else other.rpartition(".")[2]).ratio()
             for other in among}
    least = max(least, max(alike.values()) - 0.1)
    return sorted((other for other in among if alike[other] >= least), key=lambda other: -alike[other])[:3]


def _as_given(flag: str, names: list[str]) -> str:
    """The names as flags, or as keys where a key was given."""
    return " or ".join(("--" if flag.startswith("-") else "") + name for name in names)


def _origin(words: list[str], said: str) -> str:
    """Where a setting that is out of range comes from, if from a YAML file: its name and line in brackets."""
    found = re.match(r"--([\w.]+) is ", said)
    if not found:
        return ""
    setting, place = found[1], ""
    for flag, values in _groups(words):
        if flag == "--config":
            place = values and _line_of(values[0], setting) or place
        elif f"{setting}.".startswith(f"{flag[2:]}."):  # it, or its section
            place = values and _line_of(values[0], setting[len(flag) - 1:]) or ""
    return place


def _line_of(file: str, name: str) -> str:
    """Where a YAML file, or one that it names for a section, sets that; empty if it does not or is no file."""
    if not name or not os.path.isfile(file):
        return ""
    node: yaml.Node | None = yaml.compose(_read(Path(file)), Loader=yaml.SafeLoader)
    while isinstance(node, yaml.MappingNode):
        entries, node = node.value, None
        for key, value in entries:
            if key.value == name:
                return f" ({file}, line {key.start_mark.line + 1})"
            if name.startswith(f"{key.value}."):
                node, rest = value, name[len(key.value) + 1:]
        name = rest if node else name
    return _line_of(str(Path(file).parent / node.value), name) if isinstance(node, yaml.ScalarNode) else ""
