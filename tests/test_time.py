"""Time of a step: FLOPs by hand and of networks, bytes against counted collectives of real engines, sums by hand."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from support.engine_runs import Job, write
from support.forked import forked
from support.launchers import HANGS, ROOT
from vir.config import ModelConfig
from vir.engine.ds_config import ZeroSettings, read, zero_settings
from vir.models import kernels
from vir.models.build import sketch
from vir.models.forms import retain
from vir.planning.hardware import GPUS, Cluster, Range
from vir.planning.time import FUSED_TILE, Communication, Part, Work, communicate, count_work, retention_flops, step_time
from vir.reports.throughput import count_flops


@pytest.mark.parametrize("form, chunk, tokens, grid, expected", [
    ("parallel", 0, 79, None, 4 * 16 * 79 * 79),
    ("parallel", 0, 197, None, 4 * 16 * (80 * 80 + 80 * 160 + 37 * 197)),  # each block sees the keys up to its own end
    ("parallel", 0, 197, (14, 14), 4 * 16 * (80 * 80 + 80 * 160 + 37 * 197)),
    ("chunkwise", 64, 197, None, 4 * (4 * 16 * 50 ** 2 + 4 * 50 * 16 ** 2) + 4 * 4 * 2 * 16 ** 2),  # of 50, and carried
    ("chunkwise", 64, 49, (7, 7), 4 * 16 * 49 ** 2 + 2 * 16 ** 2 * (49 + 7 * 7)),  # one block, and its state
    ("recurrent", 0, 197, None, 2 * 16 ** 2 * 197), ("recurrent", 0, 197, (14, 14), 2 * 16 ** 2 * 197)])
def test_flops_of_one_head_are_those_worked_out_by_hand(form, chunk, tokens, grid, expected):
    assert retention_flops(form, chunk, tokens, 16, grid) == expected


def test_the_recurrent_form_has_the_flops_of_the_real_function():
    q, decay = torch.empty(1, 1, 21, 16, device="meta"), torch.empty(1, device="meta")
    for grid in (None, (4, 5)):
        assert retention_flops("recurrent", 0, 21, 16, grid) == count_flops(retain, q, q, q, decay, grid, "recurrent")


@pytest.mark.parametrize("tokens, width, padded", [(1, 64, 64), (64, 64, 64), (197, 64, 64), (197, 72, 128),
                                                   (1025, 128, 128)])
def test_the_fused_kernel_computes_the_tiles_up_to_the_diagonal(tokens, width, padded):
    """Its loops, run as the kernel does: a program for each tile of queries, two products for each tile of keys."""
    multiply_adds = 0
    for tile in range(-(-tokens // 64)):
        for _ in range(0, tile + 1):
            multiply_adds += 64 * 64 * padded + 64 * 64 * padded
    assert retention_flops("fused", 0, tokens, width, None) == 2 * multiply_adds
    if kernels.triton is not None:
        found = kernels._constants(width, width, torch.bfloat16, "ieee")
        assert (found["TILE"], found["KEY_BLOCK"], found["VALUE_BLOCK"]) == (FUSED_TILE, padded, padded)


def test_chunks_of_fla_are_padded_and_carried_by_no_product():
    chunk_of_64 = 2 * 64 * 64 * 32 * 2 + 2 * 64 * 32 * 32 * 2  # scores twice; a state added and one read
    assert retention_flops("fla", 64, 3000, 32, None) == 47 * chunk_of_64


@pytest.mark.parametrize("dims, side, fused, precision, form", [
    (1, 224, True, "bf16", "fused"), (1, 224, True, "fp32", "chunkwise of 64"), (1, 112, False, "fp32", "parallel"),
    (1, 224, False, "fp16", "chunkwise of 64"), (2, 224, False, "fp32", "parallel"),
    (2, 448, False, "fp32", "chunkwise of 256"), (1, 1024, True, "bf16", "fla in chunks of 64")])
def test_work_is_of_the_form_that_auto_takes(dims, side, fused, precision, form):
    network, spec = sketch(ModelConfig(name="vir_small_patch16_224", img_size=side, args={"retention_dims": dims}),
                           [""] * 1000)
    work = count_work(network, spec, fused, precision)
    assert work.form == form and not network.blocks[0].retention._forward_pre_hooks
    assert network.training and network.blocks[0].retention.mode == "auto"
    if not fused:  # the network itself, which takes that form here
        with torch.device("meta"):
            assert work.total == count_flops(network.eval(), torch.empty(1, *spec.input.size))
    else:
        tokens, grid = (side // 16) ** 2 + 1, None
        name, chunk = {"fused": ("fused", 0), "chunkwise of 64": ("chunkwise", 64)}.get(form, ("fla", 64))
        assert work.performed == 12 * 6 * retention_flops(name, chunk, tokens, 64, grid)


def test_work_of_a_mode_that_is_set_and_of_other_networks():
    network, spec = sketch(ModelConfig(name="vir_small_patch16_224", retention_mode="parallel"), [""] * 10)
    work = count_work(network, spec, True, "bf16")
    assert work.form == "parallel" and work.performed > work.retention
    network, spec = sketch(ModelConfig(name="vit_small_patch16_224"), [""] * 1000)
    work = count_work(network, spec, True, "bf16")
    assert (work.form, work.retention, work.performed) == ("", 0, 0) and work.total == work.model
    assert work.model == pytest.approx(2 * 4.61e9, rel=0.01)  # timm publishes 4.61 GMACs


def cluster(nodes=1, gpus_per_node=2):
    return Cluster(nodes=nodes, gpus_per_node=gpus_per_node, gpu=GPUS["h100-80gb"], network=50e9)


def payload(communication, what):
    return sum(part.payload for part in communication.parts if part.what == what)


ARGS = dict(img_size=8, patch_size=4, embed_dim=64, depth=4, num_heads=2)
PERSISTENT = {"stage3_param_persistence_threshold": 1000}
BLOCK = 12 * 64 * 64


def jobs(tmp):
    for stage, (accumulation, recompute) in itertools.product(range(4), [(1, False), (2, True)]):
        yield Job(output=str(tmp / f"{stage}-{accumulation}"), stage=stage, accumulation=accumulation, args=ARGS,
                  recompute=recompute, steps=2, zero=PERSISTENT if stage == 3 else {},
                  precision="bf16" if stage in (1, 3) and recompute else "fp32")
    yield Job(output=str(tmp / "frozen"), stage=2, args=ARGS, steps=2, freeze="blocks.0")
    live = {"stage3_max_live_parameters": 3 * BLOCK, "stage3_prefetch_bucket_size": BLOCK // 4}
    for name, recompute, more in (
            ("twice", False, {"stage3_max_reuse_distance": 0}), ("again", True, {"stage3_max_reuse_distance": 0}),
            ("some", True, {"stage3_max_reuse_distance": 3 * BLOCK, **live}),
            ("groups", False, {"stage3_max_reuse_distance": 0, "zero_hpz_partition_size": 2})):
        yield Job(output=str(tmp / name), stage=3, args=ARGS, steps=2, accumulation=2, recompute=recompute,
                  zero={**PERSISTENT, "stage3_prefetch_bucket_size": 0, **more})


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_bytes_of_a_step_are_those_that_deepspeed_sends(tmp_path):
    made = list(jobs(tmp_path))
    done = forked(ROOT / "tests" / "support" / "counted_collectives.py", write(tmp_path / "jobs.json", made))
    assert done.returncode == 0, done.stdout[-6000:]
    for job in made:
        found = json.loads(Path(job.output, "collectives.json").read_text())
        zero = zero_settings(job.ds_config())
        planned = communicate(found["parameters"], found["trained"], sum(n for n in found["sizes"] if n <= 1000), zero,
                              job.precision, cluster(), job.accumulation, job.recompute)
        sent = found["bytes"]
        reduced = sent.get("all_reduce", 0) + sent.get("reduce_scatter_tensor", 0)
        # padding, and a few numbers beside
        assert payload(planned, "gradients") == pytest.approx(reduced, rel=0.002), job
        assert payload(planned, "weights") == pytest.approx(
            sent.get("all_gather_into_tensor", 0), rel=0.02 if "some" in job.output else 0.002), job
        on_the_wire = sum(sent.values()) / 2 + sent.get("all_reduce", 0) / 2  # of two ranks: half, or half twice
        assert planned.within_node == pytest.approx(on_the_wire, rel=0.02) and planned.between_nodes == 0


P, SMALL = 10**9, 10**6


def sent(zero, nodes=4, accumulation=1, recomputes=False):
    return communicate(P, P, SMALL, ZeroSettings(**zero), "bf16", cluster(nodes, 8), accumulation, recomputes)


def test_each_ring_crosses_every_link():
    """All-gather of 2 GB among 32: 31/32 of it over each GPU's link, an eighth of that over its share of the cards."""
    gathered, = [part for part in sent({"stage": 1}).parts if part.what == "weights"]
    each = 2e9 * 31 / 32
    assert gathered.between == each / 8 and gathered.within == each * 7 / 8
    one = sent({"stage": 0}, nodes=1)
    assert one.within_node == 2 * 2e9 * 7 / 8 and one.between_nodes == 0
    alone = communicate(P, P, SMALL, ZeroSettings(stage=0), "fp32", cluster(4, 1), 1, False)
    assert alone.within_node == 0 and alone.between_nodes == 2 * 4e9 * 3 / 4
    assert alone.seconds(cluster(4, 1)) == 2 * 4e9 * 3 / 4 / 50e9
    nobody = communicate(P, P, SMALL, ZeroSettings(stage=3), "fp32", cluster(1, 1), 1, False)
    assert nobody.parts == () and nobody.seconds(cluster(1, 1)) == nobody.exposed(cluster(1, 1), 1.0) == 0


@pytest.mark.parametrize("zero, accumulation, reduced, gathered", [
    ({"stage": 0}, 4, 2e9, 0), ({"stage": 1}, 4, 2e9, 2e9), ({"stage": 2}, 4, 8e9, 2e9),
    ({"stage": 3}, 1, 2e9, 2e9),  # up to 1e9 numbers stay gathered
    ({"stage": 3, "stage3_max_reuse_distance": 3e8}, 4, 8e9, 2e6 + 4 * 2 * (999e6 + 699e6)),
    ({"stage": 3, "stage3_max_reuse_distance": 0}, 4, 8e9, 2e6 + 4 * 2 * (999e6 + 949e6))])  # those prefetched stay
def test_payload_by_stage(zero, accumulation, reduced, gathered):
    for recomputes in (False, True):
        found = sent(zero, accumulation=accumulation, recomputes=recomputes)
        assert payload(found, "gradients") == reduced and payload(found, "weights") == gathered


def test_zero_plus_plus_quantizes_and_gathers_again_inside_a_node():
    """Of four nodes of 8 GPUs; two micro-batches, each gathering twice, of which one is over all ranks."""
    zero = dict(stage=3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0, overlap_comm=True)
    large = P - SMALL
    plain, every = sent(zero, accumulation=2), 2 * 31 / 32
    assert plain.between_nodes * 8 == pytest.approx(every * (SMALL + 4 * large + 2 * P))
    part = sent({**zero, "zero_hpz_partition_size": 8}, accumulation=2)
    assert payload(part, "weights") == payload(plain, "weights")
    assert part.between_nodes * 8 == pytest.approx(every * (SMALL + large + 2 * P))
    assert part.within_node == pytest.approx(every * 7 / 8 * (SMALL + large + 2 * P) + 2 * 3 * large * 7 / 8)
    bytes_of_weights = sent({**zero, "zero_quantized_weights": True}, accumulation=2)
    assert payload(bytes_of_weights, "weights") == 2 * SMALL + 4 * large
    quarter = sent({**zero, "zero_quantized_gradients": True}, accumulation=2)
    assert payload(quarter, "gradients") == 2 * large / 2 + 2 * 2 * SMALL
    exchanged = [part for part in quarter.parts if part.what == "gradients"][0]
    assert exchanged.within == large * 7 / 8 and exchanged.between == large / 8 * 3 / 4
    one = sent({**zero, "zero_quantized_gradients": True}, nodes=1)
    assert payload(one, "gradients") == 2e9  # DeepSpeed does it between nodes


def test_every_shipped_json_communicates():
    for name in ("zero0_bf16", "zero1_bf16", "zero2_bf16", "zero2_offload_bf16", "zero3_bf16", "zero3pp_bf16"):
        found = communicate(P, P, SMALL, zero_settings(read(name)), "bf16", cluster(4, 8), 1, False)
        assert found.overlapped == (name != "zero0_bf16") and found.seconds(cluster(4, 8)) > 0


def test_what_hides_behind_what():
    """Stage 2 hides its gradients behind two thirds of computing, and nothing of its weights."""
    place = cluster(4, 8)
    reduce_s, gather_s = 2 * 2e9 * 31 / 32 / 8 / 50e9, 2e9 * 31 / 32 / 8 / 50e9
    hidden, told = sent({"stage": 2, "overlap_comm": True}), sent({"stage": 2})
    assert told.seconds(place) == hidden.seconds(place) == pytest.approx(reduce_s + gather_s)
    assert told.exposed(place, 9.0) == told.seconds(place) and not told.overlapped and hidden.overlapped
    assert hidden.exposed(place, 9.0) == pytest.approx(gather_s)
    assert hidden.exposed(place, 3e-3) == pytest.approx(gather_s + reduce_s - 2e-3)
    again = sent({"stage": 2, "overlap_comm": True}, recomputes=True)
    assert again.exposed(place, 4e-3) == pytest.approx(gather_s + reduce_s - 3e-3)
    last = sent({"stage": 1, "overlap_comm": True}, accumulation=2)  # behind the last backward pass alone
    assert last.exposed(place, 6e-3) == pytest.approx(gather_s + reduce_s - 2e-3)
    shared = Communication(overlapped=True, parts=tuple(
        Part(what="weights", payload=0, within=450e9 * seconds, between=0, window=window)
        for seconds, window in ((2.0, 0.5), (3.0, 1.0), (1.0, 0.0))))
    assert [shared.exposed(place, compute) for compute in (0, 2, 4, 5, 9)] == [6, 4, 2, 1, 1]


def test_a_step_takes_its_flops_over_the_peak_and_what_is_not_hidden():
    work = Work(model=10**12, form="fused", retention=10**11, performed=3 * 10**11)
    place = cluster(4, 8)
    said = sent({"stage": 2, "overlap_comm": True}, accumulation=2)
    step = step_time(work, Range(0.25, 0.5), place, "bf16", micro_batch=64, accumulation=2, recomputes=False,
                     communication=said)
    fastest = 3 * 1.2e12 * 128 / (989e12 * 0.5)
    assert step.compute == pytest.approx((fastest, 2 * fastest))
    assert step.exposed == pytest.approx((said.exposed(place, fastest), said.seconds(place)))
    assert step.communication == said.seconds(place) > step.exposed.low
    assert step.seconds == pytest.approx((fastest + step.exposed.low, 2 * fastest + step.communication))
    assert step.images_per_second == pytest.approx((128 * 32 / step.seconds.high, 128 * 32 / step.seconds.low))
    again = step_time(work, Range(0.25, 0.5), place, "bf16", micro_batch=64, accumulation=2, recomputes=True,
                      communication=said)
    assert again.compute == pytest.approx((4 / 3 * fastest, 8 / 3 * fastest))


def test_a_network_of_ten_billion_is_counted_in_no_time():
    network, spec = sketch(ModelConfig(name="vir_base_patch16_224", args=dict(
        embed_dim=4096, depth=50, num_heads=32, patch_size=14)), [""] * 1000)
    work = count_work(network, spec, True, "bf16")
    assert work.form == "fused" and work.model == pytest.approx(2 * 257 * 10.1e9, rel=0.02)
