"""Quantise keys and values to 2, 4 or 8 bits and pack the codes into bytes, in one pass over them.

What `nanokv.quant.quantise` and `pack` do in a dozen steps, with the same bits: minimum and scale are rounded to fp16
first, codes are computed from the rounded ones, divided as IEEE 754 says and rounded half to even.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.quant import pack, quantise

EVEN = tl.constexpr(1.5 * 2**23)  # added to and subtracted from an fp32 number below 2^22: rounded half to even
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def pack_keys_naive(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `pack_keys_triton` does."""
    codes, scale, low = quantise(x.mT, bits)  # (n, D, group), (n, D)
    return pack(codes.mT, bits), scale, low


def pack_values_naive(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `pack_values_triton` does."""
    codes, scale, low = quantise(x.unflatten(-1, (-1, group)), bits)  # (n, D / group, group), (n, D / group)
    room = codes.new_zeros(-(-len(x) // group) * group, x.shape[1])
    room[: len(x)] = codes.flatten(1)
    return pack(room.unflatten(0, (-1, group)), bits), scale, low


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
def squeeze(code, p_out, m_d, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Pack codes (GROUP, BD) into bytes (GROUP * BITS / 8, D): code j of byte row w is row j * W + w."""
    W: tl.constexpr = GROUP * BITS // 8
    PER: tl.constexpr = 8 // BITS
    j = tl.arange(0, PER)
    byte = tl.sum(tl.reshape(code, (PER, W, BD)) << (j * BITS)[:, None, None], 0)  # (W, BD)
    o_w, o_d = tl.arange(0, W), tl.arange(0, BD)
    tl.store(p_out + o_w[:, None] * D + o_d[None, :], byte.to(tl.uint8), mask=m_d)


@triton.jit
def pack_keys(p_x, p_code, p_scale, p_low, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
              GROUP: tl.constexpr):  # fmt: skip
    """Quantise one group of keys per channel."""
    i_group = tl.program_id(0).to(tl.int64)
    o_t, o_d = tl.arange(0, GROUP), tl.arange(0, BD)
    m_d = o_d < D
    # (GROUP, BD)
    x = tl.load(p_x + i_group * (GROUP * D) + o_t[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
    x = x.to(tl.float32)
    scale, low = levels(tl.min(x, 0), tl.max(x, 0), (1 << BITS) - 1)  # (BD,)
    tl.store(p_scale + i_group * D + o_d, scale, mask=m_d)
    tl.store(p_low + i_group * D + o_d, low, mask=m_d)
    code = encode(x, scale[None, :], low[None, :], (1 << BITS) - 1)
    squeeze(code, p_code + i_group * (GROUP * BITS // 8 * D), m_d[None, :], D, BD, BITS, GROUP)


@triton.jit(do_not_specialize=["n"])
def pack_values(p_x, p_code, p_scale, p_low, n, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """Quantise the values of up to GROUP tokens, each in groups of channels; missing tokens have code 0."""
    S: tl.constexpr = BD // GROUP
    i_group = tl.program_id(0).to(tl.int64)
    o_t, o_d, o_s = tl.arange(0, GROUP), tl.arange(0, BD), tl.arange(0, S)
    m_d, m_t = (o_d < D)[None, :], (i_group * GROUP + o_t < n)[:, None]
    # (GROUP, BD)
    x = tl.load(p_x + i_group * (GROUP * D) + o_t[:, None] * D + o_d[None, :], mask=m_t & m_d, other=0.0)
    x = tl.reshape(x.to(tl.float32), (GROUP, S, GROUP))
    scale, low = levels(tl.min(x, 2), tl.max(x, 2), (1 << BITS) - 1)  # (GROUP, S)
    o = i_group * (GROUP * (D // GROUP)) + o_t[:, None] * (D // GROUP) + o_s[None, :]
    m_s = m_t & (o_s < D // GROUP)[None, :]
    tl.store(p_scale + o, scale, mask=m_s)
    tl.store(p_low + o, low, mask=m_s)
    code = tl.reshape(encode(x, scale[:, :, None], low[:, :, None], (1 << BITS) - 1), (GROUP, BD))
    squeeze(code, p_code + i_group * (GROUP * BITS // 8 * D), m_d, D, BD, BITS, GROUP)


def pack_keys_triton(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups of keys x (n, group, D) per channel, in 2, 4 or 8 bits.

    Returns bytes (n, group * bits / 8, D), scale and minimum fp16 (n, D). group is a power of two of at least 16.
    """
    n, group, D = x.shape
    code, sizes = _room(x, n, bits, group)
    scale, low = (torch.empty(n, D, dtype=torch.float16, device=x.device) for _ in range(2))
    if n:
        pack_keys[(n,)](x.contiguous(), code, scale, low, **sizes)
    return code, scale, low


def pack_values_triton(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise values x (n, D) per token and `group` channels, in 2, 4 or 8 bits.

    Returns bytes (n / group rounded up, group * bits / 8, D), the last group filled up with codes 0, and scale and
    minimum fp16 (n, D / group). group is a power of two of at least 16 that divides D.
    """
    n, D = x.shape
    if D % group:
        raise ValueError(f"group {group} does not divide {D} channels")
    code, sizes = _room(x, triton.cdiv(n, group), bits, group)
    scale, low = (torch.empty(n, D // group, dtype=torch.float16, device=x.device) for _ in range(2))
    if n:
        pack_values[(len(code),)](x.contiguous(), code, scale, low, n, **sizes)
    return code, scale, low


def _room(x: Tensor, n: int, bits: int, group: int) -> tuple[Tensor, dict]:
    """Return bytes for n groups, and the sizes a kernel is compiled for."""
    D = x.shape[-1]
    if bits not in (2, 4, 8) or group < 16 or group & (group - 1) or x.dtype not in DTYPES:
        raise NotImplementedError(f"no packing kernel for {bits} bits in groups of {group} of {x.dtype}")
    code = torch.empty(n, group * bits // 8, D, dtype=torch.uint8, device=x.device)
    BD = max(group, triton.next_power_of_2(D))
    return code, {"D": D, "BD": BD, "BITS": bits, "GROUP": group, "num_warps": 4, "num_stages": 1}


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time: name -> (fn, types, constants, aligned, options)."""
    cases = {}
    options = {t: {"num_warps": 4, "num_stages": 1} for t in ("sm_80", "sm_90", "sm_100", "gfx942")}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for bits in (2, 4, 8):
            for D in (64, 128):
                types = {"p_x": f"*{DTYPES[dtype]}", "p_code": "*u8", "p_scale": "*fp16", "p_low": "*fp16"}
                sizes = {"D": D, "BD": D, "BITS": bits, "GROUP": 32}
                name = f"{DTYPES[dtype]} {bits}-bit D={D}"
                cases[f"pack keys {name}"] = (pack_keys, types, sizes, (), options)
                cases[f"pack values {name}"] = (pack_values, types | {"n": "i32"}, sizes, (), options)
    return cases
