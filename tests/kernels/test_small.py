"""The model's small pieces: residual and RMSNorm, RoPE and append, SwiGLU, each against its plain twin."""

import interpret
import pytest
import torch

from nanokv.kernels.rmsnorm import rmsnorm_naive, rmsnorm_triton
from nanokv.kernels.rope_append import rope_append_naive, rope_append_triton
from nanokv.kernels.swiglu import swiglu_naive, swiglu_triton
from nanokv.model import Config, RoPE

ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def close(a, ref) -> bool:
    """Say whether a is the fp64 reference but for one rounding of each element, of all sizes up to the largest.

    fp32 also rounds on the way, a few times 6e-8. The interpreter rounds to bf16 by cutting off, twice the error.
    """
    largest = ref.abs().max() / ref.square().mean().sqrt()
    return interpret.error(a, ref) <= ROUNDING[a.dtype] * max(1.0, float(largest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n,E", [(1, 576), (3, 64), (2, 80), (1, 1)])
def test_residual_and_rmsnorm(n, E, dtype):
    torch.manual_seed(0)
    (x, cx), (delta, cd), (w, cw) = (interpret.guard(torch.randn(s).to(dtype)) for s in ((1, n, E), (1, n, E), (E,)))
    total, out = rmsnorm_triton(x, delta, w, 1e-5)
    ref_total, _ = rmsnorm_naive(x, delta, w, 1e-5)
    assert torch.equal(total, ref_total)  # one addition
    y = ref_total.double()
    ref = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * w.double()
    assert close(out, ref)
    for check in (cx, cd, cw):
        check()


def test_a_row_of_zeros_stays_zero():
    zero = torch.zeros(1, 1, 64)
    total, out = rmsnorm_triton(zero, zero, torch.ones(64), 1e-5)
    assert not total.any() and not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n,F", [(1, 1536), (5, 96), (2, 513), (1, 1)])
def test_swiglu(n, F, dtype):
    torch.manual_seed(0)
    x, check = interpret.guard(torch.randn(1, n, 2 * F).mul(3).to(dtype))
    gate, up = x.double().chunk(2, -1)
    assert close(swiglu_triton(x), gate * gate.sigmoid() * up)
    assert close(swiglu_naive(x), gate * gate.sigmoid() * up)
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("R,T,D", [(3, 1, 64), (2, 5, 80), (1, 1, 128), (4, 2, 32)])
def test_rope_and_append(R, T, D, dtype):
    torch.manual_seed(0)
    config = Config(1, R, R, D, 64, 64, 64, 512)
    cos, sin = RoPE(config).halves()
    both = torch.randn(T, 2 * R, D).to(dtype).transpose(0, 1)  # keys and values as the projection leaves them: views
    k, v = both[:R], both[R:]
    pos = torch.randint(0, 512, (R, T))
    slot = torch.arange(R) * (T + 7) + 3
    results = []
    for put in (rope_append_naive, rope_append_triton):
        (kb, ck), (vb, cv) = (interpret.guard(torch.full((R * (T + 7) + 9, D), torch.nan, dtype=dtype)) for _ in "kv")
        put(k, v, cos, sin, pos, kb, vb, slot)
        ck(), cv()
        results.append((kb, vb))
    (ka, va), (kb, vb) = results
    assert torch.equal(va.nan_to_num(9e3), vb.nan_to_num(9e3))  # values go unchanged to the same slots, no others
    assert torch.equal(ka.isnan(), kb.isnan())
    ref = RoPE(config)(k[:, None].double(), pos).squeeze(1)  # (R, T, D)
    mine = torch.stack([kb[s : s + T] for s in slot.tolist()])
    assert close(mine, ref)


def test_scattered_channels_are_refused():
    k = torch.randn(2, 64, 1).transpose(1, 2)[..., ::2]
    buffer = torch.zeros(9, 32)
    with pytest.raises(NotImplementedError, match="side by side"):
        rope_append_triton(k, k, *RoPE(Config(1, 2, 2, 32, 64, 64, 64, 16)).halves(), torch.zeros(2, 1), buffer, buffer,
                           torch.zeros(2, dtype=torch.int64))  # fmt: skip
