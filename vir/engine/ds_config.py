"""DeepSpeed's JSON: read, checked key by key, completed with what the run config owns. Imports no deepspeed."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable

import vir
from vir.config import RunConfig
from vir.errors import SettingsError

# Keys whose home is the run config, with the flag that sets them.
OWNED = {
    "train_batch_size": "--train.global_batch_size",
    "train_micro_batch_size_per_gpu": "--train.micro_batch_size",
    "gradient_accumulation_steps": "--train.global_batch_size and --train.micro_batch_size",
    "gradient_clipping": "--optim.clip_grad",
    "optimizer": "--optim.name, --optim.lr, --optim.weight_decay, --optim.betas and --optim.eps",
    "scheduler": "--schedule.name, --schedule.warmup_epochs, --schedule.warmup_lr and --schedule.min_lr",
}

_MONITOR = {"enabled", "output_path", "job_name"}
_MONITORS_OF_FILES = {"tensorboard", "csv_monitor"}
_WRITERS = _MONITORS_OF_FILES | {"wandb", "comet", "flops_profiler"}

# DeepSpeed 0.19 ignores a top-level key it does not know, so a typo would pass in silence; in most blocks it refuses
# one, but does not say what was meant. None: a value, not a block.
KNOWN: dict[str, set[str] | None] = {
    "zero_optimization": {
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_param", "offload_optimizer",
        "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters", "zero_hpz_partition_size",
        "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
        "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"},
    "offload_param": {"device", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"},
    "offload_optimizer": {"device", "buffer_count", "pin_memory", "fast_init"},
    "bf16": {"enabled", "check_grad_overflow", "immediate_grad_update"},
    "fp16": {"enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
             "consecutive_hysteresis", "min_loss_scale"},
    "data_types": {"grad_accum_dtype"},
    "activation_checkpointing": set(),
    "flops_profiler": {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed",
                       "output_file"},
    "comms_logger": {"enabled", "prof_all", "prof_ops", "verbose", "debug"},
    "tensorboard": _MONITOR, "csv_monitor": _MONITOR,
    "wandb": {"enabled", "group", "team", "project"},
    "comet": {"enabled", "samples_log_interval", "project", "workspace", "experiment_name", "experiment_key", "online",
              "mode"},
    "timers": {"throughput"}, "throughput": {"enabled", "synchronized"},
    "communication_data_type": None, "prescale_gradients": None, "gradient_predivide_factor": None,
    "wall_clock_breakdown": None, "memory_breakdown": None, "steps_per_print": None, "dump_state": None,
    "disable_python_gc": None,
}
_NESTED = {"offload_param", "offload_optimizer", "throughput"}

# What DeepSpeed knows, but what would train otherwise than promised, or leave checkpoints that nothing here reads.
REFUSED = {
    "zero_optimization": {
        "elastic_checkpoint": "its checkpoints have another layout; any number of ranks resumes without it",
        "load_from_fp32_weights": "weights always resume from float32",
        "leaf_module": "the weights of each block are gathered at once already",
        "stage3_module_granularity_threshold": "the weights of each block are gathered at once already",
        "round_robin_gradients": "it orders the weights in a checkpoint otherwise",
        "parameter_alignment": "it orders the weights in a checkpoint otherwise",
        "compute_grad_norm": "clipping and the log need the norm",
        "zenflow": "it updates weights at other moments than the optimizer's step, which the average would miss",
        "save_muon_momentum_buffer_in_memory": "Muon runs without ZeRO only",
        "pipeline_loading_checkpoint": "checkpoints are not loaded by DeepSpeed here",
        "legacy_stage1": "DeepSpeed has removed it", "cpu_offload": "write offload_optimizer: {device: cpu}",
        "cpu_offload_param": "write offload_param: {device: cpu}",
        "cpu_offload_use_pin_memory": "write pin_memory in offload_optimizer",
        "stage3_gather_fp16_weights_on_model_save": "write stage3_gather_16bit_weights_on_model_save",
    },
    "offload_param": {"nvme_path": "only cpu is"},
    "offload_optimizer": {
        "super_offload": "it keeps the optimizer in a process of its own, where no average is kept",
        "ratio": "a part of the weights would be stepped by an optimizer of DeepSpeed's own, without rate or average",
        "cpuadam_cores_perc": "it belongs to super_offload", "nvme_path": "only cpu is",
        "pipeline_read": "only cpu is", "pipeline_write": "only cpu is"},
    "bf16": {"bf16_master_weights_and_grads": "masters and the average are float32",
             "bf16_optimizer_states": "masters and the average are float32"},
    "fp16": {"fp16_master_weights_and_grads": "masters and the average are float32"},
    "comet": {"api_key": "it is a secret, and a run keeps its JSON; give it in the environment, as COMET_API_KEY"},
    "data_types": {"buffer_dtype": "retention's decay must stay float32",
                   "keep_in_fp32_modules": "all parameters of a group must have one type"},
    "": {"torch_autocast": "one way is supported: bf16.enabled or fp16.enabled, with float32 masters",
         "zero_allow_untested_optimizer": "--optim.name is checked against the stage instead",
         "zero_force_ds_cpu_optimizer": "--optim.name is checked against the stage instead",
         "checkpoint": "checkpoints are written as the run config says",
         "data_efficiency": "the order of samples is fixed",
         "compile": "use --model.compile true"},
}


def name_for_this_machine() -> str:
    """Of the shipped file that a run takes which names none: ZeRO 2, in the type that this machine is made for."""
    import torch

    if not torch.cuda.is_available():
        return "zero2_fp32"
    return "zero2_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "zero2_fp16"


SHIPPED = Path(vir.__file__).parent / "ds_configs"
"""The folder of the JSON files that come with this package."""


def locate(given: str | Path) -> Path:
    """The file that --deepspeed_config means: a path, or the name of a shipped one, e.g. zero2_bf16.

    Raises:
        SettingsError: neither is there.
    """
    path = Path(given)
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}
    if not path.is_file() and str(given) in shipped:
        return shipped[str(given)]
    if not path.exists():
        raise SettingsError(f"--deepspeed_config {path}: no such file; give the path of a JSON, or the name of a "
                            f"shipped one: {', '.join(shipped)}")
    return path


def read(given: str | Path) -> dict[str, Any]:
    """The JSON that `given` means (see locate), without the keys of the run config that it leaves at "auto".

    Raises:
        SettingsError: no such file, not a JSON object; anywhere in it an unknown key, one that the run config owns or
            that would break what is promised, "auto" where nothing fills it; a block that is no object, an
            activation_checkpointing key that has no effect, both fp16 and bf16, a ZeRO stage beyond 3, an offload or a
            type of accumulated gradients that the stage does not have.
    """
    path = locate(given)
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingsError(f"--deepspeed_config {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--deepspeed_config {path} holds a JSON {type(content).__name__}; it must be an object")
    owned = [key for key in OWNED if content.get(key, "auto") != "auto"]
    if owned:
        raise SettingsError(f"{path} sets {', '.join(owned)}, which the run config owns; remove it there and use " +
                            "; ".join(f"{OWNED[key]} for {key}" for key in owned))
    config = {key: value for key, value in content.items() if key not in OWNED}
    _check_keys(path, config, "", KNOWN.keys() - _NESTED, KNOWN.keys() - _NESTED | OWNED.keys())
    _refuse_auto(path, config, "")
    _check_precision(path, config)
    stage = zero_stage(config)
    if type(stage) is not int or stage not in (0, 1, 2, 3):  # true is 1 in Python
        raise SettingsError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    _check_offload(path, config, stage)
    _check_accumulation(path, config, stage)
    return config


def _check_keys(path: Path, block: dict[str, Any], prefix: str, known: set[str], guesses: set[str]) -> None:
    """Refuse what is unknown or would break, here and in the blocks within."""
    title = prefix.rstrip(".").split(".")[-1]
    for key, value in block.items():
        if reason := REFUSED.get(title, {}).get(key):
            raise SettingsError(f"{path} sets {prefix}{key}, which is not supported: {reason}; leave it out")
        if title == "activation_checkpointing":
            raise SettingsError(f"{path}: activation_checkpointing sets {', '.join(sorted(block))}, which would have "
                                "no effect; write an empty block {} to recompute every block in the backward pass")
        if key not in known:
            near = difflib.get_close_matches(key, guesses, n=1)
            raise SettingsError(f"{path}: unknown key {prefix + key!r}; " + (
                f"did you mean {prefix + near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"))
        inner = KNOWN.get(key)
        if inner is None:
            continue
        if not isinstance(value, dict):
            raise SettingsError(f"{path}: {prefix}{key} is {json.dumps(value)}; it must be an object {{...}}, or be "
                                "left out")
        _check_keys(path, value, f"{prefix}{key}.", inner, inner)


def _refuse_auto(path: Path, value: Any, key: str) -> None:
    if value == "auto":
        raise SettingsError(f'{path}: {key} is "auto", which DeepSpeed would replace by its default in silence; '
                            "write the value")
    named: Iterable[tuple[Any, Any]] = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for name, item in named:
        _refuse_auto(path, item, f"{key}.{name}" if key else name)


def _check_precision(path: Path, config: dict[str, Any]) -> None:
    for key in ("fp16", "bf16"):
        enabled = config.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise SettingsError(f"{path}: {key}.enabled is {json.dumps(enabled)}; it must be true or false")
    if is_enabled(config, "fp16") and is_enabled(config, "bf16"):
        raise SettingsError(f"{path} enables both fp16 and bf16; keep one")
    if not config.get("bf16", {}).get("check_grad_overflow", True):
        raise SettingsError(f"{path} switches bf16.check_grad_overflow off: steps that are not finite would be "
                            "applied; leave it out")


def _check_offload(path: Path, config: dict[str, Any], stage: int) -> None:
    for key, needs in (("offload_optimizer", 1), ("offload_param", 3)):
        device = config.get("zero_optimization", {}).get(key, {}).get("device", "none")
        if device == "nvme":
            raise SettingsError(f"{path}: zero_optimization.{key}.device is nvme, which is not supported: what lies "
                                "there is in no checkpoint that could be consolidated or resumed elsewhere; take cpu")
        if device not in ("cpu", "none"):
            raise SettingsError(f"{path}: zero_optimization.{key}.device is {device!r}; it must be cpu or none")
        if device == "cpu" and stage < needs:
            raise SettingsError(f"{path}: zero_optimization.{key} needs ZeRO stage {needs} or higher, the stage is "
                                f"{stage}")


def _check_accumulation(path: Path, config: dict[str, Any], stage: int) -> None:
    dtype = config.get("data_types", {}).get("grad_accum_dtype")
    if dtype is None:
        return
    if dtype not in ("fp32", "bf16", "fp16"):
        raise SettingsError(f"{path}: data_types.grad_accum_dtype is {dtype!r}; it must be fp32, bf16 or fp16")
    if stage < 2 and dtype != precision(config):
        why = ("DeepSpeed has it in stages 2 and 3 only" if stage == 0 else
               "DeepSpeed would take another optimizer, whose checkpoints have another layout")
        raise SettingsError(f"{path}: data_types.grad_accum_dtype {dtype} with ZeRO stage {stage}: {why}; take stage 2 "
                            "or 3, or leave it out")


def is_enabled(config: dict[str, Any], precision: str) -> bool:
    return bool(config.get(precision, {}).get("enabled", False))


def precision(config: dict[str, Any]) -> str:
    """fp16, bf16 or fp32."""
    return next((name for name in ("fp16", "bf16") if is_enabled(config, name)), "fp32")


def zero_stage(config: dict[str, Any]) -> Any:
    return config.get("zero_optimization", {}).get("stage", 0)


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What zero_optimization says of memory and communication; sizes in numbers, not bytes. The defaults are those of
    DeepSpeed."""

    stage: int = 0
    reduce_bucket_size: int = 500_000_000
    """Gradients that are reduced at a time; as many are kept in a buffer, where contiguous_gradients is on."""
    overlap_comm: bool = False
    """Gradients are reduced while the backward pass goes on; stage 3 does it unless it is told not to."""
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    sub_group_size: int = 1_000_000_000
    """Of stage 3: numbers that the optimizer steps at a time."""
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    """Smaller parameters stay gathered."""
    zero_hpz_partition_size: int = 1
    """Ranks, those of a node, that keep all weights among them for the second gathering (ZeRO++)."""
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    offload_optimizer: bool = False
    """Masters, optimizer state and average lie in the memory of the machine."""
    offload_param: bool = False
    """The shards of the weights lie there."""


def zero_settings(config: dict[str, Any]) -> ZeroSettings:
    """Of a checked JSON, or of a completed one."""
    zero = config.get("zero_optimization", {})
    named = {item.name for item in dataclasses.fields(ZeroSettings)} - {"offload_optimizer", "offload_param"}
    given: dict[str, Any] = {"overlap_comm": zero_stage(config) == 3}
    given |= {key: zero[key] for key in named & zero.keys() if zero[key] is not None}
    for key in ("offload_optimizer", "offload_param"):
        given[key] = (zero.get(key) or {}).get("device", "none") == "cpu"
    return ZeroSettings(**given)


def offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer works on the CPU, in its memory."""
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") == "cpu"


def takes_cpu_adam(config: dict[str, Any], optimizer: str) -> bool:
    """Whether DeepSpeed's Adam for CPUs steps the weights."""
    return offloads(config) and optimizer in ("adam", "adamw")


def quantized(config: dict[str, Any]) -> list[str]:
    """The keys that ask ZeRO 3 for a quantizer, which DeepSpeed has for GPUs only."""
    zero = config.get("zero_optimization", {})
    return [key for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights",
                            "zero_quantized_gradients") if zero.get(key) and zero_stage(config) == 3]


def check_zero3(named: str, config: dict[str, Any], on_cpu: bool, world: int) -> None:
    """Refuse what DeepSpeed would end in a traceback for, on this device and number of ranks.

    Args:
        named: how the message calls the JSON.
    """
    if on_cpu and (keys := quantized(config)):
        raise SettingsError(f"{named} sets {', '.join(keys)}, for which DeepSpeed needs a GPU; take zero3_bf16, or "
                            f"leave {'it' if len(keys) == 1 else 'them'} out")
    part = config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if zero_stage(config) == 3 and isinstance(part, int) and part > 1 and world % min(part, world):
        raise SettingsError(f"{named} sets zero_hpz_partition_size {part}, into which {world} ranks cannot be divided; "
                            "give the number of GPUs of one node, or start a multiple of it")


def shipped_in_fp32(config: dict[str, Any]) -> str:
    """Name of the shipped JSON that trains in float32 at the stage of this one, or at the nearest lower."""
    in_fp32 = {zero_stage(content): path.stem for path in sorted(SHIPPED.glob("*.json"))
               if precision(content := json.loads(path.read_text())) == "fp32"}
    return in_fp32[max(stage for stage in in_fp32 if stage <= zero_stage(config))]


def complete(config: dict[str, Any], run: RunConfig, accumulation: int) -> dict[str, Any]:
    """The dict handed to DeepSpeed: `config` with batch sizes, accumulation and clipping of the run.

    Its throughput timer, which waits for the device twice per micro-batch, is off unless `config` asks for it. On one
    rank ZeRO 1 and 2 have nothing to overlap, and would take a second bucket and wait after each backward pass.
    What DeepSpeed writes goes into the run folder; in a run that writes nothing its monitors and its profiler are off.
    """
    zero = config.get("zero_optimization", {})
    if run.train.global_batch_size == run.train.micro_batch_size * accumulation and zero.get("overlap_comm"):
        config = {**config, "zero_optimization": {**zero, "overlap_comm": zero_stage(config) == 3}}
    return {
        "timers": {"throughput": {"enabled": False}},
        **config, **_written(config, run),
        "train_batch_size": run.train.global_batch_size,
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optim.clip_grad,
    }


def _written(config: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """The blocks by which DeepSpeed writes files or reports to a service, with paths that begin in the run folder.

    An absolute path stays. By itself DeepSpeed would write into the working directory.
    """
    blocks = {key: config[key] for key in _WRITERS if key in config}
    if run.dry_run or run.validate_only:
        return {key: {**block, "enabled": False} for key, block in blocks.items()}
    for key in _MONITORS_OF_FILES & blocks.keys():
        blocks[key] = {"job_name": key, **blocks[key],
                       "output_path": str(Path(run.output, blocks[key].get("output_path") or "deepspeed"))}
    if file := blocks.get("flops_profiler", {}).get("output_file"):
        blocks["flops_profiler"] = {**blocks["flops_profiler"], "output_file": str(Path(run.output, file))}
    return blocks
