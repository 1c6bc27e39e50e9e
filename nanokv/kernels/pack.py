"""Quantise slots of numbers to 1 to 8 bits and pack the codes into bytes, in one pass over them.

What `nanokv.quant.encode` does in a dozen steps, with the same bits: minimum and scale are rounded to fp16
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
NUMBERS = 2048  # per program


def encode_naive(x: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `encode_triton` does."""
    codes, scale, low = quantise(x.unflatten(-1, (-1, group)) if group else x.mT, bits)
    codes = codes.flatten(1) if group else codes.mT.flatten(1)  # (S, T * C)
    return pack(codes, bits), scale, low


@triton.jit
def squeeze(code, p_code, o_slot, m_slot, BITS: tl.constexpr, PART: tl.constexpr):
    """Write one part of the codes (BS, N) of slots, PART bits of each: code j of byte w is number j * W + w."""
    BS: tl.constexpr = code.shape[0]
    N: tl.constexpr = code.shape[1]
    DONE: tl.constexpr = BITS // (2 * PART) * (2 * PART)  # bits in the parts before
    W: tl.constexpr = N * PART // 8
    code = tl.reshape((code >> DONE) & ((1 << PART) - 1), (BS, 8 // PART, W))
    byte = tl.sum(code << (tl.arange(0, 8 // PART) * PART)[None, :, None], 1)  # (BS, W)
    o = o_slot[:, None] * (N * BITS // 8) + N * DONE // 8 + tl.arange(0, W)[None, :]
    tl.store(p_code + o, byte.to(tl.uint8), mask=m_slot[:, None])


@triton.jit(do_not_specialize=["n"])
def encode(p_x, p_code, p_scale, p_low, n, BITS: tl.constexpr, N: tl.constexpr, L: tl.constexpr, AXIS: tl.constexpr,
           BS: tl.constexpr):  # fmt: skip
    """Quantise BS of n slots of N numbers, in L groups each: numbers side by side (AXIS 2), or L apart (AXIS 1)."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    o_slot = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_slot = o_slot < n
    # (BS, N)
    x = tl.load(p_x + o_slot[:, None] * N + tl.arange(0, N)[None, :], mask=m_slot[:, None], other=0.0).to(tl.float32)
    x = tl.reshape(tl.minimum(tl.maximum(x, -LARGEST), LARGEST), (BS, L, N // L) if AXIS == 2 else (BS, N // L, L))
    low = tl.min(x, AXIS).to(tl.float16)  # (BS, L)
    base = low.to(tl.float32)
    scale = tl.div_rn(tl.max(x, AXIS) - base, tl.full((BS, L), LEVELS, tl.float32)).to(tl.float16)
    scale = tl.where(scale <= 0, 1.0, scale).to(tl.float16)
    o_level = o_slot[:, None] * L + tl.arange(0, L)[None, :]
    tl.store(p_scale + o_level, scale, mask=m_slot[:, None])
    tl.store(p_low + o_level, low, mask=m_slot[:, None])
    divisor = tl.broadcast_to(tl.expand_dims(scale.to(tl.float32), AXIS), x.shape)
    code = tl.div_rn(x - tl.expand_dims(base, AXIS), divisor)
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)  # first, or the next line is wrong for large ones
    code = tl.reshape(((code + EVEN) - EVEN).to(tl.int32), (BS, N))
    for i in tl.static_range(4):  # a width is packed as its binary digits, low bits first
        if BITS & (8 >> i):
            squeeze(code, p_code, o_slot, m_slot, BITS, 8 >> i)


def encode_triton(x: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise and pack slots x (S, T, C), in groups of channels or, with group 0, of the T tokens of a channel.

    Returns bytes (S, T * C * bits / 8), scale and minimum fp16, (S, T, C / group) or (S, C). T * C, C and group are
    powers of two, T * C from 16 to 8192; NotImplementedError else.
    """
    S, T, C = x.shape
    powers = all(n & (n - 1) == 0 for n in (T, C, group))
    if not 1 <= bits <= 8 or not powers or not 16 <= T * C <= 8192 or x.dtype not in TYPES:
        raise NotImplementedError(f"no kernel packs {x.dtype} to {bits} bits in slots of {T} by {C}, groups of {group}")
    code = torch.empty(S, T * C * bits // 8, dtype=torch.uint8, device=x.device)
    shape = (S, T, C // group) if group else (S, C)
    scale, low = (torch.empty(shape, dtype=torch.float16, device=x.device) for _ in range(2))
    if S:
        BS = max(1, NUMBERS // (T * C))
        grid = (triton.cdiv(S, BS),)
        encode[grid](x.contiguous(), code, scale, low, S, bits, T * C, scale[0].numel(), 2 if group else 1, BS)
    return code, scale, low
