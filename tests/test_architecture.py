"""Who may import whom: the table of the design, read from the source."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# How far up in the house each file of vir/ and each room stands; imports go from higher to lower.
BASE = {"arithmetic": 0, "startup": 0, "control_groups": 0, "driver": 0, "errors": 0, "files": 0, "streams": 0,
        "status": 1, "addresses": 1, "launcher": 1, "log": 1, "output_folder": 1, "cli": 2, "config": 2,
        "interfaces": 2, "distributed": 3, "flags": 3, "run_folder": 4}
ROOMS = {"weights": 4, "cluster": 5, "models": 5, "data": 6, "checkpoints": 6, "engine": 7, "reports": 7,
         "evaluation": 8, "planning": 8, "training": 9, "benchmarks": 10}
ENTRY = 11  # vir/train.py and its like
TOOLS = 12
# Three pillars on one floor: they do not import each other.
PILLARS = {"models", "data", "engine"}

# The only files that may import a library.
KNOWS = {
    "deepspeed": {"vir/engine/engine.py", "vir/engine/zero.py", "vir/engine/blocks.py", "vir/engine/builds.py",
                  "vir/benchmarks/peer.py", "vir/benchmarks/consolidation_run.py"},
    "accelerate": {"vir/evaluate.py"},
}
# Of DeepSpeed's checkpoints.
LAYOUT = re.compile(r"deepspeed\.(runtime|utils|ops)|_optim_states|_model_states|mp_rank_|zero_pp_rank|_pp_rank_|"
                    r"single_partition_of_fp32|fp32_flat_groups|base_optimizer_state")
KNOWS_LAYOUT = {"vir/checkpoints/partitions.py"}
# Modules without a test file of their own name, and where they are tested.
TESTED_ELSEWHERE = {
    "vir.benchmarks.accuracy": "test_benchmark_accuracy.py",
    "vir.benchmarks.accuracy_run": "test_benchmark_accuracy.py: in processes of its own",
    "vir.benchmarks.conversion": "test_benchmark.py",
    "vir.benchmarks.consolidation": "test_consolidate.py: its turns, under a limit of memory",
    "vir.benchmarks.consolidation_run": "test_consolidate.py: in a process of its own",
    "vir.benchmarks.start": "test_benchmark_start.py",
    "vir.benchmarks.checkpoint_size": "test_benchmark_training.py: of the runs that are made there",
    "vir.benchmarks.checkpoints": "test_benchmark_checkpoints.py",
    "vir.benchmarks.checkpoints_run": "test_benchmark_checkpoints.py: in processes of its own",
    "vir.benchmarks.launching": "test_benchmark_launching.py",
    "vir.benchmarks.evaluation": "test_benchmark.py",
    "vir.benchmarks.timm_script": "test_end_to_end.py: a rank of its own",
    "vir.benchmarks.file_server": "test_benchmark.py",
    "vir.benchmarks.feeds": "test_benchmark_loader.py",
    "vir.benchmarks.loader": "test_benchmark_loader.py", "vir.benchmarks.order": "test_benchmark_loader.py",
    "vir.benchmarks.photographs": "test_benchmark_loader.py",
    "vir.benchmarks.model": "test_benchmark.py", "vir.benchmarks.plot": "test_benchmark.py",
    "vir.benchmarks.stopwatch": "test_benchmark.py",
    "vir.benchmarks.program": "test_benchmark.py: as the tools are run",
    "vir.benchmarks.marks": "test_benchmark_training.py", "vir.benchmarks.peer_torch": "test_benchmark_training.py",
    "vir.benchmarks.peer": "test_benchmark_training.py", "vir.benchmarks.results": "test_benchmark.py",
    "vir.benchmarks.tables": "test_results.py",
    "vir.benchmarks.traffic": "test_benchmark.py",
    "vir.benchmarks.training": "test_benchmark_training.py",
    "vir.benchmarks.transfer": "test_benchmark_transfer.py",
    "vir.checkpoints.exchange": "test_local.py: between two ranks, at awkward sizes",
    "vir.checkpoints.recovery": "test_local.py: by starts of a run whose disks are damaged",
    "vir.checkpoints.partitions": "test_consolidate.py: files of every layout are made by hand there",
    "vir.convert": "test_convert.py: by its tool, in processes of its own",
    "vir.driver": "test_distributed.py: with what is refused of it",
    "vir.data.batch": "test_loader.py: as loader processes make them",
    "vir.data.deal": "test_convert.py: the shuffle is a promise, and sizes of shards",
    "vir.data.stores.choose": "test_objects.py: which store has which URL",
    "vir.data.stores.connections": "test_http.py: redirects, logins, proxies, forks",
    "vir.data.stores.retries": "test_http.py: by the servers that make it wait",
    "vir.data.stores.store": "test_http.py: what all stores promise",
    "vir.data.stores.wire": "test_http.py: of the stores that read by it",
    "vir.data.tasks": "test_convert.py: in processes of its own, and by hand",
    "vir.data.work_folder": "test_convert.py: killed between any two changes",
    "vir.data.worker": "test_loader.py: in processes that are its workers",
    "vir.data.sources.choose": "test_folder.py: and in the files of the kinds of sources",
    "vir.data.sources.imagenet": "test_archives.py: the class list that archives must have",
    "vir.data.repeats": "test_listing.py: keys made unique, and in those of tars, vir-index and vir-verify",
    "vir.data.sources.reading": "test_convert.py: of files and disks that fail",
    "vir.data.damage": "test_verify.py: by what is found in a split",
    "vir.data.access": "test_reader.py: what is open, and what is read again",
    "vir.data.explanation": "test_explain.py: beside the batches of the loader",
    "vir.data.decode": "test_reader.py: bytes and pixels belong together",
    "vir.engine.engine": "test_engine.py: in processes of its own",
    "vir.engine.stacks": "test_blocks.py: with what is done to the blocks",
    "vir.__main__": "test_cli.py", "vir.errors": "test_cli.py",
    "vir.models.block": "test_vision_retention.py",
    "vir.models.export.any_size": "test_export.py: with all that is exported",
    "vir.models.export.graphs": "test_export.py", "vir.models.export.onnx": "test_export.py",
    "vir.models.export.program": "test_export.py", "vir.models.export.recurrent": "test_export.py",
    "vir.weights.metadata": "test_weights.py: with the files that hold it", "vir.weights.portable": "test_weights.py",
    "vir.models.network": "test_initialize.py: as weights are put into them, and test_weights.py",
    "vir.models.strips": "test_streaming.py",
    "vir.evaluation.run": "test_evaluate.py: with what it runs",
    "vir.evaluation.labelling": "test_predict.py: with what runs it",
    "vir.evaluation.limits": "test_predict.py: as what it refuses is asked for",
    "vir.evaluation.pictures": "test_predict.py: as its images are named",
    "vir.evaluation.outputs": "test_evaluate.py: as its files are asked for",
    "vir.index": "test_foreign.py: with what it runs",
    "vir.plan": "test_planning.py: as it is called", "vir.training.forecast": "test_planning.py: by a dry run",
    "vir.planning.estimate": "test_planning.py: as vir-plan and --dry_run tell it",
    "vir.planning.images": "test_planning.py", "vir.planning.page": "test_planning.py",
    "vir.planning.picture": "test_planning.py",
    "vir.planning.checkpoints": "test_planning_checkpoints.py", "vir.planning.loading": "test_planning_loading.py",
    "vir.planning.traffic": "test_planning_traffic.py: and test_traffic.py, of what it counts by",
    "vir.reports.curves": "test_metrics.py",
    "vir.training.features": "test_linear_probe.py: in runs, and on models of which none are kept",
    "vir.training.loop": "test_train.py: the loop is seen at work", "vir.training.meter": "test_train.py: as the loop",
    "vir.training.run": "test_train.py: as the loop", "vir.training.validator": "test_train.py: as the loop",
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for folder in ("vir", "tools") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(path, modules=SOURCES):
    """Full names of all modules a file imports, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def level(module):
    """How far up in the house a module of ours stands."""
    top, *rest = module.split(".")
    if top == "tools":
        return TOOLS
    return {**BASE, **ROOMS}.get(rest[0], ENTRY) if rest else -1  # vir itself: below everything


def room(module):
    return module.split(".")[1] if module.split(".")[0] == "vir" and "." in module else module


def ours(path):
    return [name for name in imports(path) if name.split(".")[0] in ("vir", "tools")]


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import a.b, c\nfrom vir import config\nfrom vir.errors import VirError\n"
                    "def f():\n    from vir.engine import engine\n")
    assert sorted(imports(path)) == ["a.b", "c", "vir.config", "vir.engine.engine", "vir.errors"]
    assert [level(name) for name in ("vir", "vir.errors", "vir.models.block", "vir.train", "tools.x")] == [
        -1, 0, 5, 11, 12]


@pytest.mark.parametrize("library", KNOWS)
def test_a_library_is_known_to_its_rooms_alone(library):
    found = {str(path.relative_to(ROOT)) for path in SOURCES.values()
             if any(name.split(".")[0] == library for name in imports(path))}
    assert found and found <= KNOWS[library]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    wrong = [name for name in ours(SOURCES[module])
             if not (level(name) < level(module) or (room(name) == room(module) and level(module) < ENTRY))]
    assert wrong == [], f"{module} imports {wrong}"


@pytest.mark.parametrize("module", [module for module in SOURCES if room(module) in PILLARS])
def test_pillars_do_not_import_each_other(module):
    wrong = [name for name in ours(SOURCES[module]) if room(name) in PILLARS - {room(module)}]
    assert wrong == [], f"{module} imports {wrong}"


def test_deepspeeds_layout_on_disk_is_known_to_one_file_and_the_engine():
    knowing = {str(path.relative_to(ROOT)) for path in SOURCES.values() if any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and LAYOUT.search(node.value)
        for node in ast.walk(ast.parse(path.read_text())))}
    assert KNOWS_LAYOUT <= knowing <= KNOWS_LAYOUT | {
        str(path.relative_to(ROOT)) for path in (ROOT / "vir" / "engine").glob("*.py")}


@pytest.mark.parametrize("module", [module for module, path in SOURCES.items() if path.name != "__init__.py"
                                    and module.startswith("vir.")])
def test_every_module_has_a_test_file_of_its_name_or_a_reason(module):
    own = ROOT / "tests" / f"test_{module.split('.')[-1]}.py"
    elsewhere = TESTED_ELSEWHERE.get(module)
    is_tested = own.is_file() and not {module, module.rpartition(".")[0]}.isdisjoint(imports(own))
    assert is_tested != (elsewhere is not None), f"{module}: {own.name} that imports it, or one TESTED_ELSEWHERE"
    assert elsewhere is None or (ROOT / "tests" / elsewhere.split(":")[0]).is_file()


def test_every_import_of_ours_exists():
    unknown = {(module, name) for module, path in SOURCES.items() for name in ours(path) if name not in SOURCES}
    assert unknown == set()


def test_no_import_cycle():
    graph = {module: set(ours(path)) - {module} for module, path in SOURCES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)  # CycleError names a cycle


def loaded(statement, *libraries):
    """Which of the libraries are imported after the statement, in a fresh process."""
    code = f"import sys\n{statement}\nprint(*(name for name in {libraries!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_vir_and_the_entry_modules_bring_no_torch():
    """So that --help and a wrong flag are answered at once."""
    assert loaded("import vir, vir.config, vir.train, vir.evaluate", "yaml", "torch", "deepspeed") == ["yaml"]


def test_a_wrong_flag_is_told_before_torch_is_imported():
    statement = ("from vir.train import main\n"
                 "assert [main(words) for words in (['--no.such', '1'], ['--optim.lr', 'x'], ['--config', 'no.yaml'], "
                 "['--help', 'no'])] == [2, 2, 2, 2]")
    assert loaded(statement, "jsonargparse", "torch") == ["jsonargparse"]


def test_consolidation_evaluation_and_data_need_no_deepspeed():
    statement = "import vir.checkpoints.consolidate, vir.evaluation.classify, vir.data.loader"
    assert loaded(statement, "torch", "deepspeed", "webdataset", "accelerate") == ["torch"]


def test_consolidation_needs_no_timm():
    """Which takes seconds and 120 MB to import."""
    assert loaded("import vir.checkpoints.consolidate, vir.consolidate", "torch", "timm", "torchvision") == ["torch"]
