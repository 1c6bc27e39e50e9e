"""Quantise keys and values to 2, 4 or 8 bits and pack the codes into bytes, in one pass over them.

What `nanokv.quant.quantise` and `pack` do in a dozen steps, with the same bits: minimum and scale are rounded to fp16
first, codes are computed from the rounded ones, divided as IEEE 754 says and rounded half to even. A program takes one
group of tokens of one row and up to CHANNELS channels, since none of them needs another's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.kernels import lengths
from nanokv.kernels.decode import TYPES
from nanokv.quant import pack, place, quantise

LARGEST = tl.constexpr(65504.0)  # of fp16
CHANNELS = 128  # per program
EVEN = tl.constexpr(1.5 * 2**23)  # added to and subtracted from an fp32 number below 2^22: rounded half to even


def pack_keys_naive(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `pack_keys_triton` does."""
    codes, scale, low = quantise(x.mT, bits)  # (..., D, group), (..., D)
    return pack(codes.mT, bits), scale, low


def pack_values_naive(x: Tensor, bits: int, group: int, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `pack_values_triton` does."""
    codes, scale, low = quantise(x.unflatten(-1, (-1, group)), bits)  # (R, t, D / group, group), (R, t, D / group)
    return place(codes.flatten(-2), bits, group, at), scale, low


@triton.jit
def levels(low, high, LEVELS: tl.constexpr):
    """Return scale and minimum as fp16: see `nanokv.quant.quantise`."""
    low = low.to(tl.float16)
    scale = tl.div_rn(high - low.to(tl.float32), tl.full(low.shape, LEVELS, tl.float32)).to(tl.float16)
    return tl.where(scale <= 0, 1.0, scale).to(tl.float16), low


@triton.jit
def encode(x, scale, low, LEVELS: tl.constexpr):
    """Return the codes of x, int32, all of one shape."""
    code = tl.div_rn(x - low.to(tl.float32), scale.to(tl.float32))
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)  # first, or the next line is wrong for large ones
    return ((code + EVEN) - EVEN).to(tl.int32)


@triton.jit
def squeeze(code, p_code, i_group, o_d, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Pack codes (GROUP, BD) into bytes (GROUP * BITS / 8, D) of a group: code j of byte row w is row j * W + w."""
    W: tl.constexpr = GROUP * BITS // 8
    PER: tl.constexpr = 8 // BITS
    j, o_w = tl.arange(0, PER), tl.arange(0, W)
    byte = tl.sum(tl.reshape(code, (PER, W, BD)) << (j * BITS)[:, None, None], 0)  # (W, BD)
    o = i_group * (W * D) + o_w[:, None] * D + o_d[None, :]
    tl.store(p_code + o, byte.to(tl.uint8), mask=(o_d < D)[None, :])


@triton.jit
def exact(p_x, mask):
    """Load numbers, fp32, as far from zero as fp16 can hold."""
    x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def pack_keys(p_x, p_code, p_scale, p_low, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
              GROUP: tl.constexpr):  # fmt: skip
    """Quantise one group of keys per channel."""
    i_group = tl.program_id(0).to(tl.int64)
    o_t, o_d = tl.arange(0, GROUP), tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    x = exact(p_x + i_group * (GROUP * D) + o_t[:, None] * D + o_d[None, :], m_d[None, :])  # (GROUP, BD)
    scale, low = levels(tl.min(x, 0), tl.max(x, 0), (1 << BITS) - 1)  # (BD,)
    tl.store(p_scale + i_group * D + o_d, scale, mask=m_d)
    tl.store(p_low + i_group * D + o_d, low, mask=m_d)
    code = encode(x, scale[None, :], low[None, :], (1 << BITS) - 1)
    squeeze(code, p_code, i_group, o_d, D, BD, BITS, GROUP)


@triton.jit(do_not_specialize=["t", "n_groups"])
def pack_values(p_x, p_at, p_code, p_scale, p_low, t, n_groups, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """Quantise the values of up to GROUP tokens of one row, each in groups of channels; missing tokens have code 0."""
    B_S: tl.constexpr = BD // GROUP
    S: tl.constexpr = D // GROUP
    i_row, i_group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_t = i_group * GROUP + tl.arange(0, GROUP) - tl.load(p_at + i_row)  # the row's own number of a token
    o_d, o_s = tl.program_id(2) * BD + tl.arange(0, BD), tl.program_id(2) * B_S + tl.arange(0, B_S)
    m_t = (o_t >= 0) & (o_t < t)
    o_t = i_row * t + o_t  # in the tensors that hold all rows
    x = exact(p_x + o_t[:, None] * D + o_d[None, :], m_t[:, None] & (o_d < D)[None, :])
    x = tl.reshape(x, (GROUP, B_S, GROUP))
    scale, low = levels(tl.min(x, 2), tl.max(x, 2), (1 << BITS) - 1)  # (GROUP, B_S)
    o, m_s = o_t[:, None] * S + o_s[None, :], m_t[:, None] & (o_s < S)[None, :]
    tl.store(p_scale + o, scale, mask=m_s)
    tl.store(p_low + o, low, mask=m_s)
    code = tl.reshape(encode(x, scale[:, :, None], low[:, :, None], (1 << BITS) - 1), (GROUP, BD))
    squeeze(code, p_code, i_row * n_groups + i_group, o_d, D, BD, BITS, GROUP)


def pack_keys_triton(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups of keys x (..., group, D) per channel, in 2, 4 or 8 bits.

    Returns bytes (..., group * bits / 8, D), scale and minimum fp16 (..., D). group is a power of two of at least 16;
    NotImplementedError else.
    """
    *shape, group, D = x.shape
    sizes = _sizes(x, bits, group)
    code = torch.empty(*shape, group * bits // 8, D, dtype=torch.uint8, device=x.device)
    scale, low = (torch.empty(*shape, D, dtype=torch.float16, device=x.device) for _ in range(2))
    if x.numel():
        grid = x.numel() // (group * D), triton.cdiv(D, sizes["BD"])
        pack_keys[grid](x.contiguous(), code, scale, low, **sizes)
    return code, scale, low


def pack_values_triton(x: Tensor, bits: int, group: int, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise values x (R, t, D) per token and `group` channels, in 2, 4 or 8 bits.

    Row r begins at token at[r] < group of its first group. Returns bytes (R, groups, group * bits / 8, D), for as many
    groups of tokens as the longest row needs, with codes 0 where there is no token, and scale and minimum fp16 (R, t,
    D / group). group is a power of two of at least 16; NotImplementedError else. ValueError if it does not divide D.
    """
    R, t, D = x.shape
    if D % group:
        raise ValueError(f"group {group} does not divide {D} channels")
    sizes, n = _sizes(x, bits, group), triton.cdiv(max(at) + t, group)
    code = torch.empty(R, n, group * bits // 8, D, dtype=torch.uint8, device=x.device)
    scale, low = (torch.empty(R, t, D // group, dtype=torch.float16, device=x.device) for _ in range(2))
    if code.numel():
        grid = R, n, triton.cdiv(D, sizes["BD"])
        pack_values[grid](x.contiguous(), lengths(at, x.device), code, scale, low, t, n, **sizes)
    return code, scale, low


def _sizes(x: Tensor, bits: int, group: int) -> dict:
    """Return what a kernel is compiled for, or raise if there is none."""
    D = x.shape[-1]
    if bits not in (2, 4, 8) or group < 16 or group & (group - 1) or x.dtype not in TYPES:
        raise NotImplementedError(f"no packing kernel for {bits} bits in groups of {group} of {x.dtype}")
    BD = max(group, min(CHANNELS, triton.next_power_of_2(D)))
    return {"D": D, "BD": BD, "BITS": bits, "GROUP": group, "num_warps": 4, "num_stages": 1}


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time: name -> (fn, types, constants, aligned, options)."""
    cases = {}
    options = {t: {"num_warps": 4, "num_stages": 1} for t in ("cuda", "hip")}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for bits in (2, 4, 8):
            for D in (64, 128):
                types = {"p_x": f"*{TYPES[dtype]}", "p_code": "*u8", "p_scale": "*fp16", "p_low": "*fp16"}
                sizes = {"D": D, "BD": D, "BITS": bits, "GROUP": 32}
                name = f"{TYPES[dtype]} {bits}-bit D={D}"
                cases[f"pack keys {name}"] = (pack_keys, types, sizes, (), options)
                more = {"p_at": "*i32", "t": "i32", "n_groups": "i32"}
                cases[f"pack values {name}"] = (pack_values, types | more, sizes, (), options)
    return cases
