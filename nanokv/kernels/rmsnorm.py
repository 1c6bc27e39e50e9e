"""Add the residual and normalise, in one pass over the row.

In decode a row is a few kilobytes, and what takes time is launching kernels and going through memory once for each: the
sum, its square's mean, the scaling and the gain are four of them. One program per row does all four in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rmsnorm_naive(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta (..., E) and that divided by its root mean square, times weight (E,)."""
    x = x + delta
    y = x.float()
    return x, (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@triton.jit
def add_rmsnorm(p_x, p_delta, p_weight, p_sum, p_out, eps, E: tl.constexpr, b_E: tl.constexpr):
    """Add and normalise one row of E numbers; eps is added to the mean square."""
    i = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, b_E)
    m_e = o_e < E
    # (E,) each; upcast at once, since sums in 16 bits would lose what the model needs
    x = tl.load(p_x + i * E + o_e, mask=m_e, other=0.0).to(tl.float32)
    delta = tl.load(p_delta + i * E + o_e, mask=m_e, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_e, mask=m_e, other=0.0).to(tl.float32)
    x = (x + delta).to(p_sum.dtype.element_ty)  # rounded as the residual stream is held
    tl.store(p_sum + i * E + o_e, x, mask=m_e)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / E + eps)
    tl.store(p_out + i * E + o_e, (x * scale * weight).to(p_out.dtype.element_ty), mask=m_e)


def rmsnorm_triton(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Do what `rmsnorm_naive` does in one kernel."""
    E = x.shape[-1]
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    add_rmsnorm[(x.numel() // E,)](x, delta, weight, total, out, eps, E, triton.next_power_of_2(E), num_warps=4)
    return total, out


def aot_cases() -> dict:
    """Return configurations to compile ahead of time: fn, types, constants, aligned, options per backend."""
    types = {f"p_{n}": "*fp16" for n in ("x", "delta", "weight", "sum", "out")} | {"eps": "fp32"}
    options = {"cuda": {"num_warps": 4}, "hip": {"num_warps": 4}}
    return {
        f"rmsnorm E={E}": (add_rmsnorm, types, {"E": E, "b_E": triton.next_power_of_2(E)}, (), options)
        for E in (576, 4096)
    }
