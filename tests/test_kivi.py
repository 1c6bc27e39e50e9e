"""KIVI: its quantiser, which tokens are quantised when, and the bytes it holds."""

import pytest
import tiny
import torch

from nanokv import KVCache
from nanokv.attention import reference
from nanokv.cache import Policy
from nanokv.methods.kivi import KIVI
from nanokv.quant import PerChannel, PerToken, pack, quantise, unpack


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_lossless_and_dense(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 64, 7), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.uint8 and words.shape == (3, 5, 64 * bits // 8, 7)
    assert torch.equal(unpack(words, bits), codes)


def _dequantise(x, bits):
    codes, scale, low = quantise(x, bits)
    assert 0 <= int(codes.min()) and int(codes.max()) <= 2**bits - 1
    return (
        codes.float() * scale.float()[..., None] + low.float()[..., None],
        scale.float()[..., None],
        low.float()[..., None],
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_within_half_a_step(bits):
    x = torch.randn(400, 32) * torch.logspace(-2, 2, 400)[:, None]
    y, scale, low = _dequantise(x, bits)
    # fp16 has 11 significant bits, so minimum and scale are off by at most 2^-12 of themselves each; the top code
    # multiplies the scale's error
    slack = 2.0**-11 * (low.abs() + (2**bits - 1) * scale)
    assert ((x - y).abs() <= scale / 2 + slack).all()


@pytest.mark.parametrize("bits, group, expected", [
    (2, 32, 0.154), (4, 32, 0.00612), (2, 16, 0.107), (4, 16, 0.0042), (2, 64, 0.203), (4, 64, 0.0080), (2, 128, 0.251),
])  # fmt: skip
def test_mean_square_error_on_normal_data(bits, group, expected):
    x = torch.randn(200_000 // group, group, generator=torch.Generator().manual_seed(0))
    y, _, _ = _dequantise(x, bits)
    assert float((x - y).square().mean()) == pytest.approx(expected, rel=0.03)


def test_grid_values_and_constants_survive():
    grid = torch.tensor([[-1.0, 0.5, 2.0, 3.5] * 8, [7.25] * 32])
    assert torch.equal(_dequantise(grid, 2)[0], grid)
    y, _, _ = _dequantise(torch.tensor([[-1.0, -0.2, 0.3, 2.0] * 8]), 2)
    assert y[0, :4].tolist() == [-1, 0, 0, 2]


def _layer(cache, i=0):
    return cache.layers[i].storage


def test_groups_run_along_tokens_for_keys_and_along_channels_for_values():
    m = tiny.model(n_layers=1)
    cache = KVCache(m, "kivi(bits=2,residual=32)")
    tiny.feed(m, cache, tiny.ids(64))
    s = _layer(cache)
    keys, codes, stats = s.k_old.rows, s.v_old.codes, s.v_old.stats
    assert keys["code"].shape == (2, 2, 8, 32)  # 2 rows, 2 groups of 32 tokens in 8 bytes of 4, 32 channels
    assert keys["scale"].shape == (2, 2, 32)
    assert codes["code"].shape == (2, 1, 8, 32) and stats["scale"].shape == (2, 32, 1)


def test_an_outlier_channel_does_not_hurt_other_key_channels():
    m = tiny.model(n_layers=1)
    k = torch.randn(1, 2, 128, 32)
    loud = k.clone()
    loud[..., 5] *= 20
    back = []
    for keys in (k, loud):
        cache = KVCache(m, "kivi(bits=2)")
        c, cache.phase = cache.layers[0], "last"
        c._allocate(1, k.device)
        c.storage.store(keys, keys, None)
        c.storage.pack()
        c._grow(torch.arange(128)[None])
        back.append(c.storage.read()[0])
    quiet = [i for i in range(32) if i != 5]
    assert torch.equal(back[0][..., quiet], back[1][..., quiet])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("T", [1, 31, 127, 128, 129, 1000, 8192])
def test_ledger_equals_the_formula(T, bits):
    m = tiny.model(n_layers=1, context=8192)
    cache = KVCache(m, f"kivi(bits={bits})")
    tiny.feed(m, cache, tiny.ids(T), chunk=1024)
    D, R, g, rows = 32, 128, 32, 2
    Tk, Tv = T - T % R, max(0, T - R)
    total = cache.ledger()["total"]
    assert total["payload"] == rows * (Tk + Tv) * D * bits // 8
    assert total["scales"] == rows * (Tk + Tv) * 4 * D // g
    assert total["residual"] == rows * (2 * T - Tk - Tv) * D * 4
    assert total["full"] == rows * T * 2 * D * 4
    # spare slots: max(16, n / 16) tokens for residuals and value scales, max(4, n / 16) groups of g tokens for codes,
    # and the room left in the last group of values
    keys, codes = max(4, Tk // g // 16) * (g * D * bits // 8 + 4 * D), (max(4, Tv // g // 16) + 1) * g * D * bits // 8
    most = keys + codes + max(16, Tv // 16) * 4 * D // g
    most += max(16, T % R // 16) * D * 4 + max(16, min(T, R) // 16) * D * 4
    assert 0 <= total["unused"] <= rows * most


def test_residual_is_exact_and_quantised_counts_follow_the_paper():
    m = tiny.model()
    cache, full = KVCache(m, "kivi(bits=4,residual=64)"), KVCache(m)
    text = tiny.ids(300)
    tiny.feed(m, cache, text[:, :100])
    tiny.feed(m, full, text[:, :100])
    for T in range(101, 300):
        tiny.steps(m, cache, text[:, T - 1 : T])
        s = _layer(cache)
        assert s.k_old.n == [T - T % 64] * 2 and s.k_new.n == [T % 64] * 2
        assert s.v_old.n == [T - 64] * 2 and s.v_new.n == [64] * 2
    tiny.steps(m, full, text[:, 100:299])
    k, v = _layer(full).read()  # layer 0 sees the same input whatever the cache does
    assert torch.equal(_layer(cache).k_new["x"], k[0][:, 256:])
    assert torch.equal(_layer(cache).v_new["x"], v[0][:, 235:])


@pytest.mark.parametrize("n", [127, 128, 200, 255])
def test_prefill_then_one_step_quantises_like_a_longer_prefill(n):
    m = tiny.model(n_layers=1)
    text = tiny.ids(n + 1)
    a, b = KVCache(m, "kivi"), KVCache(m, "kivi")
    tiny.feed(m, a, text[:, :n])
    tiny.steps(m, a, text[:, n:])
    tiny.feed(m, b, text)
    for x, y in zip(_layer(a).read(), _layer(b).read(), strict=True):
        # matrix products of other shapes round otherwise, so a code on the edge may differ by one step; more may not
        assert (x != y).float().mean() < 0.002 or tiny.rms(x, y) < 1e-5
    assert _layer(a).bytes() == _layer(b).bytes()


@pytest.mark.parametrize("chunk", [1, 33, 128, 199])
def test_prefill_is_exact_in_any_chunks(chunk):
    m = tiny.model()
    text = tiny.ids(200)
    full = tiny.feed(m, KVCache(m), text)
    cache = KVCache(m, "kivi(bits=2,residual=32)")
    # fp32 sums in another order: a few units in the last place through two layers
    assert tiny.rms(tiny.feed(m, cache, text, chunk), full) < 2e-6
    assert _layer(cache).k_old.n == [192, 192]


def test_decode_attends_to_the_quantised_prompt():
    m = tiny.model()
    text = tiny.ids(260)
    errors = []
    full = KVCache(m)
    tiny.feed(m, full, text[:, :256])
    exact = tiny.steps(m, full, text[:, 256:])
    for bits in (2, 4, 8):
        cache = KVCache(m, f"kivi(bits={bits},residual=32)")
        tiny.feed(m, cache, text[:, :256])
        errors.append(tiny.rms(tiny.steps(m, cache, text[:, 256:]), exact))
    # a step shrinks by 5 from 2 to 4 bits and by 17 from 4 to 8; large errors saturate, so ask for less than that
    assert errors[0] > 2 * errors[1] and errors[1] > 6 * errors[2] > 0, errors


@pytest.mark.parametrize("spec", ["kivi(bits=2)", "kivi(bits=8,group=16)", "streamingllm(budget=200)+kivi(bits=4)"])
def test_attend_equals_the_reference_over_read(spec):
    m = tiny.model()
    cache = KVCache(m, spec)
    for part in tiny.ids(320).split(40, 1):
        tiny.feed(m, cache, part)
    c = cache.layers[1]
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[10**6]])
    k, v = c.read()
    assert tiny.rms(c.attend(q, pos), reference(q, k, v, c.mask(pos))) < 1e-6


@pytest.mark.parametrize(
    "bad", [{"bits": 3}, {"bits": 0}, {"group": 12}, {"group": 0}, {"residual": 16}, {"residual": 40}]
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        KIVI(**bad)


def test_a_group_that_does_not_divide_head_dim_is_refused():
    with pytest.raises(NotImplementedError, match="head_dim 24"):
        KVCache(tiny.model(head_dim=24), "kivi")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scores_and_mixtures_from_codes_equal_those_from_dequantised_tensors(bits):
    torch.manual_seed(0)
    x, q, p = torch.randn(3, 160, 64), torch.randn(3, 5, 64), torch.rand(3, 5, 150)
    keys, values = PerChannel(3, bits, 32), PerToken(3, bits, 32)
    keys.add([0, 1, 2], x)
    for part in x[:, :150].split([1, 40, 1, 100, 8], 1):  # groups are filled little by little
        values.add([0, 1, 2], part)
    # codes and minima are summed apart and nearly cancel: sums of 190 leave 7, which costs a factor of 27 in fp32
    assert tiny.rms(keys.dot(q), q @ keys.read().mT) < 1e-5
    assert tiny.rms(values.mix(p), p @ values.read()) < 1e-5
    whole = PerToken(3, bits, 32)
    whole.add([0, 1, 2], x[:, :150])
    assert torch.equal(values.read(), whole.read())
    for r in range(3):
        assert torch.equal(values.read(r), values.read()[r]) and torch.equal(keys.read(r), keys.read()[r])


def test_dropping_values_keeps_the_codes_of_the_others():
    values, x = PerToken(2, 2, 32), torch.randn(2, 100, 64)
    values.add([0, 1], x)
    before = values.read()
    mask = torch.rand(2, 100) < 0.6
    values.keep(mask)
    for r in range(2):
        assert torch.equal(values.read(r), before[r][mask[r]])
    values.add([0, 1], x[:, :3])
    for r in range(2):
        assert torch.equal(values.read(r), torch.cat([before[r][mask[r]], before[r][:3]]))


def test_a_key_group_goes_with_its_last_entry_and_is_not_quantised_again():
    m = tiny.model(n_layers=1)
    cache = KVCache(m, "streamingllm(budget=300,reindex=False)+kivi(bits=2,residual=32)")
    tiny.feed(m, cache, tiny.ids(300))
    s, seen = _layer(cache), set()
    codes = {tuple(row.flatten().tolist()) for row in s.k_old.rows.row("code", 0)}
    for t in range(400):
        tiny.steps(m, cache, tiny.ids(1, seed=t))
        s = _layer(cache)
        codes |= {tuple(row.flatten().tolist()) for row in s.k_old.rows.row("code", 0)}
        seen.add(len(codes))
        assert cache.layers[0].size <= 300 + 32 + 32 + 16 + 18  # sinks' group, oldest group, spare, hidden
    assert max(seen) == (300 + 400) // 32  # every group of codes was written once and never changed


def test_what_is_stored_is_at_most_twice_what_lives():
    class Sparse(Policy):
        name = "sparse"

        def __call__(self, cache, q, pos):
            if cache.phase == "decode" and cache.n_live > 64:
                cache.keep((cache.token % 8 == 0) | (cache.rank >= cache.n_live - 40))

    m = tiny.model(n_layers=1)
    cache = KVCache(m, [Sparse(), KIVI(bits=4, residual=32)])
    tiny.feed(m, cache, tiny.ids(60))
    for t in range(300):
        tiny.steps(m, cache, tiny.ids(1, seed=t))
        c = cache.layers[0]
        assert c.size <= 2 * c.n_live + 16 and len(set(c.n_slots)) == 1
        assert c.live.sum() == c.n_live


def test_scattered_eviction_does_not_let_it_grow():
    m = tiny.model(n_layers=1, context=4096)
    cache = KVCache(m, "h2o(budget=128)+kivi(bits=2)")
    tiny.feed(m, cache, tiny.ids(300))
    sizes = []
    for t in range(900):
        m(tiny.ids(1, seed=t), cache)
        sizes.append(cache.layers[0].size)
    assert cache.layers[0].n_live == 128 and max(sizes) <= 2 * 128 + 2 * 17
