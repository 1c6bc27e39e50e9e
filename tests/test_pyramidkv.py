"""PyramidKV: the layers' budgets, how other rules differ, and what is kept under them."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv import KVCache, generate_batch
from nanokv.methods.pyramidkv import PyramidKV
from nanokv.methods.snapkv import SnapKV


def past(n_layers, total, budget, beta=20, window=32):
    """Return the layers' budgets beyond the window."""
    return [n - window for n in PyramidKV(beta).budgets(n_layers, total, budget, window)]


def authors(n_layers, total, budget, beta=20, window=32):
    """Return the same as the authors' code has it, which rounds the step."""
    b, n = budget - window, total - window
    low = b // beta
    high = 2 * b - low
    if high >= n:
        high, low = n, 2 * b - n
    step = (high - low) // (n_layers - 1)
    return [b if total < 2 * b else high - i * step for i in range(n_layers)]


def kvpress(n_layers, total, budget, beta=20, window=64):
    """Return the budgets of kvpress, which counts the window inside the slope."""
    low = budget / beta
    high = 2 * budget - low
    if high >= total - window:
        high, low = total - window, 2 * budget - (total - window)
    if not total >= high >= low >= window:
        return [budget] * n_layers
    return [round(high - i * (high - low) / (n_layers - 1)) for i in range(n_layers)]


def kept(cache, b=0):
    c = cache.config
    return {(i, h): cache.live_positions(i, h, b).tolist() for i in range(c.n_layers) for h in range(c.n_kv_heads)}


def test_the_budgets_of_small_examples():
    small = {"budget": 8 + 4, "beta": 4, "window": 4}
    assert past(4, 1000, **small) == [14, 10, 6, 2]
    assert past(4, 12 + 4, **small) == [12, 10, 6, 4]  # 12, 9.33, 6.67, 4 and one slot left for the lowest below 12
    assert past(4, 13, **small) == [9, 9, 7, 7]  # 9, 8.33, 7.67, 7
    assert past(4, 12, **small) == [8, 8, 8, 8]
    assert past(1, 1000, **small) == [8] and past(2, 1000, **small) == [14, 2]


def test_the_budgets_of_other_rules():
    exact, theirs = past(30, 8192, 512), authors(30, 8192, 512)
    assert exact[0] == 937 and exact[-1] == 24 and sum(exact) == 30 * 480  # 936 and one of the slots that rounding left
    assert theirs[0] == 936 and theirs[-1] == 37 and sum(theirs) == 14595
    assert authors(30, 900, 512) == [480] * 30 != past(30, 900, 512)  # fewer than 2 * 480 tokens: uniform
    assert kvpress(4, 4096, 2048) == [3994, 2697, 1399, 102] and kvpress(4, 256, 128) == [192, 149, 107, 64]
    assert kvpress(4, 4096, 1024) == [1024] * 4  # the last layer would get less than the window
    assert past(4, 4096, 1024, window=64)[-1] == 48


# Turns red when budgets are not linear in the layer, do not fall, or do not add up.
@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 64), st.integers(1, 40), st.integers(0, 2000))
def test_mutation_budgets_lie_on_a_line_and_add_up(budget, beta, window, L, more):
    window, total = min(window, budget), budget + more
    got, b = PyramidKV(beta).budgets(L, total, budget, window), budget - window
    assert sum(got) == L * budget
    assert got == sorted(got, reverse=True) and got[0] <= total and got[0] <= 2 * budget
    assert got[-1] - window >= min(b, 1)
    if L > 1 and more:
        low = max(b / beta, min(b, 1))
        high = min(2 * b - low, total - window)
        line = [high - i * (2 * high - 2 * b) / (L - 1) for i in range(L)]
        assert all(-1 - 1e-9 < n - window - x <= 1 + 1e-9 for n, x in zip(got, line, strict=True))


@pytest.mark.parametrize("T", [60, 150])
def test_a_layer_keeps_what_snapkv_keeps_at_its_budget(T):
    m, text = tiny.model(n_layers=4), tiny.ids(T, batch=2)
    cache = KVCache(m, "pyramidkv(budget=40,beta=5)")
    assert repr(cache.policies[0]).startswith("snapkv(budget=40, window=8")  # the authors' window
    tiny.feed(m, cache, text)
    budgets = PyramidKV(5).budgets(4, T, 40, 8)
    assert len(set(budgets)) > 1
    for i, n in enumerate(budgets):
        alone = KVCache(m, [SnapKV(budget=n, window=8)])
        tiny.feed(m, alone, text)
        assert all(kept(cache, b)[i, h] == kept(alone, b)[i, h] for h in (0, 1) for b in (0, 1))
    tiny.steps(m, cache, tiny.ids(5, batch=2))
    assert [c.counts for c in cache.layers] == [[n + 5] * 4 for n in budgets]


def test_an_even_pyramid_is_snapkv():
    m, text = tiny.model(n_layers=3), tiny.ids(150)
    caches = [KVCache(m, spec) for spec in ("pyramidkv(budget=40,beta=1,window=8)", "snapkv(budget=40,window=8)")]
    for c in caches:
        tiny.feed(m, c, text)
    assert kept(caches[0]) == kept(caches[1])


def test_later_prompts_stay_within_the_total():
    m = tiny.model(n_layers=4)
    cache = KVCache(m, "pyramidkv(budget=30,window=8)")
    for turn in range(3):
        tiny.feed(m, cache, tiny.ids(50, seed=turn))
        counts = [c.counts[0] for c in cache.layers]
        assert sum(counts) <= 4 * 30 and counts == sorted(counts, reverse=True) and counts[-1] < 30
        tiny.steps(m, cache, tiny.ids(9, seed=turn))


def test_sequences_of_unequal_length_get_budgets_of_their_own():
    m = tiny.model(n_layers=4)
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (120, 45, 20)]
    cache = KVCache(m, "pyramidkv(budget=30)")
    next(generate_batch(m, cache, prompts, 1))
    for b, prompt in enumerate(prompts):
        alone = KVCache(m, "pyramidkv(budget=30)")
        next(generate_batch(m, alone, [prompt], 1))
        assert kept(cache, b) == kept(alone)
    first = [len(kept(cache, b)[0, 0]) for b in range(3)]
    assert first[0] > first[1] > 30 > first[2] == 20


@pytest.mark.parametrize("spec", ["h2o(budget=40)+pyramidkv(beta=5)", "pyramidkv(budget=40,beta=5)+kivi(residual=32)"])
def test_over_another_policy_and_storage(spec):
    m = tiny.model(n_layers=4)
    cache = KVCache(m, spec)
    tiny.feed(m, cache, tiny.ids(150))
    counts = [c.n_live for c in cache.layers]
    assert sum(counts) == 160 and len(set(counts)) > 1
    assert tiny.steps(m, cache, tiny.ids(50)).isfinite().all()
    more = 0 if spec.startswith("h2o") else 50  # which keeps every layer at its number
    assert [c.n_live for c in cache.layers] == [n + more for n in counts]


def test_bytes_are_those_of_the_header():
    m = tiny.model(n_layers=4, context=1024)
    cache = KVCache(m, "pyramidkv(budget=200)")
    tiny.feed(m, cache, tiny.ids(600))
    budgets = PyramidKV().budgets(4, 600, 200, 8)
    rows = cache.ledger()["layers"]
    assert [row["held"] for row in rows] == [2 * (n + max(16, n // 16)) * (2 * 32 * 4 + 4) for n in budgets]
    assert sum(row["payload"] for row in rows) == 4 * 200 * 2 * 2 * 32 * 4


@pytest.mark.parametrize("beta", [0, 2.5])
def test_bad_parameters_are_refused(beta):
    with pytest.raises(ValueError, match="pyramidkv: beta must be"):
        PyramidKV(beta=beta)
