"""The heads of the shipped recipes: their commands, what is planned by them, and the table of docs/training.md."""

import re
import shlex
from dataclasses import replace

import pytest
import torch

from support.launchers import ROOT
from vir import plan
from vir.engine import ds_config
from vir.flags import parse
from vir.planning.estimate import estimate
from vir.planning.hardware import Range
from vir.planning.page import between

torch.set_num_threads(1)
RECIPES = sorted(path for path in (ROOT / "vir" / "recipes").glob("*.yaml") if path.stem != "quickstart")


def head_of(path):
    """The comment that a recipe begins with, and its two commands, each in one line."""
    head = "".join(line[1:] for line in re.match("(#.*\n)+", path.read_text())[0].splitlines(keepends=True))
    assert head.isascii() and max(map(len, path.read_text().splitlines())) <= 120
    return head, re.findall("^   (deepspeed|bash|vir-plan) (.*)$", head.replace("\\\n", ""), re.MULTILINE)


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def recipe(request, planned_of):
    return planned_of(request.param)


@pytest.fixture(scope="module")
def planned_of():
    """What a recipe says, what its command to train sets, and what its command to plan gives; each planned once."""
    known = {}

    def quickly(question):
        """Without what takes long and changes no hours: the traffic of shards, and other JSONs to compare with."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vir.planning.estimate._shipped", lambda *_: ())
            return estimate(replace(question, images=replace(question.images, shard_bytes=())))

    def of(path):
        if path not in known:
            head, ((_, train), (_, planned)) = head_of(path)
            args, settings = plan._parser().parse_known_args(shlex.split(planned))
            question = plan._question(args, parse(["--data.train", args.data or "imagenet-1k", *settings]))
            known[path] = (head, parse(shlex.split(train[train.index("--config"):])), question, quickly(question))
        return known[path]

    return of


def hours(found):
    return Range(*(seconds / 3600 * found.cluster.world for seconds in found.wall_seconds))


def test_a_head_says_where_it_comes_from_and_whether_it_was_run(recipe):
    head, config, question, _ = recipe
    assert re.search(r"arXiv:\d{4}\.\d{5}", head)
    assert re.match(r" .* on ImageNet-\w+.*\. Not yet run\.\n", head)
    micro, world = config.train.micro_batch_size, question.cluster.world
    assert f"Meant for {world} GPUs" in head and f" at {micro} images each" in head


def test_both_commands_are_of_one_run_and_its_batch_divides(recipe):
    _, config, question, _ = recipe
    assert ds_config.read(ROOT / config.deepspeed_config if "/" in config.deepspeed_config else config.deepspeed_config
                          ) == question.ds_config
    own = {"data": config.data, "output": config.output, "deepspeed_config": config.deepspeed_config}
    assert replace(question.config, **own) == replace(config, model=replace(config.model, init_from=""))
    plan._check_world(config, question.cluster.world, question.cluster.gpus_per_node)


def test_it_fits_and_takes_the_hours_that_the_head_says(recipe):
    head, _, _, found = recipe
    assert found.chosen.fits
    assert f" {between(hours(found))} GPU hours" in head.replace("\n", ""), between(hours(found))


def test_the_hours_are_those_that_vir_plan_prints(planned_of, capsys):
    path = ROOT / "vir" / "recipes" / "vir_tiny_in1k.yaml"
    words = head_of(path)[1][1][1]
    assert plan.main(shlex.split(words)) == 0
    *_, found = planned_of(path)
    assert f", {between(hours(found))} GPU hours" in capsys.readouterr().out


def test_the_page_tells_of_the_recipes_what_they_are(planned_of):
    text = (ROOT / "docs" / "training.md").read_text()
    rows = [f"| [`{path.stem}`](../vir/recipes/{path.name}) |" + row(*planned_of(path)) for path in RECIPES]
    section = text.split("\n## Recipes\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| [")] == rows, "\n".join(rows)


def row(head, config, question, found):
    """A recipe in the table, as the code knows it."""
    train, rate = config.train, config.optim.peak_lr(config.train.global_batch_size)
    side = f", {config.model.img_size} px" if config.model.img_size else ""
    args = f" {config.model.args}" if config.model.args else ""
    most = "at most " if train.linear_probe else ""  # the plan counts the backbone in every epoch
    return (f" {config.model.name}{args}{side} | {question.images.name} | {train.epochs:g} | "
            f"{train.global_batch_size:,} | {rate:g} | {question.cluster.world} | {most}{between(hours(found))} | "
            f"not yet run |")
