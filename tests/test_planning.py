"""vir-plan as it is called, and what a dry run tells: the parts of a plan together, and its refusals."""

import importlib
import json
import math
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.image
import psutil
import pytest
import torch

from support.forked import forked
from support.launchers import ROOT, TINY, call
from support.tiny_runs import command
from vir import plan
from vir.benchmarks import planning
from vir.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig
from vir.data.reader import ShardReader
from vir.distributed import World
from vir.engine import ds_config
from vir.engine.optimizer import parameter_groups
from vir.errors import SettingsError
from vir.flags import parse
from vir.models.build import sketch
from vir.planning import page, picture
from vir.planning.checkpoints import COPY_RATE, DISK_RATE, RESTART_S, default_mtbf
from vir.planning.estimate import Question, estimate
from vir.planning.hardware import Cluster, Gpu, Range
from vir.planning.images import IMAGENET_1K, IMAGENET_21K, Images, imagenet
from vir.planning.memory import Memory
from vir.training import forecast

torch.set_num_threads(1)
TINY_GPU = "memory=2GB,tflops=1,bandwidth=1GB,network=1GB"
SMALL = [*TINY, "--gpu", TINY_GPU, "--gpus-per-node", "2", "--train.micro_batch_size", "4",
         "--train.global_batch_size", "16"]


def planned(capsys, *words):
    """Exit code, what was printed, and what was said of an error."""
    code = plan.main(list(map(str, words)))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def told(shards, tmp_path_factory):
    """Of the tiny network on two GPUs of two machines for the digits, by the tool: its page, JSON and picture."""
    folder = tmp_path_factory.mktemp("plan")
    done = call("python", "tools/plan_run.py", *SMALL, "--nodes", "2", "--data", shards / "train", "--mfu", "0.5",
                "--price", "2.5", "--cores", "4", "--storage", "1GB", "--mtbf", "100", "--disk", "1GB",
                "--deepspeed_config", "zero2_bf16", "--train.epochs", "10", "--checkpoint.every_steps", "50",
                "--json", folder / "plan.json", "--picture", folder / "plan.png")
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads((folder / "plan.json").read_text()), matplotlib.image.imread(folder / "plan.png")


def test_steps_and_images_are_those_of_the_run(told):
    said, numbers, _ = told
    assert (numbers["num_images"], numbers["total_steps"], numbers["accumulation"]) == (400, 250, 1)
    assert numbers["cluster"]["nodes"] == 2 and numbers["traffic"]["num_shards"] == 7
    assert "250 steps of 16 images = 1 accumulated x 4 x 4 GPUs: 10 epochs of 400 images" in said
    for title in ("MEMORY", "TIME", "DATA", "CHECKPOINTS", "MONEY", "WHAT THE ESTIMATES REST ON"):
        assert f"\n{title}\n" in said


def test_time_follows_from_flops_peak_and_links(told):
    _, numbers, _ = told
    step, work = numbers["chosen"]["step"], numbers["work"]
    computed = 3 * (work["model"] - work["retention"] + work["performed"]) * 4 / (0.5 * 1e12)
    assert step["compute"] == pytest.approx([computed, computed])
    assert step["seconds"][1] == pytest.approx(computed + step["communication"])
    assert step["images_per_second"] == pytest.approx([16 / seconds for seconds in reversed(step["seconds"])])
    assert numbers["images_per_second"] == [3192, 3192]                         # the cores of the two machines
    assert numbers["epoch_seconds"][1] == pytest.approx(400 / numbers["images_per_second"][0])
    assert numbers["seconds"] == pytest.approx([250 * 16 / rate for rate in reversed(numbers["images_per_second"])])


def test_cores_and_storage_bound_the_run_where_they_are_less(told, capsys, shards, tmp_path):
    _, numbers, _ = told
    assert numbers["rates"]["cores"] == [2 * 4 * 399.0] * 2
    assert numbers["rates"]["storage"][0] == pytest.approx(2e9 / numbers["image_bytes"])
    least = min(numbers["rates"], key=lambda part: numbers["rates"][part][1])
    assert numbers["bound"] == least
    _, said, _ = planned(capsys, *SMALL, "--nodes", "2", "--data", shards / "train", "--mfu", "1", "--storage", "1KB",
                         "--json", tmp_path / "slow.json")
    slow = json.loads((tmp_path / "slow.json").read_text())
    assert slow["bound"] == "storage" and "bound by storage" in said
    assert slow["images_per_second"] == pytest.approx([2e3 / numbers["image_bytes"]] * 2)


def test_money_is_gpu_hours_times_the_price(told):
    said, numbers, _ = told
    goodput = numbers["checkpoints"]["as_set"]["goodput"]
    assert numbers["wall_seconds"] == pytest.approx([one / goodput for one in numbers["seconds"]])
    assert numbers["cost"] == pytest.approx([2.5 * 4 * one / 3600 for one in numbers["wall_seconds"]])
    assert numbers["checkpoints"]["mtbf_seconds"] == 100 * 3600 / 2             # one of two machines
    assert "as set: one after each" in said


def test_the_page_says_the_numbers_of_the_json(told):
    said, numbers, _ = told
    assert f"{page.gigabytes(numbers['chosen']['memory_total'])} of 2 GB of each GPU: fits" in said
    for title, size in page.parts(Memory(**numbers["chosen"]["memory"])).items():
        assert not size or f"{page.gigabytes(size)} {title}" in said
    assert page.between(Range(*numbers["images_per_second"])) in said
    for choice in numbers["choices"]:
        row = next(line for line in said.splitlines() if line.startswith(f"  {choice['name']} ") and "yes" in line)
        assert page.gigabytes(choice["memory_total"]) in row and f" {choice['largest_micro_batch']:,} " in row
        assert sum(page.parts(Memory(**choice["memory"])).values()) == choice["memory_total"]
    assert f"{numbers['best']} fits with the least communication" in said


def test_copies_of_checkpoints_take_memory_of_the_node_and_their_time_of_training(told):
    said, numbers, _ = told
    count, found = numbers["parameters"], numbers["checkpoints"]
    assert numbers["copied_bytes"] == pytest.approx((2 + 16 / 4 * 2) * count, rel=1e-3)   # of 2 of the 4 ranks
    assert numbers["checkpoint_bytes"] == pytest.approx((2 + 16) * count, rel=1e-3) and numbers["host_memory"] is None
    assert found["copying"] == pytest.approx((2 + 16 / 4) * count / COPY_RATE, rel=1e-3)
    assert (f"  {page.gigabytes(numbers['copied_bytes'])} of the memory of the node of rank 0, which has most, for the "
            "copies from which checkpoints are written\n") in said
    assert (f"{page.duration(found['seconds'])} at 1 GB/s, beside training, which waits "
            f"{page.duration(found['copying'])} for its copy") in said
    best = re.search(r"best, --checkpoint.every_minutes (\S+) --checkpoint.every_steps (\d+): one", said)
    assert float(best[1]) == pytest.approx(found["best_minutes"], rel=0.01) and int(best[2]) == found["best_steps"]


def test_the_shipped_ones_in_the_precision_are_compared(told):
    _, numbers, _ = told
    assert {choice["name"] for choice in numbers["choices"]} == {
        path.stem for path in ds_config.SHIPPED.glob("*bf16*.json")}
    sent = {choice["name"]: choice["communication"] for choice in numbers["choices"]}
    assert numbers["best"] == "zero0_bf16" and sent["zero1_bf16"] == sent["zero2_bf16"]


def test_the_picture_shows_the_numbers(told, shards):
    _, numbers, pixels = told
    assert min(pixels.shape[:2]) > 500
    args, settings = plan._parser().parse_known_args([*SMALL, "--mfu", "0.5"])
    found = plan._estimate(args, parse(["--data.train", str(shards / "train"), *settings]))
    memory, rates, caches, cadence = picture.drawn(found).axes
    widths: dict[float, float] = {}
    for bar in memory.patches:
        widths[bar.get_y()] = widths.get(bar.get_y(), 0) + bar.get_width()
    assert list(widths.values()) == pytest.approx([choice.memory.total / 1e9 for choice in found.choices])
    assert [list(line.get_xdata()) for line in rates.lines] == [*map(list, found.rates.values()),
                                                                list(found.images_per_second)]
    assert list(caches.lines[0].get_ydata()) == [row.fetched.downloads_per_shard for row in found.traffic.table]
    _, best, as_set = cadence.lines
    assert best.get_ydata() == [100 * found.checkpoints.best.goodput]
    assert as_set.get_xdata() == [found.checkpoints.as_set.interval_seconds / 60]


def test_a_dry_run_tells_what_vir_plan_would_of_its_world(shards, tmp_path):
    words = command(shards, tmp_path / "run", "zero2_fp32", "--dry_run")
    done = forked("-m", "vir.train", *words)
    assert done.returncode == 0, done.stdout[-4000:]
    config, train = parse(words), ShardReader(shards / "train")
    network, spec = sketch(config.model, train.classes)
    asked = Question(
        config=config, ds_name="zero2_fp32", ds_config=ds_config.read("zero2_fp32"), network=network, spec=spec,
        images=Images.of(train), on_gpu=False, total_steps=8, disk=DISK_RATE, restart=RESTART_S,
        cluster=Cluster(nodes=1, gpus_per_node=2, network=0.0, gpu=Gpu(
            name="CPU", memory=psutil.virtual_memory().total // 2, tflops={}, bandwidth=0.0, network=0.0, source="")))
    found = estimate(asked)
    expected = [line.strip() for line in page.lines(found)]
    first, last = expected.index("MEMORY"), expected.index("WHAT THE ESTIMATES REST ON")
    assert last - first > 20
    for line in expected[first:last]:
        assert line in done.stdout
    replace(found, host_memory=found.copied_bytes).check_that_something_fits()
    with pytest.raises(SettingsError, match="for the 2 ranks of this node.*give --checkpoint.asynchronous false"):
        replace(found, host_memory=found.copied_bytes - 1).check_that_something_fits()
    assert re.search(r"the copies from which checkpoints are written; \S+ [GT]B are available\n", done.stdout)
    assert "no shipped --deepspeed_config" in estimate(replace(asked, teacher=10**12)).remedy  # it is on every rank


@pytest.fixture
def check_memory(monkeypatch):
    """A function that checks the copies of 4 ranks in stage 2, where each finds itself in (machine, host, bytes granted
    to its container per number of the network, bytes that the machine has, too). Each copies 16 bytes for a quarter of
    the numbers, and rank 0 also the weights: 2 more bytes for each number."""
    network, _ = sketch(parse(["--data.train", "x", *TINY]).model, ["a", "b"])
    count = sum(p.numel() for p in network.parameters())
    engine = SimpleNamespace(module=network, groups=parameter_groups(network, OptimConfig()), has_ema=True,
                             zero_stage=2)
    world, ds_json = World(rank=3, size=4, device=torch.device("cpu")), ds_config.read("zero2_bf16")

    def check(*places, **checkpoint):
        monkeypatch.setattr(forecast.distributed, "gather", lambda mine: [
            (machine, host, granted * count, has * count) for machine, host, granted, has in places])
        config = RunConfig(deepspeed_config="x", output="y", data=DataConfig(train="x"),
                           checkpoint=CheckpointConfig(**checkpoint))
        forecast.check_memory_of_nodes(config, ds_json, engine, world)

    return check


def test_a_node_that_has_too_little_memory_for_copies_is_refused_by_name_on_every_rank(check_memory):
    """Ranks need not follow one another, and one may find less than the others of its node."""
    a, b = ("a", "node-a", math.inf, 10.1), ("b", "node-b", math.inf, 8.1)
    check_memory(a, b, a, b)
    short = *b[:3], 7.9
    with pytest.raises(SettingsError, match="for the 2 ranks of node-b, .* or start fewer ranks on each node"):
        check_memory(a, b, a, short)
    check_memory(a, b, a, short, asynchronous=False)
    with pytest.raises(SettingsError, match="of node-a, "):
        check_memory((*a[:3], 9.9), b, a, b)


def test_containers_of_one_machine_have_their_own_limits_and_its_memory_together(check_memory):
    one, two = ("a", "pod-1", 10.1, 18.1), ("a", "pod-2", 8.1, 18.1)
    check_memory(one, one, two, two)
    with pytest.raises(SettingsError, match="for the 2 ranks of pod-2, "):
        check_memory(one, one, two, ("a", "pod-2", 7.9, 18.1))
    with pytest.raises(SettingsError, match="for the 4 ranks of pod-1 and pod-2, "):
        check_memory(one, one, two, ("a", "pod-2", 8.1, 17.9))
    with pytest.raises(SettingsError, match="for the 2 ranks of pod-1, "):  # of the same name, on two machines
        check_memory(one, one, *[("b", "pod-1", 7.9, 18.1)] * 2)


@pytest.mark.parametrize("words, message", [
    (["--gpu", "h100-80g"], "did you mean h100-80gb"),
    (["--gpu", "memory=80GB,tflops=x,bandwidth=1GB"], "--gpu tflops is 'x'"),
    (["--nodes", "3"], "--train.global_batch_size 1024 is not a multiple of --train.micro_batch_size 128 x 24 ranks = "
                       "3072; nearest: 3072; or, as the rest is, --nodes 1"),
    (["--nodes", "5", "--train.micro_batch_size", "16", "--train.global_batch_size", "1024"],
     "640; nearest: 640 or 1280; or, as the rest is, --nodes 4 or 8"),
    (["--gpus-per-node", "7"], "x 7 ranks = 896; nearest: 896 or 1792\n"),
    (["--nodes", "64", "--gpus-per-node", "8"], "or, as the rest is, --nodes 1, or --train.micro_batch_size 2"),
    (["--train.steps", "3", "--schedule.warmup_epochs", "5"], "never trains at --optim.lr"),
    (["--distill.teacher", "vit_tiny_patch16_224", "--distill.kind", "token"], "distilled"),
    (["--data", ""], "--data.train is not given"),
    (["--gpu", "v100-32gb", "--deepspeed_config", "zero2_bf16"], "v100-32gb has no known peak in bf16"),
    (["--storage", "fast"], "--storage is 'fast'"), (["--network", "50gb"], "write GB for bytes per second or Gb"),
    (["--disk", "0GB"], "--disk"), (["--data", "nowhere"], "nowhere"),
    (["--json", "/nowhere/plan.json"], "--json /nowhere/plan.json cannot be written"),
    (["--picture", "plan.txt"], "--picture plan.txt has not the ending of a picture"),
    (["--model.nme", "x"], "no such flag: --model.nme"), (["--deepspeed_config", "zero9"], "zero9"),
    (["--model.name", "vir_smal"], "--model.name vir_smal"),
    (["--optim.name", "lamb"], "--optim.name lamb needs whole"),
])
def test_what_cannot_be_planned_is_refused_with_the_way_out(capsys, words, message):
    code, said, error = planned(capsys, *words)
    assert code in (2, 3) and said == "" and message in error


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--price", "1e300"], ["--mfu", "30"], ["--mtbf", "nan"]])
def test_numbers_out_of_range_are_refused_by_the_parser(capsys, words):
    with pytest.raises(SystemExit) as end:
        plan.main(words)
    assert end.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_model_that_nothing_makes_fit_says_by_how_much_and_what_would(capsys, tmp_path, shards):
    gpu = "memory=4GB,tflops=1,bandwidth=1GB"
    words = [*SMALL, "--data", shards / "train", "--gpu", gpu, "--model.args",
             "{patch_size: 14, embed_dim: 4096, depth: 8, num_heads: 32}"]
    code, said, error = planned(capsys, *words)
    lacking = re.search(r"(\S+) needs (\S+) GB of 4 GB with micro-batches of 2, (\S+) GB too many", error)
    assert code == 2 and lacking and "DOES NOT FIT" in said
    assert float(lacking[2]) - 4 == pytest.approx(float(lacking[3]), abs=0.01)
    ways = re.search(r"(\S+) with stage3_max_live_parameters and stage3_max_reuse_distance of (\d+), which "
                     r"needs \S+ GB, or a GPU of (\S+) GB, or a smaller model", error)
    content = json.loads((ds_config.SHIPPED / f"{ways[1]}.json").read_text())
    content["zero_optimization"] |= dict.fromkeys(
        ("stage3_max_live_parameters", "stage3_max_reuse_distance"), int(ways[2]))
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    smallest = ["--train.micro_batch_size", "2", "--train.global_batch_size", "4", "--deepspeed_config"]
    for more in ([tmp_path / "fewer.json"], [lacking[1], "--gpu", gpu.replace("4GB", f"{ways[3]}GB", 1)]):
        code, said, error = planned(capsys, *words, *smallest, *more)
        assert "fits, " in said, error


def test_a_network_that_cannot_be_measured_is_planned_without_its_memory_and_says_why(capsys):
    code, said, _ = planned(capsys, "--model.name", "swin_tiny_patch4_window7_224")
    assert code == 0 and re.search("not known: swin_tiny_patch4_window7_224: .*float32 but found .*bfloat16", said)


def test_what_a_network_does_not_have_is_left_out_of_the_shipped_ones(capsys):
    code, said, _ = planned(capsys, "--model.name", "resnet18", "--model.img_size", "64")
    assert code == 0 and "zero2_bf16 (asked for)" in said and "ckpt" not in said  # its batch norms would count twice


def test_inputs_that_are_given_and_those_that_are_assumed(capsys, tmp_path):
    code, said, _ = planned(capsys, *TINY, "--gpu", "v100-32gb", "--network", "10GB", "--restart", "7", "--nodes", "2",
                            "--train.micro_batch_size", "64", "--json", tmp_path / "plan.json")
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and numbers["chosen"]["name"] == "zero2_fp16" and numbers["work"]["form"] == "parallel"
    assert numbers["cluster"]["network"] == 1e10 and "10 GB/s to other nodes (as given)" in said
    assert numbers["checkpoints"]["restart_seconds"] == 420
    assert numbers["checkpoints"]["mtbf_seconds"] == default_mtbf(16)
    assert numbers["traffic"]["cache_bytes"] == 200e9 and "with a cache of 200 GB on each node" in said
    assert numbers["checkpoints"]["as_set"]["interval_seconds"] >= numbers["chosen"]["step"]["seconds"][0]


def test_machines_that_fail_too_often_are_told(capsys, shards):
    code, said, _ = planned(capsys, *SMALL, "--data", shards / "train", "--mtbf", "0.00001",
                            "--checkpoint.asynchronous", "false")
    assert "GB/s, for which training waits; one of these" in said and "copies" not in said
    assert code == 0 and "at no cadence more than" in said
    assert "not known: with these failures nothing gets done" in said


def test_settings_of_a_file_win_over_assumed_images_and_data_over_those(capsys, shards, tmp_path):
    (tmp_path / "run.yaml").write_text(f"data: {{train: {shards / 'train'}}}\ntrain: {{epochs: 2}}\n")
    words = [*SMALL, "--train.global_batch_size", "1024", "--config", tmp_path / "run.yaml"]
    assert "of 400 images" in planned(capsys, *words)[1]
    assert "of 1,281,167 images (imagenet-1k)" in planned(capsys, *words, "--data", "imagenet-1k")[1]


def test_imagenet_is_cut_into_shards():
    images = imagenet(1000)
    assert images.count == 1_281_167 and len(images.shard_sizes) == 1282 and images.shard_sizes[-1] == 167
    assert images.image_bytes == 110_000 and len(images.classes) == 1000
    whole = imagenet(name=IMAGENET_21K)
    assert (whole.count, len(whole.shard_sizes), len(whole.classes)) == (14_197_122, 14_198, 21_841)


def test_a_row_of_the_page_is_what_its_command_gives(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(planning, "BATCHES", {"one billion": {8: planning.BATCHES["one billion"][8]}})
    tool = importlib.import_module("benchmark_planning")
    assert tool.main(["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "rows.png")]) == 0
    row, = json.loads((tmp_path / "rows.json").read_text())["rows"]
    seconds = planning.COLUMNS.index("planned in s")
    documented = json.loads((ROOT / "docs" / "results" / "2026-11-30-planning.json").read_text())["rows"]
    assert [*row[:seconds], *row[seconds + 1:]] in [[*one[:seconds], *one[seconds + 1:]] for one in documented]
    assert matplotlib.image.imread(tmp_path / "rows.png").std() > 0.05


def test_the_commands_of_the_page_are_ones_that_are_understood():
    rows = re.findall(r"`vir-plan ([^`]+)`", (ROOT / "docs" / "planning.md").read_text())
    assert len(rows) >= 16
    settings_of = {}
    for row in rows:
        _, settings = plan._parser().parse_known_args(shlex.split(row))
        settings_of[re.sub(r"\d+", "", shlex.join(settings))] = settings  # batches are all of one kind
    for settings in settings_of.values():
        parse(["--data.train", IMAGENET_1K, *settings])
