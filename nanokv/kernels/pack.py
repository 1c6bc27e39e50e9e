"""Quantise groups of numbers to 1 to 8 bits and pack the codes into bytes, in one pass over them.

What `nanokv.quant.quantise` and `pack` do in a dozen steps, with the same bits: minimum and scale are rounded to fp16
first, codes are computed from the rounded ones, divided as IEEE 754 says and rounded half to even.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.kernels.decode import TYPES
from nanokv.quant import pack, quantise

EVEN = tl.constexpr(1.5 * 2**23)  # added to and subtracted from an fp32 number below 2^22: rounded half to even
LARGEST = tl.constexpr(65504.0)  # of fp16
NUMBERS = 4096  # per program


def encode_naive(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `encode_triton` does."""
    codes, scale, low = quantise(x, bits)  # (..., g), (...), (...)
    return pack(codes, bits), scale, low


@triton.jit
def squeeze(code, p_code, o_n, m_n, BITS: tl.constexpr, PART: tl.constexpr):
    """Write one part of the codes (BN, GROUP), PART bits of each: code j of byte w is number j * W + w."""
    BN: tl.constexpr = code.shape[0]
    GROUP: tl.constexpr = code.shape[1]
    DONE: tl.constexpr = BITS // (2 * PART) * (2 * PART)  # bits in the parts before
    W: tl.constexpr = GROUP * PART // 8
    code = tl.reshape((code >> DONE) & ((1 << PART) - 1), (BN, 8 // PART, W))
    byte = tl.sum(code << (tl.arange(0, 8 // PART) * PART)[None, :, None], 1)  # (BN, W)
    o = o_n[:, None] * (GROUP * BITS // 8) + GROUP * DONE // 8 + tl.arange(0, W)[None, :]
    tl.store(p_code + o, byte.to(tl.uint8), mask=m_n[:, None])


@triton.jit(do_not_specialize=["n"])
def encode(p_x, p_code, p_scale, p_low, n, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr):
    """Quantise BN of n groups."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < n
    # (BN, GROUP)
    x = tl.load(p_x + o_n[:, None] * GROUP + tl.arange(0, GROUP)[None, :], mask=m_n[:, None], other=0.0).to(tl.float32)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    low = tl.min(x, 1).to(tl.float16)  # (BN,)
    base = low.to(tl.float32)
    scale = tl.div_rn(tl.max(x, 1) - base, tl.full((BN,), LEVELS, tl.float32)).to(tl.float16)
    scale = tl.where(scale <= 0, 1.0, scale).to(tl.float16)
    tl.store(p_scale + o_n, scale, mask=m_n)
    tl.store(p_low + o_n, low, mask=m_n)
    code = tl.div_rn(x - base[:, None], tl.broadcast_to(scale.to(tl.float32)[:, None], (BN, GROUP)))
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)  # first, or the next line is wrong for large ones
    code = ((code + EVEN) - EVEN).to(tl.int32)
    for i in tl.static_range(4):  # a width is packed as its binary digits, low bits first
        if BITS & (8 >> i):
            squeeze(code, p_code, o_n, m_n, BITS, 8 >> i)


def encode_triton(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups x (..., g) to 1 to 8 bits and pack them: bytes (..., g * bits / 8), scale and minimum fp16 (...).

    g is a power of two from 16 to 256; NotImplementedError else.
    """
    group = x.shape[-1]
    if not 1 <= bits <= 8 or not 16 <= group <= 256 or group & (group - 1) or x.dtype not in TYPES:
        raise NotImplementedError(f"no kernel packs {x.dtype} to {bits} bits in groups of {group}")
    code = torch.empty(*x.shape[:-1], group * bits // 8, dtype=torch.uint8, device=x.device)
    scale, low = (torch.empty(x.shape[:-1], dtype=torch.float16, device=x.device) for _ in range(2))
    if n := scale.numel():
        BN = NUMBERS // group
        encode[(triton.cdiv(n, BN),)](x.contiguous(), code, scale, low, n, bits, group, BN, num_warps=4)
    return code, scale, low
