"""The harness: what it finds on caches whose quality is known, and that results survive whatever happens to a run."""

import json
import random
import statistics

import pytest
import tiny
import torch

from nanokv import KVCache
from nanokv.eval import __main__ as command
from nanokv.eval import plots, run, score, summary, tasks


class Letters:
    """A tokenizer for the tiny model: one token per letter."""

    def encode(self, text):
        return [ord(c) % 101 for c in text]


@pytest.fixture(scope="module")
def m():
    return tiny.model(context=1024)


@pytest.fixture(scope="module")
def corpus():
    return tiny.ids(3000)[0].tolist()


def of(m, specs, n=300, context=200, **options):
    text = score.Text(m, tiny.ids(n), context, **options)
    return {spec: text(spec)[0] for spec in specs}


def test_the_full_cache_is_exactly_itself_and_one_entry_is_the_worst(m):
    out = of(m, ["full", "streamingllm(budget=100,reindex=False)", "window(budget=1)"])
    full = out["full"]
    assert full["kl"] == full["rise"] == 0 and full["same"] == 1 and full["parted"] is None
    assert max(out, key=lambda s: out[s]["kl"]) == "window(budget=1)"
    assert out["window(budget=1)"]["same"] < 0.7 and out["window(budget=1)"]["kl"] > 0.5


def test_more_budget_is_better_on_average(m):
    specs = [f"streamingllm(budget={b},reindex=False)" for b in (10, 40, 100, 160, 199)]
    kl = [statistics.fmean(score_of(m, s, seed) for seed in range(4)) for s in specs]
    assert kl == sorted(kl, reverse=True)


def score_of(m, spec, seed):
    return score.Text(m, tiny.ids(260, seed=seed), 200)(spec)[0]["kl"]


def test_order_and_company_change_nothing(m):
    specs = ["snapkv(budget=50)", "kivi(residual=32)", "h2o(budget=50)", "full", "streamingllm(budget=50)"]
    one, other = of(m, specs), of(m, specs[::-1])
    assert one == other
    assert of(m, specs[:1])[specs[0]] == one[specs[0]]


@pytest.mark.parametrize(
    "spec", ["snapkv(budget=50)", "kivi(residual=32)", "h2o(budget=60)", "streamingllm(budget=60)",
             "expected_attention(budget=50)", "keydiff(budget=50)", "h2o(budget=60)+kivi(residual=32)",
             "cake(budget=50)", "adakv(budget=50)", "pca(rank=16)", "snapkv(budget=60)+pca(rank=16)+kivi(group=16)",
        "h2o(budget=60)+xquant(group=32)"]
)  # fmt: skip
@pytest.mark.parametrize("windows", [(), (24, None)])
def test_sharing_the_prompt_is_reading_it(spec, windows):
    m, ids = tiny.model(context=1024, windows=windows), tiny.ids(300)
    mine, alone = score.Prompt(m, ids, chunk=64).read(spec), KVCache(m, spec)
    score.prefill(m, alone, ids)
    a, b = m(tiny.ids(1), mine), m(tiny.ids(1), alone)
    assert tiny.rms(a, b) < 1e-5
    assert score.held(mine) == score.held(alone)


@pytest.mark.parametrize("name", ["expected_attention", "h2o", "keepkv", "cake"])
def test_methods_that_take_notes_share_the_reading_at_any_budget(m, name):
    prompt, more = score.Prompt(m, tiny.ids(300), chunk=64), tiny.ids(9, seed=5)
    for budget, end in ((80, None), (40, more), (120, None)):
        spec = f"{name}(budget={budget})"
        mine, alone = prompt.read(spec, end), KVCache(m, spec)
        score.prefill(m, alone, torch.cat([tiny.ids(300)] + ([end] if end is not None else []), 1))
        assert all(torch.equal(mine.live_positions(i, h), alone.live_positions(i, h)) for i in (0, 1) for h in (0, 1))
        assert tiny.rms(m(tiny.ids(1), mine), m(tiny.ids(1), alone)) < 1e-5 and score.held(mine) == score.held(alone)


@pytest.mark.parametrize(
    "spec", ["full", "h2o(budget=50)", "adakv(budget=50)", "kivi(residual=32)", "random(budget=50)"]
)
def test_a_batch_scores_as_its_windows_alone(m, spec):
    ids = torch.cat([tiny.ids(260, seed=s) for s in range(3)])
    for one, other in zip(
        score.Text(m, ids, 200)(spec), (score.Text(m, row[None], 200)(spec)[0] for row in ids), strict=True
    ):
        assert one["same"] == other["same"] and one["parted"] == other["parted"]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6) and one["nll"] == pytest.approx(
            other["nll"], rel=1e-4
        )
        if spec != "adakv(budget=50)":  # whose heads share a layer's budget differently in every text
            assert one["held"] == other["held"] and one["full"] == other["full"]


def test_bytes_are_those_of_the_ledger(m):
    r = of(m, ["kivi(residual=32)"])["kivi(residual=32)"]
    assert r["held"] == pytest.approx(r["payload"] + r["overhead"], abs=2)
    assert r["held_start"] < r["held"] < r["held_end"]
    token = 2 * 2 * 2 * 32 * 4  # bytes of a full cache per token: keys and values, layers, KV heads, D, fp32
    assert r["full"] == pytest.approx(token * statistics.fmean([200, *range(216, 299, 16), 299]), rel=1e-6)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_sample_holds_its_answer_at_its_depth_and_has_its_length(task, corpus):
    tok = Letters()
    for s in tasks.samples(task, tok, corpus, 900, 4):
        assert len(s.context) + len(s.question) + len(s.answer) == 900
        code, scored = s.answer[-5:], [t for t, counts in zip(s.answer, s.scored, strict=True) if counts]
        assert len(scored) == (10 if task == "multivalue" else 5) and set(scored) <= set(tok.encode("0123456789"))
        at = [i for i in range(len(s.context)) if s.context[i : i + 5] == code]
        assert at and (task in ("multivalue", "tracking", "recall") or abs(at[0] / 900 - s.depth) < 0.25)
    again = tasks.samples(task, tok, corpus, 900, 4)
    assert [s.context for s in again] == [s.context for s in tasks.samples(task, tok, corpus, 900, 4)]


def test_the_passkey_is_the_one_that_its_seed_gives(corpus):
    rng = random.Random(900)
    want = str(rng.randrange(10000, 99999))
    assert tasks.samples("passkey", Letters(), corpus, 900, 3)[0].answer == Letters().encode(want)


def test_both_modes_score_what_the_full_cache_says(m, corpus):
    s = tasks.samples("passkey", Letters(), corpus, 400, 3)[1]
    ask = score.Question(m, [s])
    out = {mode: ask("full", mode)[0] for mode in run.MODES}
    whole = torch.tensor([s.context + s.question + s.answer])
    logp = m(whole, KVCache(m))[0].log_softmax(-1)[-len(s.answer) - 1 : -1]
    want = -logp.gather(-1, torch.tensor(s.answer)[:, None]).mean()
    for r in out.values():
        assert abs(r["nll"] - float(want)) < 1e-4
        assert r["exact"] == (logp.argmax(-1).tolist() == s.answer)


def test_words_between_two_codes_are_read_and_not_scored(m, corpus):
    (s,) = tasks.samples("multivalue", Letters(), corpus, 500, 1)
    (r,) = score.Question(m, [s])("full", "aware")
    logp = m(torch.tensor([s.context + s.question + s.answer]), KVCache(m))[0].log_softmax(-1)[-len(s.answer) - 1 : -1]
    at = torch.tensor(s.scored)
    assert abs(r["nll"] + float(logp[range(len(s.answer)), s.answer][at].mean())) < 1e-4
    assert r["right"] == float((logp.argmax(-1) == torch.tensor(s.answer))[at].float().mean())


def test_a_window_keeps_the_answers_in_it_and_no_others(m, corpus):
    """A cache of the newest half finds as many answers as it keeps."""
    found = []
    for s in tasks.samples("passkey", Letters(), corpus, 1000, 4):
        cache = score.Prompt(m, torch.tensor([s.context])).read("window(budget=300)")
        kept = set(cache.live_positions(0, 0).tolist())
        at = next(j for j in range(len(s.context)) if s.context[j : j + 5] == s.answer)
        found.append(at in kept)
        assert found[-1] == (at >= len(s.context) - 300)
    assert set(found) == {True, False}


def test_windows_are_spread_evenly_and_a_short_text_is_refused():
    assert tasks.windows(1000, 80, 20, 4) == [0, 300, 600, 900]
    with pytest.raises(ValueError, match="fewer than"):
        tasks.windows(99, 80, 20, 4)
    with pytest.raises(ValueError, match="windows need"):  # which would score the same tokens twice
        tasks.windows(150, 80, 20, 4)


def test_a_text_file_replaces_the_documentation(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    assert tasks.corpus(Letters(), str(path)) == [97, 98, 99]
    assert len(tasks.corpus(Letters())) == tasks.LIMIT


# a run


@pytest.fixture
def inline(m, corpus, monkeypatch):
    """Run units in this process, on the tiny model."""

    class Pool:
        _processes = {}
        fails = []

        def __init__(self, *args):
            pass

        def submit(self, f, unit, todo):
            from concurrent.futures import Future

            out = Future()
            try:
                if self.fails and unit == self.fails[0]:
                    raise KeyboardInterrupt
                out.set_result(f(unit, todo, m, Letters(), corpus))
            except KeyboardInterrupt as e:
                out.set_exception(e)
            return out

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(run, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr("weights.load", lambda *a, **k: (m, Letters()))
    monkeypatch.setattr(run, "PARTS", 2)
    units = run.units("text", 150, 2, 40, batch=1) + run.units("passkey", 300, 2)
    chosen = [run.Setting("full"), run.Setting("window", "budget", 0.5), run.Setting("kivi", "bits", 4)]
    monkeypatch.setattr(command, "plan", lambda *_: dict.fromkeys(units, chosen))
    return Pool, units


def results(path):
    return sorted(json.dumps({k: v for k, v in r.items() if k != "peak"}, sort_keys=True) for r in run.read(path))


def table_of(path):
    return path.with_suffix(".md").read_text().split("Largest process")[0]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_table(inline, tmp_path, capsys):
    Pool, units = inline
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert command.main(["full", "--out", str(whole)]) == 0
    Pool.fails = [units[2]]
    assert command.main(["full", "--out", str(cut)]) == 130
    assert "goes on there" in capsys.readouterr().err
    Pool.fails = []
    cut.write_bytes(cut.read_bytes() + b'{"key": "brok')  # killed while it wrote
    assert command.main(["full", "--out", str(cut)]) == 0
    assert table_of(cut) == table_of(whole)
    assert results(cut) == results(whole) and len(results(cut)) == 3 * (2 + 2 * 2)
    before = cut.read_bytes()
    assert command.main(["full", "--out", str(cut)]) == 0 and cut.read_bytes() == before  # nothing is done twice


def refused(capsys, *args):
    assert command.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval: error: ") and len(err.splitlines()) == 1
    return err


def test_results_of_another_experiment_are_not_mixed_in(inline, tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.jsonl"
    assert command.main(["quick", "--out", str(path)]) == 0
    capsys.readouterr()
    assert "not bf16" in refused(capsys, "quick", "--out", str(path), "--dtype", "bf16")
    monkeypatch.setattr(run, "code", lambda: "another")  # as after a change of a method's file
    assert "with other code" in refused(capsys, "quick", "--out", str(path))
    path.write_text("hello\n")
    assert "not a results file" in refused(capsys, "quick", "--out", str(path)) and path.read_text() == "hello\n"


def test_the_hash_of_the_code_is_that_of_its_files(tmp_path, monkeypatch):
    for name in ("eval/run.py", "methods/a.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "eval/run.py"))
    before = run.code()
    assert before == run.code()
    (tmp_path / "methods/a.py").write_text("2")
    assert run.code() != before


def test_a_setting_that_fails_is_written_down_and_ends_nothing(inline, tmp_path, capsys, monkeypatch):
    from nanokv.methods.window import Window

    path, act = tmp_path / "a.jsonl", Window.after_prompt

    def broken(self, cache):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(Window, "after_prompt", broken)
    assert command.main(["full", "--out", str(path)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-2:] == [
        f"failed: window 50% on {t} tokens: RuntimeError: no room" for t in ("passkey, 300", "text, 150")
    ]
    assert (
        "kivi bits=4" in path.with_suffix(".md").read_text() and "window 50" not in path.with_suffix(".md").read_text()
    )
    monkeypatch.setattr(Window, "after_prompt", act)
    assert command.main(["full", "--out", str(path)]) == 0  # it is tried again, and nothing else is
    assert "window 50%" in path.with_suffix(".md").read_text() and len(run.read(path)) == 3 * (2 + 2 * 2)


def test_what_does_not_fit_is_refused_in_one_line(inline, m, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(command, "plan", lambda *_: {u: [run.Setting("full")] for u in run.units("text", 1000, 1, 40)})
    assert "1040 tokens, this model's context is 1024" in refused(capsys, "full", *out)
    monkeypatch.setattr(command, "plan", lambda *_: {u: [run.Setting("full")] for u in run.units("text", 100, 2, 40)})
    short = tmp_path / "short.txt"
    short.write_text("x" * 120)
    assert f"{short} is too short: the text has 120 tokens, fewer than the 140" in refused(
        capsys, "full", *out, "--text", str(short)
    )
    short.write_bytes(b"\xff" * 500)
    assert "not UTF-8" in refused(capsys, "full", *out, "--text", str(short))
    for wrong in (["--tasks", "nonsense"], ["--methods", "nonsense"], ["--jobs", "0"], ["--text", "/none"]):
        assert wrong[1] in refused(capsys, "full", *out, *wrong) or wrong[0] == "--jobs"
    twice = [run.Setting("window", "budget", 0.5), run.Setting("window", "budget", 0.5000000001)]
    monkeypatch.setattr(command, "plan", lambda *_: dict.fromkeys(run.units("text", 100, 2, 40), twice))
    assert "two settings are called 'window 50%'" in refused(capsys, "full", *out)


def test_a_setting_must_suit_the_shortest_and_the_longest_prompt(m, corpus, capsys):
    chosen = [
        run.Setting("full"),
        run.Setting("streamingllm", "budget", 0.0101),
    ]  # 3 entries of 300 are fewer than sinks
    grid = dict.fromkeys(run.units("text", 500, 1, 10) + run.units("passkey", 300, 1), chosen)
    assert all(s == chosen[:1] for s in run.check(m, Letters(), grid, corpus).values())
    assert "left out: streamingllm 1.01% at 300 tokens" in capsys.readouterr().err


def test_tasks_are_chosen_by_name(inline, tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.jsonl"
    assert "recall needs more than 300 tokens" in refused(capsys, "full", "--out", str(path), "--tasks", "recall")
    chosen = [run.Setting("full"), run.Setting("window", "budget", 0.5), run.Setting("knorm", "budget", 0.5)]
    monkeypatch.setattr(command, "plan", lambda *_: dict.fromkeys(run.units("passkey", 900, 2), chosen))
    assert command.main(["full", "--out", str(path), "--tasks", "recall", "--methods", "window"]) == 0
    found = run.read(path)
    assert {r["task"] for r in found} == {"recall"} and {r["setting"] for r in found} == {"full", "window 50%"}


def test_budgets_are_shares_of_what_is_compressed_and_labels_tell_them_apart():
    half = run.Setting("window", "budget", 0.5, "n_sink=4,last={past_sinks}", "other")
    assert half.spec(201) == "window(budget=100,n_sink=4,last=96)" and half.label == "other 50%"
    assert run.Setting("window", "budget", 1 - 0.9).spec(100) == "window(budget=10)"
    labels = {run.Setting("window", "budget", b).label for b in (0.12, 0.124, 0.125, 1 - 0.9)}
    assert len(labels) == 4 and "window 10%" in labels


def test_plots_and_tables_come_from_the_results(inline, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert command.main(["full", "--out", str(path)]) == 0
    assert command.main(["plot", "--out", str(path)]) == 0
    names = ("quality", "retrieval", "retrieval-aware", "depth-agnostic", "depth-aware")
    for kind in ("png", "svg"):
        assert all(5000 < (tmp_path / f"a-{n}.{kind}").stat().st_size < 1e6 for n in names)
    assert command.main(["plot", "--out", str(tmp_path / "none.jsonl")]) == 2
    text = path.with_suffix(".md").read_text()
    assert "passkey 300, unseen" in text and " %)" in text  # an interval behind each count
    assert command.main(["plot", "--out", str(path), "--against", "full"]) == 0
    assert "exclude 0" not in text and "exclude 0" in path.with_suffix(".md").read_text()
    assert command.main(["plot", "--out", str(path), "--against", "fool"]) == 2
    assert command.main(["full", "--out", str(path), "--against", "full"]) == 2


def test_differences_are_taken_window_by_window():
    def records(setting, kl, nll):
        unit, asked = run.Unit("text", 64, (0, 1, 2), 3, 8), run.Unit("passkey", 64, (0, 1), 2)
        out = [{"key": unit.key(i, setting), "setting": setting, "kl": x, "rise": 2 * x} for i, x in enumerate(kl)]
        return out + [{"key": asked.key(i, setting, "aware"), "setting": setting, "mode": "aware", "nll": x}
                      for i, x in enumerate(nll)]  # fmt: skip

    found = records("a 50%", [1.0, 5.0, 9.0], [1, 2]) + records("b 50%", [1.1, 5.2, 9.3], [2, 1])
    found += records("b 25%", [9.0], [9])
    _, (row,) = summary.against(found, "a")  # b 25% has none to be compared with
    # differences 0.1, 0.2, 0.3: 0.2 ± 4.303 * 0.1 / sqrt(3), where the means' own intervals are 40 times as wide
    assert row == ["b 50%", "a 50%", "+0.200 ± 0.248", "+0.400 ± 0.497", "-", "+0.000 ± 12.706"]
    _, rows = summary.against(found, "a 50%")
    assert [r[:3] for r in rows] == [["b 25%", "a 50%", "+8.000"], ["b 50%", "a 50%", "+0.200 ± 0.248"]]
    found[3]["error"] = "failed"
    steady = records("c 50%", [2.0, 6.0, 10.1], [])
    _, rows = summary.against(found + steady, "a")
    assert rows[-1][:3] == ["c 50%", "a 50%", "+1.033 ± 0.143 *"]
    _, rows = summary.against(found + records("d 50%", [1.0, 5.0, 9.0], []), "a")
    assert rows[-1][2] == "+0.000 ± 0.000"  # equal, and no star for it
    for base in ("z", "a 50", ""):
        with pytest.raises(ValueError, match="nothing can be compared with"):
            summary.against(found, base)
    with pytest.raises(ValueError, match="nothing can be compared with 'a'"):
        summary.against(records("a 50%", [1.0], []), "a")


def test_a_loss_below_the_full_caches_is_commented_on():
    def rise(*values):
        one = {"setting": "a", "task": "text", "held": 10, "full": 100, "overhead": 1, "held_start": 8, "held_end": 12}
        return summary.cells(summary.summarise([one | {"rise": r, "kl": 0.1, "same": 1.0} for r in values])[0])[4]

    assert rise(-0.5, -0.3) == "-0.400 ± 1.271 (below full: looks ahead?)"
    assert "looks" not in rise(-0.01, -0.002) + rise(-0.5, 0.1) + rise(0.5, 0.3)  # rounding, chance, loss


def test_retrieval_is_drawn_over_the_bytes_of_retrieval():
    text = {"setting": "a", "task": "text", "held": 10, "full": 100, "overhead": 1, "held_start": 8, "held_end": 12}
    text |= {"rise": 0.0, "kl": 0.1, "same": 1.0}
    asked = {"setting": "a", "task": "passkey", "mode": "agnostic", "exact": True, "nll": 0.1, "held": 30, "full": 100}
    (row,) = summary.summarise([text, asked])
    assert row["held"] == 0.1 and row["agnostic_held"] == 0.3 and "aware_held" not in row


def test_every_method_has_a_place_in_the_grid(m):
    from nanokv.methods import available

    chosen = run.settings(m.config, [0.5], [4], [0.5])
    assert {s.method for s in chosen} == {i.name for i in available()}
    for s in chosen:
        KVCache(m, s.spec(200))


def test_intervals_and_the_frontier():
    assert summary.mean([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert summary.t975(30) == 2.042 and summary.t975(40) == pytest.approx(2.021, abs=2e-3)
    assert summary.t975(120) == pytest.approx(1.980, abs=2e-3)
    low, high = summary.wilson(6, 12)
    assert low == pytest.approx(0.254, abs=1e-3) and high == pytest.approx(0.746, abs=1e-3)
    assert summary.count(6, 12) == "6/12 (25-75 %)"
    assert plots.frontier([(1, 5), (2, 3), (3, 4), (2.5, 1)]) == [(1, 5), (2, 3), (2.5, 1)]
