"""What can be checked at the door, by one process alone, before deepspeed is imported or a process group started."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import timm
import yaml

from vir import distributed, launcher
from vir.addresses import shown
from vir.checkpoints.info import DESCRIPTION, read_info
from vir.checkpoints.names import BEST, LATEST, candidates
from vir.config import DataConfig, RunConfig, differences, folder_of, plan_accumulation, to_dict
from vir.data import jpeg
from vir.data.exclusion import Exclusion, read_exclusion
from vir.data.opening import Places, open_reader, places
from vir.data.reader import Reader
from vir.data.traffic import choose
from vir.data.transforms import check_augmentation
from vir.engine import ds_config, optimizer
from vir.errors import SettingsError, VirError
from vir.models.build import FORBIDDEN_ARGS  # and vir.models registers our models with timm
from vir.models.initialize import check_pretrained
from vir.reports.metrics import read_metrics
from vir.run_folder import CHECKPOINTS, CONFIG, METRICS
from vir.training.distill import check_teacher
from vir.training.schedule import check_schedule, total_steps
from vir.weights import hub
from vir.weights.portable import is_there


@dataclass(frozen=True)
class Prepared:
    """Settings and data that are known to be usable."""

    config: RunConfig
    ds_config: dict[str, Any]
    train: Reader
    val: Reader | None
    """None: nothing is evaluated."""
    exclusion: Exclusion
    """What of the training samples is left out."""

    @property
    def ds_name(self) -> str:
        """Of the DeepSpeed JSON, without its folder."""
        return Path(self.config.deepspeed_config).stem

    @property
    def fingerprint(self) -> str:
        """Of the training data as it is served."""
        return self.exclusion.fingerprint(self.train.fingerprint)


def prepare(config: RunConfig, is_stopping: Callable[[], bool] = lambda: False) -> Prepared:
    """Fill in what was left open, read the DeepSpeed JSON, open the shards, check batch sizes, model and run folder.

    Raises:
        SettingsError, DataError: with the value and the way out.
        Stopped: `is_stopping`, asked while the index of shards is made, said yes.
    """
    distributed.check_driver()
    config = replace(config, output=str(folder_of(config)),
                     deepspeed_config=config.deepspeed_config or ds_config.name_for_this_machine())
    deepspeed_json = ds_config.read(config.deepspeed_config)
    plan_accumulation(config.train.global_batch_size, config.train.micro_batch_size,
                      launcher.adopt().size)
    kept = places(config.data, is_stopping)
    with distributed.first_of_machine_first(launcher.adopt(), is_stopping) as first:  # it makes what the others take
        train = _open("--data.train", config.data.train, kept, first)
        val = _open("--data.val", config.data.val, kept, first) if config.data.val else None
    if val is not None and train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise SettingsError(f"--data.train {train.name} has {len(train.classes)} classes and --data.val "
                            f"{val.name} has {len(val.classes)}" +
                            (f"; not in both: {', '.join(only[:5])}" if only else " in another order") +
                            "; convert both from the same source")
    check_schedule(total_steps(config.train, len(train)), len(train) / config.train.global_batch_size, config.schedule)
    _check_model(config)
    check_augmentation(config.augment)
    jpeg.decoder()  # as the environment asks for it
    optimizer.check_name(config.optim.name, ds_config.zero_stage(deepspeed_json))
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise SettingsError(f"--train.wandb {config.train.wandb}: wandb is not installed; pip install wandb, or leave "
                            "it out")
    exclusion = read_exclusion(config.data.exclude, train)
    config = replace(config, data=_with_order(config, train))
    _check_folder(config)
    return Prepared(config, deepspeed_json, train, val, exclusion)


def _open(flag: str, spec: str, kept: Places, first: bool) -> Reader:
    try:
        return open_reader(spec, kept, first=first)
    except VirError as error:
        raise type(error)(f"{flag}: {error}") from error


def _with_order(config: RunConfig, train: Reader) -> DataConfig:
    """Lanes and window as given, else as the run began, else as they fit the cache."""
    began = _began_with(config).get("data") or {}
    lanes, window = config.data.lanes or began.get("lanes"), config.data.window or began.get("window")
    chosen = choose(train.shard_sizes, sum(train.shard_bytes) / len(train.shard_sizes), train.budget_bytes,
                    launcher.nodes(), config.train.global_batch_size)
    return replace(config.data, lanes=lanes or chosen[0], window=window or chosen[1])


def _began_with(config: RunConfig) -> dict[str, Any]:
    """The settings of the run or checkpoint that this one continues; none where it begins."""
    named = [] if config.resume in ("auto", "none") else [config.resume]
    for folder in map(Path, [config.output, *named]):
        if (folder / CONFIG).is_file():
            return _read_settings(folder / CONFIG)
        if (folder / DESCRIPTION).is_file():
            return read_info(folder).config
    return {}


def _check_model(config: RunConfig) -> None:
    if forbidden := sorted(FORBIDDEN_ARGS & config.model.args.keys()):
        raise SettingsError(f"--model.args sets {', '.join(forbidden)}; a run begins with random weights, or with "
                            "those of --model.init_from or --model.pretrained: leave them out")
    begin = config.model.init_from
    if begin and not (is_there(begin) or hub.is_folder(begin)) and not continues(config):
        raise SettingsError(f"--model.init_from {shown(begin)}: " + (
            f"no {hub.CONFIG} is in that folder; vir-consolidate makes a weights file of a run, and a Hugging Face "
            "folder has one" if Path(begin).is_dir() else
            "no such file; give a .safetensors file of vir-consolidate, a timm checkpoint, or a Hugging Face folder"))
    if not timm.is_model(config.model.name):
        near = difflib.get_close_matches(config.model.name, timm.list_models(), n=3)
        raise SettingsError(f"--model.name {config.model.name}: no such model" + (
            f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() tells all, vir_* are ours"))
    try:
        timm.get_pretrained_cfg(config.model.name)
    except RuntimeError as error:
        raise SettingsError(f"--model.name {config.model.name}: {error}; leave the part after the dot out") from error
    if config.model.pretrained:
        check_pretrained(config.model.name)
    if config.distill.teacher and not config.validate_only:
        check_teacher(config.distill.teacher)


def continues(config: RunConfig) -> bool:
    """Whether the weights will be those of a checkpoint, so that none to begin from are needed."""
    if config.resume not in ("auto", "none"):
        return True
    return (config.resume == "auto" or not config.validate_only) and bool(candidates(Path(config.output)))


def _check_folder(config: RunConfig) -> None:
    """Refuse a run folder that began with other settings, or that --resume none would overwrite."""
    if (Path(config.output) / DESCRIPTION).is_file():
        raise SettingsError(f"--output {config.output} is a checkpoint, not a run folder; give the folder of its run, "
                            f"or another --output and --resume {config.output}")
    saved = Path(config.output) / CONFIG
    has_checkpoint = (Path(config.output) / CHECKPOINTS / LATEST).is_file()
    if config.resume == "none" and not config.validate_only and (saved.is_file() or has_checkpoint):
        raise SettingsError(f"--output {config.output} holds a run and --resume is none; give another --output, or "
                            "leave --resume out to continue it")
    if config.resume not in ("auto", "none") and not Path(config.resume).exists():
        raise SettingsError(f"--resume {config.resume}: nothing is there; give auto, none, or the path of a run, "
                            f"of one of its {CHECKPOINTS}/step-… folders, or of its {CHECKPOINTS}/{BEST}")
    if (Path(config.output) / METRICS).is_file():
        read_metrics(Path(config.output))  # damage is told here by every rank, later it would be rank 0 alone
    if not saved.is_file() or config.validate_only:
        return
    changed = differences(_read_settings(saved), to_dict(config))
    if changed and not config.accept_config_change:
        raise SettingsError(f"--output {config.output} began with other settings: " + "; ".join(changed) +
                            "; give the old ones to go on, another --output to begin anew, or --accept_config_change "
                            "true to go on with the new ones")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(path.read_text()))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); restore it, or give another --output") from error
