"""Ada-KV: how a layer's budget is shared out, what each head is sure of, and that it works over any scores."""

import itertools
from fractions import Fraction

import pytest
import tiny
import torch

from nanokv import KVCache, generate_batch
from nanokv.attention import top
from nanokv.method import Evict, Plan
from nanokv.methods.adakv import AdaKV
from nanokv.methods.snapkv import SnapKV


class Given(Evict):
    """Score entries as told, one list per KV head; keep the newest `n_recent`."""

    def __init__(self, budget, scores, n_recent=0, n_sink=0):
        self.budget, self.scores, self.n_recent, self.n_sink = budget, torch.tensor(scores), n_recent, n_sink

    def score(self, cache, q, pos):
        return torch.nn.functional.pad(self.scores[None], (self.n_sink, cache.N - self.scores.shape[1] - self.n_sink))


class Guard(Plan):
    """The twin that kvpress goes by: each head's floor(alpha * b) best are safe, the rest goes to the best of all."""

    def __init__(self, alpha):
        self.alpha = alpha

    def shares(self, cache, score, policy):
        fixed, Hkv = sum(policy.protects), score.shape[1]
        among, b = cache.between(*policy.protects).expand_as(score), policy.budget - fixed
        safe = top(score, int(self.alpha * b), among)
        flat = [t.transpose(1, 2).flatten(1)[:, None] for t in (score, among & ~safe)]
        best = top(flat[0], b * Hkv - safe.sum((1, 2)).view(-1, 1, 1), flat[1])
        return (safe.sum(-1) + best.unflatten(-1, (-1, Hkv))[:, 0].sum(1) + fixed).flatten().tolist()


class Spy(Evict):
    """Note the scores that SnapKV gives in each layer, {token: score} for each KV head, and keep everything."""

    def __init__(self, snap):
        self.snap, self.observes, self.heads = snap, snap.observes, {}

    def after_prompt(self, cache):
        score = self.snap.score(cache, *cache.observed(self.observes))[0]
        token, old = (
            cache.token.expand(1, *score.shape)[0],
            cache.between(0, self.snap.window).expand(1, *score.shape)[0],
        )
        self.heads[cache.layer] = [
            dict(zip(t[o].tolist(), s[o].tolist(), strict=True)) for t, o, s in zip(token, old, score, strict=True)
        ]


def uneven(**config):
    """Return a tiny model whose KV heads differ in how sharply they are attended to."""
    m = tiny.model(**config)
    for block in m.layers:
        q = block.self_attn.q_proj.weight.data.unflatten(0, (m.config.n_kv_heads, -1))
        q *= torch.linspace(0.3, 1.5, m.config.n_kv_heads)[:, None, None]
    return m


def read(m, spec, text, chunk=None):
    cache = KVCache(m, spec)
    tiny.feed(m, cache, text, chunk)
    return cache


def kept(cache, b=0):
    c = cache.config
    return {(i, h): set(cache.live_positions(i, h, b).tolist()) for i in range(c.n_layers) for h in range(c.n_kv_heads)}


def best(candidates, n):
    """Return the keys of the n highest values of a {key: value}; the lower key wins ties."""
    return set(sorted(candidates, key=lambda key: (-candidates[key], key))[: max(0, n)])


H0, H1 = [0.30, 0.25, 0.25, 0.20], [0.90, 0.05, 0.03, 0.02]


@pytest.mark.parametrize("plan, first, second", [
    (AdaKV(alpha=0.0), {0, 1, 2}, {0}),  # .90, .30, .25 and .25 are the best four of all
    (AdaKV(alpha=0.5), {0, 1}, {0, 1}),  # 1 each, and half of 3 and 1: 2.5 and 1.5 are to be rounded
    (AdaKV(alpha=1.0), {0, 1}, {0, 1}),
    (Guard(0.5), {0, 1, 2}, {0}),  # the two safe entries are the heads' best, the last two slots go to .25 and .25
    (Guard(1.0), {0, 1}, {0, 1}),
])  # fmt: skip
def test_a_small_example(plan, first, second):
    m = tiny.model(G=1, n_kv_heads=2, n_layers=1)
    cache = read(m, [Given(3, [H0, H1], n_recent=1), plan], tiny.ids(5))
    assert kept(cache) == {(0, 0): first | {4}, (0, 1): second | {4}}


# Turns red without each head's even part, or with another weight of it.
@pytest.mark.parametrize("alpha, counts", [(0.0, [20, 0]), (0.2, [18, 2]), (0.5, [15, 5]), (1.0, [10, 10])])
@pytest.mark.parametrize("n_sink", [0, 3])
def test_mutation_the_worst_head_keeps_its_even_part(alpha, counts, n_sink):
    m = tiny.model(G=1, n_kv_heads=2, n_layers=1)
    scores = [[0.1] * 20, [0.01] * 9 + [0.02, 0.03] + [0.01] * 9]
    cache = read(m, [Given(12 + n_sink, scores, 2, n_sink), AdaKV(alpha)], tiny.ids(22 + n_sink))
    live = kept(cache)
    assert [len(t) - 2 - n_sink for t in live.values()] == counts
    assert live[0, 1] >= {n_sink + t for t in ((), (10,), (9, 10))[min(2, counts[1])]}


def shared_out(heads, b, alpha):
    """Share b entries per head out by the card's words; heads is a list of {token: score}; return sets of tokens."""
    total = b * len(heads)
    flat = {(t, h): s for h, head in enumerate(heads) for t, s in head.items()}
    free = [sum(h == x for _, x in best(flat, total)) for h in range(len(heads))]
    want = [(1 - Fraction(alpha)) * c + int(alpha * b) for c in free]
    caps = [int(w) for w in want]
    while sum(caps) < total:  # largest remainders first; then, as floor(alpha * b) may leave more, again
        rest = {(caps[h], h): want[h] - caps[h] for h, head in enumerate(heads) if caps[h] < len(head)}
        caps[best(rest, 1).pop()[1]] += 1
    return [best(head, c) for head, c in zip(heads, caps, strict=True)]


@pytest.mark.parametrize("G, Hkv", [(1, 4), (3, 2), (4, 3)])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.375, 0.75])
def test_the_kept_sets_equal_a_naive_computation(G, Hkv, alpha):
    m, snap = uneven(G=G, n_kv_heads=Hkv), SnapKV(budget=40, window=8, kernel=5)
    spy = Spy(snap)
    cache = read(m, [spy, snap, AdaKV(alpha)], tiny.ids(150))
    for i in (0, 1):
        want = shared_out(spy.heads[i], 32, alpha)
        assert [kept(cache)[i, h] for h in range(Hkv)] == [w | set(range(142, 150)) for w in want]
        counts, safe = cache.layers[i].counts, 8 + int(alpha * 32)
        assert sum(counts) == 40 * Hkv and len(set(counts)) > 1  # otherwise this test shows nothing
        assert min(counts) >= safe and max(counts) <= Hkv * 40 - (Hkv - 1) * safe


@pytest.mark.parametrize("T", [1, 8, 9, 40, 41, 90])
def test_the_sum_is_exact(T):
    m = tiny.model(G=1, n_kv_heads=3)
    for budget, window, alpha in itertools.product((1, 7, 40), (1, 8), (0.0, 0.13, 0.5)):
        cache = read(m, f"adakv(budget={budget},window={window},alpha={alpha})", tiny.ids(T))
        assert all(sum(c.counts) == 3 * min(T, budget) for c in cache.layers)
        assert all(t >= set(range(max(0, T - min(window, budget)), T)) for t in kept(cache).values())


def test_all_even_is_snapkv():
    m, text = tiny.model(), tiny.ids(150)
    assert kept(read(m, "adakv(budget=40,window=8,alpha=1.0)", text)) == kept(
        read(m, "snapkv(budget=40,window=8)", text)
    )


def test_a_free_allocation_keeps_the_most_mass():
    for seed in range(3):
        m, text, spy = uneven(seed=seed, G=2, n_kv_heads=3), tiny.ids(150, seed=seed), Spy(SnapKV(window=8))
        even = kept(read(m, [spy, SnapKV(budget=30, window=8)], text))
        free = kept(read(m, "adakv(budget=30,window=8,alpha=0.0)", text))
        for i in (0, 1):
            mass = [sum(s for h in range(3) for t, s in spy.heads[i][h].items() if t in sets[i, h])
                    for sets in (free, even)]  # fmt: skip
            assert mass[0] > mass[1]


def test_equal_heads_get_equal_shares():
    m = tiny.model(G=1, n_kv_heads=3, n_layers=1)
    scores = [torch.rand(40, generator=torch.Generator().manual_seed(1)).round(decimals=1).tolist()] * 3  # many ties
    assert read(m, [Given(20, scores, 4), AdaKV()], tiny.ids(44)).layers[0].counts == [20, 20, 20]


def test_a_second_prompt_shares_ragged_rows_out_again():
    m, snap = uneven(), SnapKV(budget=30, window=8, kernel=5)
    spy = Spy(snap)
    cache = read(m, [spy, snap, AdaKV(0.25)], tiny.ids(100))
    tiny.steps(m, cache, tiny.ids(15, seed=2))
    assert len(set(cache.layers[0].counts)) > 1
    tiny.feed(m, cache, tiny.ids(20, seed=3))
    for i in (0, 1):
        want = shared_out(spy.heads[i], 22, 0.25)
        assert [kept(cache)[i, h] for h in (0, 1)] == [w | set(range(127, 135)) for w in want]


@pytest.mark.parametrize("spec", ["h2o(budget=30)+adakv", "knorm(budget=30)+adakv", "tova(budget=30)+adakv"])
def test_over_other_scores_a_head_keeps_its_number(spec):
    m = uneven()
    cache = read(m, spec, tiny.ids(100))
    counts = [c.counts for c in cache.layers]
    assert all(sum(n) == 60 for n in counts)
    assert any(len(set(n)) > 1 for n in counts) != spec.startswith("tova")  # whose heads keep the same entries
    tiny.steps(m, cache, tiny.ids(20, seed=2))
    more = 20 if spec.startswith("knorm") else 0  # which only cuts prompts
    assert [c.counts for c in cache.layers] == [[n + more for n in row] for row in counts]


def test_a_short_sequence_beside_a_long_one_grows_as_it_would_alone():
    m = uneven()
    prompts, spec = [tiny.ids(n, seed=n)[0].tolist() for n in (90, 20)], "h2o(budget=30)+adakv"
    batch, alone = KVCache(m, spec), KVCache(m, spec)
    together = [b for _, b in generate_batch(m, batch, prompts, 25)]
    assert together == [b for (b,) in generate_batch(m, alone, prompts[1:], 25)]
    assert kept(batch, 1) == kept(alone)


def test_rows_are_stored_ragged():
    m = uneven(context=1024, n_kv_heads=3, G=1)
    cache = read(m, "adakv(budget=300,alpha=0.1)", tiny.ids(700))
    want = 0
    for c in cache.layers:
        assert len(set(c.counts)) > 1 and sum(c.counts) == 900
        want += sum((n + max(16, n // 16)) * (2 * 32 * 4 + 4) for n in c.counts)
    total = cache.ledger()["total"]
    assert total["held"] == want + 4 * (700 + 700 // 16)  # and the tokens' ids
    assert total["payload"] == 2 * 900 * 2 * 32 * 4


def test_it_hands_snapkv_what_it_does_not_know():
    assert [repr(m) for m in KVCache(tiny.model(), "adakv(budget=9,alpha=0.5,window=4)").methods] == [
        "snapkv(budget=9, window=4, kernel=7, pooling='max', reduce='mean')", "adakv(alpha=0.5)",
    ]  # fmt: skip


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_bad_parameters_are_refused(alpha):
    with pytest.raises(ValueError, match="adakv: alpha must be from 0 to 1"):
        AdaKV(alpha=alpha)


def test_a_policy_without_scores_is_refused():
    with pytest.raises(NotImplementedError, match="adakv needs a policy that scores entries"):
        KVCache(tiny.model(), "streamingllm(budget=100)+adakv")
