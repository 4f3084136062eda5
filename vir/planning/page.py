"""A plan as a page of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vir.planning.estimate import Choice, Estimate
from vir.planning.hardware import Range
from vir.planning.loading import Loading
from vir.planning.traffic import Fetched, Traffic

KINDS = {
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
           + (f", {flop(plan.work.model)} forward each" if plan.work else ""))
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
    yield " + ".join(f"{gigabytes(getattr(memory, name))} {said}" for name, said in KINDS.items()
                     if name != "update" and getattr(memory, name))
    if memory.host:
        yield (f"{gigabytes(memory.host * plan.cluster.gpus_per_node)} in the memory of each machine, where "
               f"{plan.chosen.name} puts the optimizer")
    if plan.choices:
        yield ""
        yield from _table(("shipped JSON", "memory", "fits", "largest micro-batch", "sent per step", "images/s"),
                          map(_choice, plan.choices))
        yield (f"{plan.best} fits with the least communication, of those that round nothing" if plan.best else
               plan.remedy or f"none of them fits with micro-batches of {plan.micro_batch_size}; lower "
                              "--train.micro_batch_size")


def _choice(choice: Choice) -> tuple[str, ...]:
    memory = choice.memory
    return (choice.name, gigabytes(memory.total) if memory else "not known",
            "" if memory is None else "yes" if choice.fits else "no",
            f"{choice.largest_micro_batch:,}" if choice.largest_micro_batch else "none" if memory else "",
            gigabytes(choice.communication.sent), between(choice.step.images_per_second) if choice.step else "")


def _time(plan: Estimate) -> Iterator[str]:
    step = plan.chosen.step
    if plan.work is not None and plan.work.form:
        yield (f"retention is computed {plan.work.form}: {flop(plan.work.performed)} of an image's forward pass; an "
               f"MFU counts {flop(plan.work.retention)} for it")
    sent = plan.chosen.communication
    yield (f"each step and GPU sends {gigabytes(sent.sent)}: {gigabytes(sent.within_node)} within its machine, "
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
    a_day = Range(86400 / plan.epoch_seconds.high, 86400 / plan.epoch_seconds.low)
    yield (f"{between(plan.images_per_second)} images/s, {between(_per_gpu(plan))} per GPU; an epoch takes "
           f"{_span(plan.epoch_seconds)}, a day has {between(a_day)} of them")
    yield f"the run takes {_span(plan.seconds)}, without evaluations, checkpoints and failures"
    yield f"bound by {plan.bound}; by itself each part would allow, in images/s: " + ", ".join(
        f"{part} {between(rate)}" for part, rate in plan.rates.items())
    if plan.loading is not None:
        yield from _loading(plan.loading, plan.cluster.nodes)


def _loading(loads: Loading, nodes: int) -> Iterator[str]:
    of = f"each of the {nodes} machines needs" if nodes > 1 else "the machine needs"
    cores = Range(loads.cores, loads.cores_at_most)
    yield (f"for {loads.images_per_second * nodes:,.0f} images/s {of} {between(cores)} cores that decode "
           f"({loads.augmentation}{'' if loads.is_measured else ', the nearest that was measured'}) and reads "
           f"{gigabytes(loads.bytes_per_second)}/s")


def _per_gpu(plan: Estimate) -> Range:
    assert plan.images_per_second is not None
    return Range(*(rate / plan.cluster.world for rate in plan.images_per_second))


def _data(plan: Estimate) -> Iterator[str]:
    traffic, shuffle = plan.traffic, plan.shuffle
    if traffic is None or shuffle is None:
        yield (f"{plan.num_images:,} images in files of their own: no shards are downloaded, and the order is a full "
               "shuffle of what each lane has")
        return
    yield (f"{traffic.num_shards:,} shards of {gigabytes(traffic.data_bytes)}, in {traffic.lanes} lanes, window "
           f"{traffic.window:,}" + ("" if (traffic.lanes, traffic.window) == traffic.recommended else
                                    f" (recommended: {traffic.recommended[0]} and {traffic.recommended[1]:,})") +
           f"; a machine has {traffic.working_set:.0f} of {gigabytes(traffic.working_set_bytes)} in use at a time, and "
           f"reads of {traffic.shards_per_node:,.0f} in an epoch")
    yield f"in the first epoch {_fetched(traffic, traffic.first_epoch)}"
    yield f"in the next one {_fetched(traffic, traffic.later_epoch)}"
    if plan.loading is not None:
        yield (f"a machine asks servers {plan.loading.reads_per_second:,.3g} times a second for "
               f"{gigabytes(plan.loading.fetched_bytes_per_second)}/s, then "
               f"{gigabytes(plan.loading.later_bytes_per_second)}/s")
    yield ""
    yield from _table(("cache of a machine", "downloads per shard", "read in parts", "fetched by a machine"), (
        (gigabytes(row.cache_bytes) + (f", {row.working_sets:g} x what is in use" if row.working_sets else
                                       ", the whole data set"),
         f"{row.fetched.downloads_per_shard:.3f}", f"{100 * row.fetched.in_parts:.1f} %",
         gigabytes(row.fetched.bytes_per_node)) for row in traffic.table))
    simulated = traffic.first_epoch.simulated_nodes
    if simulated < traffic.nodes:
        yield f"of {simulated} of the {traffic.nodes} machines, spread evenly; the others are taken to be like them"
    yield (f"neighbours in a shard are {shuffle.distance:,.0f} images apart in training on average, "
           f"{shuffle.neighbours:.3f} of what they are in a full shuffle")


def _fetched(traffic: Traffic, fetched: Fetched) -> str:
    if traffic.cache_bytes is None:
        return f"every image is read by itself, {gigabytes(fetched.bytes_per_node)} by a machine (no --data.cache)"
    parts = f", {100 * fetched.in_parts:.1f} % of the images in parts" if fetched.in_parts else ""
    return (f"each shard is downloaded {fetched.downloads_per_shard:.3f} times{parts}, "
            f"{gigabytes(fetched.bytes_per_node)} by a machine")


def _checkpoints(plan: Estimate) -> Iterator[str]:
    found = plan.checkpoints
    if found is None:
        yield f"{gigabytes(plan.checkpoint_bytes)} each"
        return
    yield (f"{gigabytes(found.bytes)} each, {duration(found.seconds)} at {gigabytes(found.disk_rate)}/s; a failure "
           f"every {duration(found.mtbf_seconds)} on average, {duration(found.restart_seconds)} to start again")
    for title, cadence in (("as set", found.as_set), ("best", found.best)):
        steps = f", --checkpoint.every_steps {found.best_steps}" if cadence is found.best else ""
        yield (f"{title}: one after each {duration(cadence.interval_seconds)}{steps}: {100 * cadence.goodput:.2f} % of "
               f"the time is of use, {100 * cadence.stall:.2f} % waits for checkpoints, {100 * cadence.lost:.2f} % is "
               "lost")
    yield found.advice


def _money(plan: Estimate) -> Iterator[str]:
    if plan.wall_seconds is None:
        return
    world = plan.cluster.world
    hours = Range(*(one / 3600 * world for one in plan.wall_seconds))
    yield (f"{_span(plan.wall_seconds)} with checkpoints and failures, {between(hours)} GPU hours" +
           (f": {between(plan.cost)}" if plan.cost is not None else "; --price tells what they cost"))


def gigabytes(size: float) -> str:
    """In 1e9 bytes, or in smaller units where that is nothing."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} KB"


def flop(number: float) -> str:
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e12 else f"{number / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    for unit, name in ((86400 * 2, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / (86400 if name == 'days' else unit):.3g} {name}"
    return f"{1000 * seconds:.3g} ms"


def between(ends: Range) -> str:
    """Two numbers, or one where they are the same."""
    low, high = (f"{end:,.0f}" if end >= 100 else f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _span(seconds: Range) -> str:
    low, high = duration(seconds.low), duration(seconds.high)
    return low if low == high else f"{low} to {high}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """In columns, the first one to the left."""
    cells = [titles, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for row in cells:
        yield "  ".join(f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
                        for column, (cell, width) in enumerate(zip(row, widths)))


if __name__ == "__main__":
    raise SystemExit("vir.planning.page is a part of the library; the program is vir-plan")
