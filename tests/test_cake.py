"""CAKE: preferences, shares in whole entries, the cascade, and what goes in a decode step."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv import KVCache, generate, generate_batch
from nanokv.attention import pool_neighbours, reference
from nanokv.cache import Policy
from nanokv.methods.cake import CAKE, allot


def prefer(rows, gamma=200.0, **parameters):
    """Return preference and indicator of attention given as W rows over prefix keys; window keys get the rest."""
    p = torch.tensor(rows)  # (W, prefix)
    W, n = p.shape
    p = torch.cat([p, (1 - p.sum(1, keepdim=True)), torch.zeros(W, W - 1)], 1)
    columns, place = {}, torch.arange(n + W).view(1, 1, -1)
    cache = SimpleNamespace(
        B=1, config=SimpleNamespace(n_kv_heads=1), notes={},
        between=lambda first, last: (place >= first) & (place < n + W - last),
        observed=lambda n: (torch.zeros(1, 1, W, 8), torch.arange(n, n + W)[None]), probs=lambda q, pos: p[None, None],
        column=lambda name: None, set_column=columns.__setitem__,
    )  # fmt: skip
    CAKE(window=W, gamma=gamma, **parameters)._prefer(cache)
    return cache.notes["preference"][0], columns["indicator"][0, 0, :n]


def jefferson(weights, total, caps, floor):
    """Hand out slots one by one to the largest weight / (slots + 1), the earlier layer first."""
    out = [min(floor, cap) for cap in caps]
    while sum(out) < min(total, sum(caps)):
        open_ = [i for i in range(len(out)) if out[i] < caps[i]]
        out[max(open_, key=lambda i: (weights[i] / (out[i] + 1), -i))] += 1
    return out


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


def test_shares_of_a_small_cascade():
    assert [allot([3, 1, 4][:n], 24, [99] * n, 0) for n in (1, 2, 3)] == [[24], [18, 6], [9, 3, 12]]


def test_a_key_that_varies_beats_a_steady_one():
    e = torch.tensor([4.3, 0.1, 0.0, 0.2])  # mean .3 .1 0 .2, variance .02 0 0 0
    rows = [[0.4, 0.1, 0.0, 0.2], [0.2, 0.1, 0.0, 0.2]]
    _, got = prefer(rows)
    want = [sum(e[max(0, j - 2) : j + 3].tolist()) / 5 for j in range(4)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)  # fp32 variances times 200
    _, steady = prefer(rows, gamma=0.0)
    assert steady.tolist() == pytest.approx([0.4 / 5, 0.6 / 5, 0.6 / 5, 0.3 / 5])


def test_neighbours_are_the_nearest_live_entries():
    score = torch.tensor([[[5.0, 99, 1, 2, 99, 3, 4, 6, 7]]])
    among = torch.tensor([[[True, False, True, True, False, True, True, True, False]]])
    line = [5, 1, 2, 3, 4, 6]
    want = [sum(line[max(0, j - 2) : j + 3]) / 5 for j in range(6)]
    got = pool_neighbours(score, among, 5, "avg")
    assert got[among].tolist() == pytest.approx(want) and not got[~among].any()
    everything = pool_neighbours(score, torch.ones_like(among), 5, "avg")
    assert torch.equal(everything, torch.avg_pool1d(score, 5, stride=1, padding=2))


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


class Look(Policy):
    """Record what the last queries of the prompt attend to, per layer."""

    name = "look"

    def __init__(self, window):
        self.observes, self.seen = window, {}

    def __call__(self, cache, q, pos):
        if cache.phase == "last":
            self.seen[cache.layer] = cache.probs(*cache.observed(self.observes)).double()


def oracle(m, text, budget, W, gamma, tau1, tau2, floor):
    """Return, per layer, the budget and the tokens each KV head keeps of a prompt, from the definitions in fp64."""
    look = Look(W)
    tiny.feed(m, KVCache(m, [look]), text)
    T, G, L, scores, weights = text.shape[1], m.config.group, m.config.n_layers, [], []
    for layer in range(L):
        p = look.seen[layer][0, :, :, : T - W]  # (H, W, T - W)
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


@pytest.mark.parametrize("parameters", [{}, {"tau1": 0.05, "tau2": 0.05}, {"tau1": 2.0, "gamma": 3.0}, {"floor": 0}])
@pytest.mark.parametrize("cascading", [True, False])
def test_budgets_and_kept_entries_equal_the_definition(parameters, cascading):
    """The test that turns red when entropy, variance, shares or indicator are changed."""
    m, text = tiny.model(n_layers=4, seed=3), tiny.ids(150)
    full = {"gamma": 200.0, "tau1": 1.0, "tau2": 1.0, "floor": 4} | parameters
    cache = KVCache(m, [CAKE(budget=50, window=16, cascading=cascading, **full)])
    tiny.feed(m, cache, text)
    budgets, kept = oracle(m, text, 50, 16, **full)
    assert [c.notes["budget"] for c in cache.layers] == [[b] for b in budgets]
    assert sum(budgets) == 4 * 34 and len(set(budgets)) > 1
    for layer in range(4):
        for head in (0, 1):
            assert cache.live_positions(layer, head).tolist() == kept[layer][head]
    if parameters.get("tau1") == 0.05:
        assert max(budgets) == 150 - 16 or min(budgets) == 4  # a cap or the floor binds


def watch(budget, **parameters):
    """Return a CAKE that records, after each layer, how many entries before the window every layer holds."""
    plan, stages = CAKE(budget=budget, window=16, **parameters), []

    class Watched(CAKE):
        name = "cake"

        def __call__(self, cache, q, pos):
            super().__call__(cache, q, pos)
            if cache.phase == "last":
                stages.append([c.n_live - self.window for c in cache.parent.layers if c.storage])

    plan.__class__ = Watched
    return plan, stages


@pytest.mark.parametrize("chunk", [None, 33])
def test_the_cascade_only_shrinks_layers_and_bounds_the_whole(chunk):
    m, T, past = tiny.model(n_layers=5, seed=2), 150, 20
    plan, stages = watch(16 + past, floor=2)
    tiny.feed(m, KVCache(m, [plan]), tiny.ids(T), chunk)
    total = past * 5
    for n, stage in enumerate(stages, 1):
        assert sum(stage[:n]) == min(total, n * (T - 16))
        if chunk is None:  # else all layers hold the earlier parts
            assert len(stage) == n and sum(stages[n - 2][: n - 1] if n > 1 else []) + T - 16 <= total + T - 16
        if n > 1:
            assert all(b <= a for a, b in zip(stages[n - 2], stage[: n - 1], strict=False))


def test_no_temperature_gives_every_layer_the_same():
    m = tiny.model(n_layers=3)
    cache = KVCache(m, [CAKE(budget=40, window=16, tau1=math.inf, tau2=math.inf)])
    tiny.feed(m, cache, tiny.ids(100))
    assert [c.notes["budget"] for c in cache.layers] == [[24]] * 3 and {c.n_live for c in cache.layers} == {40}


@pytest.mark.parametrize("T", [1, 7, 16, 17, 39, 40])
def test_a_prompt_within_the_budget_is_kept_whole(T):
    m = tiny.model()
    text = tiny.ids(T + 60)
    full, cache = KVCache(m), KVCache(m, "cake(budget=40,window=16)")
    assert torch.equal(tiny.feed(m, cache, text[:, :T]), tiny.feed(m, full, text[:, :T]))
    for a, b in zip(cache.layers, full.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.read(), b.read(), strict=True))
    want = tiny.steps(m, full, text[:, T:])
    got = tiny.steps(m, cache, text[:, T:])
    # the budget has room for 40 - T more; the next query still sees 41. fp32 sums in another order
    assert tiny.rms(got[:, : 41 - T], want[:, : 41 - T]) < 1e-5
    assert tiny.rms(got, want) > 1e-3 and {c.n_live for c in cache.layers} == {40}


def test_a_step_forgets_what_its_query_cares_least_for():
    class Spy(Policy):
        name = "spy"

        def __call__(self, cache, q, pos):
            if cache.phase == "decode":
                probs[cache.layer] = cache.step_probs[0, :, 0].double()  # (H, N)

    m, text, W, probs = tiny.model(n_layers=3, seed=1), tiny.ids(140), 8, {}
    cache = KVCache(m, [Spy(), CAKE(budget=30, window=W, floor=4)])
    tiny.feed(m, cache, text[:, :100])
    sizes = [c.n_live for c in cache.layers]
    assert sum(sizes) == 90 and len(set(sizes)) > 1
    for t in range(100, 140):
        before = [[cache.live_positions(i, h).tolist() + [t] for h in (0, 1)] for i in range(3)]
        m(text[:, t : t + 1], cache)
        for i, c in enumerate(cache.layers):
            assert c.n_live == sizes[i]
            for h in (0, 1):
                line = probs[i][3 * h : 3 * h + 3].mean(0)
                line = line[line > 0].tolist()  # it is 0 in hidden slots
                assert len(line) == len(before[i][h])
                old = line[:-W]
                pooled = [sum(old[max(0, j - 2) : j + 3]) / 5 for j in range(len(old))]
                # of equals the newer goes; fp32 sums may put near equals the other way
                gone = (set(before[i][h]) - set(cache.live_positions(i, h).tolist())).pop()
                j = before[i][h].index(gone)
                assert j < len(old) and pooled[j] <= min(pooled) * (1 + 1e-5)


def test_the_ledger_holds_nothing_but_entries_and_their_tokens():
    m = tiny.model(n_layers=3, dtype=torch.bfloat16)
    cache = KVCache(m, [CAKE(budget=30, window=8, floor=4)])
    tiny.feed(m, cache, tiny.ids(100), 33)
    assert sum(c.n_live for c in cache.layers) == 90
    for c, row in zip(cache.layers, cache.ledger()["layers"], strict=True):
        n = c.notes["budget"][0] + 8
        assert row["held"] == (n + max(16, n // 16)) * 2 * (2 * 32 * 2 + 4)
        assert row["payload"] == n * 2 * 2 * 32 * 2 and row["columns"] == n * 2 * 4
        assert set(c.slots.data) == {"token"}


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_parts_of_a_prompt_make_no_difference(chunk):
    m, text = tiny.model(n_layers=3), tiny.ids(120)
    a, b = (KVCache(m, [CAKE(budget=40, window=16)]) for _ in "ab")
    assert tiny.rms(tiny.feed(m, b, text, chunk), tiny.feed(m, a, text)) < 1e-5
    assert [c.notes["budget"] for c in a.layers] == [c.notes["budget"] for c in b.layers]
    for layer in range(3):
        for head in (0, 1):
            assert torch.equal(a.live_positions(layer, head), b.live_positions(layer, head))


@pytest.mark.parametrize("policy", ["", "streamingllm(budget=60,reindex=False)+"])
@pytest.mark.parametrize("storage", ["full", "kivi(bits=8,residual=32)", "pca(rank=24)", "xquant(bits=8,group=32)"])
def test_it_composes_and_attends_as_the_reference(policy, storage):
    m, spec = tiny.model(n_layers=3), policy + "cake(budget=40,window=16)"
    cache, plain = KVCache(m, f"{spec}+{storage}"), KVCache(m, spec)
    for c in (cache, plain):
        tiny.feed(m, c, tiny.ids(120), 50)
    assert [c.counts for c in cache.layers] == [c.counts for c in plain.layers]  # packing comes after the last layer
    tiny.steps(m, cache, tiny.ids(50))
    assert sum(c.n_live for c in cache.layers) == 3 * 40
    for c in cache.layers:
        q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[170]])
        assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.mask(pos))) < 1e-5


def test_quantising_the_kept_entries_costs_little():
    m, text = tiny.model(n_layers=3), tiny.ids(130)
    out = []
    for spec in ("cake(budget=40,window=16)", "cake(budget=40,window=16)+kivi(bits=8,residual=32)"):
        cache = KVCache(m, spec)
        tiny.feed(m, cache, text[:, :120])
        out.append(m(text[:, 120:121], cache))
    # 8 bits are 1/255 of a range of about four deviations, half of that at most, through three sharp layers
    assert 0 < tiny.rms(out[1], out[0]) < 0.05


def test_a_second_prompt_shares_the_same_total():
    m = tiny.model(n_layers=3)
    cache = KVCache(m, [CAKE(budget=40, window=16)])
    for turn in range(3):
        tiny.feed(m, cache, tiny.ids(70, seed=turn), 30)
        assert sum(c.n_live for c in cache.layers) == 120
        tiny.steps(m, cache, tiny.ids(9, seed=turn))
        assert sum(c.n_live for c in cache.layers) == 120


def test_sequences_of_a_batch_have_their_own_budgets():
    m = tiny.model(n_layers=3)
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (90, 61, 12)]
    batch = KVCache(m, [CAKE(budget=30, window=8)])
    together = list(zip(*generate_batch(m, batch, prompts, 30), strict=True))
    for b, prompt in enumerate(prompts):
        one = KVCache(m, [CAKE(budget=30, window=8)])
        assert list(generate(m, one, prompt, 30)) == list(together[b])
        assert [c.notes["budget"][0] for c in one.layers] == [c.notes["budget"][b] for c in batch.layers]


BAD = {"budget": 32, "window": 1, "gamma": -1.0, "tau1": 0.0, "tau2": -1.0, "floor": -1}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters_are_refused(name):
    with pytest.raises(ValueError, match=name):
        CAKE(**{name: BAD[name]})
