"""PyramidKV: the layers' budgets, by three rules, and what is kept under them."""

import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from windowed import Spy, best, kept, run

from nanokv import KVCache, generate_batch
from nanokv.methods.pyramidkv import PyramidKV
from nanokv.methods.snapkv import SnapKV


def past(n_layers, total, **options):
    """Return the layers' budgets beyond the window."""
    p = PyramidKV(**options)
    return [n - p.window for n in p.budgets(n_layers, total)]


def test_the_budgets_of_small_examples():
    small = {"budget": 8 + 4, "beta": 4, "window": 4}
    assert past(4, 1000, **small) == [14, 10, 6, 2]
    assert past(4, 12 + 4, **small) == [12, 10, 6, 4]  # 12, 9.33, 6.67, 4 and one slot left for the lowest below 12
    assert past(4, 13, **small) == [9, 9, 7, 7]  # 9, 8.33, 7.67, 7
    assert past(4, 12, **small) == [8, 8, 8, 8]
    assert past(1, 1000, **small) == [8] and past(2, 1000, **small) == [14, 2]
    big = {"budget": 512, "window": 32}
    exact, reference = (past(30, 8192, mode=mode, **big) for mode in ("exact", "reference"))
    assert exact[0] == 937 and exact[-1] == 24 and sum(exact) == 30 * 480  # 936 and one of the slots that rounding left
    assert reference[0] == 936 and reference[-1] == 37 and sum(reference) == 14595  # the step is rounded down
    assert past(30, 900, mode="reference", **big) == [480] * 30  # fewer than 2 * 480 tokens: uniform
    assert past(30, 960, mode="reference", **big)[0] == 928


@pytest.mark.parametrize("total, budget, want", [
    (4096, 2048, [3994, 2697, 1399, 102]),
    (1024, 512, [960, 661, 363, 64]),
    (256, 128, [192, 149, 107, 64]),
    (4096, 1024, [1024] * 4),  # the last layer would get less than the window
])  # fmt: skip
def test_the_budgets_of_kvpress(total, budget, want):
    assert PyramidKV(budget=budget, window=64, mode="kvpress").budgets(4, total) == want


# Turns red when budgets are not linear in the layer, do not fall, or do not add up.
@settings(max_examples=400, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 64), st.integers(1, 40), st.integers(0, 2000))
def test_mutation_exact_budgets_lie_on_a_line_and_add_up(budget, beta, window, L, more):
    p = PyramidKV(budget=budget, beta=beta, window=window)
    got, total, b = p.budgets(L, budget + more), budget + more, budget - p.window
    assert sum(got) == L * budget
    assert got == sorted(got, reverse=True) and got[0] <= total and got[0] <= 2 * budget
    assert got[-1] - p.window >= min(b, 1)
    if L > 1 and more:
        low = max(b / beta, min(b, 1))
        high = min(2 * b - low, total - p.window)
        line = [high - i * (2 * high - 2 * b) / (L - 1) for i in range(L)]
        assert all(-1 - 1e-9 < n - p.window - x <= 1 + 1e-9 for n, x in zip(got, line, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 64), st.integers(1, 40), st.integers(0, 2000))
def test_other_modes_stay_within_their_bound(budget, beta, window, L, more):
    for mode in ("reference", "kvpress"):
        p = PyramidKV(budget=budget, beta=beta, window=window, mode=mode)
        got = p.budgets(L, budget + more)
        assert all(p.window <= n <= budget + more for n in got) and sum(got) <= 2 * budget * L


@pytest.mark.parametrize("mode", ["exact", "reference", "kvpress"])
@pytest.mark.parametrize("T", [60, 150])
def test_the_kept_sets_equal_a_naive_computation(mode, T):
    m, text = tiny.model(n_layers=4), tiny.ids(T, batch=2)
    spy, pyramid = Spy(8, 5), PyramidKV(budget=40, beta=5, window=8, kernel=5, mode=mode)
    cache = run(m, [spy, pyramid], text)
    budgets = pyramid.budgets(4, T)
    assert len(set(budgets)) > 1 or (mode, T) == ("reference", 60)
    for i, h, b in itertools.product(range(4), (0, 1), (0, 1)):
        old, new = spy.heads[i][b, h]
        assert kept(cache, b)[i, h] == best(old, budgets[i] - 8) | new
    tiny.steps(m, cache, tiny.ids(5, batch=2))
    assert [c.counts for c in cache.layers] == [[n + 5] * 4 for n in budgets]


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_an_even_pyramid_is_snapkv(mode):
    m, text = tiny.model(n_layers=4), tiny.ids(150)
    assert kept(run(m, [PyramidKV(budget=40, beta=1, window=8, mode=mode)], text)) == kept(
        run(m, [SnapKV(budget=40, window=8)], text)
    )


@pytest.mark.parametrize("T", [1, 2, 33, 40])
def test_a_budget_that_is_never_reached_changes_no_bit(T):
    m, text = tiny.model(n_layers=3), tiny.ids(T + 5)
    full = KVCache(m)
    full.out = torch.cat([tiny.feed(m, full, text[:, :T]), tiny.steps(m, full, text[:, T:])], 1)
    for mode, budget in itertools.product(("exact", "reference", "kvpress"), (T, T + 1, 2 * T)):
        cache = KVCache(m, [PyramidKV(budget=budget, window=1, mode=mode)])
        got = torch.cat([tiny.feed(m, cache, text[:, :T]), tiny.steps(m, cache, text[:, T:])], 1)
        assert torch.equal(full.out, got)


@pytest.mark.parametrize("budget", [1, 5, 8, 9, 12])
def test_small_budgets_and_exact_prompts(budget):
    m, text = tiny.model(n_layers=4), tiny.ids(90)
    cache = KVCache(m, [PyramidKV(budget=budget, window=8)])
    assert torch.equal(tiny.feed(m, cache, text), m(text, KVCache(m)))  # the prompt is read exactly
    assert sum(c.counts[0] for c in cache.layers) == 4 * budget
    assert all(t >= set(range(90 - min(8, budget), 90)) for t in kept(cache).values())


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_chunks_do_not_change_what_is_kept(chunk):
    m, text = tiny.model(n_layers=3), tiny.ids(150)
    one, parts = KVCache(m, "pyramidkv(budget=50)"), KVCache(m, "pyramidkv(budget=50)")
    tiny.feed(m, one, text)
    tiny.feed(m, parts, text, chunk)
    assert kept(one) == kept(parts)


def test_later_prompts_stay_within_the_total():
    m = tiny.model(n_layers=4)
    cache = KVCache(m, "pyramidkv(budget=30,window=8)")
    for turn in range(3):
        tiny.feed(m, cache, tiny.ids(50, seed=turn))
        assert sum(c.counts[0] for c in cache.layers) <= 4 * 30
        counts = [c.counts[0] for c in cache.layers]
        assert counts == sorted(counts, reverse=True) and counts[-1] < 30
        tiny.steps(m, cache, tiny.ids(9, seed=turn))


def test_sequences_of_unequal_length_get_budgets_of_their_own():
    m = tiny.model(n_layers=4)
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (120, 45, 20)]
    cache = KVCache(m, "pyramidkv(budget=30,window=8)")
    next(generate_batch(m, cache, prompts, 1))
    for b, prompt in enumerate(prompts):
        alone = KVCache(m, "pyramidkv(budget=30,window=8)")
        next(generate_batch(m, alone, [prompt], 1))
        assert kept(cache, b) == kept(alone)
    rows = [[len(t) for (i, h), t in kept(cache, b).items() if h == 0] for b in range(3)]
    assert rows[0][0] > rows[1][0] > rows[2][0] == 20 and rows[1][0] > 30


def test_bytes_are_those_of_the_header():
    m = tiny.model(n_layers=4, context=1024)
    cache = run(m, "pyramidkv(budget=200)", tiny.ids(600))
    budgets = PyramidKV(budget=200).budgets(4, 600)
    assert cache.nbytes == sum(2 * (n + max(16, n // 16)) * (2 * 32 * 4 + 4) for n in budgets)
    assert cache.ledger()["total"]["payload"] == 4 * 200 * 2 * 2 * 32 * 4


def test_with_a_policy_and_a_storage():
    m = tiny.model(n_layers=4)
    cache = KVCache(m, "h2o(budget=100)+pyramidkv(budget=30)+kivi(residual=32)")
    tiny.feed(m, cache, tiny.ids(150))
    assert sum(c.counts[0] for c in cache.layers) <= 4 * 30
    for n in range(150):
        logits = tiny.steps(m, cache, tiny.ids(1, seed=n))
        assert all(c.n_live <= 100 for c in cache.layers)
    assert logits.isfinite().all()


@pytest.mark.parametrize("bad", [
    {"budget": 0}, {"beta": 0}, {"beta": 2.5}, {"window": 0}, {"kernel": 2}, {"pooling": "min"},
    {"reduce": "median"}, {"mode": "even"},
], ids=str)  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"pyramidkv: {next(iter(bad))} must be"):
        PyramidKV(**bad)
