"""Attention over keys that are stored un-rotated, as in caches that renumber their entries.

When entries are forgotten and the rest close ranks, every key gets a new position at every step. Rotating them all in
memory would cost a second pass over K, so the kernel rotates each tile between loading it and multiplying it with q.
Rotation turns channel i together with channel i + D/2 (nanokv/model.py, RoPE):

    a' = a cos - b sin        b' = b cos + a sin        for the halves a, b of a key

The two halves are loaded as two tiles, so that nothing has to change places between threads, and q is multiplied half
by half: q . k' = q_a . a' + q_b . b'. The tables of cosines and sines are shared by all heads, and so are mostly in the
GPU's cache. All else is as in decode.py.
"""
# ruff: noqa: E741 (l, the denominator, as the literature calls it)

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.kernels import ROWS
from nanokv.kernels.decode import (
    HIDDEN,
    TYPES,
    aot_case,
    apart,
    blocks,
    check,
    columns,
    decode_naive,
    fold,
    keep,
    leave,
    payload,
    run,
    weigh,
)  # fmt: skip

TILE = 2**13  # bytes of keys in a tile: half of decode's, because cosines and sines take registers too
MOST = 16  # query rows at a time, for the same reason; if there are more, keys are read again


def decode_rope_naive(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *, cos: Tensor, sin: Tensor,
                      pos: Tensor, q_pos: Tensor, col_start: Tensor | None = None, **more):  # fmt: skip
    """Do what `decode_rope_triton` does by rotating all keys first, in fp32, or in fp64 if q is."""
    rotated = k.to(torch.promote_types(q.dtype, torch.float32))  # (S, D)
    rotated = rotated.clone() if rotated is k else rotated
    places = start if col_start is None else col_start
    for a, c, n in zip(start.tolist(), places.tolist(), length.tolist(), strict=True):
        at = pos[c : c + n].long()
        at = torch.where(at == HIDDEN.value, 0, at)  # (n,)
        x, y = rotated[a : a + n].chunk(2, -1)  # (n, D/2)
        rotated[a : a + n] = torch.cat([x * cos[at] - y * sin[at], y * cos[at] + x * sin[at]], -1)
    return decode_naive(q, rotated, v, start, length, pos=pos, q_pos=q_pos, col_start=col_start, **more)


@triton.jit(do_not_specialize=["window", "n_splits", "most", "n_pos"])  # they change from step to step
def decode_rope_split(p_q, p_k, p_v, p_start, p_length, p_pos, p_q_pos, p_bias, p_columns, p_acc, p_lse, p_s,
                      p_cos, p_sin, scale, window, split_len, n_splits, most, n_pos,
                      M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROW_K: tl.constexpr, ROW_V: tl.constexpr,
                      BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
                      HAS_POS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, PROBS: tl.constexpr,
                      UPCAST: tl.constexpr):  # fmt: skip
    """Do what `decode_split` does, with keys that are rotated on the way."""
    H: tl.constexpr = D // 2
    BH: tl.constexpr = BD // 2
    TYPE: tl.constexpr = tl.float32 if UPCAST else p_k.dtype.element_ty
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = i_split * split_len
    n = tl.minimum(tl.load(p_length + i_row) - first, split_len)  # entries of this split, none if not above 0
    slot = tl.load(p_start + i_row) + first
    o_m, o_h, o_v, o_t = tl.arange(0, BM), tl.arange(0, BH), tl.arange(0, BDV), tl.arange(0, BT)
    p_k += slot * ROW_K
    p_v += slot * ROW_V
    p_pos, p_bias, p_s, q_pos = columns(p_columns, p_pos, p_bias, p_s, p_q_pos, i_row, first, most, o_m, M, HAS_POS,
                                        HAS_BIAS, PROBS)  # fmt: skip
    p_q += (i_row * M + o_m)[None, :] * D + o_h[:, None]
    m_q = (o_m < M)[None, :] & (o_h < H)[:, None]
    # (BH, BM) each
    q_a = tl.load(p_q, mask=m_q, other=0.0).to(TYPE)
    q_b = tl.load(p_q + H, mask=m_q, other=0.0).to(TYPE)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BDV, BM), tl.float32)
    for i in range(0, n, BT):
        m_t = o_t < n - i
        # (BT,)
        pos = tl.load(p_pos + i + o_t, mask=m_t, other=HIDDEN)
        m_h = (o_h < H)[None, :]
        # (BT, BH) each
        a = tl.load(p_k + o_t[:, None] * ROW_K + o_h[None, :], mask=m_t[:, None] & m_h, other=0.0).to(tl.float32)
        b = tl.load(p_k + H + o_t[:, None] * ROW_K + o_h[None, :], mask=m_t[:, None] & m_h, other=0.0).to(tl.float32)
        o_rot = pos[:, None] * H + o_h[None, :]
        m_rot = (pos < n_pos)[:, None] & m_h  # forgotten entries are not in the tables
        cos = tl.load(p_cos + o_rot, mask=m_rot, other=0.0)
        sin = tl.load(p_sin + o_rot, mask=m_rot, other=0.0)
        s = tl.dot((a * cos - b * sin).to(TYPE), q_a, input_precision="ieee")  # (BT, BM)
        s = (s + tl.dot((b * cos + a * sin).to(TYPE), q_b, input_precision="ieee")) * scale
        s = weigh(s, pos, q_pos, window, p_bias + i, m_t, HAS_POS, HAS_WINDOW, HAS_BIAS, BT)
        if PROBS:
            keep(p_s, s, i + o_t, m_t, o_m, most, M)
        # (BT, BDV)
        v = tl.load(p_v + o_t[:, None] * ROW_V + o_v[None, :], mask=m_t[:, None] & (o_v < DV)[None, :], other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        m, l, acc = fold(s, v, m, l, acc, True)
        p_k += BT * ROW_K
        p_v += BT * ROW_V
    leave(m, l, acc, p_acc, p_lse, (i_row * n_splits + i_split) * M, o_m, M, DV, BDV)


def decode_rope_triton(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *, cos: Tensor, sin: Tensor,
                       pos: Tensor, q_pos: Tensor, col_start: Tensor | None = None, **more):  # fmt: skip
    """Attend as `decode_triton` does, from rotated q to un-rotated k, which are rotated by their pos on the way.

    cos and sin are fp32 (P, D/2), of positions 0 to P - 1; a slot whose pos is not below P must be a forgotten one.
    """
    if k.shape[1] % 2:
        raise NotImplementedError(f"decode_rope takes an even head_dim, not {k.shape[1]}")
    if MOST < q.shape[1] <= ROWS:
        rest = more | {"cos": cos, "sin": sin, "pos": pos, "col_start": col_start}
        return apart(lambda q, q_pos: decode_rope_triton(q, k, v, start, length, q_pos=q_pos, **rest), MOST, q, q_pos)
    check(q, k, v)
    own = sizes(k.dtype, q.shape[1], k.shape[1], v.shape[1]) | payload(k, v, start)
    own |= {"p_cos": cos.contiguous(), "p_sin": sin.contiguous(), "n_pos": len(cos)}
    columns = start if col_start is None else col_start
    return run(decode_rope_split, own, q, v.shape[1], length, columns=columns, pos=pos, q_pos=q_pos, **more)


def sizes(dtype, M: int, D: int, DV: int, **amd) -> dict:
    """Return what `decode.blocks` does, for smaller tiles, and for twice the warps where there are many queries."""
    own = blocks(dtype, M, D, DV, TILE, **amd)
    if own["M"] > 8:
        own["num_warps"] = 4
    return own


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time, as decode.aot_cases does."""
    types = {"p_cos": "*fp32", "p_sin": "*fp32", "n_pos": "i32"}
    every = {"HAS_WINDOW": True, "HAS_BIAS": True, "PROBS": True}
    cases = {}
    for dtype, M, D, flags in (
        (torch.float16, 3, 64, {}), (torch.bfloat16, 3, 64, {}), (torch.float32, 3, 64, {}),
        (torch.float16, 8, 80, {}), (torch.float16, 8, 96, {}), (torch.float16, 4, 128, {}),
        (torch.float32, 4, 128, {}), (torch.float16, 3, 64, every),
        (torch.float16, 16, 128, every),
    ):  # fmt: skip
        cases |= aot_case(f"decode_rope {TYPES[dtype]}", decode_rope_split, dtype, M, D, D, types, sizes,
                          ROW_K=D, ROW_V=D, UPCAST=False, HAS_POS=True, **flags)  # fmt: skip
    return cases
