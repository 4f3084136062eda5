"""DeepSpeed's JSON: read, checked key by key, completed with what the run config owns. Imports no deepspeed."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from vir.config import RunConfig
from vir.errors import SettingsError

# Keys whose home is the run config, with the flag that sets them.
OWNED = {
    "train_batch_size": "--train.global_batch_size",
    "train_micro_batch_size_per_gpu": "--train.micro_batch_size",
    "gradient_accumulation_steps": "--train.global_batch_size and --train.micro_batch_size",
    "gradient_clipping": "--optim.clip_grad",
    "optimizer": "--optim.lr, --optim.weight_decay, --optim.betas and --optim.eps",
    "scheduler": "--schedule.warmup_epochs, --schedule.warmup_lr and --schedule.min_lr",
}

# DeepSpeed 0.19 ignores a top-level key it does not know, so a typo would pass in silence.
KNOWN = {
    "zero_optimization", "bf16", "fp16", "activation_checkpointing", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger",
    "tensorboard", "wandb", "csv_monitor", "comet", "steps_per_print", "dump_state", "disable_python_gc", "timers",
}


def read(path: str | Path) -> dict[str, Any]:
    """The JSON at `path`, without the keys of the run config that it leaves at "auto".

    Raises:
        SettingsError: no such file, not a JSON object, an unknown key, one that the run config owns, "auto" where
            nothing fills it, a block that is no object, an activation_checkpointing key that has no effect, both
            fp16 and bf16, a ZeRO stage beyond 3.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        shipped = sorted(str(file) for file in Path("ds_configs").glob("*.json"))
        raise SettingsError(f"--deepspeed_config {path}: no such file" +
                            (f"; here are {', '.join(shipped)}" if shipped else "")) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingsError(f"--deepspeed_config {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"--deepspeed_config {path} holds a JSON {type(found).__name__}; it must be an object")

    owned = [key for key in OWNED if found.get(key, "auto") != "auto"]
    if owned:
        raise SettingsError(f"{path} sets {', '.join(owned)}, which the run config owns; remove it there and use " +
                            "; ".join(f"{OWNED[key]} for {key}" for key in owned))
    config = {key: value for key, value in found.items() if key not in OWNED}
    for key in config:
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN | OWNED.keys(), n=1)
            raise SettingsError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                                  f"; known are {', '.join(sorted(KNOWN))}"))
    _refuse_auto(path, config, "")
    _check_blocks(path, config)
    extra = sorted(config.get("activation_checkpointing", {}))
    if extra:
        raise SettingsError(f"{path}: activation_checkpointing sets {', '.join(extra)}, which would have no effect; "
                            "write an empty block {} to recompute every block in the backward pass")
    if is_enabled(config, "fp16") and is_enabled(config, "bf16"):
        raise SettingsError(f"{path} enables both fp16 and bf16; keep one")
    if not config.get("bf16", {}).get("check_grad_overflow", True):
        raise SettingsError(f"{path} switches bf16.check_grad_overflow off: steps that are not finite would be "
                            "applied; leave it out")
    offload = sorted(key for key in config.get("zero_optimization", {}) if "offload" in key)
    if offload:
        raise SettingsError(f"{path} sets zero_optimization.{offload[0]}; offload is not supported yet, leave it out")
    stage = zero_stage(config)
    if type(stage) is not int or stage not in (0, 1, 2, 3):  # true is 1 in Python
        raise SettingsError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    return config


def _check_blocks(path: Path, config: dict[str, Any]) -> None:
    for key in ("zero_optimization", "fp16", "bf16", "activation_checkpointing"):
        block = config.get(key, {})
        if not isinstance(block, dict):
            raise SettingsError(f"{path}: {key} is {json.dumps(block)}; it must be an object {{...}}, or be left out")
        enabled = block.get("enabled", False)
        if key in ("fp16", "bf16") and not isinstance(enabled, bool):
            raise SettingsError(f"{path}: {key}.enabled is {json.dumps(enabled)}; it must be true or false")


def _refuse_auto(path: Path, value: Any, key: str) -> None:
    if value == "auto":
        raise SettingsError(f'{path}: {key} is "auto", which DeepSpeed would replace by its default in silence; '
                            "write the value")
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in named:
        _refuse_auto(path, item, f"{key}.{name}" if key else name)


def is_enabled(config: dict[str, Any], precision: str) -> bool:
    return bool(config.get(precision, {}).get("enabled", False))


def precision(config: dict[str, Any]) -> str:
    """fp16, bf16 or fp32."""
    return next((name for name in ("fp16", "bf16") if is_enabled(config, name)), "fp32")


def zero_stage(config: dict[str, Any]) -> Any:
    return config.get("zero_optimization", {}).get("stage", 0)


def complete(config: dict[str, Any], run: RunConfig, accumulation: int) -> dict[str, Any]:
    """The dict handed to DeepSpeed: `config` with batch sizes, accumulation and clipping of the run."""
    return {
        **config,
        "train_batch_size": run.train.global_batch_size,
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optim.clip_grad,
    }


def offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer works in CPU memory."""
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
