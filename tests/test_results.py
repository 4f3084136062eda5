"""tools/render_results.py: every marked table in docs/ is what its file of results gives."""

import importlib
import json
import re
import shutil

import pytest

from support.launchers import ROOT
from vir.benchmarks import tables
from vir.errors import DataError

DOCS = ROOT / "docs"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("render_results").main


@pytest.fixture
def page(tmp_path):
    """A copy of docs/benchmarks.md with its results."""
    shutil.copytree(DOCS / "results", tmp_path / "results")
    return shutil.copy(DOCS / "benchmarks.md", tmp_path / "benchmarks.md")


def test_the_tables_of_the_docs_are_those_of_the_results(main, capsys):
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_file_is_shown_and_every_table_has_a_file():
    text = "".join((DOCS / page).read_text() for page in ("benchmarks.md", "planning.md"))
    shown = re.findall(r"<!-- table: (\S+) -->\n\|", text)
    assert sorted(shown) == sorted(f"results/{path.name}" for path in (DOCS / "results").iterdir())
    by_hand = re.sub(r"<!-- table: .*?<!-- end -->", "", (DOCS / "benchmarks.md").read_text(), flags=re.DOTALL)
    assert not re.search(r"^\|---", by_hand, re.MULTILINE)
    for file in shown:
        content = json.loads((DOCS / file).read_text())
        assert content["title"] and content["command"] and content["machine"], file


def test_a_table_that_differs_is_told_and_made_anew(main, page, capsys):
    before = page.read_text()
    page.write_text(before.replace("| sdpa | 74.6 (", "| sdpa | 14.6 (").replace("0.9 in 2-D", "0.8 in 2-D"))
    assert main([str(page), "--check"]) == 1
    told = capsys.readouterr().err
    assert "results/2026-11-23-operator.json is not what the file gives" in told and "model.json" not in told
    assert "| sdpa | 14.6 (" in page.read_text()  # --check writes nothing
    assert main([str(page)]) == 0 and main([str(page), "--check"]) == 0
    assert page.read_text() == before.replace("0.9 in 2-D", "0.8 in 2-D")  # what is not marked stays


def test_a_result_that_changes_changes_its_table(main, page):
    file = page.parent / "results" / "2026-11-23-model.json"
    content = json.loads(file.read_text())
    vit, ours = content["results"][:2]
    assert (vit["row"], ours["row"]) == ("vit", "auto")
    ours["ms"] = vit["ms"] / 4
    file.write_text(json.dumps(content))
    assert main([str(page)]) == 0
    assert re.search(r"^\| 224 \| 16 \| fp32 \| training \| auto \| 149\d \(.*\| 10.73 \| 4.00 \|", page.read_text(),
                     re.MULTILINE)


def test_a_file_of_the_training_tool_gives_its_tables(tmp_path):
    loop = {"ms": 11.0, "trainer_cpu": 0.01, "loader_cpu": 0.004, "data_wait": 0.5}
    turn = {"loops": {"ours": loop, "torch": {**loop, "ms": 10.0, "loader_cpu": 0.0, "data_wait": None}}}
    content = {"runs": [{
        "ranks": 2, "zero": "zero2_fp32", "global_batch_size": 16, "micro_batch_size": 4, "loops": {"turns": [turn]},
        "checkpoints": {"bytes": 5e6, "median_seconds": 1.5, "seconds": [1.5], "images_per_second": 100,
                        "epoch_seconds": 7200, "share": 0.01}}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    loops, checkpoints = tables.render(tmp_path / "x.json").split("\n\n")
    assert loops.splitlines()[2:] == ["| 2 | zero2_fp32 | 16 of 4 | ours | 11 | 90.91 |  | 10 | 4 | 50 |",
                                      "| 2 |  | 16 of 4 | bare PyTorch | 10 | 100 | 10 | 10 | 0 |  |"]
    assert checkpoints.splitlines()[2] == "| 2 | 5.00 | 1.5 | 100 | 2.00 | 1 |"


RATES = {"machine": "a CPU; today", "columns": ["workers", "reader", "×"],
         "rows": [["1", "ours", "1.20"], ["2", "ours", "1.40"], ["2", "theirs", "1.00"]]}


@pytest.mark.parametrize("target, said", [("", ""), ("≥ 1.4", "≥ 1.4"), ("≥ 1.5", "≥ 1.5 (missed)"), ("≤ 1.4", "≤ 1.4"),
                                          ("≤ 1.3", "≤ 1.3 (missed)")])
def test_ratios_of_several_files_stand_in_one_table(target, said, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    beside = [{"what": "reading", "peer": "theirs", "target": target, "file": "rates.json", "column": "×",
               "row": {"workers": "2", "reader": "ours"}}]
    (tmp_path / "x.json").write_text(json.dumps({"beside": beside}))
    assert tables.render(tmp_path / "x.json").splitlines()[2] == f"| reading | theirs | 1.40 | {said} | a CPU; today |"


@pytest.mark.parametrize("row, column, found", [
    ({"reader": "ours"}, "×", "2 rows"), ({"reader": "other"}, "×", "0 rows"),
    ({"workers": "2", "reader": "ours"}, "ratio", "1 rows"),
])
def test_a_ratio_that_is_not_in_its_file_is_told(row, column, found, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    beside = [{"what": "reading", "peer": "theirs", "target": "", "file": "rates.json", "column": column, "row": row}]
    (tmp_path / "x.json").write_text(json.dumps({"beside": beside}))
    with pytest.raises(DataError, match=f"rates.json has {found} of .*; name one row and the column of its ratio, not "
                                        f"'{column}'"):
        tables.render(tmp_path / "x.json")


@pytest.mark.parametrize("text, message", [
    ("<!-- table: x.json -->\n", "has a table that is not marked well"),
    ("<!-- table: x.json -->\n<!-- table: x.json -->\n<!-- end -->\n", "does not close the table of x.json"),
    ("<!-- table: no.json -->\n<!-- end -->\n", "no.json: No such file or directory; put the file there"),
    ("<!-- table: bad.json -->\n<!-- end -->\n", "bad.json is no JSON"),
    ("<!-- table: none.json -->\n<!-- end -->\n", "none.json has no results that make a table"),
    ("<!-- table: self.json -->\n<!-- end -->\n", "self.json has no results that make a table"),
    ("<!-- table: empty.json -->\n<!-- end -->\n", "empty.json has no results that make a table .*'results'"),
])
def test_what_gives_no_table_is_told(text, message, tmp_path):
    (tmp_path / "x.json").write_text('{"columns": ["a"], "rows": [["1"]]}')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "none.json").write_text('{"start": {"turns": []}}')
    (tmp_path / "self.json").write_text('{"machine": "", "beside": [{"file": "self.json", "column": "", "row": {}}]}')
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(DataError, match=message):
        tables.with_tables(tmp_path / "page.md")


def test_a_page_that_is_missing_ends_with_the_code_of_missing_data(main, tmp_path, capsys):
    assert main([str(tmp_path / "no.md")]) == 3
    assert "no.md: No such file or directory; name a Markdown file" in capsys.readouterr().err
