"""KIVI: what its scales run along, which tokens are quantised when, and the bytes it holds."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from nanokv import KVCache
from nanokv.attention import reference
from nanokv.method import Policy
from nanokv.methods.kivi import KIVI


def storage(cache, i=0):
    return cache.layers[i].storage


def lengths(s):
    """Return, of the first row: keys quantised, keys exact, values quantised, values exact."""
    return s.old["k"].n[0] * s.group, s.new["k"].n[0], s.old["v"].n[0], s.new["v"].n[0]


def packed(k, v, **options):
    """Return what becomes of keys and values (R, N, D), in one go."""
    s = KIVI(n_sink=0, **options)
    s.reset(SimpleNamespace(B=1, n_rows=len(k), layer=0))
    s.store([k.shape[1]] * len(k), k.flatten(0, 1), v.flatten(0, 1), None)
    s.pack(None)
    return s


# Turns red when keys are quantised per token, values per channel, or either in other groups.
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mutation_groups_run_along_tokens_for_keys_and_along_channels_for_values(bits):
    k, v = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    s = packed(k, v, bits=bits, group=16, residual=16)
    assert s.old["k"]["scale"].shape == (2, 4, 32)  # rows, groups of tokens, channels
    assert s.old["v"]["scale"].shape == (2, 48, 1, 2)  # rows, tokens, 1, groups of channels
    assert s.old["k"]["code"].shape == (2, 4, 16 * 32 * bits // 8) and s.old["v"]["code"].shape == (
        2,
        48,
        32 * bits // 8,
    )
    for x, y, groups in ((k, s.read()[0], lambda t: t.unflatten(1, (-1, 16)).mT),
                         (v[:, :48], s.read()[1][:, :48], lambda t: t.unflatten(2, (-1, 16)))):  # fmt: skip
        low, high = groups(x).aminmax(dim=-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        slack = 2.0**-11 * (low.abs() + (high - low)) + 1e-6  # minimum and scale are fp16
        assert (groups(x - y).abs() <= step / 2 + slack).all()
    assert torch.equal(s.read()[1][:, 48:], v[:, 48:])


def test_numbers_to_check_by_hand():
    x = torch.tensor([-1.0, -0.2, 0.3, 2.0]).repeat(8)  # a minimum of -1, steps of 1
    s = packed(x.repeat(2)[None, :, None].expand(1, 64, 32), x.expand(1, 64, 32), residual=32)
    k, v = s.read()
    assert k[0, :4, 0].tolist() == [-1, 0, 0, 2] and v[0, 0, :4].tolist() == [-1, 0, 0, 2]
    assert v[0, 32, :4].tolist() == x[:4].tolist()  # the newest 32 values are exact
    grid = torch.tensor([-1.0, 0.5, 2.0, 3.5]).repeat(16)
    s = packed(grid[None, :, None].expand(1, 64, 32), torch.full((1, 64, 32), 7.25), residual=32)
    assert torch.equal(s.read()[0][0, :, 5], grid) and (s.read()[1] == 7.25).all()


def test_an_outlier_channel_does_not_hurt_other_key_channels_but_other_values():
    x = torch.randn(2, 128, 32)
    loud = x.clone()
    loud[..., 5] *= 20
    quiet = [i for i in range(32) if i != 5]
    a, b = (packed(t, t, residual=32).read() for t in (x, loud))
    assert torch.equal(a[0][..., quiet], b[0][..., quiet])
    errors = [tiny.rms(t[1][:, :96, quiet], x[:, :96, quiet]) for t in (a, b)]
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("options", [{}, {"bits": 4, "n_sink": 5}, {"bits": 8, "group": 16, "residual": 48},
                                     {"bits_k": 3, "bits_v": 5, "residual": 64}])  # fmt: skip
@pytest.mark.parametrize("T", [1, 5, 127, 128, 200, 1000])
def test_ledger_equals_the_formula(T, options):
    m = tiny.model(n_layers=1, context=1024)
    cache, s = KVCache(m, [KIVI(**options)]), KIVI(**options)
    tiny.feed(m, cache, tiny.ids(T), chunk=300)
    D, R, g, S = 32, s.residual, s.group, min(T, s.n_sink)
    Tk, Tv = (T - S) - (T - S) % R, max(0, T - S - R)
    row = cache.ledger()["layers"][0]
    assert row["payload"] == 2 * (Tk * s.width["k"] + Tv * s.width["v"]) * D // 8
    assert row["scales"] == 2 * (Tk + Tv) * 4 * D // g
    assert row["residual"] == 2 * (2 * T - Tk - Tv) * D * 4
    # spare slots: max(16, n / 16) tokens, of which a key group has g
    keys, values = max(-(-16 // g), Tk // g // 16) * D * (g * s.width["k"] // 8 + 4), max(16, Tv // 16)
    exact = max(16, (T - Tk) // 16) + max(16, (T - Tv) // 16)
    most = keys + values * (D * s.width["v"] // 8 + 4 * D // g) + (exact + 2 * S) * D * 4
    assert row["held"] - row["unused"] == sum(row[k] for k in ("payload", "scales", "residual"))
    assert 0 <= row["unused"] <= 2 * most


def test_residual_is_exact_and_quantised_counts_follow_the_paper():
    m, text = tiny.model(), tiny.ids(300)
    cache, full = KVCache(m, "kivi(bits=4,residual=64)"), KVCache(m)
    for c in (cache, full):
        tiny.feed(m, c, text[:, :100])
    for T in range(101, 300):
        tiny.steps(m, cache, text[:, T - 1 : T])
        assert lengths(storage(cache)) == (T - T % 64, T % 64, T - 64, 64)
    tiny.steps(m, full, text[:, 100:299])
    k, v = (t[0] for t in full.layers[0].read())  # layer 0 sees the same input whatever the cache does
    assert torch.equal(storage(cache).new["k"]["x"], k[:, 256:])
    assert torch.equal(storage(cache).new["v"]["x"], v[:, 235:])


@pytest.mark.parametrize("n", [127, 128, 200, 255])
def test_prefill_then_one_step_quantises_like_a_longer_prefill(n):
    m, text = tiny.model(n_layers=1), tiny.ids(n + 1)
    a, b = KVCache(m, "kivi"), KVCache(m, "kivi")
    tiny.feed(m, a, text[:, :n])
    tiny.steps(m, a, text[:, n:])
    tiny.feed(m, b, text, 60)
    for x, y in zip(storage(a).read(), storage(b).read(), strict=True):
        # matrix products of other shapes round otherwise, so a code on the edge may differ by one step; more may not
        assert (x != y).float().mean() < 0.002 or tiny.rms(x, y) < 1e-5
    assert storage(a).bytes() == storage(b).bytes()


def test_more_bits_come_closer_and_keys_and_values_have_their_own():
    m, text, errors = tiny.model(), tiny.ids(260), {}
    full = KVCache(m)
    tiny.feed(m, full, text[:, :256])
    exact = tiny.steps(m, full, text[:, 256:])
    for k, v in ((2, 2), (3, 3), (4, 4), (6, 6), (8, 8), (8, 2), (2, 8)):
        cache = KVCache(m, f"kivi(bits_k={k},bits_v={v},residual=32)")
        tiny.feed(m, cache, text[:, :256])
        errors[k, v] = tiny.rms(tiny.steps(m, cache, text[:, 256:]), exact)
    # a step shrinks by 2 to 2.3 per bit; large errors saturate, so ask for less than that
    even = [errors[n, n] for n in (2, 3, 4, 6, 8)]
    assert all(b < 0.75 * a for a, b in zip(even, even[1:], strict=False)) and even[-1] > 0, errors
    assert even[-1] < errors[8, 2] < even[0] and even[-1] < errors[2, 8] < even[0]


@pytest.mark.parametrize("spec", ["kivi(bits=2)", "kivi(bits=8,group=16,n_sink=3)", "kivi(bits=3,residual=32)",
                                  "streamingllm(budget=200)+kivi(bits=4)", "pca(rank=12)+kivi(bits=4)"])  # fmt: skip
def test_attend_equals_the_reference_over_read(spec):
    m = tiny.model()
    cache = KVCache(m, spec)
    for part in tiny.ids(320).split(40, 1):
        tiny.feed(m, cache, part)
    tiny.steps(m, cache, tiny.ids(5))
    c = cache.layers[1]
    assert any(c.storage.old["k"].n)
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[10**6]])
    assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.additive_mask(pos))) < 1e-5


class Sparse(Policy):
    """Keep every 40th token, and the newest 40."""

    def after_step(self, cache, q, pos):
        cache.keep((cache.token % 40 == 0) | (cache.rank >= cache.n_live - 40))


def test_a_key_group_goes_with_its_last_entry_and_nothing_is_quantised_twice():
    m = tiny.model(n_layers=1)
    cache, plain = KVCache(m, [Sparse(), KIVI(residual=32)]), KVCache(m, [KIVI(residual=32)])
    seen = set()
    for c in (cache, plain):
        tiny.feed(m, c, tiny.ids(64))
    for t in range(200):
        for c in (cache, plain):
            tiny.steps(m, c, tiny.ids(1, seed=t))
        s, every = storage(cache), storage(plain)
        assert cache.layers[0].N <= 32 * len(range(0, 65 + t, 40)) + 40 + 64 + 16  # whole groups, window, tails, spare
        for which in "kv":
            codes = {tuple(row.tolist()) for row in every.old[which].row("code", 0)}
            assert {tuple(row.tolist()) for row in s.old[which].row("code", 0)} <= codes  # as they were written
        seen.add(s.old["k"].n[0])
    assert max(seen) < every.old["k"].n[0]


@pytest.mark.parametrize("bad", [{"bits": 0}, {"bits": 9}, {"bits_k": 9}, {"bits": 2.0}, {"group": 12, "bits": 1},
                                 {"group": 0}, {"group": 12, "bits_v": 3, "residual": 120}, {"group": 2, "residual": 4},
                                 {"residual": 16}, {"residual": 40}, {"n_sink": -1}])  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"kivi: {next(iter(bad))} must"):
        KIVI(**bad)


@pytest.mark.parametrize("bits, least", [(1, 8), (2, 4), (3, 8), (4, 2), (5, 8), (6, 4), (7, 8), (8, 1)])
def test_the_smallest_group_of_each_width(bits, least):
    m = tiny.model(n_layers=1)
    cache = KVCache(m, f"kivi(bits={bits},group={least},residual={4 * least})")
    tiny.feed(m, cache, tiny.ids(60))
    assert tiny.steps(m, cache, tiny.ids(9)).isfinite().all() and any(storage(cache).old["k"].n)
    for group in range(1, least):
        with pytest.raises(ValueError, match="kivi: group must fill whole bytes"):
            KIVI(bits=bits, group=group, residual=4 * group)


def test_a_group_that_does_not_divide_head_dim_is_refused():
    with pytest.raises(NotImplementedError, match="kivi: group 32 does not divide head_dim 24"):
        KVCache(tiny.model(head_dim=24), "kivi")
