"""A plan as a page of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from vir.planning.estimate import Choice, Estimate
from vir.planning.hardware import Range
from vir.planning.memory import Memory

_STATES = {
    "weights": "weights", "gradients": "gradients", "masters": "float32 masters", "optimizer": "optimizer",
    "average": "average", "buckets": "buckets", "gathered": "gathered layers", "activations": "activations",
    "temporary": "temporary", "update": "temporary of the update", "teacher": "teacher", "reserved": "reserved"}
"""Of the fields of Memory."""


def lines(plan: Estimate) -> Iterator[str]:
    """For people, a line each; what is an estimate has its range or is named as one."""
    yield from _head(plan)
    for title, part in (("memory", _memory(plan)), ("time", _time(plan)), ("data", _data(plan)),
                        ("checkpoints", _checkpoints(plan)), ("money", _money(plan)),
                        ("what the estimates rest on", (f"- {said}" for said in plan.basis))):
        told = [f"  {line}" for line in part]
        if told:
            yield from ("", title.upper(), *told)


def _head(plan: Estimate) -> Iterator[str]:
    cluster = plan.cluster
    frozen = f", {_count(plan.parameters - plan.trained)} of them frozen" if plan.trained < plan.parameters else ""
    yield (f"{plan.model}: {_count(plan.parameters)} parameters{frozen}, images of {'x'.join(map(str, plan.image))}"
           + (f", {plan.work.model / 1e9:.3g} GFLOP forward each" if plan.work else ""))
    machines = f"{cluster.nodes} x " if cluster.nodes > 1 else ""
    yield f"{plan.chosen.name} on {machines}{cluster.gpus_per_node} {cluster.gpu.name} = {cluster.world} ranks"
    yield (f"{plan.total_steps:,} steps of {plan.global_batch_size:,} = {plan.accumulation} x {plan.micro_batch_size} "
           f"x {cluster.world} ranks: {plan.epochs:.4g} epochs of {plan.num_images:,} images ({plan.images})")


def _memory(plan: Estimate) -> Iterator[str]:
    memory, room = plan.chosen.memory, plan.room
    if memory is None:
        yield "not known: the network cannot be measured without data"
        return
    spare = room - memory.total
    yield (f"{gigabytes(memory.total)} of {gigabytes(room)} on each rank: " + (
        f"fits, {gigabytes(spare)} to spare" if spare >= 0 else f"DOES NOT FIT, {gigabytes(-spare)} too few"))
    yield " + ".join(f"{gigabytes(getattr(memory, name))} {said}" for name, said in _STATES.items()
                     if name != "update" and getattr(memory, name))
    if memory.host:
        yield (f"{gigabytes(memory.host * plan.cluster.gpus_per_node)} in the memory of each machine, where "
               f"{plan.chosen.name} puts the optimizer")
    if plan.choices:
        yield ""
        yield from _table(("shipped JSON", "memory", "fits", "largest micro-batch", "sent per step", "images/s"),
                          map(_choice, plan.choices))
        yield (f"{plan.best} fits with the least communication" if plan.best else plan.remedy or
               f"none of them fits with micro-batches of {plan.micro_batch_size}; take a smaller --train.micro_batch_size")


def _choice(choice: Choice) -> tuple[str, ...]:
    memory = choice.memory
    return (choice.name, gigabytes(memory.total) if memory else "not known",
            "" if memory is None else "yes" if choice.fits else "no",
            f"{choice.largest_micro_batch:,}" if choice.largest_micro_batch else "none" if memory else "",
            gigabytes(choice.communication.wire), between(choice.step.images_per_second) if choice.step else "")


def _time(plan: Estimate) -> Iterator[str]:
    step = plan.chosen.step
    if plan.work is not None and plan.work.form:
        yield (f"retention is computed {plan.work.form}: {plan.work.performed / 1e9:.3g} GFLOP of an image's forward "
               f"pass, {plan.work.retention / 1e9:.3g} of them counted in MFU")
    sent = plan.chosen.communication
    yield (f"each step and GPU sends {gigabytes(sent.wire)}: {gigabytes(sent.within_node)} within its machine, "
           f"{gigabytes(sent.between_nodes)} to others")
    if step is None or plan.images_per_second is None or plan.seconds is None or plan.epoch_seconds is None:
        yield "images/s are not known: " + (
            "the peak of this device is not (--train.peak_tflops, or --gpu of vir-plan)" if plan.work else
            "the network's FLOPs cannot be counted without data")
        return
    assert plan.mfu is not None
    yield (f"a step takes {_span(step.seconds)}: {_span(step.compute)} of computation at an MFU of "
           f"{100 * plan.mfu.range.low:.3g} to {100 * plan.mfu.range.high:.3g} %, {duration(step.communication)} of "
           f"communication, of which {_span(step.exposed)} are not hidden")
    yield (f"{between(plan.images_per_second)} images/s, {between(_per_gpu(plan))} per GPU; an epoch takes "
           f"{_span(plan.epoch_seconds)}, a day has {86400 / plan.epoch_seconds.high:.3g} to "
           f"{86400 / plan.epoch_seconds.low:.3g} of them")
    yield f"the run takes {_span(plan.seconds)}, without evaluations, checkpoints and failures"
    yield "bound by " + (f"{plan.bound}: " if plan.bound else "") + ", ".join(
        f"{part} {'allow' if part.endswith('s') else 'allows'} {between(rate)} images/s"
        for part, rate in plan.rates.items())


def _per_gpu(plan: Estimate) -> Range:
    assert plan.images_per_second is not None
    return Range(*(rate / plan.cluster.world for rate in plan.images_per_second))
