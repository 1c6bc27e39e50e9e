"""CAKE: preferences, shares in whole entries, the cascade, and what goes in a decode step."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv import KVCache, generate_batch
from nanokv.method import Policy
from nanokv.methods.cake import CAKE, allot


def prefer(rows, gamma=200.0, unread=0, **parameters):
    """Return preference and indicator of attention given as W rows over prefix keys; window keys get the rest.

    `unread` rows of padding stand before them, as where another sequence's prompt is longer.
    """
    p = torch.tensor(rows)  # (W, prefix)
    W, n = p.shape
    p = torch.cat([p, (1 - p.sum(1, keepdim=True)), torch.zeros(W, W - 1)], 1)
    p = torch.cat([torch.zeros(unread, n + W), p])
    pos = torch.cat([torch.full((unread,), -1), torch.arange(n, n + W)])[None]
    columns, place = {}, torch.arange(n + W).view(1, 1, -1)
    cache = SimpleNamespace(
        B=1, config=SimpleNamespace(n_kv_heads=1), notes={}, set_column=columns.__setitem__,
        between=lambda first, last: (place >= first) & (place < n + W - last),
        observed=lambda n: (torch.zeros(1, 1, W + unread, 8), pos), probs=lambda q, pos: p[None, None],
    )  # fmt: skip
    CAKE(window=W, gamma=gamma, **parameters).after_prompt(cache)
    return cache.notes["preference"][0], columns["indicator"][0, 0, :n]


def jefferson(weights, total, caps, floor):
    """Hand out slots one by one to the largest weight / (slots + 1), the earlier layer first."""
    out = [min(floor, cap) for cap in caps]
    while sum(out) < min(total, sum(caps)):
        open_ = [i for i in range(len(out)) if out[i] < caps[i]]
        out[max(open_, key=lambda i: (weights[i] / (out[i] + 1), -i))] += 1
    return out


def fed(m, spec, text, chunk=None):
    cache = KVCache(m, spec)
    tiny.feed(m, cache, text, chunk)
    return cache


def kept(cache, b=0):
    c = cache.config
    return [[cache.live_positions(i, h, b).tolist() for h in range(c.n_kv_heads)] for i in range(c.n_layers)]


def test_preference_of_two_small_layers():
    a, _ = prefer([[0.6, 0.2], [0.4, 0.4]])
    b, _ = prefer([[0.7, 0.1], [0.6, 0.1]])
    # entropies 1.3614 and 1.0167, variances 0.04 and 0.005
    assert a == pytest.approx(0.054457, rel=1e-4) and b == pytest.approx(0.005083, rel=1e-3)
    assert a / (a + b) == pytest.approx(0.9146, abs=1e-4)
    assert allot([a, b], 10, [100, 100], 0) == [10, 0]  # 9.146 and 0.854
    assert allot([a, b], 10, [100, 100], 1) == [9, 1]
    half, _ = prefer([[0.6, 0.2], [0.4, 0.4]], tau1=2.0, tau2=0.5)
    assert half == pytest.approx(1.3614**0.5 * 0.04**2, rel=1e-4)
    assert prefer([[0.5, 0.3], [0.5, 0.3]])[0] == 0  # attention that never moves
    assert prefer([[0.6, 0.2], [0.4, 0.4]], unread=3)[0] == pytest.approx(a)


def test_shares_of_a_small_cascade():
    assert [allot([3, 1, 4][:n], 24, [99] * n, 0) for n in (1, 2, 3)] == [[24], [18, 6], [9, 3, 12]]


def test_a_key_that_varies_beats_a_steady_one():
    e = [4.3, 0.1, 0.0, 0.2]  # mean .3 .1 0 .2, variance .02 0 0 0
    rows = [[0.4, 0.1, 0.0, 0.2], [0.2, 0.1, 0.0, 0.2]]
    want = [sum(e[max(0, j - 2) : j + 3]) / 5 for j in range(4)]
    assert prefer(rows)[1].tolist() == pytest.approx(want, abs=1e-5)  # fp32 variances times 200
    assert prefer(rows, unread=2)[1].tolist() == pytest.approx(want, abs=1e-5)
    assert prefer(rows, gamma=0.0)[1].tolist() == pytest.approx([0.4 / 5, 0.6 / 5, 0.6 / 5, 0.3 / 5])


layers = st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-9, 1e3)), st.integers(0, 60)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(layers, st.integers(0, 200), st.integers(0, 9))
def test_shares_are_exact_fair_and_never_grow_when_a_layer_joins(layers, total, floor):
    weights, caps = [w for w, _ in layers], [c for _, c in layers]
    floor = min(floor, total // len(layers))
    got = allot(weights, total, caps, floor)
    assert sum(got) == min(total, sum(caps))
    assert all(min(floor, c) <= n <= c for n, c in zip(got, caps, strict=True))
    assert got == allot([w * 2.0**-20 for w in weights], total, caps, floor)
    if any(weights):
        assert got == jefferson([w / max(weights) for w in weights], total, caps, floor)
    for n in range(1, len(layers)):
        before = allot(weights[:n], total, caps[:n], floor)
        if any(weights[:n]):
            assert all(b >= a for b, a in zip(before, got[:n], strict=True))


class OneShot(CAKE):
    """The twin that keeps all layers whole until the last one has been read."""

    def after_layer(self, cache, i, x, pos):
        if i == cache.config.n_layers - 1:
            super().after_layer(cache, i, x, pos)
        return x, pos


class Look(Policy):
    """Note what the last queries of the prompt, and those of steps, attend to, per layer."""

    def __init__(self, window):
        self.observes, self.seen = window, {}

    def after_prompt(self, cache):
        self.seen[cache.layer] = cache.probs(*cache.observed(self.observes))[0].double()

    def after_step(self, cache, q, pos):
        self.seen[cache.layer] = cache.probs(q, pos)[0].double()


def oracle(m, text, budget, W, gamma, tau1, tau2, floor):
    """Return, per layer, the budget and the tokens each KV head keeps of a prompt, from the definitions in fp64."""
    look = Look(W)
    fed(m, [look], text)
    T, G, L, scores, weights = text.shape[1], m.config.group, m.config.n_layers, [], []
    for layer in range(L):
        p = look.seen[layer][:, :, : T - W]  # (H, W, T - W)
        mean = p.sum(1) / W
        var = (p - mean[:, None]).square().sum(1) / (W - 1)
        weights.append(float(-(p * (p + 1e-10).log()).sum()) ** (1 / tau1) * float(var.sum()) ** (1 / tau2))
        e = mean + gamma * var
        e = torch.stack([e[:, max(0, j - 2) : j + 3].sum(1) / 5 for j in range(T - W)], 1)  # (H, T - W)
        scores.append(e.view(-1, G, T - W).mean(1))
    budgets = jefferson(weights, (budget - W) * L, [T - W] * L, floor)
    tail = list(range(T - W, T))
    kept = [
        [sorted(sorted(range(T - W), key=lambda j, s=s: (-float(s[j]), j))[:b]) + tail for s in score]
        for score, b in zip(scores, budgets, strict=True)
    ]
    return budgets, kept


# Turns red when entropy, variance, shares or indicator are changed, or when the cascade keeps something else than a cut
# of all layers at once would.
@pytest.mark.parametrize("parameters", [{}, {"tau1": 0.05, "tau2": 0.05}, {"tau1": 2.0, "gamma": 3.0}, {"floor": 0}])
@pytest.mark.parametrize("plan", [CAKE, OneShot])
def test_mutation_budgets_and_kept_entries_equal_the_definition(parameters, plan):
    m, text = tiny.model(n_layers=4, seed=3), tiny.ids(150)
    full = {"gamma": 200.0, "tau1": 1.0, "tau2": 1.0, "floor": 4} | parameters
    cache = fed(m, [plan(budget=50, window=16, **full)], text)
    budgets, tokens = oracle(m, text, 50, 16, **full)
    assert [c.notes["budget"] for c in cache.layers] == [[b + 16] * 2 for b in budgets]
    assert sum(budgets) == 4 * 34 and len(set(budgets)) > 1
    assert kept(cache) == tokens
    if parameters.get("tau1") == 0.05:
        assert max(budgets) == 150 - 16 or min(budgets) == 4  # a cap or the floor binds


@pytest.mark.parametrize("chunk", [None, 33])
def test_the_cascade_only_shrinks_layers_and_bounds_the_whole(chunk):
    m, T, past, stages = tiny.model(n_layers=5, seed=2), 150, 20, []

    class Watched(CAKE):
        def cut(self, layers):
            super().cut(layers)
            stages.append([c.n_live - self.window for c in layers])

    fed(m, [Watched(budget=16 + past, window=16, floor=2)], tiny.ids(T), chunk)
    total = past * 5
    for n, stage in enumerate(stages, 1):
        assert sum(stage) == min(total, n * (T - 16))
        if n > 1:
            assert all(b <= a for a, b in zip(stages[n - 2], stage[:-1], strict=True))


def test_no_temperature_gives_every_layer_the_same():
    cache = fed(tiny.model(n_layers=3), [CAKE(budget=40, window=16, tau1=math.inf, tau2=math.inf)], tiny.ids(100))
    assert {c.n_live for c in cache.layers} == {40}


@pytest.mark.parametrize("T", [1, 7, 16, 17, 39, 40])
def test_within_the_budget_nothing_changes_bit_by_bit(T):
    m, text = tiny.model(), tiny.ids(T + 60)
    full, cache = fed(m, "full", text[:, :T]), fed(m, "cake(budget=40,window=16)", text[:, :T])
    for a, b in zip(cache.layers, full.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.read(), b.read(), strict=True))
    assert cache.ahead() == 41 - T  # the budget has room for 40 - T more, and the next query still sees 41
    want, got = tiny.steps(m, full, text[:, T:]), tiny.steps(m, cache, text[:, T:])
    assert torch.equal(got[:, : 41 - T], want[:, : 41 - T])
    assert tiny.rms(got, want) > 1e-3 and {c.n_live for c in cache.layers} == {40}


def test_a_step_forgets_what_its_query_cares_least_for():
    m, text, W, look = tiny.model(n_layers=3, seed=1), tiny.ids(140), 8, Look(8)
    cache = fed(m, [look, CAKE(budget=30, window=W, floor=4)], text[:, :100])
    sizes = [c.n_live for c in cache.layers]
    assert sum(sizes) == 90 and len(set(sizes)) > 1
    for t in range(100, 140):
        before = [[head + [t] for head in layer] for layer in kept(cache)]
        m(text[:, t : t + 1], cache)
        assert [c.n_live for c in cache.layers] == sizes
        for i in range(3):
            for h in (0, 1):
                line = look.seen[i][3 * h : 3 * h + 3, 0].mean(0)
                line = line[line > 0].tolist()  # it is 0 in hidden slots
                old = line[:-W]
                pooled = [sum(old[max(0, j - 2) : j + 3]) / 5 for j in range(len(old))]
                # of equals the newer goes; fp32 sums may put near equals the other way
                gone = (set(before[i][h]) - set(kept(cache)[i][h])).pop()
                j = before[i][h].index(gone)
                assert len(line) == len(before[i][h]) and j < len(old) and pooled[j] <= min(pooled) * (1 + 1e-5)


def test_the_ledger_holds_nothing_but_entries_and_their_tokens():
    m = tiny.model(n_layers=3, dtype=torch.bfloat16)
    cache = fed(m, [CAKE(budget=30, window=8, floor=4)], tiny.ids(100), 33)
    assert sum(c.n_live for c in cache.layers) == 90
    for c, row in zip(cache.layers, cache.ledger()["layers"], strict=True):
        n = c.notes["budget"][0]
        assert row["held"] == (n + max(16, n // 16)) * 2 * (2 * 32 * 2 + 4)
        assert row["payload"] == n * 2 * 2 * 32 * 2 and row["columns"] == n * 2 * 4
        assert set(c.slots.data) == {"token"}


@pytest.mark.parametrize("policy", ["", "h2o(budget=60)+"])
@pytest.mark.parametrize("storage", ["full", "kivi(bits=8,residual=32)", "pca(rank=24,least=30)"])
def test_storages_pack_when_the_last_layer_has_been_read(policy, storage):
    m, spec = tiny.model(n_layers=3), policy + "cake(budget=40,window=16)"
    cache, plain = fed(m, f"{spec}+{storage}", tiny.ids(120), 50), fed(m, spec, tiny.ids(120), 50)
    assert kept(cache) == kept(plain)
    tiny.steps(m, cache, tiny.ids(50))
    assert sum(c.n_live for c in cache.layers) == 3 * 40


def test_a_second_prompt_shares_the_same_total():
    m = tiny.model(n_layers=3)
    cache = KVCache(m, [CAKE(budget=40, window=16)])
    for turn in range(3):
        tiny.feed(m, cache, tiny.ids((70, 9, 70)[turn], seed=turn), 30)
        assert sum(c.n_live for c in cache.layers) == 120
        tiny.steps(m, cache, tiny.ids(9, seed=turn))
        assert sum(c.n_live for c in cache.layers) == 120


def test_sequences_of_a_batch_have_their_own_budgets():
    m = tiny.model(n_layers=3)
    turns = [([tiny.ids(n, seed=n)[0].tolist() for n in lengths]) for lengths in ((90, 61, 12), (50, 0, 9))]
    batch, ones = KVCache(m, "cake(budget=30,window=8)"), [KVCache(m, "cake(budget=30,window=8)") for _ in range(3)]
    for prompts in turns:  # the second sequence has no second turn, and keeps its budgets
        together = list(zip(*generate_batch(m, batch, prompts, 20), strict=True))
        for b, prompt in enumerate(prompts):
            if prompt:
                assert [t for (t,) in generate_batch(m, ones[b], [prompt], 20)] == list(together[b])
            assert [c.notes["budget"] for c in ones[b].layers] == [
                c.notes["budget"][2 * b : 2 * b + 2] for c in batch.layers
            ]


BAD = {"budget": 32, "window": 1, "gamma": math.inf, "tau1": 0.001, "tau2": -1.0, "floor": -1}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters_are_refused(name):
    with pytest.raises(ValueError, match=f"cake: {name} must be"):
        CAKE(**{name: BAD[name]})
