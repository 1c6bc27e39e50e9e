"""Attention over a KIVI cache as it lies in memory: codes are dequantised in registers, and no copy is ever written.

A row of n tokens keeps its first nk keys and its first nv values as codes (nanokv/quant.py) and the rest exact, which
makes up to four regions: keys and values quantised; the rest of whichever has more codes, once each way round; both
exact. A split walks through its part of every region with one running softmax, see nanokv/kernels/decode.py.

What makes quantised attention slow on a GPU is not the memory, which it was made to save, but the instructions that
take bytes apart. Three things keep them few. Four bytes are loaded as one word and stay together in pairs: `codes`
masks two at a time. Nothing is shifted and nothing converted from an integer: an fp16 number whose mantissa is the
masked byte, with the exponent at which that code counts in ones, is 2^e + code exactly, so that one subtraction yields
the code. And minima are not added to keys: their product with a query is the same for all tokens of a group and is
added to the scores, which also spares keys with large channels a rounding.

Arithmetic is in fp16 with fp32 sums for fp16 and bf16 models, in fp32 for fp32 models. Queries are divided by a
power of two above their largest element first, so that those of a bf16 model fit fp16. Keys and values beyond fp16's
range do not, but neither do their minima in this cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.kernels.decode import (
    HIDDEN,
    LIMIT,
    LOG2E,
    TYPES,
    combine,
    cut,
    decode_naive,
    finish,
    fold,
    leave,
    results,
    weigh,
)  # fmt: skip
from nanokv.quant import unpack


def decode_kivi_naive(q: Tensor, *, k_code: Tensor, k_scale: Tensor, k_low: Tensor, k_start: Tensor, k_len: Tensor,
                      v_code: Tensor, v_code_start: Tensor, v_scale: Tensor, v_low: Tensor, v_stat_start: Tensor,
                      v_len: Tensor, k_new: Tensor, k_new_start: Tensor, v_new: Tensor, v_new_start: Tensor,
                      length: Tensor, bits: int, group: int, scale: float, most: int, pos: Tensor | None = None,
                      q_pos: Tensor | None = None, bias: Tensor | None = None, col_start: Tensor | None = None,
                      window: int | None = None, probs: bool = False):  # fmt: skip
    """Do what `decode_kivi_triton` does: dequantise every row, in fp32 or q's fp64, and attend to the copy."""
    work = torch.promote_types(q.dtype, torch.float32)
    keys, values = [], []
    for r, n in enumerate(length.tolist()):
        nk, nv = int(k_len[r]), int(v_len[r])
        at = slice(int(k_start[r]), int(k_start[r]) + nk // group)
        k = unpack(k_code[at], bits, work) * k_scale[at, None].to(work) + k_low[at, None].to(work)  # (nk/g, g, D)
        at = slice(int(v_code_start[r]), int(v_code_start[r]) + -(-nv // group))
        v = unpack(v_code[at], bits, work).flatten(0, 1)[:nv].unflatten(-1, (-1, group))  # (nv, D/g, g)
        at = slice(int(v_stat_start[r]), int(v_stat_start[r]) + nv)
        v = v * v_scale[at, :, None].to(work) + v_low[at, :, None].to(work)
        keys += [k.flatten(0, 1), k_new[int(k_new_start[r]) :][: n - nk].to(work)]
        values += [v.flatten(1), v_new[int(v_new_start[r]) :][: n - nv].to(work)]
    start = length.cumsum(0) - length
    columns = start if col_start is None else col_start
    return decode_naive(q, torch.cat(keys), torch.cat(values), start, length, scale=scale, most=most, pos=pos,
                        q_pos=q_pos, bias=bias, col_start=columns, window=window, probs=probs)  # fmt: skip


@triton.jit
def codes(p_word, i_group, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
          BG: tl.constexpr):  # fmt: skip
    """Return the codes of groups i_group (BG,) of a row as fp16 (BG, GROUP, BD), zeros in channels beyond D."""
    W: tl.constexpr = GROUP * BITS // 8  # rows of bytes per group
    PER: tl.constexpr = 8 // BITS  # codes per byte
    o_w, o_d = tl.arange(0, W), tl.arange(0, BD // 4)
    o_row = tl.reshape(i_group[:, None] * W + o_w[None, :], (BG * W,))
    # (BG * W, BD / 4) words of the bytes of four channels
    word = tl.load(p_word + o_row[:, None] * (D // 4) + o_d[None, :], mask=(o_d < D // 4)[None, :], other=0)
    # the bytes of two channels, each in the low half of 16 bits
    even = (word & 0xFF) | ((word & 0xFF00) << 8)
    odd = ((word >> 16) & 0xFF) | ((word >> 8) & 0xFF0000)
    pair = tl.reshape(tl.join(even, odd), (BG, 1, W, BD // 2))
    j = tl.reshape(tl.arange(0, PER), (1, PER, 1, 1))
    mask = ((1 << BITS) - 1) << (j * BITS)
    magic = 0x6400 - ((j * BITS) << 10)  # 2^(10 - j * BITS) in fp16: the code j of a byte counts in ones there
    pair = (pair & (mask * 0x10001)) | (magic * 0x10001)  # (BG, PER, W, BD / 2)
    even = pair.to(tl.int16).to(tl.float16, bitcast=True)
    odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    code = tl.reshape(tl.join(even, odd), (BG, PER, W, BD)) - magic.to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(code, (BG, GROUP, BD))  # code j of byte row w is token j * W + w


@triton.jit(do_not_specialize=["window", "n_splits", "most"])  # they change from step to step
def kivi_split(p_q, p_k_code, p_k_scale, p_k_low, p_k_start, p_k_len, p_v_code, p_v_code_start, p_v_scale, p_v_low,
               p_v_stat_start, p_v_len, p_k_new, p_k_new_start, p_v_new, p_v_new_start, p_length, p_pos, p_q_pos,
               p_bias, p_columns, p_acc, p_lse, p_s, scale, window, split_len, n_splits, most,
               M: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr, BG: tl.constexpr, WORK: tl.constexpr, HAS_POS: tl.constexpr,
               HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """Attend to one split of one row, whole tiles of BG * GROUP tokens; scale is to base 2."""
    BT: tl.constexpr = BG * GROUP
    S: tl.constexpr = D // GROUP  # scales per value
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    nk, nv, n = tl.load(p_k_len + i_row), tl.load(p_v_len + i_row), tl.load(p_length + i_row)
    first = i_split * split_len
    last = tl.minimum(first + split_len, n)
    # offsets within a row fit 32 bits, where a row begins may not
    k_start, v_start = tl.load(p_k_start + i_row), tl.load(p_v_stat_start + i_row)
    p_k_code += k_start * (GROUP * BITS // 8 * D // 4)
    p_k_scale += k_start * D
    p_k_low += k_start * D
    p_v_code += tl.load(p_v_code_start + i_row) * (GROUP * BITS // 8 * D // 4)
    p_v_scale += v_start * S
    p_v_low += v_start * S
    p_k_new += tl.load(p_k_new_start + i_row) * D
    p_v_new += tl.load(p_v_new_start + i_row) * D
    o_m, o_d, o_t = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BT)
    o_g, o_s = tl.arange(0, BG), tl.arange(0, BD // GROUP)
    m_d, m_s = (o_d < D)[None, :], (o_s < S)[None, :]
    # (BD, BM)
    q = tl.load(p_q + (i_row * M + o_m)[None, :] * D + o_d[:, None], mask=(o_m < M)[None, :] & (o_d < D)[:, None],
                other=0.0).to(tl.float32)  # fmt: skip
    top = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 0), 1e-30))))  # a power of two, so that q stays exact
    q = (q / top[None, :]).to(WORK)
    scales = top * scale
    q_pos = o_m
    if HAS_POS:
        # (BM,)
        q_pos = tl.load(p_q_pos + i_row * M + o_m, mask=o_m < M, other=-1)
    if HAS_POS or HAS_BIAS:
        column = tl.load(p_columns + i_row)
        p_pos += column
        p_bias += column
    if PROBS:
        p_s += i_row * M * most
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BD, BM), tl.float32)
    for region in tl.static_range(4):  # 0: keys and values are codes; 1: keys; 2: values; 3: neither
        if region < 2:
            low, high = first, tl.minimum(last, nk)
        else:
            low, high = tl.maximum(first, nk), last
        if region % 2 == 0:
            high = tl.minimum(high, nv)
        else:
            low = tl.maximum(low, nv)
        for at in range(low // BT * BT, high, BT):
            t = at + o_t
            m_t = (t >= low) & (t < high)
            if region < 2:
                i_group = tl.minimum(at // GROUP + o_g, nk // GROUP - 1)  # beyond the last group: that again, masked
                o_k = i_group[:, None] * D + o_d[None, :]
                # (BG, BD)
                k_scale = tl.load(p_k_scale + o_k, mask=m_d, other=0.0).to(WORK)
                # (BG, BD)
                k_low = tl.load(p_k_low + o_k, mask=m_d, other=0.0).to(WORK)
                k = codes(p_k_code, i_group, D, BD, BITS, GROUP, BG).to(WORK) * k_scale[:, None, :]
                s = tl.dot(tl.reshape(k, (BT, BD)), q, input_precision="ieee")  # (BT, BM)
                s_low = tl.dot(k_low, q, input_precision="ieee")  # (BG, BM)
                s = tl.reshape(tl.reshape(s, (BG, GROUP, BM)) + s_low[:, None, :], (BT, BM))
            else:
                # (BT, BD)
                k = tl.load(p_k_new + (t - nk)[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
                s = tl.dot(k.to(tl.float32).to(WORK), q, input_precision="ieee")
            s *= scales[None, :]
            pos = t
            if HAS_POS:
                # (BT,)
                pos = tl.load(p_pos + t, mask=m_t, other=HIDDEN)
            s = weigh(s, pos, q_pos, window, p_bias + at, m_t, HAS_POS, HAS_WINDOW, HAS_BIAS, BT)
            if PROBS:
                tl.store(p_s + o_m[None, :].to(tl.int64) * most + t[:, None], s,
                         mask=m_t[:, None] & (o_m < M)[None, :])  # fmt: skip
            if region % 2 == 0:
                i_group = tl.minimum(at // GROUP + o_g, (nv - 1) // GROUP)
                o_v = tl.minimum(t, nv - 1)[:, None] * S + o_s[None, :]
                # (BT, BD / GROUP)
                v_scale = tl.load(p_v_scale + o_v, mask=m_s, other=0.0).to(WORK)
                # (BT, BD / GROUP)
                v_low = tl.load(p_v_low + o_v, mask=m_s, other=0.0).to(WORK)
                v = codes(p_v_code, i_group, D, BD, BITS, GROUP, BG).to(WORK)
                v = tl.reshape(v, (BT, BD // GROUP, GROUP)) * v_scale[:, :, None] + v_low[:, :, None]
                v = tl.reshape(v, (BT, BD))
            else:
                # (BT, BD)
                v = tl.load(p_v_new + (t - nv)[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
                v = v.to(tl.float32).to(WORK)
            m, l, acc = fold(s, v, m, l, acc, HAS_POS or HAS_BIAS)
    leave(m, l, acc, p_acc, p_lse, (i_row * n_splits + i_split) * M, o_m, M, D, BD)


def decode_kivi_triton(q: Tensor, *, k_code: Tensor, k_scale: Tensor, k_low: Tensor, k_start: Tensor, k_len: Tensor,
                       v_code: Tensor, v_code_start: Tensor, v_scale: Tensor, v_low: Tensor, v_stat_start: Tensor,
                       v_len: Tensor, k_new: Tensor, k_new_start: Tensor, v_new: Tensor, v_new_start: Tensor,
                       length: Tensor, bits: int, group: int, scale: float, most: int, pos: Tensor | None = None,
                       q_pos: Tensor | None = None, bias: Tensor | None = None, col_start: Tensor | None = None,
                       window: int | None = None, probs: bool = False, splits: int | None = None):  # fmt: skip
    """Attend from q (R, M, D) to rows of length[r] tokens, of which k_len[r] keys and v_len[r] values are codes.

    Keys, in groups of `group` tokens: k_code uint8 (Sg, group * bits / 8, D), k_scale and k_low fp16 (Sg, D); row r
    begins at group k_start[r], and k_len[r] is a multiple of `group`. Values: v_code like k_code, from group
    v_code_start[r]; v_scale and v_low fp16 (St, D / group), from token v_stat_start[r]. k_new (Sn, D) and v_new
    (Sm, D) hold the exact ones that follow, from k_new_start[r] and v_new_start[r]. Lengths are int32 (R,), starts
    int64 (R,). Nothing outside the rows is ever read, except the bytes of a row's last group of values.

    pos, q_pos, bias, window, most, probs: as in `decode_triton`; a row's columns begin at col_start[r]. Returns o
    (R, M, D) in q's dtype and, with `probs`, p fp32 (R, M, most). NotImplementedError where it is not made for it.
    """
    check(q, k_new, v_new, bits, group)
    if (pos is None) != (q_pos is None) or (pos is None and window is not None):
        raise ValueError("pos and q_pos come together, and a window needs both")
    if (pos is not None or bias is not None) and col_start is None:
        raise ValueError("pos and bias need col_start")
    (R, M, D), dev = q.shape, q.device
    sizes = blocks(k_new.dtype, bits, group, M, D)
    splits, split_len = cut(most, R, sizes["BG"] * group, splits)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    total = torch.empty(R, M, dtype=torch.float32, device=dev)
    p = torch.empty(R, M, most, dtype=torch.float32, device=dev) if probs else None
    acc, part = o, total  # a single split has the last word
    if splits > 1:
        acc = torch.empty(R, splits, M, D, dtype=torch.float32, device=dev)
        part = torch.empty(R, splits, M, dtype=torch.float32, device=dev)
    kivi_split[(R, splits)](
        q.contiguous(), words(k_code), k_scale, k_low, k_start, k_len, words(v_code), v_code_start, v_scale, v_low,
        v_stat_start, v_len, k_new, k_new_start, v_new, v_new_start, length,
        length if pos is None else pos, length if pos is None else q_pos.contiguous(), total if bias is None else bias,
        length if col_start is None else col_start, acc, part, total if p is None else p,
        scale * LOG2E.value, window or 0, split_len, splits, most, BITS=bits, GROUP=group, HAS_POS=pos is not None,
        HAS_WINDOW=window is not None, HAS_BIAS=bias is not None, PROBS=probs, **sizes)  # fmt: skip
    if splits > 1:
        combine[(R * M,)](acc, part, o, total, splits, M, D, sizes["BD"], triton.next_power_of_2(splits))
    if probs and most:
        finish[(R, triton.cdiv(most, 128))](p, total, length, most, M, sizes["BM"], 128)
    return results(o, None, p)


def words(code: Tensor) -> Tensor:
    """Return bytes (S, W, D) as words of four channels, a view."""
    return code.view(torch.int32)


def check(q, k_new, v_new, bits, group) -> None:
    """Raise if these are not the arguments the kernel was made for."""
    _, M, D = q.shape
    if bits not in (2, 4, 8) or group not in (16, 32, 64):
        raise NotImplementedError(f"kivi's kernel takes 2, 4 or 8 bits and groups of 16, 32 or 64, not {bits}, {group}")
    if D % group or D > 128:
        raise NotImplementedError(f"kivi's kernel takes multiples of group = {group} up to 128 channels, not {D}")
    if M > LIMIT:
        raise NotImplementedError(f"decode kernels take up to {LIMIT} query rows per KV head, not {M}")
    if k_new.dtype not in TYPES or v_new.dtype != k_new.dtype or q.dtype not in TYPES:
        types = f"{q.dtype}, {k_new.dtype}, {v_new.dtype}"
        raise NotImplementedError(f"decode kernels take fp16, bf16 or fp32, not {types}")


def blocks(dtype, bits: int, group: int, M: int, D: int, amd: bool = torch.version.hip is not None) -> dict:
    """Return the sizes the split kernel is compiled for: those of the problem, of its tiles, warps and stages."""
    BM = max(16 if amd else 8, triton.next_power_of_2(M))
    BD = triton.next_power_of_2(D)
    BT, warps = 128, 4  # the largest tiles of tokens that fit the registers of every GPU: they spend least per token
    if dtype == torch.float32:
        BT, warps = (128 if BM * BD <= 512 and bits == 8 else 64, 4) if BM * BD <= 2048 else (32, 8)
    elif BM * BD > 2048:
        BT, warps = 64, 8
    elif amd and bits == 2:
        BT = 64
    elif bits == 2 and BD <= 64 and BM <= 8 and dtype == torch.float16:
        BT = 256
    return {"M": M, "BM": BM, "D": D, "BD": BD, "BG": max(1, BT // group), "num_warps": warps, "num_stages": 1,
            "WORK": tl.float32 if dtype == torch.float32 else tl.float16}  # fmt: skip


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time: name -> (fn, types, constants, aligned, options)."""
    flags = {"HAS_POS": True, "HAS_WINDOW": True, "HAS_BIAS": True, "PROBS": True}
    sizes = [(t, bits, M, D, {}) for t in TYPES for bits in (2, 4, 8) for M, D in ((3, 64), (4, 128))]
    sizes += [(torch.float16, 2, M, D, {}) for M, D in ((8, 96), (24, 64), (64, 128))]
    sizes += [(torch.float32, 4, 64, 128, {}), (torch.float16, 2, 3, 64, flags)]
    cases = {}
    for dtype, bits, M, D, more in sizes:
        name = f"kivi {TYPES[dtype]} {bits}-bit D={D} M={M}" + " pos window bias probs" * bool(more)
        for suffix, targets in (("", ("sm_80", "sm_90", "sm_100")), (" (AMD)", ("gfx942",))):
            cases[name + suffix] = aot_case(dtype, bits, M, D, targets, **more)
    return cases


def aot_case(dtype, bits: int, M: int, D: int, targets: tuple, group: int = 32, **flags) -> tuple:
    """Return one case of the split kernel; options maps a target to its num_warps and num_stages."""
    exact = f"*{TYPES[dtype]}"
    types = dict.fromkeys(("p_k_start", "p_v_code_start", "p_v_stat_start", "p_k_new_start", "p_v_new_start",
                           "p_columns"), "*i64")  # fmt: skip
    types |= dict.fromkeys(("p_k_len", "p_v_len", "p_length", "p_pos", "p_q_pos", "p_k_code", "p_v_code"), "*i32")
    types |= dict.fromkeys(("p_k_scale", "p_k_low", "p_v_scale", "p_v_low"), "*fp16")
    types |= dict.fromkeys(("p_q", "p_k_new", "p_v_new"), exact)
    types |= dict.fromkeys(("p_bias", "p_acc", "p_lse", "p_s"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("window", "split_len", "n_splits", "most"), "i32")
    sizes = blocks(dtype, bits, group, M, D, amd=targets == ("gfx942",))
    options = {n: sizes.pop(n) for n in ("num_warps", "num_stages")}
    constants = dict.fromkeys(("HAS_POS", "HAS_WINDOW", "HAS_BIAS", "PROBS"), False)
    constants |= sizes | {"BITS": bits, "GROUP": group} | flags
    return kivi_split, types, constants, ("split_len",), dict.fromkeys(targets, options)
