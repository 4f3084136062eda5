"""Who may import whom: the table of the design, read from the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"errors": 0, "files": 0, "config": 1, "distributed": 1, "log": 1}
ROOMS = {"models": 2, "data": 3, "evaluation": 4, "training": 5}
ENTRY = 6  # vir/train.py and its like, and tools/

# The only files that may know the library, with whether they must.
KNOWS = {
    "deepspeed": {"vir/training/engine.py", "vir/training/checkpoint.py"},
    "webdataset": {"vir/data/shards.py"},
    "accelerate": {"vir/evaluate.py"},
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
        return ENTRY
    return {**BASE, **ROOMS}.get(rest[0], ENTRY) if rest else -1  # vir itself: below everything


def room(module):
    return module.split(".")[1] if module.split(".")[0] == "vir" and "." in module else module


def ours(path):
    return [name for name in imports(path) if name.split(".")[0] in ("vir", "tools")]


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import a.b, c\nfrom vir import config\nfrom vir.errors import VirError\n"
                    "def f():\n    from vir.training import engine\n")
    assert sorted(imports(path)) == ["a.b", "c", "vir.config", "vir.errors", "vir.engine.engine"]
    assert [level(name) for name in ("vir", "vir.errors", "vir.models.block", "vir.train", "tools.x")] == [
        -1, 0, 2, 6, 6]


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
    assert loaded("import vir.train\nassert vir.train.main(['--no.such', '1']) == 2", "jsonargparse", "torch") == [
        "jsonargparse"]


def test_consolidation_evaluation_and_data_need_no_deepspeed():
    statement = "import vir.checkpoints.consolidate, vir.evaluation.classify, vir.data.loader"
    assert loaded(statement, "torch", "deepspeed", "webdataset", "accelerate") == ["torch"]
