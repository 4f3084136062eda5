"""The pages: every file, module and flag in their commands exists, and every link and image leads somewhere."""

import importlib.util
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.launchers import HANGS, ROOT, call
from vir.checkpoints.consolidate import consolidate

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *DOCS]
OURS = ("tools/", "launch/", "tests/", "ds_configs/", "vir/", "docs/")
QUICKSTART = ROOT / "vir" / "recipes" / "quickstart.yaml"
PASS_ON = ("tools/check_cluster.py", "vir-check", "tools/benchmark_loader.py",
           "tools/plan_run.py", "vir-plan")
"""Programs that take the options of vir.train beside their own."""
PROGRAM = re.compile(r"vir[.-]\w+|(?:tools|tests)/\w+\.py")


def commands_of(text: str) -> list[str]:
    """The lines of the bash blocks, joined where they continue, without comments, with their block's variables."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = string.Template(re.split(r"\s#|^#", line)[0].strip()).safe_substitute(variables)
            if assigned := re.fullmatch(r"""(\w+)=(?:"(.*)"|'(.*)')""", line):
                variables[assigned[1]] = assigned[2] or assigned[3]
            elif line:
                found.append(line)
    return found


COMMANDS = {page: commands_of(page.read_text()) for page in PAGES}
RUNS = [pytest.param(command, id=f"{page.relative_to(ROOT)}: {command}")
        for page, commands in COMMANDS.items() for command in commands
        if re.search(r"vir[.-]\w", command) or "tools/" in command or "tests/" in command or
        command.startswith("bash ")]


def links_of(text: str) -> list[str]:
    """Targets of links and images, without those that lead to another site."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"https?:", target)]


LINKS = [pytest.param(page, target, id=f"{page.relative_to(ROOT)}: {target}")
         for page in PAGES for target in links_of(page.read_text())]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub names them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*?)\s*$", prose, flags=re.MULTILINE)}


@pytest.fixture(scope="module")
def help_of():
    """What --help of a module or tool prints."""
    known: dict[str, str] = {}

    def find(program: str) -> str:
        if program not in known:
            start = [sys.executable, program] if program.endswith(".py") else [sys.executable, "-m", *program.split()]
            if program.startswith("vir-"):
                start = [str(Path(sys.executable).parent / program)]
            done = subprocess.run([*start, "--help"], cwd=ROOT, capture_output=True, text=True,
                                  timeout=120)
            assert done.returncode == 0, done.stderr
            known[program] = done.stdout
        return known[program]

    return find


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-zA-Z_.\-]+", text))


def flags_of(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def test_the_reader_of_commands_joins_lines_and_fills_variables_in():
    text = ("```bash\na='x y'\nt=\"python t.py --a b\"\n$t \\\n  --c \"$a\" \"$d\"   # why\n\n# alone\n```\n"
            "```text\nno\n```")
    assert commands_of(text) == ['python t.py --a b    --c "x y" "$d"']


def test_readme_shows_the_set_up_and_the_verbs():
    commands = COMMANDS[ROOT / "README.md"]
    assert "bash launch/quickstart.sh" in commands and "bash tests/run.sh" in commands
    for verb in ("tools/convert_imagenet.py", "vir-plan", "launch/deepspeed.sh", "tools/consolidate_checkpoint.py",
                 "-m vir.evaluate"):
        assert any(verb in command for command in commands), verb


def test_readme_links_every_page():
    linked = set(links_of((ROOT / "README.md").read_text()))
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("command", RUNS)
def test_what_a_command_names_exists(command, help_of):
    words = shlex.split(command)
    for word in words:
        if word.startswith(OURS):
            assert (ROOT / word).is_file(), word
    if words[0] == "bash" and len(words) > 2:  # a script has flags of its own, and passes others on
        script = (ROOT / words[1]).read_text()
        known = flags_in(script)
        for passed_to in re.findall(r"vir\.train|vir\.launch \w+", script):
            known |= flags_in(help_of(passed_to)) | flags_in(help_of("vir.train"))
        assert flags_of(words) <= known, f"{words[1]} has no {flags_of(words) - known}"
    program = next((word for word in words if PROGRAM.fullmatch(word)), None)
    if program is None or Path(program).name.startswith("test_"):
        return
    if program.startswith("vir."):
        assert importlib.util.find_spec(program), program
    following = words[words.index(program) + 1:]
    end = following.index("--") if "--" in following else len(following)
    for name, given in ((program, following[:end]), ("vir.train", following[end + 1:])):
        unknown = flags_of(given) - flags_in(help_of(name)) if flags_of(given) else set()
        unknown -= flags_in(help_of("vir.train")) if name in PASS_ON else set()
        assert not unknown, f"{name} has no {unknown}"
    if kinds := re.search(r"^  \{([\w,]+)\}", help_of(program), flags=re.MULTILINE):  # a positional word among few
        optional = f"[{{{kinds[1]}}}]" in help_of(program)
        assert following[0] in kinds[1].split(",") or optional and following[0].startswith("--"), following[0]


@pytest.mark.parametrize("page, target", LINKS)
def test_a_link_leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    aim = page.parent / path if path else page
    assert aim.exists(), path
    assert not anchor or anchor in anchors(aim), f"{aim.name} has no heading {anchor}"


PYTHON = [pytest.param(page, block, id=f"{page.relative_to(ROOT)}: {number}") for page in PAGES
          for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))]


@pytest.fixture(scope="module")
def in_folder_of_weights(shards, tmp_path_factory) -> Path:
    """Where vir_small.safetensors lies, of two blocks for the time it takes, just trained for a step of two images."""
    tmp = tmp_path_factory.mktemp("user")
    done = call(sys.executable, "-m", "vir.train", "--data.train", shards / "train", "--output", tmp / "run",
                "--train.steps", "1", "--train.global_batch_size", "2", "--train.micro_batch_size", "2",
                "--model.name", "vir_small_patch16_224", "--model.args", "{depth: 2}", "--ema.decay", "0",
                timeout=HANGS)
    assert done.returncode == 0, done.stdout[-6000:]
    consolidate(tmp / "run", tmp / "vir_small.safetensors")
    return tmp


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
@pytest.mark.parametrize("page, block", PYTHON)
def test_python_on_the_pages_runs_on_a_file_just_trained(page, block, in_folder_of_weights, monkeypatch):
    monkeypatch.chdir(in_folder_of_weights)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    assert names["logits"].shape == (1, 10) and names["logits"].isfinite().all()


def test_there_is_python_on_the_pages():
    assert {page.values[0].name for page in PYTHON} >= {"README.md", "retention.md"}


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=20).returncode == 0


def test_the_quick_starts_recipe_tells_its_accuracy_and_seconds():
    assert 95 <= expected_top1() <= 100
    assert re.search(r"^# Seconds: \d+ .* on [\w-]+, \d{4}-\d\d-\d\d", QUICKSTART.read_text(), flags=re.MULTILINE)


def expected_top1() -> float:
    """As the head of the quick start's recipe says."""
    return float(re.search(r"^# Expected: ([\d.]+) %", QUICKSTART.read_text(), flags=re.MULTILINE)[1])


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_the_quick_start_goes_the_whole_road_and_is_as_accurate_as_it_says(tmp_path):
    run = tmp_path / "a run"
    done = call("bash", ROOT / "launch" / "quickstart.sh", "--output", run, timeout=HANGS)
    log = run / "quickstart.log"
    assert done.returncode == 0, (done.stdout + (log.read_text() if log.exists() else ""))[-4000:]
    said = re.search(r"held-out top-1: ([\d.]+) % raw weights, ([\d.]+) % EMA, on 1000 images", done.stdout)
    assert said and abs(max(map(float, said.groups())) - expected_top1()) <= 1.5, done.stdout[-2000:]
    assert {path.name for path in run.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "curves.png", "ds_config.json", "evaluation.json", "log.txt",
        "metrics.jsonl", "quickstart.log", "tensorboard", "vir.safetensors", "vir_ema.safetensors"}
    assert not re.search(r"[^\n -~]", done.stdout)  # no terminal, no control characters
    assert re.search(r"^step \d+ of \d+, loss [\d.]+, .*top-1", done.stdout, flags=re.MULTILINE)
    assert "building" not in log.read_text()  # of an operator that DeepSpeed would compile


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_the_quick_start_ends_as_its_training_does_and_shows_why(tmp_path):
    run = tmp_path / "run"
    done = call("bash", ROOT / "launch" / "quickstart.sh", "--output", run, "--train.epoch", "1", timeout=HANGS)
    assert done.returncode == 2
    assert "train.epoch" in done.stdout and f"exit code 2; all that was said is in {run}" in done.stdout
