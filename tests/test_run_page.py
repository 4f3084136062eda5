"""The page of a run: what it tells, that it opens in a browser, and that nothing in a run's files can act in it."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from vir import files
from vir.errors import DataError
from vir.reports import run_page
from vir.reports.run_page import thinned, watch, write

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "report.py"
HOSTILE = "<script>document.title='broken'</script>"
BEGIN = 1_790_000_000


def line(at, said):
    return time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(BEGIN + at)) + said + "\n"


def make_run(run, steps=40, of=40, every=1, ending="done: there", **more):
    """Of 128 samples a step, 10 s for each; skipped steps at step 8 and replaced samples at step 12."""
    run.mkdir(parents=True)
    settings = {"output": str(run), "optim": {"lr": 0.003}, "data": {"train": HOSTILE}} | more
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    log = [line(-60, f"command: vir-train {HOSTILE}"), line(-59, "ranks: 1 on vm (CPU)"),
           line(-58, f"{of} steps of 128 = 2 x 64 x 1 ranks; 1 evaluations")]
    events = []
    for step in range(every, steps + 1, every):
        events.append({"kind": "train", "step": step, "time": BEGIN + 10 * step, "samples_seen": 128 * step,
                       "epoch": step / 8, "loss": 2 / step + 1 + 1e-4 * (step % 3), "lr": 0.001, "grad_norm": 0.5,
                       "total_steps": of, "images_per_second": 12.8, "images_per_second_per_device": 12.8,
                       "data_wait": 0.25, "mfu": None, "skipped": 2 * (step == 8), "bad_samples": 3 * (step >= 12)})
        log.append(line(10 * step, f"step {step}/{of} loss 1"))
        if step % 20 == 0:
            events.append({"kind": "eval", "step": step, "time": BEGIN + 10 * step + 1, "epoch": step / 8, "images": 9,
                           "top1": 50 + step / 10, "loss": 1.5, "ema_top1": 40.0, "ema_loss": 1.25})
            log.append(line(10 * step + 1, f"checkpoint {run}/checkpoints/step-{step:08d}: 4.3 MB in 0.3 s, {HOSTILE}"))
    log += [line(105, f"straggler: rank 1 on {HOSTILE}"), line(10 * steps + 2, ending)]
    (run / "log.txt").write_text("".join(log))
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def no_spikes(run):
    return [], ""


def page_of(folder, *runs, evaluations=(), explain=no_spikes, **more):
    seen = write(runs, evaluations, folder / "page.html", explain, **more)
    text = (folder / "page.html").read_text()
    data = json.loads(re.search(r'id="data">(.*)</script>', text)[1])
    return seen, text, data


def test_state_position_curves_and_events_of_a_run(tmp_path):
    (run,), text, data = page_of(tmp_path, make_run(tmp_path / "a"))
    assert (run["state"], run["last"]["step"], run["total"]) == ("done", 40, 40)
    assert run["best"]["top1"]["step"] == 40 and run["best"]["ema_top1"]["step"] == 20
    plots = {plot["title"]: plot["lines"] for plot in data["plots"]}
    assert list(plots) == ["loss", "top-1, %", "learning rate", "gradient norm", "images/s", "data wait"]  # no MFU
    assert [line["label"] for line in plots["loss"]] == ["training", "validation", "validation, EMA"]
    assert plots["loss"][0]["points"][7] == [8, 1, pytest.approx(70 / 3600, rel=1e-5), pytest.approx(1.2502)]
    assert plots["loss"][2]["points"] == [[20, 2.5, 0.0530556, 1.25], [40, 5, 0.108611, 1.25]]
    assert data["reload"] is None
    marks = {}
    for kind, step, epoch, hours, said in data["runs"][0]["marks"]:
        marks.setdefault(data["kinds"][kind], []).append((step, epoch, said))
    assert marks["checkpoint"][1][0] == pytest.approx(20.1) and marks["checkpoint"][0][0] == 40
    assert marks["straggler"] == [(10.5, 1.3125, f"straggler: rank 1 on {HOSTILE}")]
    assert marks["skipped steps"] == [(8, 1, "2 in steps 8 to 8")]
    assert marks["replaced samples"] == [(12, 1.5, "3 in steps 12 to 12")]
    assert "optim.lr: None -&gt; 0.003" in text and "ranks: 1 on vm (CPU)" in text


def test_a_run_that_was_killed_in_its_last_evaluation_is_not_done(tmp_path):
    (run,), _, _ = page_of(tmp_path, make_run(tmp_path / "a", ending="data wait 20 %"))
    assert run["last"]["step"] == run["total"] == 40 and run["state"] == "failed, or killed"


def test_replaced_samples_are_counted_anew_at_each_start(tmp_path):
    folder = make_run(tmp_path / "a", steps=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    again = next(at for at, text in enumerate(lines) if '"step": 15' in text)
    lines.insert(again, json.dumps({"kind": "start", "step": 15, "time": BEGIN + 149, "epoch": 14 / 8}))
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in lines))
    marks = page_of(tmp_path, folder)[2]["runs"][0]["marks"]
    assert [mark[4] for mark in marks if mark[0] == list(run_page.KINDS).index("replaced samples")] == [
        "3 in steps 15 to 15", "3 in steps 12 to 12"]


@pytest.mark.parametrize("ending, state", [("stopped by SIGTERM; the same command continues", "stopped"),
                                           ("data wait 20 %", "failed, or killed")])
def test_a_run_that_has_ended_early(tmp_path, ending, state):
    (run,), text, data = page_of(tmp_path, make_run(tmp_path / "a", steps=30, ending=ending), reload=5)
    assert run["state"] == state and f"<i>{state}</i>" in text
    assert data["reload"] == 5  # it may be continued


def test_a_run_that_holds_its_lock_is_running_and_tells_the_time_that_is_left(tmp_path):
    folder = make_run(tmp_path / "a", steps=30, ending="data wait 20 %")
    held = files.lock(folder / ".lock")
    try:
        (run,), text, _ = page_of(tmp_path, folder)
    finally:
        files.unlock(held)
    assert run["state"] == "running" and "0:01:40 left" in text
    assert files.is_locked(folder / ".lock") is False and files.is_locked(folder / "none") is False


def test_the_log_of_another_time_zone_is_put_beside_the_metrics(tmp_path):
    folder = make_run(tmp_path / "a")
    before = page_of(tmp_path, folder)[2]["runs"][0]["marks"]
    moved = re.sub(r"^(\S+) (\d\d)", lambda match: f"{match[1]} {(int(match[2]) + 5) % 24:02d}",
                   (folder / "log.txt").read_text(), flags=re.MULTILINE)
    (folder / "log.txt").write_text(moved)
    assert page_of(tmp_path, folder)[2]["runs"][0]["marks"] == before


def test_of_several_runs_the_settings_that_differ_are_told(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", optim={"lr": 0.004})]
    _, text, data = page_of(tmp_path, *runs)
    assert "optim.lr: 0.003 -&gt; 0.004" in text and "Settings other than a’s" in text
    assert [line["run"] for line in data["plots"][0]["lines"]] == [0, 0, 0, 1, 1, 1]


def test_what_a_run_lacks_or_has_cut_off(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("output: bare\n")
    (run,), text, data = page_of(tmp_path, bare)
    assert run["state"] == "not begun" and data["plots"] == [] and "step 0 of –" in text
    cut = make_run(tmp_path / "cut", steps=39)
    whole = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(whole[:-30])
    assert page_of(tmp_path, cut)[0][0]["last"]["step"] == 38
    nan = make_run(tmp_path / "nan")
    (nan / "metrics.jsonl").write_text(re.sub(r'loss": [\d.]+', 'loss": null', whole))
    (run,), text, data = page_of(tmp_path, nan)
    assert "no finite loss" in text and data["plots"][0]["title"] == "top-1, %"


def test_many_events_make_a_small_page_that_keeps_the_extremes(tmp_path):
    folder = make_run(tmp_path / "a", steps=100_000, of=100_000)
    with (folder / "log.txt").open("a") as log:
        log.writelines(line(10 * step, "straggler: rank 1") for step in range(1000))
    _, text, data = page_of(tmp_path, folder)
    assert len(text) < 1_500_000
    first = data["plots"][0]["lines"][0]["points"]
    assert first[0][3] == pytest.approx(3.0001) and len(first) <= 1602
    assert sum(data["kinds"][mark[0]] == "straggler" for mark in data["runs"][0]["marks"]) <= 300
    assert "1001 straggler" in text and "before</details>" in re.sub(r"\s*\n\s*", "", text)


def test_thinning_keeps_the_least_the_greatest_and_gaps():
    values = np.sin(np.arange(50_000.0))
    values[31_234], values[40_000], values[77] = 9, -9, math.nan
    kept = thinned(values, 100)
    assert {0, 77, 31_234, 40_000, 49_999} <= set(kept) and len(kept) <= 100 * 2 + 3 and kept == sorted(set(kept))
    assert thinned(values[:200], 100) == list(range(200))


def test_evaluations_and_worst_classes(tmp_path):
    folder = make_run(tmp_path / "a")
    result = {"weights": HOSTILE, "top1": 76.5432, "images": 50_000, "step": 40, "ema": True, "loss": None}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "other.json").write_text("[1, 2]")
    (folder / "other.csv").write_text("class,images,top1,taken_for\nfish,1,2,bird\n")
    (folder / "torn.json").write_text('{"weights": ')
    (tmp_path / "two.json").write_text(json.dumps([result, result | {"top1": HOSTILE}]))
    (tmp_path / "classes.csv").write_text("class,images,top1,taken_for,taken_for_images\n" + "".join(
        f"{HOSTILE} {number},50,{90 - number},tench,4\n" for number in range(40)))
    (tmp_path / "broken.json").write_text('{"weights": ')
    (tmp_path / "empty.csv").write_text("")
    given = [tmp_path / name for name in ("two.json", "classes.csv", "broken.json", "empty.csv")]
    _, text, _ = page_of(tmp_path, folder, evaluations=given)
    assert text.count("<td>76.54") == 2 and text.count("<td>50,000") == 3 and "other." not in text
    assert "The worst 15 of 40 classes" in text
    assert [int(number) for number in re.findall(r"&lt;/script&gt; (\d+)<td>50", text)] == list(range(39, 24, -1))
    assert re.search(r"broken.json cannot be read: Expecting value.*; evaluate again<", text)
    assert re.search(r"torn.json cannot be read: .*; it is left out, as another program", text)
    assert "empty.csv is no result of vir-evaluate; give a file of its --json or --per-class" in text


def test_spikes_are_explained_where_the_tool_can(tmp_path):
    folder = make_run(tmp_path / "a")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"step": 30,', '"step": 30, "x": 1,').replace(
        '"loss": 1.0666666666666667', '"loss": 99.0'))
    step = {"step": 30, "samples": 128, "classes": 10, "shards": 4, "most": {"class": HOSTILE, "samples": 60},
            "keys": ["k1", "k2", "k3", "k4"]}
    _, text, _ = page_of(tmp_path, folder, explain=lambda run: ([{"name": "loss", "last": 30, "steps": [step]}],
                                                                f"vir-explain: {HOSTILE}"))
    assert "loss 99.0000" in text and "k1, k2, k3, …" in text and "(60)" in text and "k4" not in text


# ---- in a browser


def browse(page, width=1400, fragment=""):
    """The page as a browser has made it, after a look that its console is silent."""
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},2000", "--virtual-time-budget=3000",
         "--dump-dom", f"{page.as_uri()}{fragment}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_a_browser_draws_the_page_at_two_widths_and_nothing_hostile_acts(tmp_path):
    folder = make_run(tmp_path / f"a{HOSTILE.replace('/', '')}")
    (folder / "result.json").write_text(json.dumps({"weights": HOSTILE, "top1": HOSTILE, "images": HOSTILE}))
    text = page_of(tmp_path, folder, explain=lambda run: ([], HOSTILE))[1]
    assert "<script>" not in text.replace(r"\u003cscript\u003e", "") and not re.search(r"(src|href)=|url\(", text)
    for width in (1400, 480):
        made = browse(tmp_path / "page.html", width)
        assert "<title>broken" not in made
        plots = re.findall(r'<svg height="200" viewBox="0 0 (\d+) 200">', made)
        assert len(plots) == 7 and 250 < int(plots[0]) < width
        assert len(re.findall(r'<path d="M[\d.]+ [\d.]+L[^"]*" fill="none"', made)) == 9
        assert made.count("<circle") >= 5 and "NaN" not in re.sub(r"<script.*?</script>", "", made, flags=re.DOTALL)


def test_the_console_of_a_broken_page_is_heard(tmp_path):
    write([make_run(tmp_path / "a")], [], tmp_path / "page.html", no_spikes)
    page = tmp_path / "page.html"
    page.write_text(page.read_text().replace("const draw = ", "const drew = "))
    with pytest.raises(AssertionError, match="draw is not defined"):
        browse(page)


def test_dragging_zooms_all_plots_and_the_address_keeps_it(tmp_path):
    page = tmp_path / "page.html"
    write([make_run(tmp_path / "a")], [], page, no_spikes)
    text = page.read_text()
    nonce = re.search(r'<script nonce="([^"]+)"', text)[1]
    drag = """const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
      const send = (name, x) => svg.dispatchEvent(new PointerEvent(name, {pointerId: 1, clientX: box.left + x,
        clientY: box.top + 50}));
      send("pointerdown", 100); send("pointermove", 200);
      document.body.dataset.tip = find("tip").textContent;
      send("pointerup", 200); document.body.dataset.address = location.hash;"""
    page.write_text(text.replace("</body>", f'<script nonce="{nonce}">{drag}</script></body>'))
    made = browse(page, fragment="#axis=step")
    assert re.search(r'data-tip="step \d+\.\d+\ntraining 1\.\d+\nvalidation 1\.5\nvalidation, EMA 1\.25"', made)
    first, last = map(float, re.search(r'data-address="#axis=step&amp;from=([\d.]+)&amp;to=([\d.]+)"', made).groups())
    assert 0 < first < last < 40
    page.write_text(text)
    made = browse(page, fragment=f"#axis=step&from={first}&to={last}")
    ticks = [[float(at) for at in re.findall(r'y="195" text-anchor="middle">([\d.]+)', plot)]
             for plot in re.findall(r'<svg height="200".*?</rect></svg>', made, re.DOTALL)]
    assert len(ticks) == 7 and all(first <= at <= last for plot in ticks for at in plot)


# ---- the tool


def test_the_tool_refuses_what_is_no_run_and_what_cannot_be_written(tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    run, empty, page = make_run(tmp_path / "a"), tmp_path / "empty", tmp_path / "x.html"
    empty.mkdir()
    torn = make_run(tmp_path / "torn")
    (torn / "config.yaml").write_text("a: [")
    for words, code, said in [
            ([tmp_path / "none", "--output", page], 3, "none is not there; give the --output of"),
            ([empty, "--output", page], 3, "empty is no run folder; give the --output of a training run"),
            ([torn, "--output", page], 3, "config.yaml cannot be read: while parsing"),
            ([run, "--output", tmp_path / "no" / "x.html"], 2, "x.html cannot be written: No such file"),
            ([run, "--output", empty], 2, "empty cannot be written: it is a folder"),
            ([run, "--output", page, "--evaluation", "none.json"], 2, "none.json: there is no such"),
            ([run, "--output", page, "--watch", "0"], 2, "--watch is 0.0; it must be at least 0.1")]:
        assert main(list(map(str, words))) == code
        assert said in capsys.readouterr().err
    assert not page.exists()
    assert main([str(run), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"


def test_watching_renews_the_page_until_the_run_is_done(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", steps=30, ending="data wait 20 %")
    output, states = folder / "page.html", []  # in the run folder, which so changes by itself

    def go_on(seconds):
        text = output.read_text()
        states.append((re.search(r"<i>(.*?)</i>", text)[1], re.search(r'"reload": ([^,}]+)', text)[1],
                       output.stat().st_mtime_ns))
        if len(states) == 2:
            shutil.rmtree(folder)
            make_run(folder)
            output.write_text(text)
        assert len(states) < 4

    monkeypatch.setattr(run_page.time, "sleep", go_on)
    watch([folder], [], output, no_spikes, 0.5)
    assert [state[:2] for state in states] == [("failed, or killed", "0.5")] * 2 + [("done", "null")]
    assert states[0][2] == states[1][2]  # nothing had changed


def test_a_watch_that_is_ended_leaves_a_page_that_no_longer_renews_itself(tmp_path):
    run, output = make_run(tmp_path / "a", steps=30, ending="data wait 20 %"), tmp_path / "page.html"
    watching = subprocess.Popen([sys.executable, TOOL, run, "--output", output, "--watch", "0.2"], cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while not (output.exists() and '"reload": 0.2' in output.read_text()):
            assert time.monotonic() < until and watching.poll() is None
            time.sleep(0.1)
        watching.send_signal(signal.SIGTERM)
        assert watching.wait(60) == 128 + signal.SIGTERM
    finally:
        watching.kill()
        watching.wait()
    assert '"reload": null' in output.read_text()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []


def test_a_page_that_the_disk_refuses(tmp_path):
    with pytest.raises(DataError, match="cannot write .*page.html: .*No such file or directory.*free some space"):
        write([make_run(tmp_path / "a")], [], tmp_path / "gone" / "page.html", no_spikes)
