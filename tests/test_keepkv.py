"""KeepKV: that a merge leaves attention as it was, the moving average, what is merged with what, and what it holds."""

import math

import pytest
import tiny
import torch

from nanokv import KVCache, generate_batch
from nanokv.attention import Mask, probs, reference
from nanokv.cache import Policy, top
from nanokv.methods.keepkv import KeepKV, merge


def entries(N=12, D=16, seed=0, dtype=torch.float64, shift=0.0, H=2):
    """Return a query (1, H, 1, D), keys and values, logits shifted by `shift`, and log weights of random votes."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, H, n, D, generator=g, dtype=torch.float64) for n in (1, N, N))
    k += shift * math.sqrt(D) * q / q.square().sum(-1, keepdim=True)
    b = torch.randint(1, 9, (1, H, N), generator=g).double().log()
    q, k, v, b = (t.to(dtype) for t in (q, k, v, b))
    return q, k, v, (q @ k.mT).squeeze(2) / math.sqrt(D), b


def attend(q, k, v, b):
    """Attend in the inputs' dtype: softmax(q.k / sqrt(D) + b) v, for each head its own entries."""
    return ((q @ k.mT).squeeze(2) / math.sqrt(q.shape[-1]) + b).softmax(-1).unsqueeze(2) @ v


def grouped(N, size, H=2):
    """Send entries 0..size-1 to entry 1 in head 0, to entry 0 in head 1, and entries 8 and 9 to 10."""
    to = torch.arange(N).repeat(1, H, 1)
    to[0, 0, :size], to[0, 1, :size], to[..., 8:10] = 1, 0, 10
    return to


def after(q, k, v, z, b, to, form):
    """Merge, and attend to what stays."""
    k, v, b, _ = merge(k, v, z, b, to, form, q)
    gone = to != torch.arange(to.shape[-1])
    return attend(q, k, v, b.masked_fill(gone, -torch.inf))


@pytest.mark.parametrize("form", ["paper", "bias", "shift"])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 2.0, -1.5])
def test_the_query_that_decided_gets_the_same_output(form, size, shift):
    """The test that turns red when the factor ln(W / P) / mean z, or the weights of the merge, are changed."""
    for seed in range(20):
        for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            q, k, v, z, b = entries(seed=seed, dtype=dtype, shift=shift)
            got = after(q, k, v, z, b, grouped(12, size), form)
            assert (got - attend(q, k, v, b)).abs().max() < most


@pytest.mark.parametrize("form", ["paper", "bias", "shift"])
def test_logits_whose_mean_is_zero(form):
    q, k, v, z, _ = entries(N=2, H=1)
    q = q / q.norm()
    z = torch.tensor([[[1.0, -1.0]]]).double()
    k = z[..., None] * math.sqrt(16) * q  # weights exp(-1) and exp(1): the masses are equal, and so the mean is 0
    b = -z
    got = after(q, k, v, z, b, torch.zeros(1, 1, 2, dtype=torch.int64), form)
    assert (got - attend(q, k, v, b)).abs().max() < 1e-12


def test_an_unsafe_factor_falls_back_to_the_bias_form():
    seen = set()
    for seed in range(60):
        q, k, v, z, b = entries(N=2, H=1, seed=seed)
        to = torch.zeros(1, 1, 2, dtype=torch.int64)
        k1, _, b1, mass = merge(k, v, z, b, to)
        k2, _, b2, _ = merge(k, v, z, b, to, "bias")
        P, w = b.exp().sum().log(), (b + z).softmax(-1)
        factor = float((mass[..., 0] - P) / (w * z).sum())
        safe = 0.5 <= factor <= 2 and abs(float((w * z).sum())) > 1e-3
        seen.add(safe)
        if safe:
            assert torch.allclose(k1[0, 0, 0], factor * k2[0, 0, 0]) and torch.isclose(b1[0, 0, 0], P)
        else:
            assert torch.equal(k1[0, 0, 0], k2[0, 0, 0]) and b1[0, 0, 0] == b2[0, 0, 0] <= P
    assert seen == {True, False}


def test_the_plain_mean_gains_mass_by_the_divergence():
    q, k, v, z, b = entries(N=3, H=1)
    to = torch.zeros(1, 1, 3, dtype=torch.int64)
    k1, _, b1, mass = merge(k, v, z, b, to, "mean")
    w, pi = (b + z).softmax(-1), b.softmax(-1)
    got = float((q @ k1[:, :, :1].mT).squeeze() / 4 + b1[0, 0, 0])
    assert got - float(mass[0, 0, 0]) == pytest.approx(float((w * (w / pi).log()).sum()), abs=1e-12)


def test_the_bias_form_stays_exact_when_all_logits_move_together():
    q, k, v, z, b = entries(N=5, H=1)
    to = torch.zeros(1, 1, 5, dtype=torch.int64)
    a, c = (merge(k, v, z + s, b, to, "bias") for s in (0.0, 7.0))
    assert torch.allclose(a[0], c[0]) and torch.allclose(a[2][..., 0], c[2][..., 0])


@pytest.mark.parametrize("form", ["paper", "bias", "shift", "mean"])
def test_identical_entries_merge_into_themselves_for_every_query(form):
    q, k, v, z, _ = entries(N=6, shift=1.0)
    k[..., 3, :], v[..., 3, :], z[..., 3] = k[..., 2, :], v[..., 2, :], z[..., 2]
    b, to = torch.zeros(1, 2, 6).double(), torch.arange(6).repeat(1, 2, 1)
    to[..., 3] = 2
    k1, v1, b1, _ = merge(k, v, z, b, to, form, q)
    for x, y in ((k1, k), (v1, v)):
        assert torch.allclose(x[..., 2, :], y[..., 2, :], atol=1e-13)
    assert b1[0, :, 2].exp().tolist() == pytest.approx([2.0, 2.0])
    other = torch.randn(1, 2, 1, 16, dtype=torch.float64)
    stay = [0, 1, 2, 4, 5]
    assert torch.allclose(attend(other, k1[..., stay, :], v1[..., stay, :], b1[..., stay]), attend(other, k, v, b))


def test_without_merges_nothing_is_touched():
    q, k, v, z, b = entries()
    b[..., 3] = 0.0
    z[..., 4] = 0.0  # a factor of 0 / 0
    k1, v1, b1, mass = merge(k, v, z, b, torch.arange(12).repeat(1, 2, 1))
    for got, want in ((k1, k), (v1, v), (b1, b), (mass, b + z)):
        assert torch.allclose(got, want, atol=1e-13)


def test_one_vote_each_is_attention_without_votes():
    q, k, v = torch.randn(1, 6, 1, 32), torch.randn(1, 2, 40, 32), torch.randn(1, 2, 40, 32)
    votes = Mask(1, 40, bias=torch.ones(1, 2, 40).log())
    assert torch.equal(reference(q, k, v, votes), reference(q, k, v, Mask(1, 40)))


def logits(m, text, window):
    """Return keys, values and the mean query's logits (Hkv, W, N) of the last queries, from the full cache, in fp64."""
    seen = []

    class Look(Policy):
        name, observes = "look", window

        def __call__(self, cache, q, pos):
            seen.append((cache.observed(window)[0].double(), *(t[0].double() for t in cache.read())))

    tiny.feed(m, KVCache(m, [Look()]), text)
    q, k, v = seen[0]
    q = q[0].view(m.config.n_kv_heads, -1, *q.shape[2:]).mean(1)  # (Hkv, W, D)
    return q, k, v, q @ k.mT / math.sqrt(k.shape[-1])


def oracle(m, text, budget, window, threshold, alpha, n_sink, n_recent):
    """Return per KV head {token: (key, value, votes, log weight, log S)} after a prompt, by loops in fp64."""
    _, k, v, z = logits(m, text, window)
    T, out = text.shape[1], []
    for h in range(len(k)):
        W = z.shape[1]
        S, n = [], []
        for j in range(T):
            total, seen = 0.0, 0
            for i in range(W):  # one query after the other
                if T - W + i >= j:
                    total, seen = alpha * total + (1 - alpha) * math.exp(float(z[h, i, j])), seen + 1
            S.append(total / (1 - alpha**seen)), n.append(seen)
        must = [*range(n_sink), *range(T - n_recent, T)]
        rest = sorted(set(range(T)) - set(must), key=lambda j: -S[j])[: budget - len(must)]
        stay = sorted(must + rest)
        groups = {c: [c] for c in stay}
        for e in sorted(set(range(T)) - set(stay)):
            cos = {c: float(torch.cosine_similarity(k[h, e], k[h, c], 0)) for c in stay}
            best = max(stay, key=cos.get)
            if cos[best] > threshold:
                groups[best].append(e)
        head = {}
        for c, group in groups.items():
            s = torch.tensor([S[j] for j in group]).double()
            W_, P = s.sum(), float(len(group))
            zbar = float((s * s.log()).sum() / W_)
            factor = math.log(W_ / P) / zbar if zbar else math.inf
            kr, vr = (s @ k[h, group]) / W_, (s @ v[h, group]) / W_
            safe = abs(zbar) > 1e-3 and 0.5 <= factor <= 2
            b = math.log(P) if safe else math.log(W_) - zbar
            logS = math.log(W_) - b + math.log(1 - alpha ** n[c])
            head[c] = (kr * (factor if safe and len(group) > 1 else 1), vr, P, b if len(group) > 1 else 0.0, logS)
        out.append(head)
    return out


@pytest.mark.parametrize("threshold, alpha", [(0.2, 0.9), (-1.0, 0.5), (0.3, 0.0)])
def test_a_prompt_is_merged_as_defined(threshold, alpha):
    """The test that turns red when the moving average, the choice, the pairing or the merge are changed."""
    m, text = tiny.model(n_layers=1, G=2), tiny.ids(70)
    cache = KVCache(m, [KeepKV(budget=30, window=12, threshold=threshold, alpha=alpha)])
    tiny.feed(m, cache, text)
    c, heads = cache.layers[0], oracle(m, text, 30, 12, threshold, alpha, 4, 6)
    assert any(p > 2 for head in heads for *_, p, _, _ in head.values())
    k, v = c.read()
    bias, logS = (c.column(name)[0] for name in ("bias", "logS"))
    for h, head in enumerate(heads):
        assert cache.live_positions(0, h).tolist() == list(head)
        for slot, (kr, vr, _, b, s) in enumerate(head.values()):
            # fp32 logits of up to 10 carry 1e-6, and their exponentials as much relative error
            assert tiny.rms(k[0, h, slot], kr) < 1e-4 and tiny.rms(v[0, h, slot], vr) < 1e-4
            assert float(bias[h, slot]) == pytest.approx(b, abs=1e-4)
            assert float(logS[h, slot]) == pytest.approx(s, abs=1e-4)


@pytest.mark.parametrize("form", ["paper", "bias", "shift"])
def test_a_step_does_not_change_what_its_own_query_sees(form):
    """alpha=0 is the single-step form: outputs and the sum of masses before and after the merge are equal."""
    m, text = tiny.model(G=1, n_layers=2), tiny.ids(90)
    cache = KVCache(m, [KeepKV(budget=40, threshold=-1.0, alpha=0.0, key_form=form)])
    tiny.feed(m, cache, text[:, :60])
    for t in range(60, 90):
        before, saw = [], [c.compress for c in cache.layers]
        for c, compress in zip(cache.layers, saw, strict=True):

            def spy(q, pos, c=c, compress=compress):
                q_ = c.rope(q, pos)
                o, s = c.attend(q_, pos), _mass(c, q_, pos)
                compress(q, pos)
                before.append((tiny.rms(c.attend(q_, pos), o), float((_mass(c, q_, pos) - s).abs().max())))

            c.compress = spy
        m(text[:, t : t + 1], cache)
        for c in cache.layers:
            del c.compress
        # fp32; logits of up to 10 carry 1e-6
        assert len(before) == 2 and max(error for error, _ in before) < 2e-5 and max(s for _, s in before) < 2e-5
        assert all(c.n_live == 40 for c in cache.layers)


def _mass(c, q, pos):
    """Return the log-sum-exp of a query over the cache, votes included."""
    s = q.float() @ c.read()[0].float().mT / math.sqrt(q.shape[-1])
    return (s + c.mask(pos).additive()).logsumexp(-1)


def test_the_mean_query_of_a_group_is_the_exact_one():
    m, text = tiny.model(G=3, n_layers=1), tiny.ids(80)
    q = logits(m, text, 1)[0].float()[None]  # (1, Hkv, 1, D)
    full, cache = KVCache(m), KVCache(m, [KeepKV(budget=30, threshold=-1.0, alpha=0.0)])
    tiny.feed(m, full, text), tiny.feed(m, cache, text)
    a, b = (reference(q, *c.layers[0].read(), c.layers[0].mask(torch.tensor([[79]]))) for c in (full, cache))
    assert tiny.rms(b, a) < 2e-5  # fp32
    own = torch.randn(1, 6, 1, 32)  # any other query sees something else
    a, b = (reference(own, *c.layers[0].read(), c.layers[0].mask(torch.tensor([[79]]))) for c in (full, cache))
    assert tiny.rms(b, a) > 0.01


def test_the_moving_average_follows_every_query():
    m, text, alpha = tiny.model(n_layers=1), tiny.ids(60), 0.8
    cache = KVCache(m, [KeepKV(budget=100, window=10, alpha=alpha)])
    tiny.feed(m, cache, text[:, :40])
    tiny.steps(m, cache, text[:, 40:])
    z = logits(m, text, 30)[3]  # (Hkv, 30, 60): the window's 10 queries and the 20 steps
    c = cache.layers[0]
    for j in (0, 20, 33, 39, 45, 59):
        S, n = torch.zeros(2).double(), 0
        for i in range(30):
            if 30 + i >= j:
                S, n = alpha * S + (1 - alpha) * z[:, i, j].exp(), n + 1
        assert torch.allclose(c.column("logS")[0, :, j].double(), S.log(), atol=1e-5)
        assert c.column("age", 0, torch.int16)[0, :, j].tolist() == [n, n]


class Evict(Policy):
    """KeepKV's choice without merging."""

    name, observes = "evict", 12

    def __init__(self, budget, n_sink, n_recent, alpha):
        self.inner = KeepKV(budget, n_sink=n_sink, alpha=alpha, window=12)
        self.budget, self.n_sink, self.n_recent, self.alpha = budget, n_sink, n_recent, alpha

    def __call__(self, cache, q, pos):
        q, pos = cache.observed(12) if cache.phase == "last" else (cache.rope(q, pos), pos)
        q = q.float().unflatten(1, (cache.config.n_kv_heads, -1)).mean(2)
        self.inner._average(cache, q @ cache.read()[0].float().mT / math.sqrt(q.shape[-1]), pos)
        if cache.n_live > self.budget:
            rank = cache.rank.expand(cache.B, cache.config.n_kv_heads, -1)
            rest = (rank >= self.n_sink) & (rank < cache.n_live - self.n_recent)
            age = cache.column("age", 0, torch.int16).float()
            score = cache.column("logS") - torch.log1p(-(self.alpha**age))
            cache.keep(top(score, self.budget - self.n_sink - self.n_recent, rest) | ~rest)


def test_no_pair_is_similar_enough_above_a_cosine_of_one():
    m, text = tiny.model(), tiny.ids(110)
    caches = KVCache(m, [KeepKV(budget=40, threshold=1.01, window=12)]), KVCache(m, [Evict(40, 4, 8, 0.9)])
    for c in caches:
        tiny.feed(m, c, text[:, :80])
        tiny.steps(m, c, text[:, 80:])
    for a, b in zip(*(c.layers for c in caches), strict=True):
        for h in (0, 1):
            assert torch.equal(caches[0].live_positions(a.layer, h), caches[1].live_positions(a.layer, h))
        for x, y in zip(a.read(), b.read(), strict=True):
            live = a.live.expand(1, 2, -1)
            assert torch.equal(x[live], y[live])
        assert not a.column("bias").any()


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.8])
def test_votes_count_tokens_that_were_not_dropped(threshold):
    m, text = tiny.model(n_layers=1), tiny.ids(130)
    cache = KVCache(m, [KeepKV(budget=40, threshold=threshold, key_form="mean")])  # whose weights are the votes
    c = cache.layers[0]
    tiny.feed(m, cache, text[:, :90])
    for t in range(90, 130):
        m(text[:, t : t + 1], cache)
        assert c.n_live == 40
        for h in (0, 1):
            votes = c.column("bias")[0, h][c.live.expand(1, 2, -1)[0, h]].exp()
            assert torch.allclose(votes, votes.round(), rtol=1e-4) and votes.min() > 0.99
            if threshold == -1.0:  # all are similar enough
                assert float(votes.sum()) == pytest.approx(t + 1, rel=1e-4)
            else:
                assert 40 <= round(float(votes.sum())) < t + 1


def test_a_budget_that_is_never_reached_changes_nothing():
    m, text = tiny.model(), tiny.ids(120)
    full, cache = KVCache(m), KVCache(m, "keepkv(budget=120)")
    for c in (full, cache):
        c.out = torch.cat([tiny.feed(m, c, text[:, :90]), tiny.steps(m, c, text[:, 90:])], 1)
    assert torch.equal(full.out, cache.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ledger_equals_the_formula(dtype):
    m = tiny.model(dtype=dtype)
    cache, held = KVCache(m, "keepkv(budget=64)"), set()
    tiny.feed(m, cache, tiny.ids(200), 33)
    for t in range(60):
        logits = tiny.steps(m, cache, tiny.ids(1, seed=t))
        held.add(cache.nbytes)
    assert held == {2 * 2 * (64 + 16) * (2 * 32 * dtype.itemsize + 14)} and logits.isfinite().all()
    assert cache.ledger()["total"]["payload"] == 2 * 2 * 64 * 2 * 32 * dtype.itemsize


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_parts_of_a_prompt_make_no_difference(chunk):
    m, text = tiny.model(), tiny.ids(110)
    a, b = (KVCache(m, "keepkv(budget=40,threshold=0.3)") for _ in "ab")
    assert tiny.rms(tiny.feed(m, b, text[:, :100], chunk), tiny.feed(m, a, text[:, :100])) < 1e-5
    for layer in (0, 1):
        for head in (0, 1):
            assert torch.equal(a.live_positions(layer, head), b.live_positions(layer, head))
    assert tiny.rms(tiny.steps(m, b, text[:, 100:]), tiny.steps(m, a, text[:, 100:])) < 1e-4


@pytest.mark.parametrize("form", ["paper", "bias", "shift", "mean"])
def test_attend_equals_the_reference_with_weights_and_hidden_slots(form):
    m = tiny.model()
    cache = KVCache(m, [KeepKV(budget=40, threshold=0.3, key_form=form)])
    tiny.feed(m, cache, tiny.ids(100))
    tiny.steps(m, cache, tiny.ids(7))
    c = cache.layers[1]
    assert c.size > c.n_live and c.column("bias").any()
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[107]])
    assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.mask(pos))) < 1e-6
    p = probs(q, c.read()[0], c.mask(pos))
    assert not p[~c.live.repeat_interleave(3, 1).unsqueeze(2)].any()


def test_a_batch_of_unequal_prompts():
    m = tiny.model()
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (90, 50, 6)]
    rows = [list(generate_batch(m, KVCache(m, "keepkv(budget=40,threshold=0.3)"), [p], 30)) for p in prompts]
    together = list(generate_batch(m, KVCache(m, "keepkv(budget=40,threshold=0.3)"), prompts, 30))
    assert [list(x) for x in zip(*together, strict=True)] == [[t for (t,) in row] for row in rows]


def test_it_is_saved_with_its_weights(tmp_path):
    m, text = tiny.model(), tiny.ids(120)
    cache = KVCache(m, "keepkv(budget=40,threshold=0.3)")
    tiny.feed(m, cache, text[:, :90])
    cache.save(tmp_path / "c")
    again = KVCache.load(tmp_path / "c", m)
    assert torch.equal(tiny.steps(m, cache, text[:, 90:]), tiny.steps(m, again, text[:, 90:]))


def test_what_cannot_hold_a_merged_entry_is_refused():
    m = tiny.model()
    with pytest.raises(NotImplementedError, match="keepkv merges entries, and kivi cannot overwrite"):
        KVCache(m, "keepkv+kivi")
    with pytest.raises(NotImplementedError, match="no single position"):
        KVCache(m, "streamingllm(budget=100)+keepkv")
    with pytest.raises(NotImplementedError, match="sliding window"):
        KVCache(tiny.model(windows=(64, None)), "keepkv")


BAD = {"budget": 3, "n_sink": -1, "recent": 1.0, "threshold": -2.0, "alpha": 1.0, "window": 0, "key_form": "x"}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters_are_refused(name):
    with pytest.raises(ValueError, match=name):
        KeepKV(**{name: BAD[name]})
