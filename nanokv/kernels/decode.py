"""Attention of a few queries over the rows of a cache, as they lie in memory: ragged, with spare slots between them.

A decode step has one query per head and thousands of entries, so its time is that of reading K and V once. Two things
follow. The query heads that share a KV head are worked on together, as the columns of one tile, so that an entry is
read once for all of them. And since there are fewer KV heads than a GPU has processors, each row is cut into splits
that run side by side (Flash-Decoding). A split reads its entries tile by tile and keeps a running softmax:

    m    the largest score so far, per query
    l    the sum of exp(score - m), the softmax's denominator
    acc  the sum of exp(score - m) * v, its numerator

When a tile raises m, what was summed before is scaled by exp(old m - new m). What a split leaves behind, acc / l and
the logarithm of its denominator, lse = m + log l, is enough to average the splits by their share of the whole
denominator. `combine` does that for the splits of a row, and a storage for what it holds in several forms.

Keys may be stored un-rotated, as in caches that renumber their entries. Rotating them all in memory would cost a
second pass over K, so each tile is rotated between loading it and multiplying it with q. Rotation turns channel i
together with channel i + D/2 (nanokv/model.py, RoPE):

    a' = a cos - b sin        b' = b cos + a sin        for the halves a, b of a key

The halves are loaded as two tiles, so that nothing has to change places between threads, and q is multiplied half by
half: q . k' = q_a . a' + q_b . b'.

Inside a split, exponents and logarithms are to the base 2, which is what GPUs compute.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

HIDDEN = tl.constexpr(2**31 - 1)  # the position of a forgotten entry: after every query's
LOG2E = tl.constexpr(math.log2(math.e))
MOST_ROWS = 64  # query rows per KV head: heads of the group times new tokens
MOST_SPLITS = 64
PROGRAMS = 512  # splits wanted over all rows: about four for each processor of a large GPU
SHORTEST = 128  # entries that are worth a split
THIN = 16  # query rows at a time where tiles take many registers; if there are more, entries are read again
TYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # channels per key or value


def decode_naive(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *, scale: float, most: int,
                 pos: Tensor | None = None, q_pos: Tensor | None = None, bias: Tensor | None = None,
                 col_start: Tensor | None = None, window: int | None = None, cos: Tensor | None = None,
                 sin: Tensor | None = None, lse: bool = False):  # fmt: skip
    """Do what `decode` does, row by row, in fp32, or in fp64 if q is."""
    (R, M, D), work = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros(R, M, v.shape[1], dtype=work, device=q.device)
    z = torch.full((R, M), -torch.inf, dtype=work, device=q.device)
    columns = start if col_start is None else col_start
    for r, (a, c, n) in enumerate(zip(start.tolist(), columns.tolist(), length.tolist(), strict=True)):
        key, value = k[a : a + n].to(work), v[a : a + n].to(work)  # (n, D), (n, Dv)
        at = torch.arange(n, device=q.device) if pos is None else pos[c : c + n]  # (n,)
        if cos is not None:
            angle = at.masked_fill(at >= len(cos), 0).long()  # a forgotten entry has none
            x, y = key.chunk(2, -1)  # (n, D/2)
            co, si = cos[angle, : D // 2].to(work), sin[angle, : D // 2].to(work)
            key = torch.cat([x * co - y * si, y * co + x * si], -1)
        s = q[r].to(work) @ key.mT * scale  # (M, n)
        if bias is not None:
            s = s + bias[c : c + n].to(work)
        if pos is not None:
            until = q_pos[r, :, None]  # (M, 1)
            see = at <= until if window is None else (at <= until) & (at > until - window)  # (M, n)
            s = s.masked_fill(~see, -torch.inf)
        z[r] = s.logsumexp(-1)
        p = (s - z[r, :, None]).exp()
        o[r] = p.masked_fill(z[r, :, None].isneginf(), 0.0) @ value  # a query that sees nothing attends to nothing
    return (o, z) if lse else o.to(q.dtype)


@triton.jit
def rotate(p_k, o_k, m_k, p_cos, p_sin, pos, n_pos, ROW_C: tl.constexpr, BH: tl.constexpr, H: tl.constexpr):
    """Load the keys at o_k (BT, 1) and turn them by their positions pos (BT,): two halves, fp32 (BT, BH)."""
    o_h = tl.arange(0, BH)[None, :]
    # (BT, BH) each
    a = tl.load(p_k + o_k + o_h, mask=m_k & (o_h < H), other=0.0).to(tl.float32)
    b = tl.load(p_k + o_k + H + o_h, mask=m_k & (o_h < H), other=0.0).to(tl.float32)
    m_angle = (pos < n_pos)[:, None] & (o_h < H)  # a forgotten entry has none
    cos = tl.load(p_cos + pos[:, None] * ROW_C + o_h, mask=m_angle, other=0.0)
    sin = tl.load(p_sin + pos[:, None] * ROW_C + o_h, mask=m_angle, other=0.0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def hide(s, pos, until, window, p_bias, m_t):
    """Add the biases of a tile to its scores s (BT, BM), and set to -inf what a query must not see.

    pos (BT,): the entries' positions; until (BM,): the queries'; None where every query sees every entry.
    """
    if p_bias is not None:
        # (BT,)
        s += (tl.load(p_bias, mask=m_t, other=0.0) * LOG2E)[:, None]
    see = m_t[:, None]
    if until is not None:  # what lies beyond the row has the position of a forgotten entry
        see = pos[:, None] <= until[None, :]
        if window is not None:
            see = see & (pos[:, None] > (until - window)[None, :])
    return tl.where(see, s, float("-inf"))


@triton.jit
def update(s, v, m, l, acc, HIDES: tl.constexpr):
    """Take a tile, scores s (BT, BM) and values v (BT, BDV), into the running m (BM,), l (BM,), acc (BDV, BM)."""
    m_new = tl.maximum(m, tl.max(s, 0))
    top = m_new
    if HIDES:  # a query that has seen nothing yet: exp(-inf - -inf) would be NaN
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
    decay = tl.exp2(m - top)
    p = tl.exp2(s - top[None, :])
    l = l * decay + tl.sum(p, 0)
    acc = acc * decay[None, :] + tl.dot(tl.trans(v), p.to(v.dtype), input_precision="ieee")
    return m_new, l, acc


@triton.jit
def leave(m, l, acc, p_o, p_lse, o_out, M: tl.constexpr, DV: tl.constexpr):
    """Write what a split found for the queries from o_out on: acc / l and the lse, zeros and -inf if it saw nothing."""
    o_m, o_v = tl.arange(0, acc.shape[1]), tl.arange(0, acc.shape[0])
    l_safe = tl.where(l > 0, l, 1.0)
    o = (acc / l_safe[None, :]).to(p_o.dtype.element_ty)
    tl.store(p_o + (o_out + o_m)[None, :] * DV + o_v[:, None], o, mask=(o_m < M)[None, :] & (o_v < DV)[:, None])
    lse = tl.where(l > 0, (m + tl.log2(l_safe)) / LOG2E, float("-inf"))
    tl.store(p_lse + o_out + o_m, lse, mask=o_m < M)


@triton.jit(do_not_specialize=["n_splits", "n_pos"])  # they change from step to step
def split(p_q, p_k, p_v, p_start, p_length, p_pos, p_q_pos, p_bias, p_col, p_cos, p_sin, p_o, p_lse,
          scale, window, split_len, n_splits, n_pos,
          M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROW_K: tl.constexpr, ROW_V: tl.constexpr,
          ROW_C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Attend to one split of one row; scale is to base 2. Keys are the rows of a product and queries its columns:
    tensor cores take 16 rows but only 8 columns, so that three query heads waste 5 of 8, and not 13 of 16."""
    TYPE: tl.constexpr = p_k.dtype.element_ty
    ROPE: tl.constexpr = p_cos is not None
    HALVES: tl.constexpr = 2 if ROPE else 1  # of a key, each multiplied alone
    H: tl.constexpr = D // HALVES
    BH: tl.constexpr = BD // HALVES
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = i_split * split_len
    n = tl.minimum(tl.load(p_length + i_row) - first, split_len)  # entries of this split, none if not above 0
    slot = tl.load(p_start + i_row) + first
    p_k += slot * ROW_K
    p_v += slot * ROW_V
    o_m, o_h, o_v, o_t = tl.arange(0, BM), tl.arange(0, BH), tl.arange(0, BDV), tl.arange(0, BT)
    o_q = (i_row * M + o_m)[None, :] * D + o_h[:, None]
    m_q = (o_m < M)[None, :] & (o_h < H)[:, None]
    # (BH, BM)
    q = tl.load(p_q + o_q, mask=m_q, other=0.0).to(TYPE)
    if ROPE:
        q_b = tl.load(p_q + o_q + H, mask=m_q, other=0.0).to(TYPE)
    until = None
    if p_col is not None:
        col = tl.load(p_col + i_row) + first
    if p_pos is not None:
        # (BM,)
        until = tl.load(p_q_pos + i_row * M + o_m, mask=o_m < M, other=-1)
        p_pos += col
    if p_bias is not None:
        p_bias += col
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BDV, BM), tl.float32)
    for i in range(0, n, BT):
        m_t = o_t < n - i
        pos = first + i + o_t
        if p_pos is not None:
            # (BT,)
            pos = tl.load(p_pos + i + o_t, mask=m_t, other=HIDDEN)
        if ROPE:
            a, b = rotate(p_k, o_t[:, None] * ROW_K, m_t[:, None], p_cos, p_sin, pos, n_pos, ROW_C, BH, H)
            s = tl.dot(a.to(TYPE), q, input_precision="ieee") + tl.dot(b.to(TYPE), q_b, input_precision="ieee")
        else:
            # (BT, BD)
            k = tl.load(p_k + o_t[:, None] * ROW_K + o_h[None, :], mask=m_t[:, None] & (o_h < D)[None, :], other=0.0)
            s = tl.dot(k, q, input_precision="ieee")
        s = hide(s * scale, pos, until, window, None if p_bias is None else p_bias + i + o_t, m_t)  # (BT, BM)
        # (BT, BDV)
        v = tl.load(p_v + o_t[:, None] * ROW_V + o_v[None, :], mask=m_t[:, None] & (o_v < DV)[None, :], other=0.0)
        m, l, acc = update(s, v, m, l, acc, p_pos is not None or p_bias is not None)
        p_k += BT * ROW_K
        p_v += BT * ROW_V
    leave(m, l, acc, p_o, p_lse, (i_row * n_splits + i_split) * M, M, DV)


@triton.jit(do_not_specialize=["n_splits"])
def combine(p_part, p_part_lse, p_o, p_lse, n_splits, M: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
            BS: tl.constexpr):  # fmt: skip
    """Average the splits of one query by their share of the softmax's denominator."""
    i = tl.program_id(0).to(tl.int64)  # row and query
    o_s, o_v = tl.arange(0, BS), tl.arange(0, BDV)
    o_part = ((i // M) * n_splits + o_s) * M + i % M
    # (BS,)
    lse = tl.load(p_part_lse + o_part, mask=o_s < n_splits, other=float("-inf"))
    top = tl.max(lse, 0)
    share = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(share, 0)
    # (BS, BDV)
    o = tl.load(p_part + o_part[:, None] * DV + o_v[None, :], mask=(o_s < n_splits)[:, None] & (o_v < DV)[None, :],
                other=0.0)  # fmt: skip
    o = tl.sum(o * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(p_o + i * DV + o_v, o.to(p_o.dtype.element_ty), mask=o_v < DV)
    tl.store(p_lse + i, top + tl.log(total))


INTERPRETED = not isinstance(combine, triton.JITFunction)  # TRITON_INTERPRET=1: its bf16 arithmetic is wrong


def decode(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *, pos: Tensor | None = None,
           q_pos: Tensor | None = None, col_start: Tensor | None = None, cos: Tensor | None = None,
           sin: Tensor | None = None, **more):  # fmt: skip
    """Attend from q (R, M, D) to the slots start[r] to start[r] + length[r] of k (S, D) and v (S, Dv), for each row r.

    M is the number of queries of a row, at most 64. start is int64 (R,), length int32 (R,), `most` at least the largest
    length. A query sees the slots whose pos, int32 (S2,), is at most its q_pos, int32 (R, M), and above q_pos - window;
    all if pos is None. bias, fp32 (S2,), is added to the logits. A row begins at col_start[r] in pos and bias, int64
    (R,), at start[r] if that is None. Slots outside the rows are never read.

    cos and sin, fp32 (P, D) or (P, D/2), say that keys are stored un-rotated: they are turned by their pos, if that is
    None by 0, 1, ... from a row's first slot on. A slot whose pos is not below P must be a forgotten one.

    Returns o (R, M, Dv) in q's dtype, zeros for a query that sees nothing. With `lse`, o is fp32 and followed by the
    natural logarithm of the softmax's denominator, fp32 (R, M), -inf where nothing is seen. NotImplementedError where
    the kernel is not made for it.
    """
    check(q, k, v)
    (_, M, D), rope = q.shape, cos is not None
    if rope and D % 2:
        raise NotImplementedError(f"the decode kernel rotates an even number of channels, not {D}")
    if rope and M > THIN:
        more |= {"pos": pos, "col_start": col_start, "cos": cos, "sin": sin}
        return apart(lambda q, q_pos: decode(q, k, v, start, length, q_pos=q_pos, **more), q, q_pos)
    if INTERPRETED and k.dtype == torch.bfloat16:
        k, v = k.float(), v.float()
    own = sizes(k.dtype, M, D, v.shape[1], rope) | {"p_k": k, "p_v": v, "p_start": start}
    own |= {"ROW_K": k.stride(0), "ROW_V": v.stride(0), "ROW_C": cos.stride(0) if rope else 0}
    own |= {"p_cos": cos, "p_sin": sin, "n_pos": len(cos) if rope else 0}
    columns = start if col_start is None else col_start
    return run(split, own, q, v.shape[1], length, columns=columns, pos=pos, q_pos=q_pos, **more)


def run(kernel, own: dict, q: Tensor, DV: int, length: Tensor, *, scale: float, most: int, columns: Tensor | None,
        pos: Tensor | None = None, q_pos: Tensor | None = None, bias: Tensor | None = None, window: int | None = None,
        lse: bool = False, splits: int | None = None):  # fmt: skip
    """Launch a split kernel and `combine`. `own` holds sizes and what only this kernel takes."""
    if (pos is None) != (q_pos is None) or (pos is None and window is not None):
        raise ValueError("pos and q_pos come together, and a window needs both")
    if pos is None and bias is None:
        columns = None
    elif columns is None:
        raise ValueError("pos and bias need col_start")
    R, M, _ = q.shape
    exact = lse or (INTERPRETED and q.dtype == torch.bfloat16)
    splits, split_len = cut(most, R, own["BT"], splits)
    o = torch.empty(R, M, DV, dtype=torch.float32 if exact else q.dtype, device=q.device)
    z = torch.empty(R, M, dtype=torch.float32, device=q.device)
    part, part_z = o, z  # a single split has the last word
    if splits > 1:
        part = torch.empty(R, splits, M, DV, dtype=torch.float32, device=q.device)
        part_z = torch.empty(R, splits, M, dtype=torch.float32, device=q.device)
    kernel[(R, splits)](
        p_q=q.contiguous(), p_length=length, p_pos=pos, p_q_pos=None if q_pos is None else q_pos.contiguous(),
        p_bias=bias, p_col=columns, p_o=part, p_lse=part_z,
        scale=scale * LOG2E.value, window=window, split_len=split_len, n_splits=splits, **own)  # fmt: skip
    if splits > 1:
        BDV = triton.next_power_of_2(DV)
        combine[(R * M,)](part, part_z, o, z, splits, M, DV, BDV, MOST_SPLITS)  # one size for any number of splits
    return (o, z) if lse else o.to(q.dtype)


def apart(attend, q: Tensor, q_pos: Tensor | None):
    """Return what attend(q, q_pos) does, called for THIN queries of every row at a time; entries are read again."""
    places = q_pos.split(THIN, 1) if q_pos is not None else (None,) * -(-q.shape[1] // THIN)
    parts = [attend(x, at) for x, at in zip(q.split(THIN, 1), places, strict=True)]
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True)) if type(parts[0]) is tuple else torch.cat(parts, 1)


def rows_of(q: Tensor, R: int) -> Tensor:
    """Return q (B, H, T, D) with the queries of a group as rows of its KV head: (R, M, D), contiguous."""
    return q.reshape(R, -1, q.shape[-1]).contiguous()


def heads_of(o: Tensor, q: Tensor) -> Tensor:
    """Undo `rows_of` for outputs o (R, M, Dv): (B, H, T, Dv), with B, H and T as in q."""
    return o.view(*q.shape[:3], -1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Average o (R, M, Dv) of several parts of the same rows by their shares of the softmax, given their lse (R, M)."""
    if len(parts) == 1:
        return parts[0][0]
    o, lse = (torch.stack(x) for x in zip(*parts, strict=True))  # (parts, R, M, Dv), (parts, R, M)
    total = lse.logsumexp(0)
    share = (lse - total.masked_fill(total.isneginf(), 0.0)).exp()  # a query that sees nothing has none
    return (o * share[..., None]).sum(0)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise if these are not the arguments a kernel was made for."""
    if q.shape[1] > MOST_ROWS:
        raise NotImplementedError(f"decode kernels take up to {MOST_ROWS} query rows per KV head, not {q.shape[1]}")
    if max(k.shape[1], v.shape[1]) > WIDEST:
        raise NotImplementedError(f"decode kernels take up to {WIDEST} channels, not {max(k.shape[1], v.shape[1])}")
    if k.dtype not in TYPES or v.dtype != k.dtype or q.dtype not in TYPES:
        raise NotImplementedError(f"decode kernels take fp16, bf16 or fp32, not {q.dtype}, {k.dtype}, {v.dtype}")
    if k.stride(1) != 1 or v.stride(1) != 1:
        raise NotImplementedError("decode kernels take keys and values whose channels lie side by side")


def cut(most: int, n_rows: int, tile: int, splits: int | None = None) -> tuple[int, int]:
    """Return into how many splits rows of up to `most` entries are cut, and the entries of a split, whole tiles.

    As many as make PROGRAMS in all, but none of less than SHORTEST entries and at most MOST_SPLITS. The rule looks at
    sizes only, not at the device, so that the same step gives the same bits everywhere.
    """
    if splits is None:
        splits = min(triton.cdiv(PROGRAMS, max(1, n_rows)), most // SHORTEST, MOST_SPLITS)
    split_len = triton.cdiv(triton.cdiv(max(1, most), max(1, splits)), tile) * tile
    return max(1, triton.cdiv(most, split_len)), split_len


def sizes(dtype, M: int, D: int, DV: int, rope: bool, amd: bool = torch.version.hip is not None) -> dict:
    """Return what `split` is compiled for: the sizes of the problem and of its tiles, warps and stages.

    A tile of keys is 16 KB, half of that where cosines and sines take registers too, and smaller where there are many
    queries. With two warps, not four, Triton takes the tensor cores' plain instructions, which suit thin products
    better than those of Hopper and Blackwell.
    """
    BD, BDV = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    BM = max(16 if amd else 8, triton.next_power_of_2(M))
    width = max(BD, BDV) * dtype.itemsize  # bytes of an entry's key or value
    tile, most = 2**13 if rope else 2**14, 128 if dtype.itemsize < 4 else 64
    BT = max(16 if width > 512 else 32, min(most, tile // width) * 8 // max(8, triton.next_power_of_2(M)))
    if amd and BM * BDV > 4096:
        BT = min(BT, 16)
    warps = 2 if BM * BDV <= 2048 else 4 if BM * BDV <= 4096 or amd else 8
    if rope and M > 8:
        warps = 4
    return {"M": M, "D": D, "DV": DV, "BM": BM, "BD": BD, "BDV": BDV, "BT": BT,
            "num_warps": warps, "num_stages": 1 if amd else 2}  # fmt: skip
