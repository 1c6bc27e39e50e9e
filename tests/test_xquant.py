"""XQuant: the factors, rematerialised keys and values, what is quantised along which axis, and what it holds."""

import pytest
import tiny
import torch

from nanokv import KVCache, generate_batch
from nanokv.attention import reference
from nanokv.cache import Policy
from nanokv.methods import xquant
from nanokv.methods.xquant import XQuant, factor
from nanokv.quant import PerChannel, PerToken

WIDE = {"n_kv_heads": 1, "head_dim": 16}  # 64 inputs for 16 + 16 outputs: auto means latent


class Drop(Policy):
    """Forget chosen tokens of one KV head, or of all, when so many tokens have been read."""

    name = "drop"

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, cache, q, pos):
        now = cache.parent.next_position + q.shape[2]
        for at, head, tokens in self.plan:
            if at == now:
                heads = torch.arange(cache.config.n_kv_heads).view(1, -1, 1)
                gone = torch.isin(cache.token, torch.tensor(tokens, dtype=torch.int32))
                cache.keep(~(gone & ((heads == head) | (head is None))))


def biased(**kw):
    """Return a tiny model with biases and normalised queries and keys, none of them trivial."""
    m = tiny.model(qkv_bias=True, qk_norm=True, **kw)
    for block in m.layers:
        block.attn.qkv.bias.normal_()
        block.attn.k_norm.weight.uniform_(0.5, 2)
    return m


@pytest.mark.parametrize("make", [tiny.model, biased])
@pytest.mark.parametrize("mode", ["latent", "x"])
@pytest.mark.parametrize("chunk", [1, 7, 33, None])
def test_without_quantisation_nothing_changes(make, mode, chunk):
    m, text = make(), tiny.ids(120)
    cache, full = KVCache(m, f"xquant(bits=16,mode='{mode}')"), KVCache(m)
    assert tiny.rms(tiny.feed(m, cache, text[:, :100], chunk), tiny.feed(m, full, text[:, :100])) < 1e-5
    assert tiny.rms(tiny.steps(m, cache, text[:, 100:]), tiny.steps(m, full, text[:, 100:])) < 1e-5
    for a, b in zip(cache.layers, full.layers, strict=True):
        for x, y in zip(a.read(), b.read(), strict=True):
            assert tiny.rms(x, y) < 1e-5  # a product with U and M rounds like one with W, twice


def test_factors_multiply_to_the_weights_and_are_shared():
    m = tiny.model(**WIDE)
    attn = m.layers[0].attn
    both, Mk, Mv = factor(attn.qkv.weight, attn.widths)
    Wk, Wv = (w.T for w in attn.qkv.weight.split(attn.widths)[1:])
    x = torch.randn(50, 64)
    for U, M, W in zip(both.chunk(2, 1), (Mk, Mv), (Wk, Wv), strict=True):
        assert (U.T @ U - torch.eye(16)).abs().max() < 1e-5 and tiny.rms(U @ M, W) < 1e-5
        assert ((x @ U).norm(dim=1) <= x.norm(dim=1) * (1 + 1e-5)).all()
        # singular values come first in M: its rows are orthogonal and shrink
        assert tiny.rms((M @ M.T), torch.linalg.svdvals(W).square().diag()) < 1e-5
    caches = [KVCache(m, "xquant(group=16)") for _ in "ab"]
    for c in caches:
        m(tiny.ids(20), c)
    a, b = (c.layers[0].storage.bases for c in caches)
    assert a is b is factor(attn.qkv.weight, attn.widths)
    n = len(xquant.FACTORS)
    del m, attn, caches, c, a, b
    import gc

    gc.collect()
    assert len(xquant.FACTORS) < n  # they go with the model


def test_auto_chooses_the_narrower():
    for kw, latent in ((WIDE, True), ({}, False), ({"n_kv_heads": 1}, False)):  # 64 > 32, 64 <= 128, 64 <= 64
        m = tiny.model(**kw)
        cache = KVCache(m, "xquant(group=16)")
        m(tiny.ids(20), cache)
        assert bool(cache.layers[0].storage.bases) is latent


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mode", ["latent", "x"])
def test_what_is_quantised_along_which_axis(mode, bits):
    """The test that turns red when a stream is quantised along another axis, or before its prompt has ended."""
    m, g = tiny.model(**WIDE), 16
    cache, exact = KVCache(m, [XQuant(bits, g, mode)]), KVCache(m, [XQuant(16, g, mode)])
    for c in (cache, exact):
        tiny.feed(m, c, tiny.ids(60), 25)
    z = [t[0] for t in exact.layers[0].storage._latents()]  # two times (60, r)
    got = [t[0] for t in cache.layers[0].storage._latents()]
    kinds = (PerChannel, PerToken) if mode == "latent" else (PerToken, PerToken)
    for a, b, kind in zip(z, got, kinds, strict=True):
        q = kind(1, bits, g)
        q.add([0], a[None, :48])
        # matrix products of other shapes round otherwise, so a code on the edge may differ by one step
        assert (q.read(0) != b[:48]).float().mean() < 0.02 and torch.allclose(a[48:], b[48:], atol=1e-5)
        groups = a[:48].unflatten(0, (-1, g)).mT if kind is PerChannel else a[:48].unflatten(1, (-1, g))
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        err = (a - b)[:48].unflatten(0, (-1, g)).mT if kind is PerChannel else (a - b)[:48].unflatten(1, (-1, g))
        slack = 2.0**-10 * groups.abs().amax(-1) * 2  # scale and minimum are rounded to fp16
        assert (err.abs().amax(-1) <= step / 2 + slack).all()


def test_keys_are_off_by_at_most_the_norm_of_their_factor():
    m = tiny.model(**WIDE)
    cache, exact = KVCache(m, "xquant(bits=4,group=16)"), KVCache(m, "xquant(bits=16,group=16)")
    for c in (cache, exact):
        tiny.feed(m, c, tiny.ids(64))
    for i in (0, 1):
        z, z4 = (c.layers[0].storage._latents()[i][0] for c in (exact, cache))
        y, y4 = (c.layers[0].read()[i][0, 0] for c in (exact, cache))  # one head: rotation keeps norms
        most = torch.linalg.matrix_norm(cache.layers[0].storage.bases[i + 1], 2)
        assert ((y - y4).norm(dim=1) <= most * (z - z4).norm(dim=1) * (1 + 1e-4)).all() and (z != z4).any()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("mode", ["latent", "x"])
@pytest.mark.parametrize("T", [1, 15, 16, 100, 1000])
def test_the_ledger_equals_the_formula(mode, bits, T):
    m, g = tiny.model(context=1024, **WIDE), 16
    cache = KVCache(m, [XQuant(bits, g, mode)])
    tiny.feed(m, cache, tiny.ids(T), 300)
    w, Tq = 64 if mode == "x" else 32, T - T % g if bits < 16 else 0
    for row in cache.ledger()["layers"]:
        assert row["payload"] == (Tq * w * bits // 8 if bits < 16 else T * w * 4)
        assert row["scales"] == Tq * w * 4 // g and row["residual"] == ((T - Tq) * w * 4 if bits < 16 else 0)
        assert row["constants"] == (0 if mode == "x" else (64 * 32 + 2 * 16 * 16) * 4)
        assert row["held"] == sum(row[k] for k in ("payload", "scales", "residual", "unused")) and row["unused"] >= 0
        group = w * g * bits // 8 + 4 * w
        n = max(T - Tq, 1)
        most = max(4, T // g // 16) * 2 * group + max(16, T // 16) * 8 * w // g + max(16, n // 16) * w * 4
        assert row["unused"] <= most


@pytest.mark.parametrize("make", [tiny.model, biased])
@pytest.mark.parametrize("mode", ["latent", "x"])
def test_mixing_latents_first_equals_the_reference(make, mode):
    m = make(G=4)
    cache = KVCache(m, f"xquant(bits=4,group=32,mode='{mode}')")
    tiny.feed(m, cache, tiny.ids(150), 50)
    tiny.steps(m, cache, tiny.ids(7))
    c = cache.layers[1]
    for T in (1, 3):
        q, pos = torch.randn(1, 8, T, 32), torch.arange(157 - T, 157)[None]
        assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.mask(pos))) < 1e-5


def test_more_bits_come_closer():
    m, text = tiny.model(**WIDE), tiny.ids(170)
    full, errors = KVCache(m), []
    tiny.feed(m, full, text[:, :160])
    exact = tiny.steps(m, full, text[:, 160:])
    for bits in (2, 4, 8, 16):
        cache = KVCache(m, f"xquant(bits={bits},group=16)")
        tiny.feed(m, cache, text[:, :160])
        errors.append(tiny.rms(tiny.steps(m, cache, text[:, 160:]), exact))
    assert errors[0] > 1.5 * errors[1] and errors[1] > 6 * errors[2] and errors[2] > 100 * errors[3], errors


@pytest.mark.parametrize("mode", ["latent", "x"])
@pytest.mark.parametrize("chunk", [16, 33, 99])
def test_the_prompt_is_read_exactly_in_any_parts(mode, chunk):
    m, text = tiny.model(), tiny.ids(100)
    cache = KVCache(m, f"xquant(bits=2,group=16,mode='{mode}')")
    assert tiny.rms(tiny.feed(m, cache, text, chunk), m(text, KVCache(m))) < 1e-5
    assert cache.layers[0].storage.v_old.n == [96] and cache.layers[0].storage.new.n == [4]


def test_groups_fill_while_decoding():
    m = tiny.model(**WIDE)
    cache = KVCache(m, "xquant(bits=8,group=16)")
    for t in range(70):
        m(tiny.ids(1, seed=t), cache)
        s = cache.layers[0].storage
        T = t + 1
        assert s.new.n == [T % 16] and s.k_old.n == s.v_old.n == [T - T % 16]


@pytest.mark.parametrize("mode", ["latent", "x"])
def test_an_entry_stays_until_it_is_forgotten_in_all_heads(mode):
    plan = [(100, 0, list(range(10, 60))), (100, 1, list(range(30, 80))), (120, None, list(range(64, 70))),
            (130, 0, list(range(60, 100))), (130, 1, list(range(50, 96)))]  # fmt: skip
    m, text = tiny.model(), tiny.ids(140)
    cache, full = KVCache(m, [Drop(plan), XQuant(bits=16, mode=mode)]), KVCache(m, [Drop(plan)])
    packed = KVCache(m, [Drop(plan), XQuant(bits=8, group=16, mode=mode)])
    for c in (cache, full, packed):
        tiny.feed(m, c, text[:, :100])
        c.sizes = [c.layers[0].n_slots]
        c.out = tiny.steps(m, c, text[:, 100:])
        c.sizes.append(c.layers[0].n_slots)
    assert cache.sizes[0] == packed.sizes[0] == [70, 70]  # 30..59 died in both heads
    assert tiny.rms(cache.out, full.out) < 1e-5 and tiny.rms(packed.out, full.out) < 0.1
    for c in (cache, packed):
        layer = c.layers[0]
        for h in (0, 1):
            assert torch.equal(c.live_positions(0, h), full.live_positions(0, h))
        q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[140]])
        assert tiny.rms(layer.attend(q, pos), reference(q, *layer.read(), layer.mask(pos))) < 1e-5
        assert layer.read()[0].shape[2] == layer.size
    s = packed.layers[0].storage
    assert s.v_old.n[0] + s.new.n[0] == packed.sizes[1][0] < 110  # whole groups have gone since


@pytest.mark.parametrize("mode", ["latent", "x"])
@pytest.mark.parametrize("make", [tiny.model, biased])
def test_positions_that_are_renumbered(mode, make):
    m, out = make(), []
    for storage in ("full", f"xquant(bits=16,mode='{mode}')"):
        cache = KVCache(m, f"streamingllm(budget=40)+{storage}")
        for part in tiny.ids(90).split(9, 1):
            tiny.feed(m, cache, part)
        out.append(tiny.steps(m, cache, tiny.ids(60, seed=3)))
    assert tiny.rms(out[1], out[0]) < 1e-5


@pytest.mark.parametrize("policy", ["streamingllm(budget=60,reindex=False)+", "streamingllm(budget=60)+", ""])
def test_it_composes_and_attends_as_the_reference(policy):
    m = tiny.model()
    cache = KVCache(m, policy + "xquant(bits=4,group=32)")
    for part in tiny.ids(130).split(10, 1):
        tiny.feed(m, cache, part)
    tiny.steps(m, cache, tiny.ids(100))
    c = cache.layers[1]
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[59 if c.renumbers else 230]])
    assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.mask(pos))) < 1e-5
    if policy:  # what died groupwise is gone
        assert c.size < 60 + 3 * 32 + 16


def test_a_batch_of_unequal_prompts():
    m = tiny.model(**WIDE)
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (70, 41, 6)]
    together = list(generate_batch(m, KVCache(m, "xquant(bits=8,group=16)"), prompts, 30))
    for b, p in enumerate(prompts):
        alone = list(generate_batch(m, KVCache(m, "xquant(bits=8,group=16)"), [p], 30))
        assert [t for (t,) in alone] == [row[b] for row in together]


@pytest.mark.parametrize("mode", ["latent", "x"])
def test_bfloat16(mode):
    m = tiny.model(dtype=torch.bfloat16)
    full, cache = KVCache(m), KVCache(m, f"xquant(bits=16,mode='{mode}')")
    for c in (full, cache):
        tiny.feed(m, c, tiny.ids(90))
    for a, b in zip(cache.layers[0].read(), full.layers[0].read(), strict=True):
        assert a.dtype == torch.bfloat16 and tiny.rms(a, b) < 2**-7  # latents and keys carry 2^-9 each
    packed = KVCache(m, f"xquant(bits=4,group=32,mode='{mode}')")
    tiny.feed(m, packed, tiny.ids(90), 33)
    assert tiny.steps(m, packed, tiny.ids(40)).isfinite().all()


def test_bad_parameters_are_refused():
    for bad in ({"bits": 3}, {"group": 0}, {"group": 13}, {"mode": "y"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            XQuant(**bad)
    with pytest.raises(NotImplementedError, match="group 48 does not divide the 64 channels"):
        KVCache(tiny.model(), "xquant(group=48)")


def test_on_a_real_model_the_latents_of_keys_want_a_scale_per_channel(smollm2):
    """Channels come by their singular values, so a group across channels is spanned by its largest."""
    m, tokenizer = smollm2
    cache = KVCache(m, "xquant(bits=16)")
    text = (__doc__ + test_on_a_real_model_the_latents_of_keys_want_a_scale_per_channel.__doc__) * 3
    ids = torch.tensor([tokenizer.encode(text)[:128]])
    m(ids, cache, last=True)
    wins = 0
    for c in cache.layers:
        assert c.storage.bases
        z, errors = c.storage._latents()[0], []
        for kind in (PerChannel, PerToken):
            q = kind(1, 4, 64)
            q.add([0], z)
            errors.append(tiny.rms(q.read(0), z[0]))
        wins += errors[0] < errors[1]
    assert ids.shape[1] == 128 and wins == 30
