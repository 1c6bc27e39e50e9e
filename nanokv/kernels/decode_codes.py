"""Attention over quantised entries as they lie in memory: codes are widened in registers, no copy is ever written.

A row of n tokens keeps its first keys and its first values as codes (nanokv/quant.py) and the rest exact, and it may
have more keys than values as codes, or the other way round. A split walks through its part of a row with the running
softmax of decode.py: first over the tiles that are codes throughout, then over the rest, where codes and exact numbers
are both loaded and each is zero where the other counts.

Codes are packed slot by slot: a slot of keys is GROUP_K tokens, whose numbers of one channel share a scale and a
minimum, one of values is a token, of which GROUP_V channels share them. A width is packed as its binary digits, see
`codes`.

What makes quantised attention slow on a GPU is not the memory, which it was made to save, but the instructions that
take bytes apart. Four things keep them few. Four bytes, of four channels, are loaded as one word, which is two pairs of
bytes in halves of 16 bits as it stands, channels 0 and 2, and again when shifted once, channels 1 and 3: `planes` masks
two at a time, and channels 1 and 2 of every four change places in queries and results instead, see `exchange`. Codes
are neither shifted nor converted from integers: an fp16 number whose mantissa is the masked byte, with the exponent at
which that code counts in ones, is 2^e + code exactly, so that one subtraction yields the code. Masking and setting the
exponent are one instruction, but only if the compiler cannot know one of its constants, see `unknown`. And minima are
not added to keys: their product with a query is the same for all tokens of a slot and is added to the scores.

That also spares keys with large channels a rounding. Codes are counted from the middle of their range, 2^(bits - 1):
the smaller the product of code and scale, the smaller its rounding, and at 2 bits, -2 to 1, there is none.

Arithmetic is in fp16 with fp32 sums for fp16 and bf16 models, in fp32 for fp32 models. Queries are divided by a
power of two above their largest element first, so that those of a bf16 model fit fp16. Keys and values beyond fp16's
range do not, but neither do their minima in this cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.kernels.decode import HIDDEN, THIN, apart, check, decode_naive, hide, leave, run, update
from nanokv.quant import decode as widen


class Codes(NamedTuple):
    """What is packed, in slots as `nanokv.quant.encode` makes them: row r is the n[r] slots from start[r] on.

    code uint8 (S, bytes); scale and low fp16, (S, D) for keys, (S, 1, D / group) for values, whose slots are tokens;
    start int64 (R,), n int32 (R,).
    """

    code: Tensor
    scale: Tensor
    low: Tensor
    start: Tensor
    n: Tensor
    bits: int


class Exact(NamedTuple):
    """What follows the packed entries: x (S, D), of which row r begins at start[r], int64 (R,)."""

    x: Tensor
    start: Tensor


def decode_codes_naive(q: Tensor, k_old: Codes, v_old: Codes, k_new: Exact, v_new: Exact, length: Tensor, **more):
    """Do what `decode_codes` does: widen every row, in fp32 or q's fp64, and attend to the copy."""
    D, work = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    tokens, group = slot_sizes(k_old, v_old, D)
    keys, values = [], []
    for r, n in enumerate(length.tolist()):
        for old, new, shape, out in ((k_old, k_new, (tokens, 0), keys), (v_old, v_new, (1, group), values)):
            at = slice(int(old.start[r]), int(old.start[r] + old.n[r]))
            x = widen(old.code[at], old.scale[at], old.low[at], old.bits, *shape).flatten(0, 1).to(work)  # (tokens, D)
            begin = int(new.start[r])
            out += [x, new.x[begin : begin + n - len(x)].to(work)]
    start = length.cumsum(0) - length
    return decode_naive(q, torch.cat(keys), torch.cat(values), start, length, **more)


def slot_sizes(k_old: Codes, v_old: Codes, D: int) -> tuple[int, int]:
    """Return how many tokens a slot of keys has, and how many channels of a value share a scale."""
    return k_old.code.shape[-1] * 8 // (k_old.bits * D), D // v_old.scale.shape[-1]


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
def planes(p_word, o_slot, m_slot, unknown, N: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr):
    """Return what PART bits of each code add to it, fp16 (slots, N), see `codes`."""
    W: tl.constexpr = N * PART // 32  # words
    DONE: tl.constexpr = BITS // (2 * PART) * (2 * PART)  # bits in the parts before
    MIDDLE: tl.constexpr = 1 << (PART - 1) if DONE + PART == BITS else 0
    PER: tl.constexpr = 8 // PART  # codes per byte
    o_word = o_slot[:, None] * (N * BITS // 32) + N * DONE // 32 + tl.arange(0, W)[None, :]
    # (slots, W) words of the bytes of four channels
    word = tl.load(p_word + o_word, mask=m_slot[:, None], other=0)
    pair = tl.reshape(tl.join(word, word >> 8), (word.shape[0], 1, 2 * W))  # the low bytes of halves count
    shift = tl.reshape(tl.arange(0, PER) * PART, (1, PER, 1))
    mask = ((1 << PART) - 1) << shift
    magic = 0x6400 - ((shift - DONE) << 10)  # 2^e in fp16, at which this part of the byte counts in 2^DONE
    pair = (pair & (mask * 0x10001)) | (magic * 0x10001 + unknown)  # (slots, PER, 2 * W)
    first = pair.to(tl.int16).to(tl.float16, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (magic + (MIDDLE << shift)).to(tl.int16).to(tl.float16, bitcast=True)  # is to be 0
    code = tl.reshape(tl.join(first, second), (word.shape[0], PER, 4 * W)) - zero
    return tl.reshape(code, (word.shape[0], N))  # code j of byte w is number j * bytes + w


@triton.jit
def codes(p_word, o_slot, m_slot, unknown, N: tl.constexpr, BITS: tl.constexpr):
    """Return the N codes of slots o_slot, less 2^(BITS - 1), as fp16 (slots, N), channels exchanged.

    They are packed as the binary digits of their width, low bits first: 3 bits are 2 and then 1, 6 are 4 and then 2.
    """
    LAST: tl.constexpr = BITS & -BITS
    out = planes(p_word, o_slot, m_slot, unknown, N, BITS, LAST)
    if BITS & 4 and LAST < 4:
        out += planes(p_word, o_slot, m_slot, unknown, N, BITS, 4)
    if BITS & 2 and LAST < 2:
        out += planes(p_word, o_slot, m_slot, unknown, N, BITS, 2)
    return out


@triton.jit
def levels(p_scale, p_low, o_slot, m_slot, N: tl.constexpr):
    """Return the N scales and minima of slots o_slot, fp16 (slots, N) each, zeros where m_slot is False."""
    o = o_slot[:, None] * N + tl.arange(0, N)[None, :]
    # (slots, N) each
    return tl.load(p_scale + o, mask=m_slot[:, None], other=0.0), tl.load(p_low + o, mask=m_slot[:, None], other=0.0)


@triton.jit
def key_scores(p_code, p_scale, p_low, o_slot, m_slot, q, q_exchanged, unknown, BITS: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """Return the products (slots * GROUP, BM) of queries (D, BM) with the packed keys of slots o_slot."""
    D: tl.constexpr = q.shape[0]
    BM: tl.constexpr = q.shape[1]
    BG: tl.constexpr = o_slot.shape[0]
    scale, low = levels(p_scale, p_low, o_slot, m_slot, D)
    scale, low = scale.to(q.dtype), low.to(q.dtype)
    k = tl.reshape(codes(p_code, o_slot, m_slot, unknown, GROUP * D, BITS).to(q.dtype), (BG, GROUP, D))
    k = tl.reshape(k * exchange(scale, 1)[:, None, :], (BG * GROUP, D))
    s = tl.dot(k, q_exchanged, input_precision="ieee")
    s_low = tl.dot(low, q, input_precision="ieee")  # (BG, BM)
    s_low += tl.dot(scale, q, input_precision="ieee") * (1 << (BITS - 1))
    return tl.reshape(tl.reshape(s, (BG, GROUP, BM)) + s_low[:, None, :], (BG * GROUP, BM))


@triton.jit
def values(p_code, p_scale, p_low, t, m_t, unknown, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
           WORK: tl.constexpr):  # fmt: skip
    """Return the packed values of tokens t (BT,), (BT, D) with channels exchanged, zeros where m_t is False."""
    scale, low = levels(p_scale, p_low, t, m_t, D // GROUP)
    scale, low = scale.to(tl.float32), low.to(tl.float32)
    low = (low + scale * (1 << (BITS - 1))).to(WORK)
    v = tl.reshape(codes(p_code, t, m_t, unknown, D, BITS).to(WORK), (t.shape[0], D // GROUP, GROUP))
    return tl.reshape(v * scale.to(WORK)[:, :, None] + low[:, :, None], (t.shape[0], D))


@triton.jit
def exact(p_x, t, m_t, D: tl.constexpr, WORK: tl.constexpr):
    """Return the keys or values of tokens t (BT,) that are held exactly: (BT, D), zeros where m_t is False."""
    # (BT, D)
    x = tl.load(p_x + t[:, None] * D + tl.arange(0, D)[None, :], mask=m_t[:, None], other=0.0)
    return x.to(tl.float32).to(WORK)


@triton.jit
def scaled_queries(p_q, o_m, M: tl.constexpr, D: tl.constexpr, WORK: tl.constexpr):
    """Return queries (D, BM) divided by a power of two, so that they stay exact and fit WORK, and that, (BM,)."""
    # (D, BM)
    q = tl.load(p_q + o_m[None, :] * D + tl.arange(0, D)[:, None], mask=(o_m < M)[None, :], other=0.0).to(tl.float32)
    top = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 0), 1e-30))))
    return (q / top[None, :]).to(WORK), top


@triton.jit(do_not_specialize=["n_splits"])
def split_codes(p_q, p_k_code, p_k_scale, p_k_low, p_k_start, p_k_n, p_v_code, p_v_scale, p_v_low, p_v_start, p_v_n,
                p_k_new, p_k_new_start, p_v_new, p_v_new_start, p_length, p_pos, p_q_pos, p_bias, p_col, p_o, p_lse,
                scale, window, split_len, n_splits,
                M: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BITS_K: tl.constexpr,
                BITS_V: tl.constexpr, GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, WORK: tl.constexpr):  # fmt: skip
    """Attend to one split of one row, whole tiles of BT tokens; scale is to base 2."""
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, nk, nv = tl.load(p_length + i_row), tl.load(p_k_n + i_row) * GROUP_K, tl.load(p_v_n + i_row)
    unknown = tl.minimum(n, 0)  # 0, see above
    first = i_split * split_len
    last = tl.minimum(first + split_len, n)
    # offsets within a row fit 32 bits, where a row begins may not
    k_start, v_start = tl.load(p_k_start + i_row), tl.load(p_v_start + i_row)
    p_k_code += k_start * (GROUP_K * D * BITS_K // 32)
    p_k_scale += k_start * D
    p_k_low += k_start * D
    p_v_code += v_start * (D * BITS_V // 32)
    p_v_scale += v_start * (D // GROUP_V)
    p_v_low += v_start * (D // GROUP_V)
    p_k_new += (tl.load(p_k_new_start + i_row) - nk) * D  # the first exact one is token nk
    p_v_new += (tl.load(p_v_new_start + i_row) - nv) * D
    o_m = tl.arange(0, BM)
    q, top = scaled_queries(p_q + i_row * M * D, o_m, M, D, WORK)
    q_exchanged, scales = exchange(q, 0), top * scale
    until = None
    if p_col is not None:
        col = tl.load(p_col + i_row)
    if p_pos is not None:
        # (BM,)
        until = tl.load(p_q_pos + i_row * M + o_m, mask=o_m < M, other=-1)
        p_pos += col
    if p_bias is not None:
        p_bias += col
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((D, BM), tl.float32)
    whole = tl.minimum(tl.minimum(nk, nv), last) // BT * BT  # tokens in tiles that are codes throughout
    for ENDS in tl.static_range(2):  # tiles at the ends are half as long: they take registers for both forms
        o_t, o_g = tl.arange(0, BT // (1 + ENDS)), tl.arange(0, BT // (1 + ENDS) // GROUP_K)
        for at in range(tl.maximum(first, whole) if ENDS else first, last if ENDS else whole, BT // (1 + ENDS)):
            t, slot = at + o_t, at // GROUP_K + o_g
            m_t, m_k, m_v = t < last, slot * GROUP_K < nk, t < nv
            if not ENDS:
                m_t, m_k, m_v = m_t | True, m_k | True, m_v | True
            s = key_scores(p_k_code, p_k_scale, p_k_low, slot, m_k, q, q_exchanged, unknown, BITS_K, GROUP_K)
            v = values(p_v_code, p_v_scale, p_v_low, t, m_v, unknown, D, BITS_V, GROUP_V, WORK)
            if ENDS:
                s += tl.dot(exact(p_k_new, t, m_t & (t >= nk), D, WORK), q, input_precision="ieee")  # (BT / 2, BM)
                v += exchange(exact(p_v_new, t, m_t & (t >= nv), D, WORK), 1)  # (BT / 2, D)
            pos = t
            if p_pos is not None:
                # (BT,)
                pos = tl.load(p_pos + t, mask=m_t, other=HIDDEN)
            s = hide(s * scales[None, :], pos, until, window, None if p_bias is None else p_bias + t, m_t)
            m, l, acc = update(s, v, m, l, acc, p_pos is not None or p_bias is not None)
    leave(m, l, exchange(acc, 0), p_o, p_lse, (i_row * n_splits + i_split) * M, M, D)


def decode_codes(q: Tensor, k_old: Codes, v_old: Codes, k_new: Exact, v_new: Exact, length: Tensor, *,
                 q_pos: Tensor | None = None, col_start: Tensor | None = None, **more):  # fmt: skip
    """Attend from q (R, M, D) to rows of length[r] tokens, int32, of which the first are codes and the rest exact.

    Nothing outside the rows is ever read. pos, q_pos, bias, window, most, lse and what is returned: as in `decode`; a
    row's columns begin at col_start[r]. NotImplementedError where it is not made for it.
    """
    D = q.shape[2]
    check(q, k_new.x, v_new.x)
    tokens, group = slot_sizes(k_old, v_old, D)
    if bad := [bits for bits in (k_old.bits, v_old.bits) if bits == 7]:
        raise NotImplementedError(f"no kernel attends to codes of {bad[0]} bits")
    if D not in (32, 64, 128) or tokens not in (16, 32, 64) or group not in (16, 32, 64):
        why = f"{D} channels, keys in groups of {tokens}, values in groups of {group}"
        raise NotImplementedError(f"no kernel attends to codes of {why}")
    if k_new.x.stride(0) != D or v_new.x.stride(0) != D:
        raise NotImplementedError("the kernel for codes takes exact entries that lie side by side")
    own = sizes(k_new.x.dtype, k_old.bits, v_old.bits, tokens, min(THIN, q.shape[1]), D)
    own |= {"BITS_K": k_old.bits, "BITS_V": v_old.bits, "GROUP_K": tokens, "GROUP_V": group}
    for which, old, new in (("k", k_old, k_new), ("v", v_old, v_new)):
        own |= {f"p_{which}_code": old.code.view(torch.int32), f"p_{which}_scale": old.scale, f"p_{which}_low": old.low}
        own |= {f"p_{which}_start": old.start, f"p_{which}_n": old.n}
        own |= {f"p_{which}_new": new.x, f"p_{which}_new_start": new.start}

    def attend(q, q_pos):
        return run(split_codes, own | {"M": q.shape[1]}, q, D, length, columns=col_start, q_pos=q_pos, **more)

    return attend(q, q_pos) if q.shape[1] <= THIN else apart(attend, q, q_pos)


def sizes(dtype, bits_k: int, bits_v: int, group: int, M: int, D: int, amd: bool = torch.version.hip is not None):
    """Return what `split_codes` is compiled for: the sizes of the problem and of its tiles, warps and stages."""
    BM = max(16 if amd else 8, triton.next_power_of_2(M))
    BT = 128  # the largest tiles of tokens that fit the registers of every GPU: they spend least per token
    if dtype == torch.float32 or (amd and min(bits_k, bits_v) == 2):
        BT = 64
    elif {bits_k, bits_v} <= {1, 2, 4} and D <= 64 and BM <= 8 and dtype == torch.float16:
        BT = 256
    wide = dtype == torch.float32 and BM * D > 1024 and not amd
    out = {"M": M, "BM": BM, "D": D, "BT": max(2 * group, BT), "num_warps": 8 if wide else 4, "num_stages": 1,
           "WORK": tl.float32 if dtype == torch.float32 else tl.float16}  # fmt: skip
    return out if amd else out | {"maxnreg": 255}  # else a few registers are spilled for the sake of occupancy
