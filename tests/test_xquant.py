"""XQuant: the factors, rematerialised keys and values, what is quantised along which axis, and what it holds."""

import gc

import pytest
import tiny
import torch

from nanokv import KVCache, generate_batch, quant
from nanokv.attention import reference
from nanokv.method import Policy
from nanokv.methods import xquant
from nanokv.methods.xquant import XQuant, factor

WIDE = {"n_kv_heads": 1, "head_dim": 16}  # 64 inputs for 16 + 16 outputs: auto means latent


class Drop(Policy):
    """Forget chosen tokens of one KV head, or of all, when so many tokens have been read."""

    def __init__(self, *plan):
        self.plan = plan

    def after_prompt(self, cache):
        for at, head, tokens in self.plan:
            if [at] == cache.next_position:
                heads = torch.arange(cache.config.n_kv_heads).view(1, -1, 1)
                gone = torch.isin(cache.token, torch.tensor(tokens, dtype=torch.int32))
                cache.keep(~(gone & ((heads == head) | (head is None))))

    def after_step(self, cache, q, pos):
        self.after_prompt(cache)


def biased(**kw):
    """Return a tiny model with biases and normalised queries and keys, none of them trivial."""
    m = tiny.model(qkv_bias=True, qk_norm=True, **kw)
    for block in m.layers:
        for proj in (block.self_attn.k_proj, block.self_attn.v_proj):
            proj.bias.normal_()
        block.self_attn.k_norm.weight.uniform_(0.5, 2)
    return m


def fed(m, spec, text, chunk=None):
    cache = KVCache(m, spec)
    tiny.feed(m, cache, text, chunk)
    return cache


def latents(cache):
    """Return z_k and z_v of the first sequence in layer 0, (N, r)."""
    return [t[0] for t in cache.layers[0].storage.latents()]


@pytest.mark.parametrize("make", [tiny.model, biased])
@pytest.mark.parametrize("mode", ["latent", "x"])
@pytest.mark.parametrize("policy", ["", "streamingllm(budget=60)+"])
def test_without_quantisation_nothing_changes(make, mode, policy):
    m, text = make(), tiny.ids(120)
    cache, full = KVCache(m, f"{policy}xquant(bits=16,mode='{mode}')"), KVCache(m, f"{policy}full")
    for c in (cache, full):
        c.out = [tiny.feed(m, c, text[:, :100], 10), tiny.steps(m, c, text[:, 100:])]
    assert all(tiny.rms(a, b) < 1e-5 for a, b in zip(cache.out, full.out, strict=True))
    for pair in zip(cache.layers, full.layers, strict=True):
        (k, v), (k_full, v_full) = ([t[c.live.expand(t.shape[:3])] for t in c.read()] for c in pair)
        assert tiny.rms(k, k_full) < 1e-5 and tiny.rms(v, v_full) < 1e-5  # a product with U and M rounds twice


def test_factors_multiply_to_the_weights_and_are_shared():
    m = tiny.model(**WIDE)
    attn, x = m.layers[0].self_attn, torch.randn(50, 64)
    for weight in (attn.k_proj.weight, attn.v_proj.weight):
        (U, M), W = factor(weight), weight.T
        assert (U.T @ U - torch.eye(16)).abs().max() < 1e-5 and tiny.rms(U @ M, W) < 1e-5
        assert ((x @ U).norm(dim=1) <= x.norm(dim=1) * (1 + 1e-5)).all()
        # singular values come first in M: its rows are orthogonal and shrink
        assert tiny.rms((M @ M.T), torch.linalg.svdvals(W).square().diag()) < 1e-5
    caches = [fed(m, "xquant(group=16)", tiny.ids(20)) for _ in "ab"]
    caches.append(caches[0].clone())
    assert all(c.layers[0].storage.factors[1][0] is factor(attn.v_proj.weight)[0] for c in caches)
    n = len(xquant.FACTORS)
    del m, attn, caches, weight, W, U, M
    gc.collect()
    assert len(xquant.FACTORS) < n  # they go with the model


def test_auto_chooses_the_narrower():
    for kw, latent in ((WIDE, True), ({}, False), ({"n_kv_heads": 1}, False)):  # 64 > 32, 64 <= 128, 64 <= 64
        cache = fed(tiny.model(**kw), "xquant(group=16)", tiny.ids(20))
        assert bool(cache.layers[0].storage.factors) is latent


# Turns red when a stream is quantised along another axis, or before its prompt has ended.
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["latent", "x"])
def test_mutation_what_is_quantised_along_which_axis(mode, bits):
    m, g = tiny.model(**WIDE), 16
    exact, cache = (fed(m, [XQuant(bits=b, group=g, mode=mode)], tiny.ids(60), 25) for b in (16, bits))
    for which, a, b in zip("kv", latents(exact), latents(cache), strict=True):
        tokens, group = (g, 0) if which == "k" and mode == "latent" else (1, g)
        x = a[:48].unflatten(0, (-1, tokens))
        y = quant.decode(**quant.encode(x, bits, group), bits=bits, tokens=tokens, group=group).flatten(0, 1)
        # matrix products of other shapes round otherwise, so a code on the edge may differ by one step
        assert (y != b[:48]).float().mean() < 0.02 and torch.allclose(a[48:], b[48:], atol=1e-5)
        groups, err = (
            t[:48].unflatten(0, (-1, g)).mT if not group else t[:48].unflatten(1, (-1, g)) for t in (a, a - b)
        )
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        slack = 2.0**-10 * groups.abs().amax(-1) * 2  # scale and minimum are rounded to fp16
        assert (err.abs().amax(-1) <= step / 2 + slack).all()


def test_keys_are_off_by_at_most_the_norm_of_their_factor():
    m = tiny.model(**WIDE)
    exact, cache = (fed(m, f"xquant(bits={bits},group=16)", tiny.ids(64)) for bits in (16, 4))
    for i in (0, 1):
        z, z4 = latents(exact)[i], latents(cache)[i]
        y, y4 = (c.layers[0].read()[i][0, 0] for c in (exact, cache))  # one head: rotation keeps norms
        most = torch.linalg.matrix_norm(cache.layers[0].storage.factors[i][1], 2)
        assert ((y - y4).norm(dim=1) <= most * (z - z4).norm(dim=1) * (1 + 1e-4)).all() and (z != z4).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("mode", ["latent", "x"])
@pytest.mark.parametrize("T", [1, 16, 100, 1000])
def test_the_ledger_equals_the_formula(mode, bits, T):
    m, g = tiny.model(context=1024, **WIDE), 16
    cache = fed(m, [XQuant(bits=bits, group=g, mode=mode)], tiny.ids(T), 300)
    w, Tq = 64 if mode == "x" else 32, T - T % g if bits < 16 else 0
    for row in cache.ledger()["layers"]:
        assert row["payload"] == Tq * w * bits // 8 and row["scales"] == Tq * w * 4 // g
        assert row["residual"] == (T - Tq) * w * 4
        assert row["constants"] == (0 if mode == "x" else (64 * 32 + 2 * 16 * 16) * 4)
        assert row["held"] == sum(row[k] for k in ("payload", "scales", "residual", "unused"))
        spare = max(16, Tq // 16) * (w * bits // 8 + 4 * w // g) + 2 * max(16, (T - Tq) // 16) * w * 4
        assert 0 <= row["unused"] <= spare


@pytest.mark.parametrize("make", [tiny.model, biased])
@pytest.mark.parametrize("spec", [
    "xquant(bits=4,group=32,mode='latent')", "xquant(bits=4,group=32,mode='x')",
    "streamingllm(budget=60)+xquant(group=32)", "snapkv(budget=60)+xquant(group=32)",
])  # fmt: skip
def test_mixing_latents_first_equals_the_reference(make, spec):
    m = make(G=4)
    cache = fed(m, spec, tiny.ids(150), 10)
    tiny.steps(m, cache, tiny.ids(37))
    c = cache.layers[1]
    assert any(c.storage.old["v"].n)
    for T in (1, 3):
        last = c.counts[0] if c.renumbers else 187
        q, pos = torch.randn(1, 8, T, 32), torch.arange(last - T, last)[None]
        assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.additive_mask(pos))) < 1e-5


def test_more_bits_come_closer():
    m, text = tiny.model(**WIDE), tiny.ids(170)
    exact, errors = tiny.steps(m, fed(m, "full", text[:, :160]), text[:, 160:]), []
    for bits in (2, 3, 4, 8, 16):
        cache = fed(m, f"xquant(bits={bits},group=16)", text[:, :160])
        errors.append(tiny.rms(tiny.steps(m, cache, text[:, 160:]), exact))
    assert all(b < 0.8 * a for a, b in zip(errors, errors[1:], strict=False)) and errors[4] < 0.01 * errors[3], errors


@pytest.mark.parametrize("mode", ["latent", "x"])
def test_groups_fill_while_decoding(mode):
    m = tiny.model(**WIDE)
    cache = KVCache(m, [XQuant(bits=8, group=16, mode=mode, n_sink=3, residual=5)])
    for T in range(1, 71):
        tiny.steps(m, cache, tiny.ids(1, seed=T))
        s = cache.layers[0].storage
        packed = max(0, T - 3 - 5) // 16 * 16
        for which, new in s.new.items():
            assert s.first[which].n[0] + new.n[0] == T - packed and s.old[which].n == [packed // s.slot[which]]


@pytest.mark.parametrize("mode", ["latent", "x"])
def test_an_entry_stays_until_it_is_forgotten_in_all_heads(mode):
    drop = Drop((100, 0, range(10, 60)), (100, 1, range(30, 80)), (120, None, range(64, 70)),
                (130, 0, range(60, 100)), (130, 1, range(50, 96)))  # fmt: skip
    drop.plan = [(at, head, list(tokens)) for at, head, tokens in drop.plan]
    m, text = tiny.model(), tiny.ids(140)
    storages = {"full": [], "exact": [XQuant(bits=16, mode=mode)], "packed": [XQuant(bits=8, group=16, mode=mode)]}
    caches = {name: KVCache(m, [drop, *storage]) for name, storage in storages.items()}
    for c in caches.values():
        tiny.feed(m, c, text[:, :100])
        c.first = c.layers[0].n_slots
        c.out = tiny.steps(m, c, text[:, 100:])
    full, exact, packed = caches.values()
    assert exact.first == packed.first == [70, 70]  # 30..59 died in both heads
    assert tiny.rms(exact.out, full.out) < 1e-5 and tiny.rms(packed.out, full.out) < 0.1
    for c in (exact, packed):
        for h in (0, 1):
            assert torch.equal(c.live_positions(0, h), full.live_positions(0, h))
    # of 70 packed at 100, 60..63 and 70..95 have died since: in latent mode whole groups of 16 go
    left = packed.layers[0].n_slots[0]
    assert left < 110 and exact.layers[0].n_slots[0] <= left


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
    full, cache = fed(m, "full", tiny.ids(90)), fed(m, f"xquant(bits=16,mode='{mode}')", tiny.ids(90))
    for a, b in zip(cache.layers[0].read(), full.layers[0].read(), strict=True):
        assert a.dtype == torch.bfloat16 and tiny.rms(a, b) < 2**-7  # latents and keys carry 2^-9 each
    packed = fed(m, f"xquant(bits=4,group=32,mode='{mode}')", tiny.ids(90), 33)
    assert tiny.steps(m, packed, tiny.ids(40)).isfinite().all()


def test_bad_parameters_are_refused():
    for bad in ({"bits": 1}, {"bits": 9}, {"group": 0}, {"group": 13}, {"group": 4, "bits": 3}, {"mode": "y"},
                {"bits": 16, "bits_k": 4}):  # fmt: skip
        with pytest.raises(ValueError, match=f"xquant: {next(iter(bad))} must"):
            XQuant(**bad)
    with pytest.raises(NotImplementedError, match="group 48 does not divide the 64 channels"):
        KVCache(tiny.model(), "xquant(group=48)")
    with pytest.raises(NotImplementedError, match="xquant stores layer inputs, not keys and values for pca to turn"):
        KVCache(tiny.model(), "pca+xquant")


def test_on_a_real_model_the_latents_of_keys_want_a_scale_per_channel(smollm2):
    """Channels come by their singular values, so a group across channels is spanned by its largest."""
    m, tokenizer = smollm2
    text = (__doc__ + test_on_a_real_model_the_latents_of_keys_want_a_scale_per_channel.__doc__) * 3
    cache = fed(m, "xquant(bits=16)", torch.tensor([tokenizer.encode(text)[:128]]))
    wins = 0
    for c in cache.layers:
        z, errors = c.storage.latents()[0][0], []  # (128, 192)
        for tokens, group in ((64, 0), (1, 64)):
            codes = quant.encode(z.unflatten(0, (-1, tokens)), 4, group)
            errors.append(tiny.rms(quant.decode(**codes, bits=4, tokens=tokens, group=group).flatten(0, 1), z))
        wins += errors[0] < errors[1]
    assert z.shape == (128, 192) and wins == 30
