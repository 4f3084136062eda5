"""A plan as a page of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vir.planning.estimate import Choice, Estimate
from vir.planning.hardware import Range
from vir.planning.loading import Loading
from vir.planning.memory import Memory
from vir.planning.traffic import MOST_DOWNLOADS, CacheRow, Fetched

PARTS = {
    "weights": "weights", "gradients": "gradients", "masters": "float32 masters", "optimizer": "optimizer",
    "average": "EMA", "buckets": "buckets", "teacher": "teacher", "gathered": "gathered layers",
    "activations": "activations", "temporary": "temporary in the backward pass", "update": "temporary in the update",
    "reserved": "CUDA, NCCL and fragmentation, assumed"}
"""Of the fields of Memory."""


def lines(plan: Estimate) -> Iterator[str]:
    """For people, a line each; what is an estimate has its range or is named as one."""
    yield from _head(plan)
    for title, part in (("memory", _memory(plan)), ("time", _time(plan)), ("data", _data(plan)),
                        ("checkpoints", _checkpoints(plan)), ("money", _money(plan)),
                        ("what the estimates rest on", (f"- {said}" for said in plan.basis))):
        told = [f"  {line}" if line else "" for line in part]
        if told:
            yield from ("", title.upper(), *told)


def parts(memory: Memory) -> dict[str, int]:
    """Bytes by their titles, which add up to the total: what passes take, or the update where that takes more."""
    passes = ("gathered", "activations", "temporary")
    left_out = ("update",) if sum(getattr(memory, name) for name in passes) >= memory.update else passes
    return {title: getattr(memory, name) for name, title in PARTS.items() if name not in left_out}


def _head(plan: Estimate) -> Iterator[str]:
    cluster, world = plan.cluster, plan.cluster.world
    frozen = f", {_count(plan.parameters - plan.trained)} of them frozen" if plan.trained < plan.parameters else ""
    args = {name: value for name, value in plan.args.items() if name != "num_classes"}
    yield (f"{plan.model}{f' {args}' if args else ''}: {_count(plan.parameters)} parameters{frozen}, images of "
           f"{'x'.join(map(str, plan.image))}" + (f", {flop(plan.work.model)} forward each" if plan.work else ""))
    nodes = f"{cluster.nodes} nodes of " if cluster.nodes > 1 else ""
    yield f"{plan.chosen.name} on {nodes}{cluster.gpus_per_node} {cluster.gpu.name}"
    yield (f"{plan.total_steps:,} steps of {plan.global_batch_size:,} images = {plan.accumulation} accumulated x "
           f"{plan.micro_batch_size} x {world} {_gpu(plan)}s: {plan.epochs:.4g} epochs of {plan.num_images:,} images "
           f"({plan.images})")


def _gpu(plan: Estimate) -> str:
    return "GPU" if plan.on_gpu else "rank"


def _memory(plan: Estimate) -> Iterator[str]:
    memory, room = plan.chosen.memory, plan.cluster.gpu.memory
    if memory is None:
        yield f"not known: {plan.chosen.unknown}"
        yield from _copies(plan)
        return
    spare = room - memory.total
    yield (f"{gigabytes(memory.total)} of {gigabytes(room)} of each {_gpu(plan)}: " + (
        f"fits, {gigabytes(spare)} to spare" if spare >= 0 else f"DOES NOT FIT, {gigabytes(-spare)} too few"))
    yield " + ".join(f"{gigabytes(size)} {title}" for title, size in parts(memory).items() if size)
    if memory.host:
        yield f"{_host(memory, plan)} of the memory of each node, for what {plan.chosen.name} offloads"
    yield from _copies(plan)
    yield ""
    yield from _table(("DeepSpeed JSON", "memory", "fits", "largest micro-batch", "sent per step", "images/s"),
                      (_choice(choice, plan) for choice in plan.choices))
    best = next((choice for choice in plan.choices if choice.name == plan.best), None)
    smaller = max(plan.choices, key=lambda choice: choice.largest_micro_batch)
    if best is not None and best.memory is not None:
        yield (f"{best.name} fits with the least communication, of those that round nothing they send" +
               (f"; it takes {_host(best.memory, plan)} of the memory of each node" if best.memory.host else ""))
    else:
        yield plan.remedy or (f"none of them fits with micro-batches of {plan.micro_batch_size}; {smaller.name} does "
                              f"with --train.micro_batch_size {smaller.largest_micro_batch}")


def _copies(plan: Estimate) -> Iterator[str]:
    if plan.copied_bytes:
        node = "the node of rank 0, which has most," if plan.cluster.nodes > 1 else "the node"
        free = "" if plan.host_memory is None else f"; {gigabytes(plan.host_memory)} are available"
        yield (f"{gigabytes(plan.copied_bytes)} of the memory of {node} for the copies from which checkpoints are "
               f"written{free}")


def _host(memory: Memory, plan: Estimate) -> str:
    return gigabytes(memory.host * plan.cluster.gpus_per_node)


def _choice(choice: Choice, plan: Estimate) -> tuple[str, ...]:
    memory, speed = choice.memory, choice.step.images_per_second if choice.step else None
    told = "" if speed is None else f"at most {speed.high:,.0f}" if choice.offloads else between(speed)
    return (f"{choice.name}{' (asked for)' if choice.name == plan.chosen.name else ''}",
            gigabytes(memory.total) if memory else "not known",
            "" if memory is None else "yes" if choice.fits else "no",
            f"{choice.largest_micro_batch:,}" if choice.largest_micro_batch else "none" if memory else "",
            gigabytes(choice.communication.sent), told)


def _time(plan: Estimate) -> Iterator[str]:
    step, sent = plan.chosen.step, plan.chosen.communication
    if plan.work is not None and plan.work.form:
        yield (f"retention is computed {plan.work.form}: {flop(plan.work.performed)} of an image's forward pass; an "
               f"MFU counts {flop(plan.work.retention)} for it")
    yield (f"each {_gpu(plan)} sends {gigabytes(sent.sent)} in a step: {gigabytes(sent.within_node)} within its node, "
           f"{gigabytes(sent.between_nodes)} to other nodes")
    if step is None or plan.images_per_second is None or plan.seconds is None or plan.epoch_seconds is None:
        yield "images/s are not known: " + (
            "the peak of this device is not (--gpu of vir-plan takes it)" if plan.work else
            "the network's FLOPs cannot be counted without data")
        return
    assert plan.mfu is not None
    yield (f"a step takes {span(step.seconds)}: {span(step.compute)} of computing at an MFU of "
           f"{between(Range(*(100 * share for share in plan.mfu.range)))} %, {duration(step.communication)} of "
           f"communication, of which {span(step.exposed)} are not hidden behind it")
    a_day = Range(86400 / plan.epoch_seconds.high, 86400 / plan.epoch_seconds.low)
    each = Range(*(rate / plan.cluster.world for rate in plan.images_per_second))
    yield (f"{between(plan.images_per_second)} images/s, {between(each)} per GPU; an epoch takes "
           f"{span(plan.epoch_seconds)}, a day has {between(a_day)} of them")
    yield f"the run takes {span(plan.seconds)}, without evaluations, checkpoints and failures"
    not_known = [flag for part, flag in (("cores", "--cores"), ("storage", "--storage")) if part not in plan.rates]
    yield (f"bound by {plan.bound}{', of what is known' if not_known else ''}; by itself each part would allow, in "
           "images/s: " + ", ".join(f"{part} {between(rate)}" for part, rate in plan.rates.items()) +
           (f"; not told: {' and '.join(not_known)}" if not_known else ""))
    if plan.loading is not None:
        yield from _loading(plan.loading, plan.cluster.nodes)


def _loading(loads: Loading, nodes: int) -> Iterator[str]:
    cores = Range(loads.cores, loads.cores_at_most)
    yield (f"for {between(Range(*[loads.images_per_second * nodes] * 2))} images/s {_each_node(nodes)} needs "
           f"{between(cores)} cores that decode ({loads.augmentation}"
           f"{'' if loads.is_measured else ', the nearest that was measured'}) and reads "
           f"{gigabytes(loads.bytes_per_second)}/s")


def _each_node(nodes: int) -> str:
    return f"each of {nodes} nodes" if nodes > 1 else "the node"


def _data(plan: Estimate) -> Iterator[str]:
    traffic, shuffle = plan.traffic, plan.shuffle
    if traffic is None or shuffle is None:
        yield f"{plan.num_images:,} images in files of their own: no shards are downloaded"
        return
    node = _each_node(traffic.nodes)
    yield (f"{traffic.num_shards:,} shards of {gigabytes(traffic.data_bytes)}, in {traffic.lanes} lanes with a window "
           f"of {traffic.window:,}: {node} has {traffic.working_set:.0f} ({gigabytes(traffic.working_set_bytes)}) in "
           f"use at a time, and reads images of {traffic.shards_per_node:,.0f} in an epoch")
    if not traffic.whole_lanes:
        yield "nodes share lanes, and so download the same shards; see the recommended lanes"
    if traffic.cache_bytes is None:
        yield ("without a cache (--data.cache) every image is read by itself: "
               f"{gigabytes(traffic.first_epoch.bytes_per_node)} by a node in an epoch")
    else:
        yield (f"with a cache of {gigabytes(traffic.cache_bytes)} on each node (--data.cache_bytes) "
               f"{_fetched(traffic.first_epoch)} in the first epoch; in the next one {_fetched(traffic.later_epoch)}")
    if plan.recommended is not None:
        best = plan.recommended
        yield (f"recommended: {best.lanes} lanes, window {best.window:,}; with these {_fetched(best.first_epoch)} in "
               "the first epoch")
    if plan.loading is not None:
        yield (f"{node} asks servers {plan.loading.reads_per_second:,.3g} times a second for "
               f"{gigabytes(plan.loading.fetched_bytes_per_second)}/s, from the second epoch on for "
               f"{gigabytes(plan.loading.later_bytes_per_second)}/s")
    yield ""
    yield from _table(("cache of a node", "downloads per shard", "images by themselves", "fetched by a node"),
                      map(_cache, traffic.table))
    yield (f"{gigabytes(traffic.needed_cache)} are enough for at most {MOST_DOWNLOADS} downloads per shard"
           if traffic.needed_cache is not None else
           f"no cache gives at most {MOST_DOWNLOADS} downloads per shard with these lanes")
    simulated = traffic.first_epoch.simulated_nodes
    if simulated < traffic.nodes:
        yield f"of {simulated} of the {traffic.nodes} nodes, spread evenly; the others are taken to be like them"
    yield (f"neighbours in a shard are {shuffle.distance:,.0f} images apart in training on average, "
           f"{shuffle.neighbours:.3f} of what they are in a full shuffle")


def _cache(row: CacheRow) -> tuple[str, ...]:
    size = f"{gigabytes(row.cache_bytes)}, {f'{row.working_sets:g} x what is in use' if row.working_sets else 'all'}"
    if row.working_sets is not None and row.working_sets < 1:  # what it does then depends on everything
        return size, "too small", "", ""
    fetched = row.fetched
    return (size, f"{fetched.downloads_per_shard:.3f}", f"{100 * fetched.in_parts:.1f} %",
            gigabytes(fetched.bytes_per_node))


def _fetched(fetched: Fetched) -> str:
    alone = f" and {100 * fetched.in_parts:.1f} % of the images by themselves" if fetched.in_parts >= 0.0005 else ""
    return (f"each shard is downloaded {fetched.downloads_per_shard:.3f} times{alone} "
            f"({gigabytes(fetched.bytes_per_node)} by a node)")


def _checkpoints(plan: Estimate) -> Iterator[str]:
    found = plan.checkpoints
    if found is None:
        yield f"{gigabytes(plan.checkpoint_bytes)} each"
        return
    failing = f"one of these {plan.cluster.world} GPUs" if plan.cluster.world > 1 else "the GPU"
    way = ("for which training waits" if found.copying is None else
           f"beside training, which waits {duration(found.copying)} for its copy")
    yield (f"{gigabytes(found.bytes)} each, {duration(found.seconds)} at {gigabytes(found.disk_rate)}/s, {way}; "
           f"{failing} fails every {duration(found.mtbf_seconds)} on average, and the run takes "
           f"{duration(found.restart_seconds)} to start again")
    best = f"best, --checkpoint.every_minutes {found.best_minutes:.3g} --checkpoint.every_steps {found.best_steps}"
    for title, cadence in (("as set", found.as_set), (best, found.best)):
        yield (f"{title}: one after each {duration(cadence.interval_seconds)}; {100 * cadence.goodput:.2f} % of the "
               f"time is of use, {100 * cadence.stall:.2f} % waits for checkpoints, {100 * cadence.lost:.2f} % is lost")
    if found.advice:
        yield found.advice


def _money(plan: Estimate) -> Iterator[str]:
    if plan.wall_seconds is None:
        if plan.seconds is not None:
            yield "not known: with these failures nothing gets done"
        return
    hours = Range(*(one / 3600 * plan.cluster.world for one in plan.wall_seconds))
    yield (f"{span(plan.wall_seconds)} with checkpoints as set and failures, {between(hours)} GPU hours" + (
        f": {between(plan.cost)} at {plan.price:g} per GPU hour" if plan.cost is not None else
        "; --price tells what they cost"))


def gigabytes(size: float) -> str:
    """In 1e9 bytes, or in smaller units where that is nothing."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} KB"


def flop(number: float) -> str:
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e12 else f"{number / 1e9:.3g} GFLOP"


_UNITS = ((2 * 86400, 86400, "days"), (3600, 3600, "h"), (60, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms"))
"""Of times: from how many seconds on, how many it has, and its name."""


def _unit(seconds: float) -> tuple[float, str]:
    return next((size, name) for least, size, name in _UNITS if seconds >= least)


def duration(seconds: float) -> str:
    size, name = _unit(seconds)
    return f"{_number(seconds / size)} {name}"


def span(seconds: Range) -> str:
    """From one time to another, in one unit."""
    size, name = _unit(seconds.high)
    return f"{between(Range(seconds.low / size, seconds.high / size))} {name}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def between(ends: Range) -> str:
    """Two numbers, or one where they are the same."""
    low, high = map(_number, ends)
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
