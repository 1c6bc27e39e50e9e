"""Expected Attention: the closed form, the moments of a prompt's queries, and which entries they keep."""

import itertools
import math
from functools import lru_cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from windowed import Drop, best, held, kept, read_exactly, rows, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.method import Policy
from nanokv.methods.expected_attention import ExpectedAttention, log_attention


class Look(Policy):
    """Note, at the end of a prompt read in one pass, what each KV head holds and the queries before rotation."""

    def __init__(self):
        self.heads = {}

    def after_part(self, cache, q, pos):
        if cache.phase != "last":
            return
        v = cache.read()[1].double()
        queries = cache.unrotated.unflatten(1, (cache.config.n_kv_heads, -1)).double()  # (B, Hkv, G, T, D)
        for b in range(cache.B):
            live, real = cache.live.expand(cache.B, cache.config.n_kv_heads, -1)[b], pos[b] >= 0
            for h, (tokens, k) in enumerate(rows(cache, b)):
                mine = queries[b, h][:, real], pos[b, real]
                self.heads[cache.layer, h, b] = tokens, k.double(), v[b, h, live[h]], *mine


@lru_cache
def average_rotation(D, start, n):
    """Return the mean of RoPE's matrices for the positions from start to start + n - 1, fp64 (D, D)."""
    R = [[0.0] * D for _ in range(D)]
    for p, i in itertools.product(range(start, start + n), range(D // 2)):
        a, j = p * 10000.0 ** (-2 * i / D), i + D // 2
        for x, y, value in ((i, i, math.cos(a)), (i, j, -math.sin(a)), (j, i, math.sin(a)), (j, j, math.cos(a))):
            R[x][y] += value / n
    return torch.tensor(R, dtype=torch.float64)


def scores(method, tokens, k, v, q, pos):
    """Return {token: score} of the entries after the sinks: k, v (n, D), q (G, T, D), all in fp64, step by step."""
    D, angle = k.shape[1], average_rotation(k.shape[1], int(pos[-1]) + 1, method.n_future)
    k, v, tokens, total = k[method.n_sink :], v[method.n_sink :], tokens[method.n_sink :], 0
    for head in q:
        x = head[pos >= method.n_sink]
        mean = angle @ x.mean(0)
        z = k @ mean / D**0.5
        if method.use_covariance:
            cov = angle @ (x - x.mean(0)).T @ (x - x.mean(0)) @ angle.T / len(x)
            z = z + torch.stack([y @ cov @ y for y in k]) / (2 * D)
        total = total + z.softmax(0) / len(q)
    if method.use_vnorm:
        total = (total + method.epsilon) * v.norm(dim=-1)
    return dict(zip(tokens, total.tolist(), strict=True))


def want(method, tokens, *rest):
    """Return the set that `method` is to keep of these entries."""
    must = {*tokens[: method.n_sink], *(tokens[-method.n_recent :] if method.n_recent else [])}
    s = scores(method, tokens, *rest)
    return must | best({t: x for t, x in s.items() if t not in must}, method.budget - len(must))


def agree(mine, theirs, method, heard):
    """Assert that sets are equal but for ties: epsilon hides differences of attention far below it, and a token that
    comes twice has, in a first layer, values of equal norm. fp32 keeps 1e-7 of a score."""
    if mine != theirs:
        assert method.epsilon and len(mine) == len(theirs)
        s = scores(method, *heard)
        tied = [s[t] for t in mine ^ theirs]
        assert max(tied) < min(tied) * (1 + 1e-5)


MEAN, COV = torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([0.0, 2.0]))


class Told(ExpectedAttention):
    """Let queries be of MEAN and COV, without a rotation."""

    def _ahead(self, cache):
        return MEAN.view(1, 1, 1, 1, 2), COV.view(1, 1, 1, 2, 2)


@pytest.mark.parametrize("options, values", [
    ({}, [0.434, 0.705, 0.214]),  # e = .434, .353, .214, times 1, 2, 1
    ({"use_vnorm": False}, [0.434, 0.353, 0.214]),
    ({"use_covariance": False}, [0.504, 0.497, 0.248]),  # z = .707, 0, 0
    ({"epsilon": 10.0}, [10.434, 20.705, 10.214]),
], ids=str)  # fmt: skip
def test_a_small_example(options, values):
    k, v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    z = log_attention(k, MEAN[None], COV)
    assert z.tolist() == pytest.approx([0.7071, 0.5, 0.0], abs=1e-4)
    assert z.softmax(-1).tolist() == pytest.approx([0.434, 0.353, 0.214], abs=1e-3)
    fake = SimpleNamespace(read=lambda: (k[None, None], v[None, None]), rank=torch.arange(3).view(1, 1, -1))
    score = Told(n_sink=0, **options).score(fake, None, None)
    assert score.flatten().tolist() == pytest.approx(values, abs=1.5e-3)


# Turns red when the covariance term is missing or has another factor, or when D is not under the root.
def test_mutation_the_closed_form_is_the_mean_over_gaussian_queries():
    rng = torch.Generator().manual_seed(0)
    D, mean = 8, torch.randn(8, generator=rng) * 0.5
    half = torch.randn(D, D, generator=rng) * 0.3
    q = mean + torch.randn(400_000, D, generator=rng) @ half.T
    k = torch.randn(6, D, generator=rng)
    z = log_attention(k, mean[None], half @ half.T)
    got = (q @ k.T / D**0.5).double().exp().mean(0)
    assert (z - log_attention(k, mean[None])).max() > 0.2  # the covariance matters here
    # 4e5 samples whose logits have a variance of at most 1.2: a standard error of at most 0.25 %; four of them
    assert (2 * (z - log_attention(k, mean[None]))).max() < 1.2
    assert (got.log() - z).abs().max() < 0.01


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("options", [
    {},
    {"window": 0},
    {"n_sink": 0, "n_future": 1},
    {"use_covariance": False, "window": 4},
    {"use_vnorm": False, "n_sink": 10},
    {"epsilon": 0.02, "window": 0},
], ids=str)  # fmt: skip
def test_the_kept_sets_equal_a_naive_computation(G, options):
    m, look = tiny.model(G=G), Look()
    method = ExpectedAttention(**({"budget": 40, "window": 8, "n_future": 60} | options))
    cache = run(m, [look, method], tiny.ids(150, batch=2))
    for (i, h, b), heard in look.heads.items():
        agree(kept(cache, b)[i, h], want(method, *heard), method, heard)
    assert len(look.heads) == 8


def test_the_mean_of_groups_comes_after_the_softmax():
    m, look, method = tiny.model(G=4, n_layers=1), Look(), ExpectedAttention(budget=30, window=0, n_future=9)
    cache = run(m, [look, method], tiny.ids(120))
    for h in (0, 1):
        heard = look.heads[0, h, 0]
        alone = [best(scores(method, *heard[:3], heard[3][g : g + 1], heard[4]), 26) for g in range(4)]
        assert len(set(map(frozenset, alone))) == 4  # heads of a group disagree
        assert kept(cache)[0, h] == want(method, *heard)


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_the_moments_are_those_of_all_queries_after_the_sinks(chunk):
    m, look, seen = tiny.model(n_layers=1), Look(), {}
    run(m, [look], tiny.ids(60))

    class Mine(ExpectedAttention):
        def _ahead(self, cache):
            seen.update(cache.notes)
            return super()._ahead(cache)

    cache = run(m, [Mine(budget=20, n_sink=5)], tiny.ids(60), chunk=chunk)
    assert not cache.layers[0].notes  # they live no longer than a prompt
    assert seen["queries"].flatten().tolist() == [55.0]
    for h in (0, 1):
        q = look.heads[0, h, 0][3][:, 5:]  # (G, 55, D)
        # the model computes queries in fp32, in batches of another size: 1e-6 of their size
        off = q - q.mean(1, keepdim=True)
        assert tiny.rms(seen["mean"][0, h, :, 0], q.mean(1)) < 1e-5
        assert tiny.rms(seen["scatter"][0, h], off.mT @ off) < 1e-5


def test_hidden_entries_and_padding_do_not_count():
    m, look, method = tiny.model(), Look(), ExpectedAttention(budget=20, window=4, n_future=9)
    drops = [Drop(60, 1, [3, 4, 50]), Drop(60, None, [1, 8, 9])]
    cache = run(m, [*drops, look, method], tiny.ids(60))
    for key, tokens in kept(cache).items():
        assert tokens == want(method, *look.heads[(*key, 0)])
        assert {0, 2, 56, 57, 58, 59} <= tokens and not tokens & {1, 8, 9}
    text, pads = tiny.ids(60, batch=4), [0, 25, 50, 57]
    padded = torch.where(torch.arange(60) < torch.tensor(pads)[:, None], -1, text)
    cache = run(m, "expected_attention(budget=20,window=4)", padded, chunk=30)
    for b, n in enumerate(pads):
        assert kept(cache, b) == kept(run(m, "expected_attention(budget=20,window=4)", text[b : b + 1, n:]))


def test_a_second_prompt_is_judged_by_its_own_queries():
    m, look, method = tiny.model(), Look(), ExpectedAttention(budget=30, window=8, n_future=9)
    cache = run(m, [look, method], tiny.ids(80), steps=15)
    before = kept(cache)
    tiny.feed(m, cache, tiny.ids(9, seed=3))
    for key, tokens in kept(cache).items():
        heard = look.heads[(*key, 0)]
        assert heard[3].shape[1] == 9 and tokens == want(method, *heard)
        assert tokens <= before[key] | set(range(95, 104))


@pytest.mark.parametrize("T", [1, 2, 9, 40, 41, 90])
@pytest.mark.parametrize("budget", [4, 5, 20, 40])
def test_counts_ends_and_prompt_logits(T, budget):
    before = read_exactly(tiny.model(), f"expected_attention(budget={budget})", budget, False, T)
    ends = {*range(min(4, T)), *range(max(0, T - min(32, budget - 4)), T)}
    assert all(tokens >= ends for tokens in before.values())


def test_a_budget_that_is_never_reached_changes_no_bit():
    within_budget_is_full(tiny.model(), "expected_attention(budget=60)", 60, 9)


def test_where_positions_are_renumbered_they_count_from_the_cache():
    m, method = tiny.model(n_layers=1), ExpectedAttention(budget=30, window=8, n_future=9)
    cache, plain = (run(m, [*first, method], tiny.ids(90)) for first in (["streamingllm(budget=400)"], []))
    assert cache.renumbers and kept(cache) == kept(plain)
    look = Look()
    cache = run(m, ["streamingllm(budget=60)", look, method], tiny.ids(200), steps=40)
    tiny.feed(m, cache, tiny.ids(14, seed=3))
    for key, tokens in kept(cache).items():
        heard = look.heads[(*key, 0)]
        assert heard[4].tolist() == list(range(46, 60)) and tokens == want(method, *heard)


def test_a_clone_in_the_middle_of_a_prompt_goes_on_alike():
    m, text = tiny.model(), tiny.ids(90)
    cache = KVCache(m, "expected_attention(budget=40,window=8)")
    m(text[:, :50], cache, "prompt")
    clone = cache.clone()
    m(text[:, 50:], cache, "last")
    m(text[:, 50:], clone, "last")
    assert kept(cache) == kept(clone) == kept(run(m, "expected_attention(budget=40,window=8)", text))


def test_bytes_are_those_of_the_header():
    m = tiny.model(context=1024)
    cache = KVCache(m, "expected_attention(budget=320)")
    list(generate(m, cache, tiny.ids(600)[0], 1))
    assert held(cache) == 2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)


def test_the_ledger_counts_the_moments_while_a_prompt_is_read():
    m, caches = tiny.model(), []
    for spec in ("full", "expected_attention(budget=40)"):
        caches.append(KVCache(m, spec))
        m(tiny.ids(60), caches[-1], "prompt")
    # per layer in fp64: the number of queries; per query head a mean of D and a scatter of D * D
    assert held(caches[1]) - held(caches[0]) == 2 * 8 * (1 + 6 * 32 + 6 * 32 * 32)


@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.3), (131, 0.8), (400, 0.9)])
@pytest.mark.parametrize("options", [
    {},
    {"epsilon": 0.01, "n_sink": 1},
    {"use_covariance": False, "use_vnorm": False},
], ids=str)  # fmt: skip
def test_the_kept_sets_are_those_of_kvpress(G, T, ratio, options):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text, look = tiny.model(G=G), tiny.ids(T), Look()
    method = ExpectedAttention(budget=budget(T, ratio), window=0, **options)
    mine = kept(run(m, [look, method], text))
    for key, theirs in pressed(m, kvpress.ExpectedAttentionPress(compression_ratio=ratio, **options), text).items():
        agree(mine[key], theirs, method, look.heads[(*key, 0)])


@pytest.mark.parametrize("bad", [
    {"budget": 0}, {"budget": 3}, {"n_future": 0}, {"n_future": 10**19}, {"n_sink": -1}, {"window": -1},
    {"epsilon": -0.1}, {"epsilon": float("inf")},
], ids=str)  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"expected_attention: {next(iter(bad))} must be"):
        ExpectedAttention(**bad)
