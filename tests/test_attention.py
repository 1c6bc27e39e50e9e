"""The specification of attention by loops, and fast_cpu.py against the readable text."""

import math

import pytest
import tiny
import torch

from nanokv import KVCache, attention, fast_cpu, kernels
from nanokv.methods.kivi import KIVI


def shaped(B, H, Hkv, T, N, D=16, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(B, H, T, D).to(dtype), *(torch.randn(B, Hkv, N, D).to(dtype) for _ in "kv")


def by_loops(q, k, v, mask):
    """Attend query by query, in fp64."""
    out, (B, H, T, _), G = torch.zeros(*q.shape, dtype=torch.float64), q.shape, q.shape[1] // k.shape[1]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                bias = mask[b if len(mask) > 1 else 0, h // G if mask.shape[1] > 1 else 0, t].double()
                s = k[b, h // G].double() @ q[b, h, t].double() / math.sqrt(q.shape[-1]) + bias
                if bool((bias > -torch.inf).any()):
                    out[b, h, t] = s.softmax(0) @ v[b, h // G].double()
    return out


@pytest.mark.parametrize("B, H, Hkv, T, N", [(1, 3, 1, 5, 9), (2, 4, 4, 1, 7), (2, 6, 2, 3, 3)])
@pytest.mark.parametrize("heads", [1, None])
def test_attention_is_what_loops_say(B, H, Hkv, T, N, heads):
    q, k, v = shaped(B, H, Hkv, T, N)
    mask = torch.where(torch.rand(B, heads or Hkv, T, N) < 0.6, torch.randn(B, heads or Hkv, T, N), -torch.inf)
    mask[0, 0, 0] = -torch.inf  # a query that sees nothing
    want = by_loops(q, k, v, mask)
    assert tiny.rms(attention.reference(q, k, v, mask), want) < 1e-6
    keys = [(k[:, :, :1].flatten(0, 1), None), (k[:, :, 1:].flatten(0, 1), None)]
    values = [(v[:, :, :2].flatten(0, 1), None), (v[:, :, 2:].flatten(0, 1), None)]
    assert tiny.rms(attention.in_parts(q, keys, values, mask), want) < 1e-6
    mask[0, 0, 0] = 0.0  # PyTorch's own has no word for that
    assert tiny.rms(attention.attend(q, k, v, mask), attention.reference(q, k, v, mask)) < 1e-6


@pytest.mark.parametrize("T, N", [(1, 9), (5, 9), (9, 9)])
def test_causal_needs_no_mask(T, N):
    q, k, v = shaped(2, 6, 2, T, N)
    see = torch.ones(T, N, dtype=torch.bool).tril(N - T)
    mask = torch.where(see, 0.0, -torch.inf)[None, None]
    want = attention.reference(q, k, v, mask)
    assert tiny.rms(attention.attend(q, k, v, causal=T > 1), want) < 1e-6
    assert tiny.rms(attention.probs(q, k, None), torch.softmax(attention.probs(q, k, None).log(), -1)) < 1e-5


def test_a_number_that_is_none_stays_one():
    q, k, v = shaped(1, 2, 1, 2, 4)
    k[0, 0, 1] = float("nan")
    mask = torch.zeros(1, 1, 2, 4)
    assert attention.reference(q, k, v, mask).isnan().all()
    mask[0, 0, 0] = -torch.inf
    out = attention.reference(q, k, v, mask)
    assert not out[0, :, 0].any() and out[0, :, 1].isnan().all()


def test_parts_in_other_coordinates():
    q, k, v = shaped(2, 6, 2, 3, 8)
    U = torch.linalg.qr(torch.randn(4, 16, 16))[0]
    keys = [((k.flatten(0, 1)[:, :5] @ U), U), (k.flatten(0, 1)[:, 5:], None)]
    values = [((v.flatten(0, 1)[:, :5] @ U), U), (v.flatten(0, 1)[:, 5:], None)]
    assert tiny.rms(attention.in_parts(q, keys, values, None), attention.reference(q, k, v, None)) < 1e-6


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
@pytest.mark.parametrize("B, H, Hkv, T, N", [(1, 3, 1, 40, 40), (2, 4, 4, 7, 50), (1, 8, 2, 300, 310)])
def test_what_entries_are_paid_in_blocks(how, B, H, Hkv, T, N):
    q, k, _ = shaped(B, H, Hkv, T, N)
    mask = torch.where(torch.ones(T, N, dtype=torch.bool).tril(N - T), 0.0, -torch.inf)[None, None]
    p = attention.probs(q, k, mask).unflatten(1, (Hkv, -1))
    want = {"mean": p.mean(2), "max": p.amax(2), "sum": p.sum(2)}[how].sum(2)
    assert tiny.rms(attention.paid(q, k, lambda i, j: mask[:, :, i:j], how, block=16), want) < 1e-6
    assert tiny.rms(fast_cpu.paid(q, k, how), want) < 1e-6
    assert tiny.rms(fast_cpu.paid(q, k, how, block=7), want) < 1e-6


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("how", ["max", "avg"])
def test_pooling_knows_only_the_candidates(kernel, how):
    score, among = torch.rand(2, 3, 20), torch.rand(2, 3, 20) < 0.7
    got = attention.pool(score, among, kernel, how)
    for b in range(2):
        for h in range(3):
            line = [float(s) for s, m in zip(score[b, h], among[b, h], strict=True) if m]
            near = [line[max(0, i - kernel // 2) : i + kernel // 2 + 1] for i in range(len(line))]
            want = [max(x) if how == "max" else sum(x) / kernel for x in near]
            assert torch.allclose(got[b, h][among[b, h]], torch.tensor(want)) and not got[b, h][~among[b, h]].any()


def test_ties_go_to_the_older():
    score = torch.tensor([[[2.0, 1.0, 2.0, 1.0, 2.0]]])
    every = torch.ones(1, 1, 5, dtype=torch.bool)
    assert attention.top(score, 2, every)[0, 0].tolist() == [True, False, True, False, False]
    assert attention.top(score, torch.tensor([[[4]]]), every)[0, 0].tolist() == [True, True, True, False, True]
    assert attention.top(score, 9, score < 2)[0, 0].tolist() == [False, True, False, True, False]
    assert attention.lowest(score, 1)[0, 0].tolist() == [3] and attention.lowest(score, 3)[0, 0].tolist() == [3, 1, 4]
    nan = torch.tensor([[[float("nan"), torch.inf, -torch.inf]]])
    assert attention.top(nan, 1, torch.ones(1, 1, 3, dtype=torch.bool))[0, 0].tolist() == [False, True, False]


# Quicker on a CPU, and the same


@pytest.mark.parametrize("options", [{}, {"G": 1}, {"qk_norm": True, "qkv_bias": True, "o_bias": True}, {"tied": True}])
@pytest.mark.parametrize("dtype, far", [(torch.float64, 1e-6), (torch.float32, 3e-6), (torch.bfloat16, 5e-2)])
def test_a_sped_up_model_says_the_same(options, dtype, far):
    m, fast = (tiny.model(**options, dtype=dtype) for _ in range(2))
    names = list(fast.state_dict())
    assert fast_cpu.speed_up(fast) is fast and list(fast.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), fast.state_dict().values(), strict=True))
    for text in (tiny.ids(40), tiny.ids(3, batch=2)):
        a, b = KVCache(m), KVCache(fast)
        want = torch.cat([tiny.feed(m, a, text), tiny.steps(m, a, text[:, :5])], 1)
        got = torch.cat([tiny.feed(fast, b, text, 17), tiny.steps(fast, b, text[:, :5])], 1)
        assert tiny.rms(got, want) < far


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("n_in, n_out", [(96, 301), (301, 96), (2048, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_are_the_same_however_the_matrix_lies(rows, n_in, n_out, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(n_in, n_out).to(dtype).requires_grad_(False)
    x = torch.randn(1, rows, n_in).to(dtype)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    columns = fast_cpu.arrange(layer.weight)
    y = fast_cpu.product(x, layer.weight, layer.bias, columns)
    size = x.double().abs() @ layer.weight.double().abs().T + layer.bias.double().abs()  # of the terms of each sum
    ulp = torch.finfo(dtype).eps
    bound = size * n_in * max(2**-24, 0) + 3 * ulp * size if dtype is torch.bfloat16 else size * n_in * ulp
    assert y.shape == exact.shape and y.dtype == dtype and ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("B, H, Hkv", [(1, 9, 3), (2, 4, 4), (2, 8, 1)])
@pytest.mark.parametrize("T, N", [(17, 18), (17, 100), (64, 200)])
@pytest.mark.parametrize("dtype, far", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_past_and_present(B, H, Hkv, T, N, dtype, far):
    q, k, v = shaped(B, H, Hkv, T, N, 32, dtype)
    mask = torch.where(torch.ones(T, N, dtype=torch.bool).tril(N - T), 0.0, -torch.inf)[None, None]
    assert tiny.rms(fast_cpu.past_and_present(q, k, v), attention.reference(q, k, v, mask)) < far


def _layer(spec, lengths, dtype=torch.float32, **options):
    """Return a layer that has read texts of these lengths, before a step of all sequences."""
    m = tiny.model(dtype=dtype, n_layers=1, **options)
    cache = KVCache(m, spec)
    m(torch.stack([torch.cat([torch.full((max(lengths) - n,), -1), tiny.ids(n, seed=n)[0]]) for n in lengths]), cache)
    m(tiny.ids(1, batch=len(lengths)), cache)
    layer = cache.layers[0]
    pos = torch.tensor(layer.next_position)[:, None] - 1
    return layer, torch.randn(len(lengths), m.config.n_heads, 1, 32, dtype=dtype), pos


def test_ragged_rows_one_by_one():
    layer, q, pos = _layer("full", (30, 9, 1))
    assert layer.lengths_say_all
    want = attention.reference(q, *layer.read(), layer.additive_mask(pos))
    assert tiny.rms(fast_cpu.ragged(q, layer.storage.kv), want) < 1e-6
    assert tiny.rms(fast_cpu.attend(layer.storage, q, pos, layer), want) < 1e-6


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("group", [8, 16, 32])
def test_codes_are_attended_to_as_they_are(bits, sinks, group):
    spec = f"kivi(bits={bits}, group={group}, residual=32, n_sink={sinks})"
    for lengths, T in (((90,), 1), ((90, 90), 1), ((90,), 4)):
        layer, q, pos = _layer(spec, lengths)
        q = q.expand(-1, -1, T, -1) + torch.randn(1, 1, T, 1)
        pos = pos + torch.arange(1 - T, 1)
        got = fast_cpu.on_codes(layer.storage, q, pos, layer)
        want = attention.reference(q, *layer.read(), layer.additive_mask(pos))
        planes, groups = 8 // bits, 32 // group
        assert (got is None) == bool(planes % groups and groups % planes)
        assert got is None or tiny.rms(got, want) < 1e-5


def test_codes_of_odd_widths_and_unequal_rows_are_left_to_the_text():
    for spec, lengths in (("kivi(bits=3, group=16, residual=32)", (90,)), ("kivi(group=16, residual=32)", (90, 40))):
        layer, q, pos = _layer(spec, lengths)
        assert fast_cpu.on_codes(layer.storage, q, pos, layer) is None
        want = attention.reference(q, *layer.read(), layer.additive_mask(pos))
        assert tiny.rms(layer.attend(q, pos), want) < 1e-6


def test_both_ways_run_side_by_side(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # other tests of the same process set it
    m = fast_cpu.speed_up(tiny.model())
    cache = KVCache(m, KIVI(group=16, residual=16))
    with kernels.use("both"):
        tiny.feed(m, cache, tiny.ids(90))
        tiny.steps(m, cache, tiny.ids(3))
        m(tiny.ids(5), cache, "draft")
    assert all(0 < layer.difference < 1e-5 for layer in cache.layers)
    assert kernels.used() == "torch"
