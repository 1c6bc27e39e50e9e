"""The commands of the harness: killed runs, bytes against tokens, speed, its pictures, and another checkout."""

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from rich.console import Console
from test_generate import write_model

from nanokv import KVCache
from nanokv.eval import __main__ as command
from nanokv.eval import against, growth, run, score, speed, tasks

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def m():
    return tiny.model(context=1024)


# a run that is killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    words = ["the", "cache", "is", "an", "object", "and", "a", "list", "of", "rows", "which", "may", "be", "cut"]
    (path / "a.txt").write_text(" ".join(words[i * i % 13] for i in range(3000)))
    return path


def start(folder, out, *more):
    args = ["quick", "--model", folder, "--text", folder / "a.txt", "--jobs", "2", "--out", out, *more]
    args += ["--methods", "window", "kivi", "snapkv", "h2o", "knorm"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "nanokv.eval", *map(str, args)]
    return subprocess.Popen(call, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_nothing_behind_and_goes_on_to_the_same_results(folder, tmp_path):
    cut, whole = tmp_path / "cut.jsonl", tmp_path / "whole.jsonl"
    child = start(folder, cut)
    while not run.read(cut):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    others = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = len(run.read(cut))
    gone, left = psutil.wait_procs(others, timeout=20)
    assert others and not left
    for path in (cut, whole):
        child = start(folder, path)
        assert child.wait(120) == 0, child.stderr.read()

    def of(path):
        return {r["key"]: {k: v for k, v in r.items() if k != "peak"} for r in run.read(path)}

    assert of(cut) == of(whole) and before < len(of(whole)) == 11 * (2 + 2 * 2)
    tables = [p.with_suffix(".md").read_text().split("Largest process") for p in (cut, whole)]
    assert tables[0][0] == tables[1][0] and tables[0][1].split("\n", 1)[1] == tables[1][1].split("\n", 1)[1]


@pytest.mark.slow
def test_the_full_cache_answers_nearly_always(smollm2):
    """Or the model would be measured and not the cache. The questions are those of `full`."""
    (model, tokenizer), found = smollm2, []
    for unit in command.plan("full", model.config):
        if unit.task != "text":
            work = run.work(unit, [run.Setting("full", modes=("aware",))], model, tokenizer, tasks.corpus(tokenizer))
            found += [r["exact"] for r in work]
    assert len(found) == 42 and statistics.fmean(found) > 0.8


@pytest.mark.slow
def test_seeing_the_question_does_not_harm_snapkv(smollm2):
    model, tokenizer = smollm2
    ask = score.Question(model, tasks.samples("passkey", tokenizer, tasks.corpus(tokenizer), 512, 6))
    for share in (0.5, 0.25):
        nll = {}
        for mode in run.MODES:
            spec = run.Setting("snapkv", "budget", share).spec(ask.length(mode))
            nll[mode] = statistics.fmean(r["nll"] for r in ask(spec, mode))
        assert nll["aware"] < nll["agnostic"] + 0.1


@pytest.mark.slow
def test_the_first_window_is_as_the_other_tool_has_it(smollm2):
    """By kvpress snapkv at half the entries raises the NLL over eight windows by 0.036; the standard error is 0.014."""
    model, tokenizer = smollm2
    ids = tasks.corpus(tokenizer)
    starts = tasks.windows(len(ids), 2048, 256, 8)
    rise = []
    for i in (0, 2, 4, 6):
        text = score.Text(model, torch.tensor([ids[starts[i] : starts[i] + 2304]]), 2048)
        rise.append(text("snapkv(budget=1024,window=64,kernel=5,pooling='avg')")[0]["rise"])
    assert abs(statistics.fmean(rise) - 0.036) < 3 * 0.014


# bytes against tokens


def test_bytes_grow_with_the_text_or_do_not(m, tmp_path, capsys, monkeypatch):
    full, window = (growth.measure(m, s, tiny.ids(160), 100) for s in ("full", "window(budget=40)"))
    assert [n for n, _ in full] == [0, *range(8, 61, 8), 60]
    assert full[-1][1] > full[0][1] and window[-1][1] <= window[0][1] * 1.1 < full[0][1]
    cache = KVCache(m, "full")
    tiny.feed(m, cache, tiny.ids(100))
    assert full[0][1] == cache.nbytes
    monkeypatch.setattr("weights.load", lambda *a, **k: (m, None))
    monkeypatch.setattr("nanokv.eval.compare.prose", lambda tokenizer, n: tiny.ids(n))
    out = str(tmp_path / "a")
    assert command.main(["bytes", "full", "window(budget=40)", "--context", "100", "--tokens", "30", "--out", out]) == 0
    assert all(5000 < (tmp_path / f"a.{kind}").stat().st_size < 1e6 for kind in ("png", "svg"))
    assert json.loads((tmp_path / "a.json").read_text())["bytes"]["full"][0] == [0, full[0][1]]
    capsys.readouterr()
    for wrong in (["nonsense"], ["full", "--context", "2000"], ["full", "--tokens", "0"]):
        assert command.main(["bytes", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# speed


def test_speed_writes_draws_and_reads_what_it_measured(m, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("weights.load", lambda *a, **k: (m, None))
    file, stem = tmp_path / "s.json", tmp_path / "p"
    small = ["--contexts", "20", "40", "--rounds", "1", "--peer"]
    assert command.main(["speed", "window(budget=8)", *small, "--json", str(file), "--plot", str(stem)]) == 0
    (found,) = json.loads(file.read_text())
    names = [(r["context"], r["name"]) for r in found["records"]]
    assert names == [(n, s) for n in (20, 40) for s in ("full", "window(budget=8)")]  # the full cache is always there
    assert all(r["used"] == "torch" and r["prefill_s"] > 0 for r in found["records"])
    made = [tmp_path / f"p{end}" for end in (".png", ".svg", "-first.png", "-first.svg")]
    assert all(5000 < p.stat().st_size < 1e6 for p in made)
    made[0].unlink()
    assert command.main(["speed", "--read", str(file), "--plot", str(stem)]) == 0 and made[0].exists()
    capsys.readouterr()
    file.write_text("{}")
    for wrong in (["--read", str(file), "--plot", str(stem)], ["--contexts", "1020"], ["--contexts", "0"],
                  ["--read", str(tmp_path / "none")]):  # fmt: skip
        assert command.main(["speed", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_speed_says_that_triton_needs_a_gpu(m, capsys, monkeypatch):
    monkeypatch.setattr("weights.load", lambda *a, **k: (m, None))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command.main(["speed", "--backend", "torch", "triton", "--contexts", "20"]) == 2
    assert "only torch can be measured" in capsys.readouterr().err


def test_speed_takes_each_method_on_each_backend(m):
    lesson = tiny.model(context=1024)
    field = speed.contestants(m, ["full", "window(budget=8)"], [], ["torch", "auto"], lesson)
    assert [c.model for c in field] == [lesson, m, lesson, m]
    assert [c.name for c in field] == [f"{s} [{b}]" for s in ("full", "window(budget=8)") for b in ("torch", "auto")]
    records = speed.measure(field, [20], rounds=1, repeats=1, vocab=101)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(speed.table(records, 1000, 1e9, "full [torch]", "title"))
    assert "full [auto]" in console.export_text()  # not taken for a style


# another checkout


def test_two_checkouts_take_turns(folder, tmp_path, capsys):
    out = tmp_path / "a.json"
    options = ["--model", str(folder), "--contexts", "20", "--threads", "1", "--json", str(out)]
    few = ["--prompts", "1", "--rounds", "3", "--steps", "2"]
    assert command.main(["against", str(ROOT), "window(budget=8)|full", *options, *few]) == 0
    (found,) = json.loads(out.read_text())
    assert found["spec"] == "window(budget=8)" and found["context"] == 20
    assert [len(found[k]) for k in ("prompt", "step")] == [1, 3]
    assert all(s > 0 for k in ("prompt", "step") for pair in found[k] for s in pair)
    assert "window(budget=8)" in capsys.readouterr().out
    for wrong, what in (
        (["against", str(tmp_path)], "is not a checkout"),
        (["against", str(ROOT), "--rounds", "0"], "at least 1"),
        (["against", str(ROOT), "full|nonsense", *options], "unknown method 'nonsense'"),
    ):
        assert command.main(wrong) == 2
        err = capsys.readouterr().err.strip()
        assert what in err and len(err.splitlines()) == 1


def test_turns_alternate_and_their_ratios_have_an_interval():
    asked = []

    class Stub:
        def __init__(self, seconds):
            self.seconds = seconds

        def ask(self, **order):
            asked.append(self.seconds)
            return [self.seconds] * order["steps"]

    found = against.turns([Stub(3.0), Stub(1.0)], 4, [{"steps": 2}] * 2)
    assert found == [[3.0, 1.0]] * 4 and asked == [1.0, 3.0, 3.0, 1.0] * 2
    assert against.cells(found) == ["3000.0", "1000.0", "3.00 (3.00 to 3.00)"]
    middle, low, high = against.interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert middle == 3.0 and 1.0 <= low < middle < high <= 100.0
