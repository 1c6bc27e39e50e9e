"""Attention over quantised entries as they lie in memory: codes are widened in registers, no copy is ever written.

A row of n tokens keeps its first keys and its first values as codes (nanokv/quant.py) and the rest exact, and it may
have more keys than values as codes, or the other way round. A split walks through its part of a row with the running
softmax of decode.py: first over the tiles that are codes throughout, then over the rest, where codes and exact numbers
are both loaded and each is zero where the other counts.

Both kinds of code lie alike: a packed row holds N groups of GROUP codes, each group with its scale and minimum. For
keys a row is GROUP tokens and a group is one of its D channels; for values a row is one token and a group is GROUP of
its channels. A width is packed as its binary digits, 6 bits as 4 and 2, see `codes`.

What makes quantised attention slow on a GPU is not the memory, which it was made to save, but the instructions that
take bytes apart. Four things keep them few. Four bytes are loaded as one word, which is two pairs of bytes in halves of
16 bits as it stands, bytes 0 and 2, and again when shifted once, bytes 1 and 3: `planes` masks two at a time, and
numbers 1 and 2 of every four stand in each other's place, see `exchanged`. Codes are neither shifted nor converted from
integers: an fp16 number whose mantissa is the masked byte, with the exponent at which that code counts in ones, is
2^e + code exactly, so that one subtraction yields the code. Masking and setting the exponent are one instruction, but
only if the compiler cannot know one of its constants, see `unknown`. And minima are not added to keys: their product
with a query is the same for all tokens of a group and is added to the scores.

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
    """What is packed: code uint8 (S, N, bytes), scale and low fp16 (S, N), of rows of n[r] slots from start[r] on.

    A slot of keys is as many tokens as a group has codes, and N is D; one of values is a token, and N is D / group.
    start is int64 (R,), n int32 (R,), in slots.
    """

    code: Tensor
    scale: Tensor
    low: Tensor
    start: Tensor
    n: Tensor
    bits: int

    @property
    def group(self) -> int:
        """Return the codes per scale."""
        return self.code.shape[-1] * 8 // self.bits


class Exact(NamedTuple):
    """What follows the packed entries: x (S, D), of which row r begins at start[r], int64 (R,)."""

    x: Tensor
    start: Tensor


def decode_codes_naive(q: Tensor, k_old: Codes, v_old: Codes, k_new: Exact, v_new: Exact, length: Tensor, **more):
    """Do what `decode_codes` does: widen every row, in fp32 or q's fp64, and attend to the copy."""
    work = torch.promote_types(q.dtype, torch.float32)
    keys, values = [], []
    for r, n in enumerate(length.tolist()):
        for old, new, out in ((k_old, k_new, keys), (v_old, v_new, values)):
            at = slice(int(old.start[r]), int(old.start[r] + old.n[r]))
            x = widen(old.code[at], old.scale[at], old.low[at], old.bits).to(work)  # (slots, N, group)
            x = x.mT.flatten(0, 1) if old is k_old else x.flatten(1)  # (tokens, D)
            begin = int(new.start[r])
            out += [x, new.x[begin : begin + n - len(x)].to(work)]
    start = length.cumsum(0) - length
    return decode_naive(q, torch.cat(keys), torch.cat(values), start, length, **more)


@triton.jit
def exchanged(i):
    """Return i with 1 and 2 of every four in each other's place."""
    return (i & ~3) | ((i & 1) << 1) | ((i >> 1) & 1)


@triton.jit
def exchange(x):
    """Let rows 1 and 2 of every four of x (A, B) change places."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (A // 4, 2, 2, B)), (0, 2, 1, 3)), (A, B))


@triton.jit
def planes(p_word, o_row, m_row, unknown, N: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
           PART: tl.constexpr):  # fmt: skip
    """Return what PART bits of each code add to it, fp16 (rows, BN, GROUP), see `codes`."""
    ROW: tl.constexpr = GROUP * BITS // 32  # words of a group
    W: tl.constexpr = GROUP * PART // 32  # those of this part
    DONE: tl.constexpr = BITS // (2 * PART) * (2 * PART)  # bits in the parts before
    MIDDLE: tl.constexpr = 1 << (PART - 1) if DONE + PART == BITS else 0
    PER: tl.constexpr = 8 // PART  # codes per byte
    o_w = tl.arange(0, BN * W)
    o_word = o_w
    if W < ROW:
        o_word = o_w // W * ROW + o_w % W + GROUP * DONE // 32
    # (rows, BN * W) words of four bytes
    word = tl.load(p_word + o_row[:, None] * (N * ROW) + o_word[None, :], mask=m_row[:, None] & (o_w < N * W)[None, :],
                   other=0)  # fmt: skip
    pair = tl.reshape(tl.join(word, word >> 8), (word.shape[0], BN, 1, 2 * W))  # the low bytes of its halves count
    shift = tl.reshape(tl.arange(0, PER) * PART, (1, 1, PER, 1))
    mask = ((1 << PART) - 1) << shift
    magic = 0x6400 - ((shift - DONE) << 10)  # 2^e in fp16, at which this part of the byte counts in 2^DONE
    pair = (pair & (mask * 0x10001)) | (magic * 0x10001 + unknown)  # (rows, BN, PER, 2 * W)
    first = pair.to(tl.int16).to(tl.float16, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (magic + (MIDDLE << shift)).to(tl.int16).to(tl.float16, bitcast=True)  # is to be 0
    code = tl.reshape(tl.join(first, second), (word.shape[0], BN, PER, 4 * W)) - zero
    return tl.reshape(code, (word.shape[0], BN, GROUP))  # code j of byte w is number j * bytes + w


@triton.jit
def codes(p_word, o_row, m_row, unknown, N: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Return the codes, less 2^(BITS - 1), of N groups in packed rows o_row: fp16 (rows, BN, GROUP), exchanged.

    A group is packed as the binary digits of its width, low bits first: 3 bits are 2 and then 1, 6 are 4 and then 2.
    """
    LAST: tl.constexpr = BITS & -BITS
    out = planes(p_word, o_row, m_row, unknown, N, BN, BITS, GROUP, LAST)
    if BITS & 4 and LAST < 4:
        out += planes(p_word, o_row, m_row, unknown, N, BN, BITS, GROUP, 4)
    if BITS & 2 and LAST < 2:
        out += planes(p_word, o_row, m_row, unknown, N, BN, BITS, GROUP, 2)
    return out


@triton.jit
def levels(p_scale, p_low, o_row, m_row, N: tl.constexpr, BN: tl.constexpr):
    """Return scale and minimum of the N groups of rows o_row, fp16 (rows, BN) each, zeros where m_row is False."""
    o_n = tl.arange(0, BN)
    o, m = o_row[:, None] * N + o_n[None, :], m_row[:, None] & (o_n < N)[None, :]
    # (rows, BN) each
    return tl.load(p_scale + o, mask=m, other=0.0), tl.load(p_low + o, mask=m, other=0.0)


@triton.jit
def key_scores(p_code, p_scale, p_low, o_slot, m_slot, q, unknown, D: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """Return the products (slots * GROUP, BM) of queries (BD, BM) with the packed keys of slots o_slot, exchanged."""
    BD: tl.constexpr = q.shape[0]
    BM: tl.constexpr = q.shape[1]
    BG: tl.constexpr = o_slot.shape[0]
    PARTS: tl.constexpr = 2 if D == BD else 1  # of a slot's channels: a thread is to hold some of each, see above
    scale, low = levels(p_scale, p_low, o_slot, m_slot, D, BD)
    scale, low = scale.to(q.dtype), low.to(q.dtype)
    o_part = tl.reshape((o_slot * PARTS)[None, :] + tl.arange(0, PARTS)[:, None], (PARTS * BG,))
    m_part = tl.reshape(tl.broadcast_to(m_slot[None, :], (PARTS, BG)), (PARTS * BG,))
    k = codes(p_code, o_part, m_part, unknown, D // PARTS, BD // PARTS, BITS, GROUP).to(q.dtype)
    k = tl.permute(tl.reshape(k, (PARTS, BG, BD // PARTS, GROUP)), (1, 3, 0, 2))  # (BG, GROUP, PARTS, BD / PARTS)
    k = tl.reshape(k * tl.reshape(scale, (BG, 1, PARTS, BD // PARTS)), (BG * GROUP, BD))
    s = tl.dot(k, q, input_precision="ieee")
    s_low = tl.dot(low, q, input_precision="ieee")  # (BG, BM)
    s_low += tl.dot(scale, q, input_precision="ieee") * (1 << (BITS - 1))
    return tl.reshape(tl.reshape(s, (BG, GROUP, BM)) + s_low[:, None, :], (BG * GROUP, BM))


@triton.jit
def values(p_code, p_scale, p_low, t, m_t, unknown, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr,
           GROUP: tl.constexpr, WORK: tl.constexpr):  # fmt: skip
    """Return the packed values of tokens t (BT,), (BT, BD) with channels exchanged, zeros where m_t is False."""
    S: tl.constexpr = D // GROUP
    BS: tl.constexpr = BD // GROUP
    scale, low = levels(p_scale, p_low, t, m_t, S, BS)
    scale, low = scale.to(tl.float32), low.to(tl.float32)
    low = (low + scale * (1 << (BITS - 1))).to(WORK)
    code = codes(p_code, t, m_t, unknown, S, BS, BITS, GROUP).to(WORK)  # (BT, BS, GROUP)
    return tl.reshape(code * scale.to(WORK)[:, :, None] + low[:, :, None], (t.shape[0], BD))


@triton.jit
def exact(p_x, t, m_t, D: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr):
    """Return the keys or values of tokens t (BT,) that are held exactly: (BT, BD), zeros where m_t is False."""
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


@triton.jit(do_not_specialize=["n_splits"])
def split_codes(p_q, p_k_code, p_k_scale, p_k_low, p_k_start, p_k_n, p_v_code, p_v_scale, p_v_low, p_v_start, p_v_n,
                p_k_new, p_k_new_start, p_v_new, p_v_new_start, p_length, p_pos, p_q_pos, p_bias, p_col, p_o, p_lse,
                scale, window, split_len, n_splits,
                M: tl.constexpr, D: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, GROUP_K: tl.constexpr,
                GROUP_V: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
                WORK: tl.constexpr):  # fmt: skip
    """Attend to one split of one row, whole tiles of BT tokens; scale is to base 2."""
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, nk, nv = tl.load(p_length + i_row), tl.load(p_k_n + i_row) * GROUP_K, tl.load(p_v_n + i_row)
    unknown = tl.minimum(n, 0)  # 0, see above
    first = i_split * split_len
    last = tl.minimum(first + split_len, n)
    # offsets within a row fit 32 bits, where a row begins may not
    k_start, v_start = tl.load(p_k_start + i_row) * D, tl.load(p_v_start + i_row) * (D // GROUP_V)
    p_k_code += k_start * (GROUP_K * BITS_K // 32)
    p_k_scale += k_start
    p_k_low += k_start
    p_v_code += v_start * (GROUP_V * BITS_V // 32)
    p_v_scale += v_start
    p_v_low += v_start
    p_k_new += (tl.load(p_k_new_start + i_row) - nk) * D  # the first exact one is token nk
    p_v_new += (tl.load(p_v_new_start + i_row) - nv) * D
    o_m = tl.arange(0, BM)
    q, top = scaled_queries(p_q + i_row * M * D, o_m, M, D, BD, WORK)
    scales = top * scale
    until = None
    if p_pos is not None:
        # (BM,)
        until = tl.load(p_q_pos + i_row * M + o_m, mask=o_m < M, other=-1)
        p_pos += tl.load(p_col + i_row)
    if p_bias is not None:
        p_bias += tl.load(p_col + i_row)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BD, BM), tl.float32)
    whole = tl.minimum(tl.minimum(nk, nv), last) // BT * BT  # tokens in tiles of nothing but codes
    for ENDS in tl.static_range(2):
        WHOLE = ENDS == 0
        o_t = exchanged(tl.arange(0, BT // (1 + ENDS)))
        o_g = tl.arange(0, BT // (1 + ENDS) // GROUP_K)
        for at in range(tl.maximum(first, whole) if ENDS else first, last if ENDS else whole, BT // (1 + ENDS)):
            t = at + o_t
            slot = at // GROUP_K + o_g
            m_t, m_k, m_v = (t < last) | WHOLE, (slot * GROUP_K < nk) | WHOLE, (t < nv) | WHOLE
            s = key_scores(p_k_code, p_k_scale, p_k_low, slot, m_k, q, unknown, D, BITS_K, GROUP_K)
            v = values(p_v_code, p_v_scale, p_v_low, t, m_v, unknown, D, BD, BITS_V, GROUP_V, WORK)
            if ENDS:
                s += tl.dot(exact(p_k_new, t, m_t & (t >= nk), D, BD, WORK), q, input_precision="ieee")  # (BT, BM)
                v += tl.trans(exchange(tl.trans(exact(p_v_new, t, m_t & (t >= nv), D, BD, WORK))))  # (BT, BD)
            pos = t
            if p_pos is not None:
                # (BT,)
                pos = tl.load(p_pos + t, mask=m_t, other=HIDDEN)
            s = hide(s * scales[None, :], pos, until, window, None if p_bias is None else p_bias + t, m_t)
            m, l, acc = update(s, v, m, l, acc, p_pos is not None or p_bias is not None)
    leave(m, l, exchange(acc), p_o, p_lse, (i_row * n_splits + i_split) * M, M, D)


def decode_codes(q: Tensor, k_old: Codes, v_old: Codes, k_new: Exact, v_new: Exact, length: Tensor, *,
                 q_pos: Tensor | None = None, col_start: Tensor | None = None, **more):  # fmt: skip
    """Attend from q (R, M, D) to rows of length[r] tokens, int32, of which the first are codes and the rest exact.

    Nothing outside the rows is ever read. pos, q_pos, bias, window, most, lse and what is returned: as in `decode`; a
    row's columns begin at col_start[r]. NotImplementedError where it is not made for it.
    """
    D = q.shape[2]
    check(q, k_new.x, v_new.x)
    for old in (k_old, v_old):
        part = old.bits & -old.bits
        if old.bits == 7 or old.group not in (16, 32, 64) or old.group * part % 32:
            raise NotImplementedError(f"no kernel attends to {old.bits}-bit codes in groups of {old.group}")
    if D % v_old.group or D > 128:
        raise NotImplementedError(f"no kernel attends to codes of {D} channels in groups of {v_old.group}")
    if k_new.x.stride(0) != D or v_new.x.stride(0) != D:
        raise NotImplementedError("the kernel for codes takes exact entries that lie side by side")
    own = sizes(k_new.x.dtype, k_old.bits, v_old.bits, k_old.group, min(THIN, q.shape[1]), D)
    own |= {"BITS_K": k_old.bits, "BITS_V": v_old.bits, "GROUP_K": k_old.group, "GROUP_V": v_old.group}
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
    BD = triton.next_power_of_2(D)
    BT = 128  # the largest tiles of tokens that fit the registers of every GPU: they spend least per token
    if dtype == torch.float32 or (amd and min(bits_k, bits_v) == 2):
        BT = 64
    elif max(bits_k, bits_v) < 8 and BD <= 64 and BM <= 8 and dtype == torch.float16:
        BT = 256
    out = {"M": M, "BM": BM, "D": D, "BD": BD, "BT": max(2 * group, BT), "num_warps": 4, "num_stages": 1,
           "WORK": tl.float32 if dtype == torch.float32 else tl.float16}  # fmt: skip
    return out if amd else out | {"maxnreg": 255}  # else a few registers are spilled for the sake of occupancy
