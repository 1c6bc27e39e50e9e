"""KeepKV: that a merge leaves attention as it was, the moving average, what is merged with what, and what it holds."""

import math

import pytest
import tiny
import torch

from nanokv import KVCache, generate_batch
from nanokv.attention import reduce_group, reference
from nanokv.method import Policy
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


# Turns red when the factor ln(W / P) / mean z, or the weights of the merge, are changed.
@pytest.mark.parametrize("form", ["paper", "bias", "shift"])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 2.0, -1.5])
def test_mutation_the_query_that_decided_gets_the_same_output(form, size, shift):
    for seed in range(20):
        for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            q, k, v, z, b = entries(seed=seed, dtype=dtype, shift=shift)
            assert (after(q, k, v, z, b, grouped(12, size), form) - attend(q, k, v, b)).abs().max() < most


@pytest.mark.parametrize("form", ["paper", "bias", "shift"])
def test_logits_whose_mean_is_zero(form):
    q, k, v, z, _ = entries(N=2, H=1)
    q = q / q.norm()
    z = torch.tensor([[[1.0, -1.0]]]).double()
    k = z[..., None] * math.sqrt(16) * q  # weights exp(-1) and exp(1): the masses are equal, and so the mean is 0
    got = after(q, k, v, z, -z, torch.zeros(1, 1, 2, dtype=torch.int64), form)
    assert (got - attend(q, k, v, -z)).abs().max() < 1e-12


def test_an_unsafe_factor_falls_back_to_the_bias_form():
    seen, to = set(), torch.zeros(1, 1, 2, dtype=torch.int64)
    for seed in range(60):
        q, k, v, z, b = entries(N=2, H=1, seed=seed)
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
    k1, _, b1, mass = merge(k, v, z, b, torch.zeros(1, 1, 3, dtype=torch.int64), "mean")
    w, pi = (b + z).softmax(-1), b.softmax(-1)
    got = float((q @ k1[:, :, :1].mT).squeeze() / 4 + b1[0, 0, 0])
    assert got - float(mass[0, 0, 0]) == pytest.approx(float((w * (w / pi).log()).sum()), abs=1e-12)


def test_the_bias_form_stays_exact_when_all_logits_move_together():
    _, k, v, z, b = entries(N=5, H=1)
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
    other, stay = torch.randn(1, 2, 1, 16, dtype=torch.float64), [0, 1, 2, 4, 5]
    assert torch.allclose(attend(other, k1[..., stay, :], v1[..., stay, :], b1[..., stay]), attend(other, k, v, b))


def test_without_merges_nothing_is_touched():
    _, k, v, z, b = entries()
    b[..., 3] = 0.0
    z[..., 4] = 0.0  # a factor of 0 / 0
    for got, want in zip(merge(k, v, z, b, torch.arange(12).repeat(1, 2, 1)), (k, v, b, b + z), strict=True):
        assert torch.allclose(got, want, atol=1e-13)


class Look(Policy):
    """Note keys, values and the mean query's logits (Hkv, W, N) of a prompt's last queries, in fp64."""

    def __init__(self, window):
        self.observes = window

    def after_prompt(self, cache):
        q, (k, v) = cache.observed(self.observes)[0].double(), cache.read()
        self.q, self.k, self.v = reduce_group(q, k.shape[1], "mean")[0], k[0].double(), v[0].double()
        self.z = self.q @ self.k.mT / math.sqrt(k.shape[-1])


def looked(m, text, window):
    look = Look(window)
    tiny.feed(m, KVCache(m, [look]), text)
    return look


def oracle(look, budget, threshold, alpha, n_sink, n_recent):
    """Return per KV head {token: (key, value, votes, log weight, log S)} after a prompt, by loops in fp64."""
    k, v, z, out = look.k, look.v, look.z, []
    T, W = k.shape[1], z.shape[1]
    for h in range(len(k)):
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


# Turns red when the moving average, the choice, the pairing or the merge are changed.
@pytest.mark.parametrize("threshold, alpha", [(0.2, 0.9), (-1.0, 0.5), (0.3, 0.0)])
def test_mutation_a_prompt_is_merged_as_defined(threshold, alpha):
    m, text = tiny.model(n_layers=1, G=2), tiny.ids(70)
    cache = KVCache(m, [KeepKV(budget=30, window=12, threshold=threshold, alpha=alpha)])
    tiny.feed(m, cache, text, 29)
    c, heads = cache.layers[0], oracle(looked(m, text, 12), 30, threshold, alpha, 4, 6)
    assert any(p > 2 for head in heads for *_, p, _, _ in head.values())
    (k, v), bias, logS = c.read(), c.column("bias")[0], c.column("logS")[0]
    for h, head in enumerate(heads):
        assert cache.live_positions(0, h).tolist() == list(head)
        for slot, (kr, vr, _, b, s) in enumerate(head.values()):
            # fp32 logits of up to 10 carry 1e-6, and their exponentials as much relative error
            assert tiny.rms(k[0, h, slot], kr) < 1e-4 and tiny.rms(v[0, h, slot], vr) < 1e-4
            assert float(bias[h, slot]) == pytest.approx(b, abs=1e-4)
            assert float(logS[h, slot]) == pytest.approx(s, abs=1e-4)


class Watch(KeepKV):
    """Note how much a step's own query sees another output, and another mass, after its merge."""

    seen = []

    def after_step(self, cache, q, pos):
        before = self.look(cache, q, pos)
        super().after_step(cache, q, pos)
        o, mass = self.look(cache, q, pos)
        self.seen.append((tiny.rms(o, before[0]), float((mass - before[1]).abs().max())))

    def look(self, cache, q, pos):
        k, v = cache.read()
        mask = cache.additive_mask(pos)
        s = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
        return reference(q, k, v, mask), (s + mask).logsumexp(-1)


@pytest.mark.parametrize("form", ["paper", "bias", "shift"])
def test_a_step_does_not_change_what_its_own_query_sees(form):
    """alpha=0 is the single-step form: outputs and the sum of masses before and after the merge are equal."""
    m, text = tiny.model(G=1, n_layers=2), tiny.ids(90)
    watch = Watch(budget=40, threshold=-1.0, alpha=0.0, key_form=form)
    watch.seen = []
    cache = KVCache(m, [watch])
    tiny.feed(m, cache, text[:, :60])
    tiny.steps(m, cache, text[:, 60:])
    assert len(watch.seen) == 60 and all(c.n_live == 40 for c in cache.layers)
    assert max(max(pair) for pair in watch.seen) < 3e-5  # fp32; logits of up to 10 carry 1e-6


def test_the_mean_query_of_a_group_is_the_exact_one():
    m, text = tiny.model(G=3, n_layers=1), tiny.ids(80)
    q, own = looked(m, text, 1).q.float()[None], torch.randn(1, 2, 1, 32)
    full, cache = KVCache(m), KVCache(m, [KeepKV(budget=30, threshold=-1.0, alpha=0.0)])
    for c in (full, cache):
        tiny.feed(m, c, text)
        layer, pos = c.layers[0], torch.tensor([[79]])
        c.outs = [reference(x, *layer.read(), layer.additive_mask(pos)) for x in (q, own)]
    assert tiny.rms(cache.outs[0], full.outs[0]) < 2e-5  # fp32
    assert tiny.rms(cache.outs[1], full.outs[1]) > 0.01  # any other query sees something else


def test_the_moving_average_follows_every_query():
    m, text, alpha = tiny.model(n_layers=1), tiny.ids(60), 0.8
    cache = KVCache(m, [KeepKV(budget=100, window=10, alpha=alpha)])
    tiny.feed(m, cache, text[:, :40])
    tiny.steps(m, cache, text[:, 40:])
    z = looked(m, text, 30).z  # (Hkv, 30, 60): the window's 10 queries and the 20 steps
    c = cache.layers[0]
    for j in (0, 20, 33, 39, 45, 59):
        S, n = torch.zeros(2).double(), 0
        for i in range(30):
            if 30 + i >= j:
                S, n = alpha * S + (1 - alpha) * z[:, i, j].exp(), n + 1
        assert torch.allclose(c.column("logS")[0, :, j].double(), S.log(), atol=1e-5)
        assert c.column("age", 0, torch.int16)[0, :, j].tolist() == [n, n]


def test_no_pair_is_similar_enough_above_a_cosine_of_one():
    class Drops(KeepKV):
        def forget(self, cache, score, n, q):
            cache.keep_best(score, n, *self.protects)

    m, text = tiny.model(), tiny.ids(110)
    caches = [KVCache(m, [kind(budget=40, threshold=1.01, window=12)]) for kind in (KeepKV, Drops)]
    for c in caches:
        tiny.feed(m, c, text[:, :80])
        tiny.steps(m, c, text[:, 80:])
    for a, b in zip(*(c.layers for c in caches), strict=True):
        assert torch.equal(a.token, b.token)
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


def test_within_the_budget_nothing_changes_bit_by_bit():
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
        held |= {row["held"] for row in cache.ledger()["layers"]}
    assert held == {2 * (64 + 16) * (2 * 32 * dtype.itemsize + 14)} and logits.isfinite().all()


@pytest.mark.parametrize("form", ["paper", "bias", "shift", "mean"])
def test_attend_equals_the_reference_with_weights_and_hidden_slots(form):
    m = tiny.model()
    cache = KVCache(m, [KeepKV(budget=40, threshold=0.3, key_form=form)])
    tiny.feed(m, cache, tiny.ids(100))
    tiny.steps(m, cache, tiny.ids(7))
    c = cache.layers[1]
    assert c.N > c.n_live and c.column("bias").any()
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[107]])
    assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.additive_mask(pos))) < 1e-6
    assert not c.probs(q, pos)[~c.live.repeat_interleave(3, 1).unsqueeze(2)].any()


def test_a_sequence_that_pauses_goes_on_as_if_alone():
    m, spec = tiny.model(), "keepkv(budget=40,threshold=0.3)"
    turns = [[tiny.ids(n, seed=n)[0].tolist() for n in lengths] for lengths in ((90, 50, 6), (30, 0, 9), (5, 7, 60))]
    batch, ones = KVCache(m, spec), [KVCache(m, spec) for _ in range(3)]
    for prompts in turns:
        together = list(zip(*generate_batch(m, batch, prompts, 20), strict=True))
        for b, prompt in enumerate(prompts):
            if prompt:
                assert [t for (t,) in generate_batch(m, ones[b], [prompt], 20)] == list(together[b])


def test_over_a_plan_heads_keep_their_numbers():
    m = tiny.model()
    cache = KVCache(m, "keepkv(budget=40,threshold=0.3)+adakv")
    tiny.feed(m, cache, tiny.ids(100))
    counts = [c.counts for c in cache.layers]
    assert all(sum(n) == 80 for n in counts) and any(len(set(n)) > 1 for n in counts)
    tiny.steps(m, cache, tiny.ids(20))
    assert [c.counts for c in cache.layers] == counts


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
    with pytest.raises(ValueError, match=f"keepkv: {name} must be"):
        KeepKV(**{name: BAD[name]})
