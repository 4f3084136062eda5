"""DeepSpeed's JSON: each refusal names the file, the key and the way out."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from support.launchers import HANGS, ROOT, call
from vir.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from vir.engine import ds_config
from vir.errors import SettingsError

SHIPPED = sorted((Path(__file__).resolve().parent.parent / "ds_configs").glob("*.json"))


@pytest.fixture()
def read(tmp_path):
    """Reads a dict, or a text that is to be JSON, through a file."""
    def read_content(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return ds_config.read(path)
    return read_content


def test_files_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_reads_and_is_what_its_name_says(path):
    found = ds_config.read(path)
    assert found == json.loads(path.read_text())
    words = path.stem.split("_")
    assert words[0] == f"zero{ds_config.zero_stage(found)}" + ("pp" if "pp" in words[0] else "")
    assert ds_config.precision(found) in words
    assert ("zero_hpz_partition_size" in found["zero_optimization"]) == ("pp" in words[0])
    assert ds_config.offloads(found) == ("offload" in words)
    assert ("activation_checkpointing" in found) == ("ckpt" in words or words[:2] == ["zero3", "offload"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_accepts_a_shipped_file(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    found = DeepSpeedConfig({**ds_config.read(path), "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8})
    assert found.zero_optimization_stage == ds_config.zero_stage(ds_config.read(path))


def deepspeeds_keys():
    """Of each block, from DeepSpeed's own classes, by the names that a JSON uses."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
              "offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
              "offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
              "tensorboard": TensorBoardConfig, "wandb": WandbConfig,
              "csv_monitor": CSVConfig, "comet": CometConfig, "comms_logger": CommsLoggerConfig}
    found = {block: {field.alias or name for name, field in model.model_fields.items()}
             for block, model in models.items()}
    found["flops_profiler"] = {value for name, value in vars(constants).items() if name.startswith("FLOPS_PROFILER_")
                               and not name.endswith(("_DEFAULT", "_FORMAT"))}
    return found


def test_every_key_of_deepspeed_is_either_known_or_refused_with_a_reason():
    """Fails when DeepSpeed gets or loses one."""
    for block, keys in deepspeeds_keys().items():
        known, refused = ds_config.KNOWN[block], ds_config.REFUSED.get(block, {}).keys()
        assert known | refused == keys and not known & refused, block


@pytest.mark.parametrize("content, said", [
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "'zero_optimization.overlap_com'; did you mean "
                                                               "'zero_optimization.overlap_comm'"),
    ({"bf16": {"enable": True}}, "'bf16.enable'; did you mean 'bf16.enabled'"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
     "'zero_optimization.offload_param.devise'; did you mean 'zero_optimization.offload_param.device'"),
    ({"flops_profiler": {"profile_steps": 1}}, "'flops_profiler.profile_steps'; did you mean"),
    ({"timers": {"throughput": {"enable": True}}}, "'timers.throughput.enable'; did you mean"),
    ({"fp16": {"qqq": 1}}, "unknown key 'fp16.qqq'; known are auto_cast"),
    ({"offload_param": {"device": "cpu"}}, "unknown key 'offload_param'"),  # right inside zero_optimization only
])
def test_a_typo_is_refused_at_any_depth(read, content, said):
    with pytest.raises(SettingsError, match=said):
        read(content)


def test_what_users_of_deepspeed_rely_on_passes(read):
    content = {"wall_clock_breakdown": True, "steps_per_print": 10, "memory_breakdown": False,
               "flops_profiler": {"enabled": True, "profile_step": 3, "detailed": True},
               "comms_logger": {"enabled": True, "verbose": False, "prof_ops": ["all_reduce"]},
               "tensorboard": {"enabled": True, "output_path": "tb", "job_name": "x"},
               "wandb": {"enabled": False, "project": "vir"}, "csv_monitor": {"enabled": True},
               "timers": {"throughput": {"enabled": False}},
               "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0, "reduce_bucket_size": 5e8}}
    assert read(content) == content


@pytest.mark.parametrize("content, said", [
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "_optimizer needs ZeRO stage 1"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs ZeRO stage 3"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "is nvme, which is not supported"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}}, "it must be cpu or none"),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}}, "stage 0: DeepSpeed has it"),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
     "would take another optimizer"),
    ({"data_types": {"grad_accum_dtype": "fp64"}}, "'fp64'; it must be fp32, bf16 or fp16"),
    ({"comet": {"api_key": "geheim"}}, "comet.api_key, which is not supported: it is a secret.*as COMET_API_KEY"),
    ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype, which is not supported: retention's decay"),
    ({"torch_autocast": {"enabled": True}}, "one way is supported: bf16.enabled"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "it orders the weights in a"),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "the average are float32"),
    ({"compile": {"deepcompile": True}}, "use --model.compile true"),
])
def test_what_a_stage_or_a_checkpoint_does_not_have_is_refused_with_the_reason(read, content, said):
    with pytest.raises(SettingsError, match=said):
        read(content)


def test_gradients_are_accumulated_in_float32_where_the_stage_can(read):
    for stage in (2, 3):
        content = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
                   "data_types": {"grad_accum_dtype": "fp32"}}
        assert read(content) == content


@pytest.mark.parametrize("key, flag", [
    ("train_batch_size", "--train.global_batch_size"),
    ("train_micro_batch_size_per_gpu", "--train.micro_batch_size"),
    ("gradient_accumulation_steps", "--train.global_batch_size and --train.micro_batch_size"),
    ("gradient_clipping", "--optim.clip_grad"), ("optimizer", "--optim.lr"), ("scheduler", "--schedule.warmup_epochs"),
])
def test_a_key_of_the_run_config_is_refused_with_its_flag_and_dropped_where_auto(read, key, flag):
    value = {"type": "AdamW"} if key in ("optimizer", "scheduler") else 8
    with pytest.raises(SettingsError, match=rf"ds\.json sets {key}, which the run config owns; remove .*{flag}"):
        read({key: value})
    assert read({key: "auto", "bf16": {"enabled": True}}) == {"bf16": {"enabled": True}}


def test_all_owned_keys_are_named_at_once(read):
    with pytest.raises(SettingsError, match="train_batch_size, gradient_clipping.*--optim.clip_grad for gradient_cl"):
        read({"gradient_clipping": 1.0, "train_batch_size": 8})


@pytest.mark.parametrize("content, key", [
    ({"bf16": {"enabled": "auto"}}, "bf16.enabled"), ({"steps_per_print": "auto"}, "steps_per_print"),
    ({"zero_optimization": {"offload_optimizer": {"device": "auto"}}}, "zero_optimization.offload_optimizer.device"),
    ({"comms_logger": {"prof_ops": ["x", "auto"]}}, "comms_logger.prof_ops.1"),
])
def test_auto_is_refused_where_nothing_fills_it(read, content, key):
    with pytest.raises(SettingsError, match=rf'{key} is "auto"'):
        read(content)


@pytest.mark.parametrize("typo, meant", [("zero_optimisation", "zero_optimization"), ("bfloat16", "bf16"),
                                         ("gradient_cliping", "gradient_clipping")])
def test_a_typo_is_refused_with_the_nearest_name(read, typo, meant):
    with pytest.raises(SettingsError, match=f"unknown key '{typo}'; did you mean '{meant}'"):
        read({typo: {}})


def test_an_unknown_key_like_no_other_lists_the_known(read):
    with pytest.raises(SettingsError, match="unknown key 'qqq'; known are .*zero_optimization"):
        read({"qqq": 1})


def test_activation_checkpointing_takes_an_empty_block_only(read):
    assert "activation_checkpointing" in read({"activation_checkpointing": {}})
    with pytest.raises(SettingsError, match="activation_checkpointing sets cpu_checkpointing, partition_activations"):
        read({"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False}})


@pytest.mark.parametrize("key", ["zero_optimization", "fp16", "bf16", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False, None, 2])
def test_a_block_that_is_no_object_is_refused(read, key, value):
    """activation_checkpointing: false above all: the presence of the key switches it on."""
    with pytest.raises(SettingsError, match=f"{key} is {json.dumps(value)}; it must be an object"):
        read({key: value})


@pytest.mark.parametrize("value", ["false", 1, None])
def test_enabled_is_true_or_false(read, value):
    with pytest.raises(SettingsError, match=f"bf16.enabled is {json.dumps(value)}; it must be true or false"):
        read({"bf16": {"enabled": value}})


@pytest.mark.parametrize("text, said", [
    ('{"bf16": {"enabled": true}', "cannot be read as JSON.*line 1"), ("", "cannot be read as JSON"),
    ("[]", "holds a JSON list; it must be an object"), ('"auto"', "holds a JSON str"),
])
def test_what_is_no_json_object_is_refused(read, text, said):
    with pytest.raises(SettingsError, match=rf"--deepspeed_config .*ds\.json {said}"):
        read(text)


def test_a_missing_file_is_refused_and_the_shipped_ones_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ", ".join(path.stem for path in SHIPPED)
    with pytest.raises(SettingsError, match="--deepspeed_config nowhere.json: no such file; give the path of a JSON, "
                                            f"or the name of a shipped one: {shipped}$"):
        ds_config.read("nowhere.json")


def test_a_shipped_one_is_found_by_name_from_any_folder_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    expected = ds_config.read("ds_configs/zero2_bf16.json")
    monkeypatch.chdir(tmp_path)
    assert ds_config.read("zero2_bf16") == expected != {}
    (tmp_path / "zero2_bf16").mkdir()  # as a run's --output may be called
    assert ds_config.read("zero2_bf16") == expected
    (tmp_path / "zero2_bf16").rmdir()
    (tmp_path / "zero2_bf16").write_text('{"zero_optimization": {"stage": 1}}')
    assert ds_config.zero_stage(ds_config.read("zero2_bf16")) == 1


def test_a_folder_instead_of_a_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        ds_config.read(tmp_path)


def test_both_precisions_at_once_are_refused(read):
    with pytest.raises(SettingsError, match="enables both fp16 and bf16; keep one"):
        read({"fp16": {"enabled": True}, "bf16": {"enabled": True}})
    assert ds_config.precision(read({"fp16": {"enabled": True}, "bf16": {"enabled": False}})) == "fp16"


def test_without_precision_and_stage_it_is_fp32_without_zero(read):
    found = read({})
    assert ds_config.precision(found) == "fp32" and ds_config.zero_stage(found) == 0


@pytest.mark.parametrize("stage", [4, -1, "2", None, True, 2.0])
def test_a_stage_that_is_not_0_to_3_is_refused(read, stage):
    with pytest.raises(SettingsError, match=rf"zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3"):
        read({"zero_optimization": {"stage": stage}})


def test_complete_adds_the_numbers_of_the_run_and_keeps_the_rest():
    given = {"zero_optimization": {"stage": 2}}
    run = RunConfig(deepspeed_config="d", output="o", data=DataConfig(train="t", val="v"),
                    train=TrainConfig(global_batch_size=24, micro_batch_size=4), optim=OptimConfig(clip_grad=0.5))
    assert ds_config.complete(given, run, 3) == {
        "zero_optimization": {"stage": 2}, "train_batch_size": 24, "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3, "gradient_clipping": 0.5, "timers": {"throughput": {"enabled": False}}}
    assert given == {"zero_optimization": {"stage": 2}}
    timed = {"timers": {"throughput": {"enabled": True}}}
    assert ds_config.complete(timed, run, 3)["timers"] == timed["timers"]  # who asks for it pays for it


@pytest.mark.parametrize("stage, batch, overlaps", [(2, 48, True), (2, 24, False), (1, 24, False), (3, 24, True)])
def test_one_rank_overlaps_no_reduction_in_stages_1_and_2(stage, batch, overlaps):
    given = {"zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 3000}}
    run = RunConfig(deepspeed_config="d", output="o", data=DataConfig(train="t", val="v"),
                    train=TrainConfig(global_batch_size=batch, micro_batch_size=8))
    assert ds_config.complete(given, run, 3)["zero_optimization"] == {**given["zero_optimization"],
                                                                      "overlap_comm": overlaps}
    assert given["zero_optimization"]["overlap_comm"]


def completed(config, **fields):
    run = RunConfig(deepspeed_config="d", output="runs/a", data=DataConfig(train="t", val="v"), **fields)
    return ds_config.complete(config, run, 1)


@pytest.mark.parametrize("given, taken", [
    ({}, {"output_path": "runs/a/deepspeed", "job_name": "csv_monitor"}),
    ({"output_path": "", "job_name": "mine"}, {"output_path": "runs/a/deepspeed", "job_name": "mine"}),
    ({"output_path": "csv"}, {"output_path": "runs/a/csv", "job_name": "csv_monitor"}),
    ({"output_path": "/logs"}, {"output_path": "/logs", "job_name": "csv_monitor"}),
])
def test_a_monitor_writes_into_the_run_folder_unless_its_path_is_absolute(given, taken):
    assert completed({"csv_monitor": {"enabled": True, **given}})["csv_monitor"] == {"enabled": True, **taken}


@pytest.mark.parametrize("given, taken", [("flops.txt", "runs/a/flops.txt"), ("/x/flops.txt", "/x/flops.txt")])
def test_the_profile_of_operations_is_written_into_the_run_folder(given, taken):
    found = completed({"flops_profiler": {"enabled": True, "output_file": given}})
    assert found["flops_profiler"] == {"enabled": True, "output_file": taken}
    assert completed({"flops_profiler": {"enabled": True}})["flops_profiler"] == {"enabled": True}


@pytest.mark.parametrize("switch", ["dry_run", "validate_only"])
@pytest.mark.parametrize("monitor", ["tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler"])
def test_a_run_that_writes_nothing_has_no_monitors_and_no_profile(switch, monitor):
    assert completed({monitor: {"enabled": True}}, **{switch: True})[monitor] == {"enabled": False}


@pytest.mark.timeout(2 * HANGS)
def test_real_engines_leave_nothing_in_the_working_directory_and_refuse_what_this_device_lacks(tmp_path):
    """One that trains with all that writes, one that only shows its plan, and those that ended in a traceback."""
    writing = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True, "job_name": "job"},
               "flops_profiler": {"enabled": True, "profile_step": 0, "output_file": "profiles/flops.txt"},
               "comms_logger": {"enabled": True}, "zero_optimization": {"stage": 1}}
    quantized = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8}}
    jobs = [(writing, {"output": "run"}), (writing, {"output": "dry", "dry_run": True}), (quantized, {"output": "zpp"})]
    without = not importlib.util.find_spec("wandb")
    if without:
        jobs.append(({"wandb": {"enabled": True}}, {"output": "wandb"}))
    (tmp_path / "jobs.json").write_text(json.dumps([{"settings": job, "run": fields} for job, fields in jobs]))
    (tmp_path / "here").mkdir()
    done = call("env", "-C", tmp_path / "here", sys.executable, ROOT / "tests" / "support" / "one_engine.py",
                tmp_path / "jobs.json", timeout=HANGS, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout
    run, dry, refused, *no_wandb = done.stdout.split("== ")[1:]
    assert "trained without inductor" in run and "trained without inductor" in dry, done.stdout
    assert ("refused: --deepspeed_config mine.json sets zero_quantized_weights, for which DeepSpeed needs a GPU; take "
            "zero3_bf16, or leave it out") in refused
    if without:
        assert "refused: DeepSpeed refuses mine.json: No module named 'wandb'" in no_wandb[0]
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()]
    folders = {str(path.parent) for path in files}
    assert folders == {"run/deepspeed/tensorboard", "run/deepspeed/job", "run/profiles"}, files


@pytest.mark.parametrize("ranks, part, fits", [
    (8, 8, True), (16, 8, True), (1, 8, True), (4, 8, True), (12, 8, False), (3, 2, False), (5, 1, True)])
def test_groups_of_ranks_that_do_not_divide_the_world_are_refused(ranks, part, fits):
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": part}}
    if fits:
        return ds_config.check_zero3("x.json", config, False, ranks)
    with pytest.raises(SettingsError, match=f"^x.json sets zero_hpz_partition_size {part}, into which {ranks} ranks "
                                            "cannot be divided; give the number of GPUs of one node"):
        ds_config.check_zero3("x.json", config, False, ranks)
    config["zero_optimization"]["stage"] = 2
    ds_config.check_zero3("x.json", config, False, ranks)  # which has no such groups


def test_a_quantizer_is_refused_on_cpus_alone_by_all_its_keys():
    shipped = ds_config.read("zero3pp_bf16")
    ds_config.check_zero3("x", shipped, False, 8)
    with pytest.raises(SettingsError, match="^x sets zero_quantized_weights, zero_quantized_gradients, for which "
                                            "DeepSpeed needs a GPU; take zero3_bf16, or leave them out$"):
        ds_config.check_zero3("x", shipped, True, 8)


@pytest.mark.parametrize("stage, name", [(0, "zero0_fp32"), (1, "zero0_fp32"), (2, "zero2_fp32"), (3, "zero2_fp32")])
def test_the_shipped_one_in_float32_is_of_this_stage_or_the_nearest_lower(stage, name):
    assert ds_config.shipped_in_fp32({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}) == name


@pytest.mark.parametrize("content, said", [
    ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow off"),
])
def test_what_would_train_wrongly_or_cannot_be_consolidated_is_refused(content, said, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=said):
        ds_config.read(tmp_path / "ds.json")
