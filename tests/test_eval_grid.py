"""The harness: what it finds on caches whose quality is known, and that results survive whatever happens to a run."""

import json
import random
import statistics

import pytest
import tiny
import torch

from nanokv import KVCache
from nanokv.eval import __main__ as command
from nanokv.eval import run, score, summary, tasks


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
    return dict(score.text(m, specs, tiny.ids(n), context, **options))


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
    return dict(score.text(m, [spec], tiny.ids(260, seed=seed), 200))[spec]["kl"]


def test_order_chunks_and_company_change_nothing(m):
    specs = ["snapkv(budget=50)", "kivi(residual=32)", "h2o(budget=50)", "full", "streamingllm(budget=50)"]
    one, other = of(m, specs), of(m, specs[::-1])
    assert one == other
    assert of(m, specs[:1])[specs[0]] == one[specs[0]]
    specs = ["snapkv(budget=50)", "window(budget=50)", "h2o(budget=50)", "tova(budget=50)", "streamingllm(budget=50)"]
    parts, single = of(m, specs), of(m, specs, chunk=1)  # token by token, as users do
    for s in specs:
        assert abs(single[s]["kl"] - parts[s]["kl"]) < 1e-5 * parts[s]["kl"], s


@pytest.mark.parametrize(
    "spec", ["snapkv(budget=50)", "kivi(residual=32)", "h2o(budget=60)", "streamingllm(budget=60)"]
)
@pytest.mark.parametrize("windows", [(), (24, None)])
def test_sharing_the_prompt_is_reading_it(spec, windows):
    m, ids = tiny.model(context=1024, windows=windows), tiny.ids(300)
    mine, alone = score.Prompt(m, ids, chunk=64).read(spec), KVCache(m, spec)
    score.prefill(m, alone, ids)
    a, b = m(tiny.ids(1), mine), m(tiny.ids(1), alone)
    assert tiny.rms(a, b) < 1e-5
    assert score.held(mine) == score.held(alone)


def test_bytes_are_those_of_the_ledger(m):
    r = of(m, ["kivi(residual=32)"])["kivi(residual=32)"]
    assert r["held"] == r["payload"] + r["overhead"] and r["full"] == 2 * 2 * 299 * 2 * 32 * 4


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_sample_holds_its_answer_at_its_depth_and_has_its_length(task, corpus):
    tok = Letters()
    for s in tasks.samples(task, tok, corpus, 900, 4):
        assert len(s.context) + len(s.question) + len(s.answer) == 900
        code = s.answer[-5:]
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
    out = {mode: r for spec, mode, r in score.question(m, ["full"], s)}
    whole = torch.tensor([s.context + s.question + s.answer])
    logp = m(whole, KVCache(m))[0].log_softmax(-1)[-len(s.answer) - 1 : -1]
    want = -logp.gather(-1, torch.tensor(s.answer)[:, None]).mean()
    for r in out.values():
        assert abs(r["nll"] - float(want)) < 1e-4
        assert r["exact"] == (logp.argmax(-1).tolist() == s.answer)


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
    monkeypatch.setattr("weights.load", lambda *a, **k: (m, None))
    units = [run.Unit("text", 150, i, 2, 40) for i in range(2)] + [run.Unit("passkey", 300, i, 2) for i in range(2)]
    chosen = [run.Setting("full"), run.Setting("window", "budget", 0.5), run.Setting("kivi", "bits", 4)]
    monkeypatch.setattr(command, "plan", lambda *_: (chosen, units))
    return Pool, units


def results(path):
    return sorted(json.dumps(r, sort_keys=True) for r in run.read(path))


def test_an_interrupted_run_goes_on_and_ends_with_the_same_table(inline, tmp_path, capsys):
    Pool, units = inline
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert command.main(["full", "--out", str(whole)]) == 0
    table = whole.with_suffix(".md").read_text()
    Pool.fails = [units[2]]
    assert command.main(["full", "--out", str(cut)]) == 130
    assert "goes on there" in capsys.readouterr().err
    Pool.fails = []
    cut.write_bytes(cut.read_bytes() + b'{"key": "brok')  # killed while it wrote
    assert command.main(["full", "--out", str(cut)]) == 0
    assert cut.with_suffix(".md").read_text() == table
    assert results(cut) == results(whole) and len(results(cut)) == 3 * (2 + 2 * 2)
    before = cut.read_bytes()
    assert command.main(["full", "--out", str(cut)]) == 0 and cut.read_bytes() == before  # nothing is done twice


def test_results_of_another_experiment_are_not_mixed_in(inline, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert command.main(["quick", "--out", str(path)]) == 0
    assert command.main(["quick", "--out", str(path), "--dtype", "bf16"]) == 2
    err = capsys.readouterr().err
    assert "not bf16" in err and "Traceback" not in err
    path.write_text("hello\n")
    assert command.main(["quick", "--out", str(path)]) == 2 and path.read_text() == "hello\n"


def test_plots_and_tables_come_from_the_results(inline, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert command.main(["full", "--out", str(path)]) == 0
    assert command.main(["plot", "--out", str(path)]) == 0
    for kind in ("png", "svg"):
        assert all((tmp_path / f"a-{n}.{kind}").stat().st_size > 5000 for n in ("quality", "retrieval", "depth-full"))
    assert command.main(["plot", "--out", str(tmp_path / "none.jsonl")]) == 2


def test_every_method_has_a_place_in_the_grid(m):
    from nanokv.methods import available

    chosen = run.settings(m.config, [0.5], [4], [0.5])
    assert {s.method for s in chosen} == {i.name for i in available()}
    for s in chosen:
        KVCache(m, s.spec(200))


def test_intervals_and_the_frontier():
    assert summary.mean([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1.96 / 3**0.5))
    low, high = summary.wilson(6, 12)
    assert low == pytest.approx(0.254, abs=1e-3) and high == pytest.approx(0.746, abs=1e-3)
    assert summary.frontier([(1, 5), (2, 3), (3, 4), (2.5, 1)]) == [(1, 5), (2, 3), (2.5, 1)]
