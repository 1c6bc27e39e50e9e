"""SnapKV: what the window votes for, which entries that keeps, and that nothing else changes."""

import itertools

import pytest
import tiny
import torch
from windowed import Drop, Spy, best, give_scores, held, kept, read_exactly, run, within_budget_is_full

from nanokv import KVCache
from nanokv.method import Policy
from nanokv.methods.snapkv import SnapKV


class Look(SnapKV):
    """Note the scores."""

    def score(self, cache, q, pos):
        self.seen = super().score(cache, q, pos)
        return self.seen


ROW = [0.05, 0, 0.3, 0, 0, 0.1, 0, 0.05]


@pytest.mark.parametrize("pooling, kernel, scores, keeps", [
    ("max", 3, [0.05, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.05], {1, 2, 3}),
    ("avg", 3, [0.05 / 3, 0.35 / 3, 0.1, 0.1, 0.1 / 3, 0.1 / 3, 0.05, 0.05 / 3], {1, 2, 3}),
    ("max", 1, ROW, {0, 2, 5}),
])  # fmt: skip
def test_a_small_example(monkeypatch, pooling, kernel, scores, keeps):
    m, look = tiny.model(G=1, n_kv_heads=1, n_layers=1), Look(budget=5, window=2, kernel=kernel, pooling=pooling)
    give_scores(monkeypatch, [ROW])
    cache = run(m, [look], tiny.ids(10))
    assert torch.allclose(look.seen[0, 0, :8], torch.tensor(scores), atol=1e-7)  # one rounding of numbers below 0.4
    assert kept(cache) == {(0, 0): keeps | {8, 9}}


# Turns red when the group is reduced after pooling: then entry 2, near both heads' favourites, would score twice.
def test_mutation_the_group_is_reduced_before_pooling(monkeypatch):
    m, text = tiny.model(G=2, n_kv_heads=1, n_layers=1), tiny.ids(10)
    give_scores(monkeypatch, [[0, 0.4, 0, 0, 0, 0, 0, 0.1], [0, 0, 0, 0.4, 0, 0, 0, 0.1]])
    keeps = run(m, [SnapKV(budget=3, window=2, kernel=3)], text)
    assert kept(keeps) == {(0, 0): {0, 8, 9}}  # 0.2 for entries 0 to 4: the oldest
    keeps = run(m, [SnapKV(budget=8, window=2, kernel=3)], text)
    assert kept(keeps) == {(0, 0): {0, 1, 2, 3, 4, 6, 8, 9}}


@pytest.mark.parametrize("reduce, entry", [("mean", 1), ("sum", 1), ("max", 4)])
def test_the_reduction_over_a_group(monkeypatch, reduce, entry):
    m, text = tiny.model(G=2, n_kv_heads=1, n_layers=1), tiny.ids(10)
    give_scores(monkeypatch, [[0, 0.3, 0, 0, 0.5, 0, 0, 0], [0, 0.3, 0, 0, 0, 0, 0, 0]])
    cache = run(m, [SnapKV(budget=3, window=2, kernel=1, reduce=reduce)], text)
    assert kept(cache) == {(0, 0): {entry, 8, 9}}


def test_heads_choose_for_themselves(monkeypatch):
    m, text = tiny.model(G=2, n_kv_heads=3, n_layers=1), tiny.ids(20)
    rows = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)).tolist()
    give_scores(monkeypatch, rows)
    first = kept(run(m, [SnapKV(budget=8, window=4, kernel=3)], text))
    give_scores(monkeypatch, rows[2:] + rows[:2])
    moved = kept(run(m, [SnapKV(budget=8, window=4, kernel=3)], text))
    assert [moved[0, h] for h in range(3)] == [first[0, (h + 1) % 3] for h in range(3)]
    assert first[0, 0] != first[0, 1]


@pytest.mark.parametrize("chunk", [None, 1, 33, 199])  # 199 leaves a last part of one token
def test_the_window_scores_are_a_slice_of_dense_attention(chunk):
    m, look, seen = tiny.model(n_layers=1), Look(budget=100, window=16, kernel=1), {}

    class Dense(Policy):
        def after_part(self, cache, q, pos):
            k = cache.read()[0].repeat_interleave(3, 1).double()
            s = q.double() @ k.mT / 32**0.5
            p = s.masked_fill(torch.ones(200, 200).triu(1).bool(), -torch.inf).softmax(-1)
            seen["p"] = p[:, :, 184:, :184].sum(2).view(1, 2, 3, -1).mean(2)

    run(m, [Dense()], tiny.ids(200))
    run(m, [look], tiny.ids(200), chunk=chunk)
    assert tiny.rms(look.seen[..., :184], seen["p"]) < 1e-5  # fp32: 16 rows, logits up to 10 with an error of 1e-6
    assert not look.seen[..., 184:].any()


@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("options", [
    {},
    {"pooling": "avg", "kernel": 5},
    {"reduce": "max", "kernel": 1},
    {"reduce": "sum", "kernel": 3, "window": 1},
], ids=str)  # fmt: skip
def test_the_kept_sets_equal_a_naive_computation(G, options):
    """Equal scores are copies of one number by max-pooling, in both; other scores differ by more than fp32 rounds."""
    m = tiny.model(G=G)
    snap = SnapKV(**({"budget": 40, "window": 8} | options))
    spy = Spy(snap.window, snap.kernel, snap.pooling, snap.reduce)
    cache = run(m, [spy, snap], tiny.ids(150))
    for key, (old, new) in spy.heads.items():
        assert kept(cache)[key] == best(old, 40 - snap.window) | new
    assert len(spy.heads) == 4 and cache.layers[0].counts == [40, 40]


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 100])
def test_a_budget_that_is_never_reached_changes_no_bit(T):
    within_budget_is_full(tiny.model(), f"snapkv(budget={T})", T, 5)


@pytest.mark.parametrize("T", [1, 2, 9, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 5, 8, 9, 40])
def test_counts_window_and_prompt_logits(T, budget):
    before = read_exactly(tiny.model(), f"snapkv(budget={budget},window=8)", budget, False, T)
    assert all(tokens >= set(range(max(0, T - min(8, budget)), T)) for tokens in before.values())


def test_entries_that_were_hidden_do_not_count(monkeypatch):
    """Hidden slots, reclaimed or not, in all heads or in one, must not shift neighbours, ranks or counts."""
    m, text = tiny.model(), tiny.ids(60)
    results = []
    for least in (100, 1):
        monkeypatch.setattr("nanokv.entries.spare", lambda n, least=least: least)
        spy, snap = Spy(8, 5), SnapKV(budget=30, window=8, kernel=5)
        cache = KVCache(m, [spy, Drop(56, None, [3, 4, 50]), Drop(58, 1, [7, 8, 9, 20, 55]), snap])
        tiny.feed(m, cache, tiny.ids(25))
        tiny.steps(m, cache, text[:, 25:])
        assert all((c.counts == c.n_slots) == (least == 1) for c in cache.layers)
        tiny.feed(m, cache, tiny.ids(20, seed=5))
        for key, (old, new) in spy.heads.items():
            assert len(old) + len(new) == (77, 72)[key[1]]
            assert kept(cache)[key] == best(old, 22) | new
        results.append(kept(cache))
    assert results[0] == results[1]


def test_a_second_prompt_is_judged_by_its_own_queries():
    m = tiny.model()
    spy = Spy(8)
    cache = run(m, [spy, SnapKV(budget=30, window=8)], tiny.ids(80), steps=15)
    before = kept(cache)
    tiny.feed(m, cache, tiny.ids(9, seed=3))
    for key, tokens in kept(cache).items():
        old, new = spy.heads[key]
        assert tokens == best(old, 22) | new and new == set(range(96, 104))
        assert tokens <= before[key] | set(range(95, 104))  # what was forgotten does not come back
    tiny.feed(m, cache, tiny.ids(3, seed=4))  # shorter than the window: 3 queries vote, the newest 8 entries stay
    assert all(len(t) == 30 and t >= set(range(99, 107)) for t in kept(cache).values())


def test_queries_that_see_nothing_have_no_vote():
    m, drop = tiny.model(), Drop(100, None, list(range(97)))  # the window's first queries see no entry at all
    cache = run(m, [drop, SnapKV(budget=2, window=1)], tiny.ids(100))
    assert all(99 in t and len(t) == 2 for t in kept(cache).values())
    look = Look(budget=2, window=8)
    cache = run(m, [drop, look], tiny.ids(100))
    assert look.seen.isfinite().all() and tiny.steps(m, cache, tiny.ids(3)).isfinite().all()


def test_bytes_are_those_of_the_header():
    cache = run(tiny.model(context=1024), "snapkv(budget=300)", tiny.ids(600))
    assert held(cache) == 2 * (300 + 18) * 2 * (2 * 32 * 4 + 4)
    assert cache.ledger()["total"]["payload"] == 2 * 300 * 2 * 2 * 32 * 4


def test_the_ledger_counts_the_window_s_queries_while_a_prompt_is_read():
    m, caches = tiny.model(), []
    for spec in ("full", "snapkv(budget=40)"):
        caches.append(KVCache(m, spec))
        m(tiny.ids(60), caches[-1], "prompt")
    assert held(caches[1]) - held(caches[0]) == 2 * (6 * 32 * 32 * 4 + 32 * 8)  # layers; queries, positions


def test_with_kivi_the_same_entries_stay():
    m, text = tiny.model(), tiny.ids(100)
    a, b = (run(m, f"snapkv(budget=60){more}", text, steps=9) for more in ("", "+kivi(bits=2,residual=32)"))
    strip = [{key: {t for t in tokens if t < 100} for key, tokens in kept(c).items()} for c in (a, b)]
    assert strip[0] == strip[1] and b.layers[0].counts == [69, 69]


@pytest.mark.parametrize("bad", [
    {"budget": 0}, {"window": 0}, {"kernel": 4}, {"kernel": -1}, {"pooling": "min"}, {"reduce": "median"},
], ids=str)  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"snapkv: {next(iter(bad))} must be"):
        SnapKV(**bad)


def test_a_budget_below_the_window_keeps_the_newest():
    m = tiny.model()
    for budget, T in itertools.product((1, 3), (4, 50)):
        tokens = kept(run(m, f"snapkv(budget={budget})", tiny.ids(T)))
        assert set(map(frozenset, tokens.values())) == {frozenset(range(T - budget, T))}
