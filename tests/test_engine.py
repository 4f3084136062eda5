"""Engines of every ZeRO stage, precision, accumulation and recomputation against a plain loop in one process; their
checkpoints taken up by every other stage and number of ranks."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.engine_runs import GLOBAL_BATCH, Job, batch, seed_of, write
from support.forked import forked
from support.launchers import HANGS, ROOT
from vir.checkpoints.consolidate import consolidate
from vir.checkpoints.info import read_info
from vir.checkpoints.names import newest
from vir.checkpoints.partitions import WEIGHT, Partitions
from vir.engine.optimizer import parameter_groups
from vir.training.loss import training_loss

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

torch.set_num_threads(1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Losses, relative to the plain loop's. Low precisions keep 8 and 11 bits, and DeepSpeed sums gradients in them.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}
RANKS = 2


def launch(tmp: Path, jobs: list[Job], ranks: int = RANKS) -> None:
    done = forked(ROOT / "tests" / "support" / "engine_runs.py", write(tmp / f"jobs{ranks}.json", jobs), ranks=ranks)
    assert done.returncode == 0, done.stdout[-6000:]


def plain_loop(job: Job, applied: list[bool] | None = None) -> tuple[
        list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, gradient norms, float32 weights and their average after the job's steps, by PyTorch alone.

    Steps that are not `applied` only tell their loss.
    """
    dtype, config = DTYPES[job.precision], job.config()
    model = job.build()
    masters = {name: p.detach().to(dtype).float() for name, p in model.named_parameters()}
    model.to(dtype)
    for name, p in model.named_buffers():  # the decay stays in float32, as under DeepSpeed
        if p.dtype != torch.float32 and p.is_floating_point():
            p.data = p.float()
    live = {name: torch.nn.Parameter(value) for name, value in masters.items()}
    groups = [{"params": [live[name] for name in group["names"]], "weight_decay": group["weight_decay"]}
              for group in parameter_groups(model, config.optim)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=config.optim.betas, eps=config.optim.eps)
    average = {name: value.detach().clone() for name, value in live.items()}
    losses, norms = [], []
    for step in range(job.steps):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(live[name])
        images, targets = batch(step)
        micro, total = GLOBAL_BATCH // RANKS // job.accumulation, 0.0
        parts = range(0, GLOBAL_BATCH, micro)
        for value in live.values():
            value.grad = torch.zeros_like(value)
        for start in parts:
            torch.manual_seed(seed_of(step, start))
            loss = training_loss(model(images[start:start + micro].to(dtype)), targets[start:start + micro],
                                 config.train)
            model.zero_grad()
            (loss * (256 if job.precision == "fp16" else 1)).backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    live[name].grad += p.grad.float() / len(parts) / (256 if job.precision == "fp16" else 1)
            total += float(loss.detach()) / len(parts)
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(live.values(), config.optim.clip_grad)))
        if applied is not None and not applied[step]:
            continue
        optimizer.step()
        decay = min(0.9, (2 + step) / (11 + step))
        average = {name: decay * value + (1 - decay) * live[name].detach() for name, value in average.items()}
    return losses, norms, {name: value.detach() for name, value in live.items()}, average


def result(job: Job) -> dict:
    return torch.load(Path(job.output) / "result.pt", weights_only=True)


def partitions(job: Job) -> Partitions:
    folder = newest(Path(job.output))
    return Partitions(folder, read_info(folder))


CASES = [case for case in itertools.product(range(4), DTYPES, (1, 4), (False, True)) if case[2:] != (1, True)
         and (case[1] != "fp16" or not case[3])]

# What else a DeepSpeed JSON may ask for, with what it must equal: (stage, precision, accumulation, JSON, how close).
OPTIONS = {
    "offload z1": (1, "bf16", 1, {"offload_optimizer": {"device": "cpu"}}, {}),
    "offload z2": (2, "fp32", 4, {"offload_optimizer": {"device": "cpu"}}, {}),
    "offload z3": (3, "bf16", 1, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, {}),
    "gradients in float32 z2": (2, "bf16", 4, {}, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "gradients in float32 z3": (3, "bf16", 4, {}, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "overlap z1": (1, "fp32", 4, {"overlap_comm": True, "reduce_bucket_size": 3000}, {}),
    "overlap z2": (2, "bf16", 4, {"overlap_comm": True, "reduce_bucket_size": 3000}, {}),
    "hpZ": (3, "fp32", 1, {"zero_hpz_partition_size": 2}, {}),
    "nothing stays gathered": (3, "fp32", 4, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                                              "stage3_param_persistence_threshold": 0}, {}),
}
OVERFLOWS = 12
# The first block then gets an input without a gradient, and passes one through layers that need none.
FREEZE = r"patch_embed|cls_token|pos_embed|blocks\.0\.mlp"
FROZEN = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
DROPOUT = {"proj_drop_rate": 0.3, "drop_rate": 0.2, "pos_drop_rate": 0.1}
NOT_FINITE = list(itertools.product(range(4), ("fp32", "bf16")))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> dict[tuple, Job]:
    tmp = tmp_path_factory.mktemp("matrix")
    jobs = {(stage, precision, accumulation, recompute): Job(
        output=str(tmp / f"z{stage}_{precision}_{accumulation}_{recompute}"), stage=stage, precision=precision,
        accumulation=accumulation, recompute=recompute) for stage, precision, accumulation, recompute in CASES}
    for name, (stage, precision, accumulation, zero, settings) in OPTIONS.items():
        jobs[name] = Job(output=str(tmp / name), stage=stage, precision=precision, accumulation=accumulation,
                         zero=zero, settings=settings)
    for stage in range(4):
        jobs["overflow", stage] = Job(output=str(tmp / f"overflow{stage}"), stage=stage, precision="fp16",
                                      scale_power=24, steps=OVERFLOWS)
    for stage in range(4):
        jobs["growth", stage] = Job(output=str(tmp / f"growth{stage}"), stage=stage, precision="fp16", scale_window=2)
    for stage in (1, 3):
        jobs["compiled", stage] = Job(output=str(tmp / f"compiled{stage}"), stage=stage, recompute=True, compile=True,
                                      drop_path_rate=0.0)  # compiled code draws other random numbers
    jobs["no average"] = Job(output=str(tmp / "no average"), ema=0.0)
    for stage, precision in FROZEN:
        jobs["frozen", stage, precision] = Job(output=str(tmp / f"frozen{stage}_{precision}"), stage=stage,
                                               precision=precision, freeze=FREEZE)
    for stage, recompute in itertools.product((0, 3), (False, True)):
        jobs["dropout", stage, recompute] = Job(output=str(tmp / f"dropout{stage}_{recompute}"), stage=stage,
                                                recompute=recompute, args=Job(output="").args | DROPOUT)
    jobs["frozen", "recomputed"] = replace(jobs["frozen", 3, "fp32"], output=str(tmp / "recomputed"), recompute=True)
    for stage, precision in NOT_FINITE:
        jobs["nan", stage, precision] = Job(output=str(tmp / f"nan{stage}_{precision}"), stage=stage,
                                            precision=precision, nan=[1], drop_path_rate=0.0)
    for stage in range(4):
        jobs["floor", stage] = Job(output=str(tmp / f"floor{stage}"), stage=stage, precision="fp16", scale_power=1,
                                   nan=[0, 1], steps=2)
    for stage, steps in ((0, 1), (2, 3)):
        jobs["batch norm", stage] = Job(output=str(tmp / f"batch norm{stage}"), stage=stage, model="test_resnet",
                                        args={}, drop_path_rate=0.0, steps=steps)
    launch(tmp, list(jobs.values()))
    return jobs


@pytest.fixture(scope="module")
def plain() -> dict[tuple, tuple]:
    return {(precision, accumulation): plain_loop(Job(output="plain", precision=precision, accumulation=accumulation))
            for precision in DTYPES for accumulation in (1, 4)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_norms_and_average_are_those_of_a_plain_loop(case, matrix, plain):
    is_as_the_plain_loop(matrix[case], plain[case[1:3]], 1e-4)


def is_as_the_plain_loop(job: Job, plain: tuple, of_weights: float) -> None:
    """Args:
        of_weights: absolute tolerance of float32 weights and average, after steps of 1e-2.
    """
    losses, norms, weights, average = plain
    events = result(job)["events"]
    assert all(event["applied"] for event in events)
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=TOLERANCE[job.precision])
    assert [event["norm"] for event in events] == pytest.approx(norms, rel=10 * TOLERANCE[job.precision])
    found = partitions(job)
    assert found.shapes == {name: value.shape for name, value in weights.items()}
    if job.precision == "fp32":  # Adam divides by small numbers: rounding grows to a part of a step
        for name in weights:
            for key, expected in ((WEIGHT, weights[name]), ("ema", average[name])):
                assert (found.whole(name, key) - expected).abs().max() < of_weights, (name, key)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_json_train_to_what_a_plain_loop_does(name, matrix, plain):
    job = matrix[name]
    losses, _, weights, _ = plain[job.precision, job.accumulation]
    assert [event["loss"] for event in result(job)["events"]] == pytest.approx(losses, rel=TOLERANCE[job.precision])
    found, begun = partitions(job), dict(job.build().named_parameters())
    for tensor in weights:  # every one has moved, and where the plain loop's went: by the cosine of the two ways
        ours, theirs = ((moved - begun[tensor].detach()).flatten() for moved in (
            found.whole(tensor, WEIGHT), weights[tensor]))
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > (0.999 if job.precision == "fp32" else 0.8)


@pytest.mark.parametrize("stage", range(4))
def test_overflow_is_skipped_and_halves_the_scale_until_it_fits(stage, matrix):
    job = matrix["overflow", stage]
    events = result(job)["events"]
    for now, then in zip(events, events[1:]):
        assert then["scale"] == (now["scale"] if now["applied"] else now["scale"] / 2)
    skipped = sum(not event["applied"] for event in events)
    assert events[0]["scale"] == 2**24 and 4 < skipped < OVERFLOWS - 2
    assert all(event["norm"] < 5 for event in events if event["applied"])  # unscaled
    info = read_info(newest(Path(job.output)))
    assert (info.step, info.updates) == (OVERFLOWS, OVERFLOWS - skipped)
    assert info.loss_scaler["cur_scale"] == events[-1]["scale"]
    assert int(partitions(job).scalars("head.weight")["step"]) == OVERFLOWS - skipped  # Adam counts updates alone
    losses, _, _, _ = plain_loop(job, applied=[event["applied"] for event in events])
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("stage", range(4))
def test_the_scale_grows_after_its_window_and_the_losses_stay(stage, matrix, plain):
    job = matrix["growth", stage]
    events = result(job)["events"]
    assert [event["scale"] for event in events] == [2**8, 2**8, 2**9]
    losses, norms, _, _ = plain["fp16", 1]
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=TOLERANCE["fp16"])
    assert [event["norm"] for event in events] == pytest.approx(norms, rel=10 * TOLERANCE["fp16"])


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks_train_to_the_same_losses(stage, matrix):
    losses, norms, _, _ = plain_loop(Job(output="plain", drop_path_rate=0.0))
    events = result(matrix["compiled", stage])["events"]
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=1e-5)
    assert [event["norm"] for event in events] == pytest.approx(norms, rel=1e-4)


def test_without_an_average_the_training_is_the_same_and_none_is_saved(matrix):
    with_it, without = matrix[0, "fp32", 1, False], matrix["no average"]
    assert result(with_it)["events"] == result(without)["events"]
    assert set(partitions(without).keys("head.weight")) == {"exp_avg", "exp_avg_sq"}
    assert torch.equal(result(without)["averaged"], result(without)["logits"])


@pytest.mark.parametrize("case", [case for case in CASES if case[3]], ids=str)
def test_recomputation_changes_no_bit_runs_each_block_twice_and_keeps_less(case, matrix):
    """Nor does an evaluation of weights and average after each step, which the recomputing jobs have as well."""
    is_recomputed_to_the_bit(matrix[(*case[:3], False)], matrix[case])


def is_recomputed_to_the_bit(plainly: Job, recomputed: Job) -> None:
    once, twice = result(plainly), result(recomputed)
    assert once["events"] == twice["events"]
    assert twice["forwards"] == 2 * once["forwards"] > 0
    assert 0 < twice["kept"] < once["kept"] / 2  # bytes that autograd holds between forward and backward
    left, right = partitions(plainly), partitions(recomputed)
    assert all(torch.equal(left.whole(name, "ema"), right.whole(name, "ema")) for name in left.shapes)


@pytest.mark.parametrize("case", [("frozen", *case) for case in FROZEN], ids=str)
def test_frozen_parameters_stay_as_they_began_while_the_others_are_trained_as_by_a_plain_loop(case, matrix):
    job = matrix[case]
    losses, norms, weights, _ = plain_loop(job)
    events = result(job)["events"]
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=TOLERANCE[job.precision])
    assert [event["norm"] for event in events] == pytest.approx(norms, rel=10 * TOLERANCE[job.precision])
    found, model = partitions(job), job.build()
    assert found.shapes == {name: weight.shape for name, weight in weights.items()}
    assert found.frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert 5 < len(found.frozen) < len(found.shapes) - 5
    for name, parameter in model.named_parameters():
        kept = parameter.detach().to(DTYPES[job.precision]).float()
        same = [torch.equal(found.whole(name, key), kept) for key in (WEIGHT, "ema")]
        assert same == [name in found.frozen] * 2, name
        assert found.whole(name, WEIGHT).dtype == torch.float32


@pytest.mark.parametrize("case", [("frozen", *case) for case in FROZEN], ids=str)
@pytest.mark.parametrize("ema", [False, True])
def test_consolidated_weights_hold_the_frozen_parameters(case, ema, matrix, tmp_path):
    job = matrix[case]
    consolidate(newest(Path(job.output)), tmp_path / "w.safetensors", ema=ema)
    model = job.build()
    begun = {name: tensor.clone().to(DTYPES[job.precision]).float() for name, tensor in model.named_parameters()}
    model.load_state_dict(load_file(tmp_path / "w.safetensors"))  # all of them
    assert {name for name, tensor in model.named_parameters() if torch.equal(tensor, begun[name])} == set(
        partitions(job).frozen)


@pytest.mark.parametrize("case", [*CASES, *OPTIONS, ("no average",), *(("frozen", *case) for case in FROZEN),
                                  ("batch norm", 0), ("batch norm", 2)], ids=str)
def test_consolidated_weights_are_those_of_the_optimizers_and_of_zero_to_fp32(case, matrix, tmp_path):
    """Bit for bit; the average too, of which DeepSpeed's tool knows nothing."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    job = matrix[case if case in matrix else case[0]]
    for ema, live in enumerate(result(job)["live"]):
        assert bool(live) == (not ema or case != ("no average",))
        if live:
            consolidate(Path(job.output), tmp_path / "w.safetensors", ema=bool(ema), force=True)
            found = load_file(tmp_path / "w.safetensors")
            assert found.keys() == job.build().state_dict().keys()
            assert all(torch.equal(found[name].view(-1), tensor) for name, tensor in live.items())
    if job.stage:
        consolidate(Path(job.output), tmp_path / "w.safetensors", force=True)
        found = load_file(tmp_path / "w.safetensors")
        expected = get_fp32_state_dict_from_zero_checkpoint(str(Path(job.output) / "checkpoints"))
        # Of stage 1 DeepSpeed's tool leaves out what is frozen, without a word.
        assert found.keys() - expected.keys() == (partitions(job).frozen if job.stage == 1 else set())
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_recomputation_behind_a_frozen_patch_embedding_changes_no_bit(matrix):
    once, twice = matrix["frozen", 3, "fp32"], matrix["frozen", "recomputed"]
    assert result(once)["events"] == result(twice)["events"]
    assert result(twice)["forwards"] == 2 * result(once)["forwards"] > 0
    left, right = partitions(once), partitions(twice)
    assert all(torch.equal(left.whole(name, WEIGHT), right.whole(name, WEIGHT)) for name in left.shapes)


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputation_draws_the_same_dropout(stage, matrix, plain):
    once, twice = (result(matrix["dropout", stage, recompute]) for recompute in (False, True))
    assert once["events"] == twice["events"]
    assert once["events"][0]["loss"] != pytest.approx(plain["fp32", 1][0][0], rel=1e-4)  # it does drop
    left, right = (partitions(matrix["dropout", stage, recompute]) for recompute in (False, True))
    assert all(torch.equal(left.whole(name, WEIGHT), right.whole(name, WEIGHT)) for name in left.shapes)


@pytest.mark.parametrize("case", NOT_FINITE, ids=str)
def test_a_gradient_of_one_rank_that_is_not_finite_is_skipped_by_all(case, matrix):
    """Weights and average stay to the bit, and the next step is the one that would have come without it."""
    job = matrix["nan", *case]
    events = result(job)["events"]
    assert [event["of ranks"] for event in events] == [
        [("APPLIED", False)] * RANKS, [("SKIPPED", True)] * RANKS, [("APPLIED", False)] * RANKS]
    losses, *_ = plain_loop(job, applied=[True, False, True])
    assert [events[step]["loss"] for step in (0, 2)] == pytest.approx([losses[0], losses[2]],
                                                                      rel=TOLERANCE[job.precision])
    info = read_info(newest(Path(job.output)))
    assert (info.step, info.updates) == (3, 2)


@pytest.mark.parametrize("stage", range(4))
def test_all_ranks_tell_that_the_loss_scale_is_at_its_floor(stage, matrix):
    first, second = result(matrix["floor", stage])["events"]
    assert (first["scale"], second["scale"]) == (2, 1)
    assert first["of ranks"] == [("SKIPPED", True)] * RANKS
    assert second["of ranks"] == [(None, True)] * RANKS  # LossScaleError


@pytest.mark.parametrize("stage", [0, 2])
def test_running_statistics_are_those_of_all_ranks(stage, matrix):
    job = matrix["batch norm", stage]
    of_ranks = result(job)["buffers"]
    assert len(of_ranks) == RANKS and len(of_ranks[0]) > 10
    for name, buffer in of_ranks[0].items():
        assert all(torch.equal(other[name], buffer) for other in of_ranks) and buffer.isfinite().all(), name
    if job.steps == 1:  # by the images of both ranks and the initial weights
        stem = job.build().conv1
        convolution = stem[0] if isinstance(stem, torch.nn.Sequential) else stem
        with torch.no_grad():
            mean = convolution(batch(0)[0]).mean((0, 2, 3))
        first = next(name for name in of_ranks[0] if name.endswith("running_mean"))
        assert torch.allclose(of_ranks[0][first], 0.1 * mean, atol=1e-6)


def test_nothing_is_saved_between_the_micro_batches_of_a_step(matrix, resharded):
    for job in (matrix[0, "fp32", 4, False], matrix[2, "bf16", 4, False], resharded["accumulating, resumed"]):
        assert result(job)["refused"] == [True] * 3 * job.steps


@pytest.mark.parametrize("case", [*CASES, *OPTIONS, *(("frozen", *case) for case in FROZEN)], ids=str)
def test_evaluation_takes_the_weights_or_the_average_and_gives_the_weights_back(case, matrix):
    is_evaluated_as_saved(matrix[case])


def is_evaluated_as_saved(job: Job) -> None:
    """Its logits of weights and of the average are those of a model on CPU that has what was saved."""
    found, model = result(job), job.build().eval()
    for key, logits in ((WEIGHT, "logits"), ("ema", "averaged")):
        parts = partitions(job)
        model.load_state_dict({name: parts.whole(name, key) for name in parts.shapes})
        model.to(DTYPES[job.precision]).to(torch.float32)
        with torch.no_grad():
            expected = model(batch(0)[0])
        tolerance = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}[job.precision]
        assert (found[logits] - expected).abs().max() < tolerance * expected.abs().max()


# ---- taken up by another stage and number of ranks

WORLDS = (1, 2, 3)
PLACES = list(itertools.product(range(4), WORLDS))
# Optimizers that keep something per group, of another shape, no step, or nothing at all beside our average.
# From two ranks to other stages and one or three: (stage, precision) before, (stage, ranks) after.
FROZEN_MOVES = [((0, "fp32"), (3, 3)), ((0, "bf16"), (3, 1)), ((1, "fp32"), (0, 3)), ((2, "bf16"), (0, 1)),
                ((3, "fp32"), (2, 1)), ((3, "fp32"), (3, 3)), ((3, "bf16"), (1, 3))]
KEPT = {"lamb": {}, "adafactor": {}, "sgd": {}, "momentum": {"momentum": 0}}


@pytest.fixture(scope="module")
def resharded(tmp_path_factory) -> dict[tuple, Job]:
    """Two steps of every stage and world, the third after a checkpoint of another one.

    Of each pair of stages three pairs of worlds, of each pair of worlds five or six of stages (a Latin square): all
    144 pairs take three times as long.
    """
    tmp = tmp_path_factory.mktemp("resharded")
    fixed = dict(drop_path_rate=0.0, precision="fp32")
    begun = {(stage, ranks): Job(output=str(tmp / f"z{stage}_w{ranks}"), stage=stage, steps=2, **fixed)
             for stage, ranks in PLACES}
    jobs = {(before, after): Job(output=str(tmp / f"{before}_{after}"), stage=after[0], first=2, steps=1,
                                 save_first=True, restore=begun[before].output, **fixed)
            for before in PLACES for after in PLACES if sum(before + after) % 3 == 0}
    padding = dict(stage=2, classes=2, optim={"layer_decay": 0.8}, **fixed)
    others = {"padding": Job(output=str(tmp / "padding"), steps=2, **padding)}
    others["padding, resumed"] = Job(output=str(tmp / "padding, resumed"), first=2, steps=0,
                                     restore=others["padding"].output, **padding)
    for name, optim in KEPT.items():
        with_it = dict(optim={"name": name, **optim}, **fixed)
        others[name] = Job(output=str(tmp / name), steps=4, **with_it)
        others[name, "begun"] = Job(output=str(tmp / f"{name} begun"), steps=2, **with_it)
        others[name, "resumed"] = Job(output=str(tmp / f"{name} resumed"), first=2, steps=2,
                                      restore=others[name, "begun"].output, **with_it)
    for stage in range(4):
        without = dict(stage=stage, optim={"name": "momentum", "momentum": 0}, **fixed)
        others["no average", stage] = Job(output=str(tmp / f"no average{stage}"), ema=0.0, steps=2, **without)
        others["average begins", stage] = Job(output=str(tmp / f"average begins{stage}"), first=2, steps=0,
                                              restore=others["no average", stage].output, **without)
    accumulating = dict(stage=2, accumulation=4, precision="bf16", nan=[1])  # nan: a step that is skipped
    others["accumulating"] = Job(output=str(tmp / "accumulating"), steps=2, **accumulating)
    others["accumulating, resumed"] = Job(output=str(tmp / "accumulating, resumed"), first=2, steps=1,
                                          restore=others["accumulating"].output, **accumulating)
    for stage, precision in FROZEN:
        others["frozen", stage, precision] = Job(output=str(tmp / f"frozen{stage}_{precision}"), stage=stage,
                                                 precision=precision, drop_path_rate=0.0, steps=2, freeze=FREEZE)
    others["frozen, refused"] = Job(output=str(tmp / "refused"), stage=1, restore=others["frozen", 0, "fp32"].output,
                                    freeze=FREEZE + "|head", **fixed)
    for (before, precision), (after, ranks) in FROZEN_MOVES:
        jobs["frozen", before, precision, after, ranks] = Job(
            output=str(tmp / f"frozen{before}_{precision}_{after}_{ranks}"), stage=after, precision=precision, seed=1,
            drop_path_rate=0.0, first=2, steps=1, save_first=True, freeze=FREEZE,
            restore=others["frozen", before, precision].output)
    for ranks in WORLDS:
        mine = [job for (_, of), job in begun.items() if of == ranks]
        launch(tmp, mine + [job for name, job in others.items() if ranks == (3 if "padding" in name else 2)], ranks)
    for ranks in WORLDS:
        (tmp / str(ranks)).mkdir()
        launch(tmp / str(ranks), [job for name, job in jobs.items() if ranks == (
            name[-1] if name[0] == "frozen" else name[-1][1])], ranks)
    return begun | jobs | others


@pytest.mark.parametrize("before", PLACES, ids=str)
def test_any_stage_and_world_takes_up_the_checkpoint_of_any_other(before, resharded):
    """Weights, moments and average to the bit, and the next loss as in one process that never stopped."""
    losses, norms, _, _ = plain_loop(Job(output="plain", drop_path_rate=0.0))
    source = partitions(resharded[before])
    for after in (after for after in PLACES if (before, after) in resharded):
        found, job = partitions(resharded[before, after]), resharded[before, after]
        assert read_info(newest(Path(job.output))).world_size == after[1]
        for name in source.shapes:
            assert set(found.keys(name)) == {"exp_avg", "exp_avg_sq", "ema"}
            for key in (WEIGHT, *found.keys(name)):
                assert torch.equal(found.whole(name, key), source.whole(name, key)), (after, name, key)
            assert int(found.scalars(name)["step"]) == 2
        (event,) = result(job)["events"]
        assert event["loss"] == pytest.approx(losses[2], rel=1e-5), after
        assert event["norm"] == pytest.approx(norms[2], rel=1e-4), after


def test_a_rank_that_holds_only_the_padding_of_a_group_takes_it_up_evaluates_and_saves(resharded):
    """The bias of two classes is a group of its own, on three ranks two of them hold none of it."""
    before, after = resharded["padding"], resharded["padding, resumed"]
    old, new = partitions(before), partitions(after)
    for name in old.shapes:
        for key in (WEIGHT, "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(old.whole(name, key), new.whole(name, key)), (name, key)
    assert torch.equal(result(before)["averaged"], result(after)["averaged"])


@pytest.mark.parametrize("name", KEPT)
def test_without_zero_whatever_an_optimizer_keeps_is_resumed(name, resharded):
    whole, resumed = (result(resharded[job]) for job in (name, (name, "resumed")))
    assert whole["events"][2:] == resumed["events"]
    assert torch.equal(whole["averaged"], resumed["averaged"])


@pytest.mark.parametrize("stage", range(4))
def test_an_average_that_has_not_begun_is_the_weights(stage, resharded):
    """Momentum's optimizer without a momentum keeps nothing: there is no state to be restored."""
    before, after = (result(resharded[name, stage]) for name in ("no average", "average begins"))
    assert torch.equal(after["averaged"], after["logits"]) and torch.equal(after["logits"], before["logits"])


@pytest.mark.parametrize("move", FROZEN_MOVES, ids=str)
def test_frozen_parameters_are_taken_up_by_another_stage_and_world(move, resharded):
    """By an engine whose model begins with other weights."""
    (before, precision), (after, ranks) = move
    old, job = resharded["frozen", before, precision], resharded["frozen", before, precision, after, ranks]
    source, found = partitions(old), partitions(job)
    assert found.frozen == source.frozen and found.shapes == source.shapes
    for name in source.shapes:
        for key in (WEIGHT, *source.keys(name)):
            assert torch.equal(found.whole(name, key), source.whole(name, key)), (name, key)
    losses, *_ = plain_loop(replace(old, steps=3))
    (event,) = result(job)["events"]
    assert event["loss"] == pytest.approx(losses[2], rel=TOLERANCE[precision])


def test_a_checkpoint_of_other_frozen_parameters_is_refused_by_name(resharded):
    folder = Path(resharded["frozen, refused"].output)
    for rank in range(RANKS):
        said = (folder / f"refused{rank}.txt").read_text()
        assert "trained with other parameters frozen (2 differ: head.bias, head.weight)" in said
        assert "resume with the --model.freeze that it was saved with" in said


# ---- on a GPU, one rank

ON_GPU = [*CASES, *(name for name in OPTIONS if name.startswith(("offload", "gradients")))]
NEXT = {stage: (stage + 1) % 4 for stage in range(4)}
"""Which stage takes up the checkpoint of which."""


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory) -> dict:
    """Without random numbers, which a GPU draws otherwise, but for dropout; with heads that the fused kernel takes."""
    tmp = tmp_path_factory.mktemp("gpu")
    fixed = dict(drop_path_rate=0.0, args=Job(output="").args | {"embed_dim": 32})
    jobs = {case: Job(output=str(tmp / str(case)), stage=case[0], precision=case[1], accumulation=case[2],
                      recompute=case[3], **fixed) for case in CASES}
    for name in ON_GPU[len(CASES):]:
        stage, precision, accumulation, zero, settings = OPTIONS[name]
        jobs[name] = Job(output=str(tmp / name), stage=stage, precision=precision, accumulation=accumulation, zero=zero,
                         settings=settings, **fixed)
    for stage in (1, 3):
        jobs["compiled", stage] = Job(output=str(tmp / f"compiled{stage}"), stage=stage, recompute=True, compile=True,
                                      **fixed)
    for stage, recompute in itertools.product((0, 3), (False, True)):
        jobs["dropout", stage, recompute] = Job(
            output=str(tmp / f"dropout{stage}_{recompute}"), stage=stage, precision="bf16", recompute=recompute,
            args=fixed["args"] | DROPOUT)
    for stage in range(4):
        jobs["begun", stage] = Job(output=str(tmp / f"begun{stage}"), stage=stage, steps=2, **fixed)
        for after in (stage, NEXT[stage]):
            jobs["resumed", stage, after] = Job(
                output=str(tmp / f"resumed{stage}_{after}"), stage=after, first=2, steps=1, save_first=True,
                restore=jobs["begun", stage].output, **fixed)
    launch(tmp, list(jobs.values()), ranks=1)
    return jobs


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ON_GPU, ("compiled", 1), ("compiled", 3)], ids=str)
def test_on_a_gpu_training_is_that_of_a_plain_loop_on_cpu(case, on_gpu):
    is_as_the_plain_loop(on_gpu[case], plain_loop(on_gpu[case]), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_on_a_gpu_evaluation_takes_the_weights_or_the_average(case, on_gpu):
    is_evaluated_as_saved(on_gpu[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*(case for case in CASES if case[-1]), ("dropout", 0, True), ("dropout", 3, True)],
                         ids=str)
def test_on_a_gpu_recomputation_changes_no_bit(case, on_gpu):
    is_recomputed_to_the_bit(on_gpu[(*case[:-1], False)], on_gpu[case])


@pytest.mark.gpu
@pytest.mark.parametrize("before, after", [(stage, after) for stage in range(4) for after in (stage, NEXT[stage])])
def test_on_a_gpu_a_checkpoint_is_taken_up_to_the_bit(before, after, on_gpu):
    source, job = on_gpu["begun", before], on_gpu["resumed", before, after]
    old, new = partitions(source), partitions(job)
    for name in old.shapes:
        for key in (WEIGHT, "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(new.whole(name, key), old.whole(name, key)), (name, key)
    (event,) = result(job)["events"]
    if before == after:
        (uninterrupted,) = result(on_gpu[before, "fp32", 1, False])["events"][2:]
        assert (event["loss"], event["norm"]) == (uninterrupted["loss"], uninterrupted["norm"])
    losses, *_ = plain_loop(replace(job, first=0, steps=3))
    assert event["loss"] == pytest.approx(losses[2], rel=1e-5)
