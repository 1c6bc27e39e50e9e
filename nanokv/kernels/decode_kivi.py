"""Attention over a KIVI cache as it lies in memory: codes are dequantised in registers, and no copy is ever written.

A row of n tokens keeps its first nk keys and its first nv values as codes (nanokv/quant.py) and the rest exact, which
makes up to four regions: keys and values quantised; the rest of whichever has more codes, once each way round; both
exact. A split walks through its part of every region with one running softmax, see nanokv/kernels/decode.py.

What makes quantised attention slow on a GPU is not the memory, which it was made to save, but the instructions that
take bytes apart. Four things keep them few. Four bytes, of four channels, are loaded as one word, which is two pairs of
bytes in halves of 16 bits as it stands, channels 0 and 2, and again when shifted once, channels 1 and 3: `codes` masks
two at a time, and channels 1 and 2 of every four change places in queries and results instead, see `exchange`. Codes
are neither shifted nor converted from integers: an fp16 number whose mantissa is the masked byte, with the exponent at
which that code counts in ones, is 2^e + code exactly, so that one subtraction yields the code. Masking and setting the
exponent are one instruction, but only if the compiler cannot know one of its constants, see `unknown`. And minima are
not added to keys: their product with a query is the same for all tokens of a group and is added to the scores.

That also spares keys with large channels a rounding. Codes are counted from the middle of their range, 2^(bits - 1):
the smaller the product of code and scale, the smaller its rounding, and at 2 bits, -2 to 1, there is none.

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
    TYPES,
    aot_case,
    apart,
    check,
    columns,
    decode_naive,
    fold,
    keep,
    leave,
    run,
    weigh,
)  # fmt: skip
from nanokv.quant import unpack

PLACES = ("k_scale", "k_low", "k_start", "k_len", "v_scale", "v_low", "v_code_start", "v_stat_start", "v_len",
          "k_new_start", "v_new_start")  # fmt: skip
MOST = 16  # query rows at a time, so that a tile fits the registers; if there are more, the cache is read again


def decode_kivi_naive(q: Tensor, *, k_code: Tensor, k_scale: Tensor, k_low: Tensor, k_start: Tensor, k_len: Tensor,
                      v_code: Tensor, v_code_start: Tensor, v_scale: Tensor, v_low: Tensor, v_stat_start: Tensor,
                      v_len: Tensor, k_new: Tensor, k_new_start: Tensor, v_new: Tensor, v_new_start: Tensor,
                      length: Tensor, bits: int, group: int, **more):  # fmt: skip
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
    return decode_naive(q, torch.cat(keys), torch.cat(values), start, length, **more)


@triton.jit
def exchange(x, axis: tl.constexpr):
    """Let channels 1 and 2 of every four change places; they are the rows (axis 0) or columns (axis 1) of x."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    if axis == 0:
        x = tl.permute(tl.reshape(x, (A // 4, 2, 2, B)), (0, 2, 1, 3))
    else:
        x = tl.permute(tl.reshape(x, (A, B // 4, 2, 2)), (0, 1, 3, 2))
    return tl.reshape(x, (A, B))


@triton.jit
def codes(p_word, i_group, unknown, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
          BG: tl.constexpr):  # fmt: skip
    """Return the codes of groups i_group (BG,), less 2^(BITS - 1), as fp16 (BG, GROUP, BD), channels exchanged."""
    W: tl.constexpr = GROUP * BITS // 8  # rows of bytes per group
    PER: tl.constexpr = 8 // BITS  # codes per byte
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    o_w, o_d = tl.arange(0, W), tl.arange(0, BD // 4)
    o_row = tl.reshape(i_group[:, None] * W + o_w[None, :], (BG * W,))
    # (BG * W, BD / 4) words of the bytes of four channels
    word = tl.load(p_word + o_row[:, None] * (D // 4) + o_d[None, :], mask=(o_d < D // 4)[None, :], other=0)
    pair = tl.reshape(tl.join(word, word >> 8), (BG, 1, W, BD // 2))  # the low bytes of its halves are two channels
    j = tl.reshape(tl.arange(0, PER), (1, PER, 1, 1))
    mask = ((1 << BITS) - 1) << (j * BITS)
    magic = 0x6400 - ((j * BITS) << 10)  # 2^(10 - j * BITS) in fp16: the code j of a byte counts in ones there
    pair = (pair & (mask * 0x10001)) | (magic * 0x10001 + unknown)  # (BG, PER, W, BD / 2)
    first = pair.to(tl.int16).to(tl.float16, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (magic + (MIDDLE << (j * BITS))).to(tl.int16).to(tl.float16, bitcast=True)  # is to be 0
    code = tl.reshape(tl.join(first, second), (BG, PER, W, BD)) - zero
    return tl.reshape(code, (BG, GROUP, BD))  # code j of byte row w is token j * W + w


@triton.jit
def key_scores(p_code, p_scale, p_low, i_group, q, q_exchanged, unknown, D: tl.constexpr, BD: tl.constexpr,
               BITS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    """Return the products (BG * GROUP, BM) of queries (BD, BM) with the quantised keys of groups i_group (BG,)."""
    BM: tl.constexpr = q.shape[1]
    o_d = tl.arange(0, BD)
    o, m_d = i_group[:, None] * D + o_d[None, :], (o_d < D)[None, :]
    # (BG, BD) each
    scale = tl.load(p_scale + o, mask=m_d, other=0.0).to(q.dtype)
    low = tl.load(p_low + o, mask=m_d, other=0.0).to(q.dtype)
    k = codes(p_code, i_group, unknown, D, BD, BITS, GROUP, BG).to(q.dtype) * exchange(scale, 1)[:, None, :]
    s = tl.dot(tl.reshape(k, (BG * GROUP, BD)), q_exchanged, input_precision="ieee")
    s_low = tl.dot(low, q, input_precision="ieee")  # (BG, BM)
    s_low += tl.dot(scale, q, input_precision="ieee") * (1 << (BITS - 1))
    return tl.reshape(tl.reshape(s, (BG, GROUP, BM)) + s_low[:, None, :], (BG * GROUP, BM))


@triton.jit
def values(p_code, p_scale, p_low, i_group, t, unknown, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
           GROUP: tl.constexpr, BG: tl.constexpr, WORK: tl.constexpr):  # fmt: skip
    """Return the values (BG * GROUP, BD) of groups i_group (BG,), channels exchanged; their scales are those of t."""
    o_s = tl.arange(0, BD // GROUP)
    o, m_s = t[:, None] * (D // GROUP) + o_s[None, :], (o_s < D // GROUP)[None, :]
    # (BG * GROUP, BD / GROUP) each
    scale = tl.load(p_scale + o, mask=m_s, other=0.0).to(tl.float32)
    low = tl.load(p_low + o, mask=m_s, other=0.0).to(tl.float32)
    low, scale = (low + scale * (1 << (BITS - 1))).to(WORK), scale.to(WORK)
    code = codes(p_code, i_group, unknown, D, BD, BITS, GROUP, BG).to(WORK)
    v = tl.reshape(code, (BG * GROUP, BD // GROUP, GROUP)) * scale[:, :, None] + low[:, :, None]
    return tl.reshape(v, (BG * GROUP, BD))


@triton.jit
def exact(p_x, t, m_t, D: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr):
    """Return the keys or values t (BT,) that are held exactly: (BT, BD)."""
    o_d = tl.arange(0, BD)
    # (BT, BD)
    x = tl.load(p_x + t[:, None] * D + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
    return x.to(tl.float32).to(WORK)


@triton.jit
def scaled_queries(p_q, o_m, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr):
    """Return queries (BD, BM) divided by a power of two, so that they stay exact and fit WORK, and that, (BM,)."""
    o_d = tl.arange(0, BD)
    # (BD, BM)
    q = tl.load(p_q + o_m[None, :] * D + o_d[:, None], mask=(o_m < M)[None, :] & (o_d < D)[:, None], other=0.0)
    q = q.to(tl.float32)
    top = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 0), 1e-30))))
    return (q / top[None, :]).to(WORK), top


@triton.jit(do_not_specialize=["window", "n_splits", "most"])  # they change from step to step
def kivi_split(p_q, p_k_code, p_k_scale, p_k_low, p_k_start, p_k_len, p_v_code, p_v_code_start, p_v_scale, p_v_low,
               p_v_stat_start, p_v_len, p_k_new, p_k_new_start, p_v_new, p_v_new_start, p_length, p_pos, p_q_pos,
               p_bias, p_columns, p_acc, p_lse, p_s, scale, window, split_len, n_splits, most,
               M: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr, BT: tl.constexpr, WORK: tl.constexpr, HAS_POS: tl.constexpr,
               HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """Attend to one split of one row, whole tiles of BT tokens; scale is to base 2."""
    BG: tl.constexpr = BT // GROUP
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    nk, nv, n = tl.load(p_k_len + i_row), tl.load(p_v_len + i_row), tl.load(p_length + i_row)
    unknown = tl.minimum(n, 0)  # 0, see above
    first = i_split * split_len
    last = tl.minimum(first + split_len, n)
    # offsets within a row fit 32 bits, where a row begins may not
    k_start, v_start = tl.load(p_k_start + i_row), tl.load(p_v_stat_start + i_row)
    p_k_code += k_start * (GROUP * BITS // 8 * D // 4)
    p_k_scale += k_start * D
    p_k_low += k_start * D
    p_v_code += tl.load(p_v_code_start + i_row) * (GROUP * BITS // 8 * D // 4)
    p_v_scale += v_start * (D // GROUP)
    p_v_low += v_start * (D // GROUP)
    p_k_new += (tl.load(p_k_new_start + i_row) - nk) * D  # the first exact one is token nk
    p_v_new += (tl.load(p_v_new_start + i_row) - nv) * D
    o_m, o_t, o_g = tl.arange(0, BM), tl.arange(0, BT), tl.arange(0, BG)
    q, top = scaled_queries(p_q + i_row * M * D, o_m, M, D, BD, WORK)
    q_exchanged, scales = exchange(q, 0), top * scale
    p_pos, p_bias, p_s, q_pos = columns(p_columns, p_pos, p_bias, p_s, p_q_pos, i_row, 0, most, o_m, M, HAS_POS,
                                        HAS_BIAS, PROBS)  # fmt: skip
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BD, BM), tl.float32)
    for region in tl.static_range(4):  # 0: keys and values are codes; 1: keys; 2: values; 3: neither
        low = first if region < 2 else tl.maximum(first, nk)
        high = tl.minimum(last, nk) if region < 2 else last
        low = low if region % 2 == 0 else tl.maximum(low, nv)
        high = tl.minimum(high, nv) if region % 2 == 0 else high
        for at in range(low // BT * BT, high, BT):
            t = at + o_t
            m_t = (t >= low) & (t < high)
            i_group = at // GROUP + o_g
            if region < 2:  # beyond the last group: that again, masked
                s = key_scores(p_k_code, p_k_scale, p_k_low, tl.minimum(i_group, nk // GROUP - 1), q, q_exchanged,
                               unknown, D, BD, BITS, GROUP, BG)  # fmt: skip
            else:
                s = tl.dot(exact(p_k_new, t, m_t, D, BD, WORK), q, input_precision="ieee")  # (BT, BM)
            s *= scales[None, :]
            pos = t
            if HAS_POS:
                # (BT,)
                pos = tl.load(p_pos + t, mask=m_t, other=HIDDEN)
            s = weigh(s, pos, q_pos, window, p_bias + at, m_t, HAS_POS, HAS_WINDOW, HAS_BIAS, BT)
            if PROBS:
                keep(p_s, s, t, m_t, o_m, most, M)
            if region % 2 == 0:
                v = values(p_v_code, p_v_scale, p_v_low, tl.minimum(i_group, (nv - 1) // GROUP),
                           tl.minimum(t, nv - 1), unknown, D, BD, BITS, GROUP, BG, WORK)  # fmt: skip
            else:
                v = exchange(exact(p_v_new, t, m_t, D, BD, WORK), 1)
            m, l, acc = fold(s, v, m, l, acc, HAS_POS or HAS_BIAS)
    leave(m, l, exchange(acc, 0), p_acc, p_lse, (i_row * n_splits + i_split) * M, o_m, M, D, BD)


def decode_kivi_triton(q: Tensor, *, k_code: Tensor, v_code: Tensor, k_new: Tensor, v_new: Tensor, length: Tensor,
                       bits: int, group: int, q_pos: Tensor | None = None, col_start: Tensor | None = None,
                       **more):  # fmt: skip
    """Attend from q (R, M, D) to rows of length[r] tokens, of which k_len[r] keys and v_len[r] values are codes.

    Keys, in groups of `group` tokens: k_code uint8 (Sg, group * bits / 8, D), k_scale and k_low fp16 (Sg, D); row r
    begins at group k_start[r], and k_len[r] is a multiple of `group`. Values: v_code like k_code, from group
    v_code_start[r]; v_scale and v_low fp16 (St, D / group), from token v_stat_start[r]. k_new (Sn, D) and v_new
    (Sm, D) hold the exact ones that follow, from k_new_start[r] and v_new_start[r]. Lengths are int32 (R,), starts
    int64 (R,). Nothing outside the rows is ever read, except the bytes of a row's last group of values.

    pos, q_pos, bias, window, most, probs, lse and what is returned: as in `decode_triton`; a row's columns begin at
    col_start[r]. NotImplementedError where it is not made for it.
    """
    D = q.shape[2]
    if bits not in (2, 4, 8) or group not in (16, 32, 64):
        raise NotImplementedError(f"kivi's kernel takes 2, 4 or 8 bits and groups of 16, 32 or 64, not {bits}, {group}")
    if D % group or D > 128:
        raise NotImplementedError(f"kivi's kernel takes multiples of group = {group} up to 128 channels, not {D}")
    check(q, k_new, v_new)
    own = blocks(k_new.dtype, bits, group, min(MOST, q.shape[1]), D) | {"BITS": bits, "GROUP": group}
    own |= {f"p_{name}": more.pop(name) for name in PLACES} | {"p_k_new": k_new, "p_v_new": v_new}
    own |= {"p_k_code": k_code.view(torch.int32), "p_v_code": v_code.view(torch.int32)}  # words of four channels

    def attend(q, q_pos):
        return run(kivi_split, own | {"M": q.shape[1]}, q, D, length, columns=col_start, q_pos=q_pos, **more)

    return attend(q, q_pos) if q.shape[1] <= MOST else apart(attend, MOST, q, q_pos)


def blocks(dtype, bits: int, group: int, M: int, D: int, amd: bool = torch.version.hip is not None) -> dict:
    """Return the sizes the split kernel is compiled for: those of the problem, of its tiles, warps and stages."""
    BM = max(16 if amd else 8, triton.next_power_of_2(M))
    BD = triton.next_power_of_2(D)
    BT = 128  # the largest tiles of tokens that fit the registers of every GPU: they spend least per token
    if dtype == torch.float32:
        BT = 128 if BM * BD <= 512 and bits == 8 else 64
    elif amd and bits == 2:
        BT = 64
    elif bits < 8 and BD <= 64 and BM <= 8 and dtype == torch.float16:
        BT = 256
    out = {"M": M, "BM": BM, "D": D, "BD": BD, "BT": max(group, BT), "num_warps": 4, "num_stages": 1,
           "WORK": tl.float32 if dtype == torch.float32 else tl.float16}  # fmt: skip
    return out if amd else out | {"maxnreg": 255}  # else a few registers are spilled for the sake of occupancy


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time: name -> (fn, types, constants, aligned, options)."""
    flags = {"HAS_POS": True, "HAS_WINDOW": True, "HAS_BIAS": True, "PROBS": True}
    sizes = [(t, bits, M, D, {}) for t in TYPES for bits in (2, 4, 8) for M, D in ((3, 64), (4, 128))]
    sizes += [(torch.float16, 2, M, D, {}) for M, D in ((8, 96), (16, 64), (16, 128))]
    sizes += [(torch.float32, 4, 16, 128, {}), (torch.float16, 2, 3, 64, flags)]
    types = dict.fromkeys(("p_k_start", "p_v_code_start", "p_v_stat_start", "p_k_new_start", "p_v_new_start"), "*i64")
    types |= dict.fromkeys(("p_k_len", "p_v_len", "p_k_code", "p_v_code"), "*i32")
    types |= dict.fromkeys(("p_k_scale", "p_k_low", "p_v_scale", "p_v_low"), "*fp16")
    cases = {}
    for dtype, bits, M, D, more in sizes:
        new = dict.fromkeys(("p_k_new", "p_v_new"), f"*{TYPES[dtype]}")
        own = lambda dtype, M, D, DV, amd, bits=bits: blocks(dtype, bits, 32, M, D, amd)  # noqa: E731
        cases |= aot_case(f"kivi {TYPES[dtype]} {bits}-bit", kivi_split, dtype, M, D, D, types | new, own,
                          BITS=bits, GROUP=32, **more)  # fmt: skip
    return cases
