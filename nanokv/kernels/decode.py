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
denominator, which is what `combine` does for the splits of a row, and a storage for what it holds in two forms.

Inside the kernels exponents and logarithms are to the base 2, which is what GPUs compute.
"""
# ruff: noqa: E741 (l, the denominator, as the literature calls it)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanokv.kernels import ROWS

HIDDEN = tl.constexpr(2**31 - 1)  # the position of a forgotten entry, see nanokv/cache.py
LOG2E = tl.constexpr(math.log2(math.e))
WIDEST = 256  # channels per key or value
PROGRAMS = 512  # splits wanted over all rows: about four for each processor of a large GPU
SHORTEST = 128  # entries that are worth a split
MOST_SPLITS = 64
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def decode_naive(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *, scale: float, most: int,
                 pos: Tensor | None = None, q_pos: Tensor | None = None, bias: Tensor | None = None,
                 col_start: Tensor | None = None, window: int | None = None,
                 probs: bool = False, lse: bool = False):  # fmt: skip
    """Do what `decode_triton` does, row by row, in fp32, or in fp64 if q is."""
    (R, M, _), work = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros(R, M, v.shape[1], dtype=work, device=q.device)
    p = torch.zeros(R, M, most, dtype=work, device=q.device)
    z = torch.full((R, M), -torch.inf, dtype=work, device=q.device)
    places = start if col_start is None else col_start
    for r, (a, c, n) in enumerate(zip(start.tolist(), places.tolist(), length.tolist(), strict=True)):
        s = q[r].to(work) @ k[a : a + n].to(work).mT * scale  # (M, n)
        if bias is not None:
            s = s + bias[c : c + n].to(work)
        if pos is not None:
            at, until = pos[c : c + n], q_pos[r, :, None]  # (n,), (M, 1)
            see = at <= until if window is None else (at <= until) & (at > until - window)  # (M, n)
            s = s.masked_fill(~see, -torch.inf)
        z[r] = s.logsumexp(-1)
        p[r, :, :n] = (s - z[r, :, None]).exp().nan_to_num(0.0)  # a query that sees nothing attends to nothing
        o[r] = p[r, :, :n] @ v[a : a + n].to(work)
    return results(o if lse else o.to(q.dtype), z if lse else None, p if probs else None)


@triton.jit
def weigh(s, pos, q_pos, window, p_bias, m_t,
          HAS_POS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Add biases to the scores s (BT, BM) of a tile, and set to -inf what a query must not see."""
    if HAS_BIAS:
        # (BT,)
        b_bias = tl.load(p_bias + tl.arange(0, BT), mask=m_t, other=0.0)
        s += (b_bias * LOG2E)[:, None]
    see = m_t[:, None]
    if HAS_POS:
        see = see & (pos[:, None] <= q_pos[None, :])
    if HAS_WINDOW:
        see = see & (pos[:, None] > (q_pos - window)[None, :])
    return tl.where(see, s, float("-inf"))


@triton.jit
def fold(s, v, m, l, acc, HIDES: tl.constexpr):
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
def columns(p_columns, p_pos, p_bias, p_s, p_q_pos, i_row, first, most, o_m,
            M: tl.constexpr, HAS_POS: tl.constexpr, HAS_BIAS: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """Return where positions, biases and scores of entry `first` of a row lie, and its queries' positions (BM,)."""
    q_pos = o_m
    if HAS_POS:
        # (BM,)
        q_pos = tl.load(p_q_pos + i_row * M + o_m, mask=o_m < M, other=-1)
    if HAS_POS or HAS_BIAS:
        column = tl.load(p_columns + i_row) + first
        p_pos += column
        p_bias += column
    if PROBS:
        p_s += i_row * M * most + first
    return p_pos, p_bias, p_s, q_pos


@triton.jit
def keep(p_s, s, t, m_t, o_m, most, M: tl.constexpr):
    """Write scores s (BT, BM) of entries t, of which `finish` makes probabilities."""
    tl.store(p_s + o_m[None, :].to(tl.int64) * most + t[:, None], s, mask=m_t[:, None] & (o_m < M)[None, :])


@triton.jit
def leave(m, l, acc, p_acc, p_lse, o_out, o_m, M: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr):
    """Write what a split found: acc / l, and the base-2 logarithm of its denominator, -inf if nothing was seen."""
    o_v = tl.arange(0, BDV)
    l_safe = tl.where(l > 0, l, 1.0)
    o = (acc / l_safe[None, :]).to(p_acc.dtype.element_ty)
    tl.store(p_acc + (o_out + o_m)[None, :] * DV + o_v[:, None], o, mask=(o_m < M)[None, :] & (o_v < DV)[:, None])
    tl.store(p_lse + o_out + o_m, tl.where(l > 0, m + tl.log2(l_safe), float("-inf")), mask=o_m < M)


@triton.jit(do_not_specialize=["window", "n_splits", "most"])  # they change from step to step
def decode_split(p_q, p_k, p_v, p_start, p_length, p_pos, p_q_pos, p_bias, p_columns, p_acc, p_lse, p_s,
                 scale, window, split_len, n_splits, most,
                 M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROW_K: tl.constexpr, ROW_V: tl.constexpr,
                 BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
                 HAS_POS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, PROBS: tl.constexpr,
                 UPCAST: tl.constexpr):  # fmt: skip
    """Attend to one split of one row; scale is to base 2. Keys are the rows of a product and queries its columns:
    tensor cores take 16 rows but only 8 columns, so that three query heads waste 5 of 8, and not 13 of 16."""
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = i_split * split_len
    n = tl.minimum(tl.load(p_length + i_row) - first, split_len)  # entries of this split, none if not above 0
    slot = tl.load(p_start + i_row) + first  # int64, since a flat tensor may have more than 2^31 elements
    o_m, o_d, o_v = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    p_k += slot * ROW_K
    p_v += slot * ROW_V
    # (BD, BM)
    q = tl.load(p_q + (i_row * M + o_m)[None, :] * D + o_d[:, None], mask=(o_m < M)[None, :] & (o_d < D)[:, None],
                other=0.0)  # fmt: skip
    q = q.to(tl.float32 if UPCAST else p_k.dtype.element_ty)
    p_pos, p_bias, p_s, q_pos = columns(p_columns, p_pos, p_bias, p_s, p_q_pos, i_row, first, most, o_m, M, HAS_POS,
                                        HAS_BIAS, PROBS)  # fmt: skip
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BDV, BM), tl.float32)
    o_t = tl.arange(0, BT)
    for i in range(0, n, BT):
        m_t = o_t < n - i
        # (BT, BD)
        k = tl.load(p_k + o_t[:, None] * ROW_K + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        s = tl.dot(k, q, input_precision="ieee") * scale  # (BT, BM)
        pos = o_t
        if HAS_POS:
            # (BT,)
            pos = tl.load(p_pos + i + o_t, mask=m_t, other=HIDDEN)
        s = weigh(s, pos, q_pos, window, p_bias + i, m_t, HAS_POS, HAS_WINDOW, HAS_BIAS, BT)
        if PROBS:
            keep(p_s, s, i + o_t, m_t, o_m, most, M)
        # (BT, BDV)
        v = tl.load(p_v + o_t[:, None] * ROW_V + o_v[None, :], mask=m_t[:, None] & (o_v < DV)[None, :], other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        m, l, acc = fold(s, v, m, l, acc, HAS_POS or HAS_BIAS)
        p_k += BT * ROW_K
        p_v += BT * ROW_V
    leave(m, l, acc, p_acc, p_lse, (i_row * n_splits + i_split) * M, o_m, M, DV, BDV)


@triton.jit(do_not_specialize=["n_splits"])
def combine(p_acc, p_lse, p_o, p_total, n_splits, M: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
            BS: tl.constexpr):  # fmt: skip
    """Average the splits of one query by their share of the softmax's denominator."""
    i = tl.program_id(0).to(tl.int64)  # row and query
    o_s, o_v = tl.arange(0, BS), tl.arange(0, BDV)
    o_part = ((i // M) * n_splits + o_s) * M + i % M
    # (BS,)
    lse = tl.load(p_lse + o_part, mask=o_s < n_splits, other=float("-inf"))
    m = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(share, 0)
    # (BS, BDV)
    acc = tl.load(p_acc + o_part[:, None] * DV + o_v[None, :], mask=(o_s < n_splits)[:, None] & (o_v < DV)[None, :],
                  other=0.0)  # fmt: skip
    o = tl.sum(acc * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(p_o + i * DV + o_v, o.to(p_o.dtype.element_ty), mask=o_v < DV)
    tl.store(p_total + i, m + tl.log2(total))


@triton.jit(do_not_specialize=["most"])
def finish(p_s, p_lse, p_length, most, M: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr):
    """Turn base-2 scores (R, M, most) into probabilities, in place, now that the whole denominator is known."""
    i_row = tl.program_id(0).to(tl.int64)
    o_m, o_t = tl.arange(0, BM), tl.program_id(1) * BT + tl.arange(0, BT)
    m_t = o_t < tl.load(p_length + i_row)
    # (BM,)
    lse = tl.load(p_lse + i_row * M + o_m, mask=o_m < M, other=0.0)
    o_s = (i_row * M + o_m)[:, None] * most + o_t[None, :]
    m_m = (o_m < M)[:, None]
    # (BM, BT)
    s = tl.load(p_s + o_s, mask=m_m & m_t[None, :], other=float("-inf"))
    p = tl.exp2(s - tl.where(lse == float("-inf"), 0.0, lse)[:, None])  # 0 beyond the row's length
    tl.store(p_s + o_s, p, mask=m_m & (o_t < most)[None, :])


INTERPRETED = not isinstance(combine, triton.JITFunction)  # TRITON_INTERPRET=1


def decode_triton(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *, col_start: Tensor | None = None,
                  **more):  # fmt: skip
    """Attend from q (R, M, D) to the slots start[r] to start[r] + length[r] of k (S, D) and v (S, Dv), for each row r.

    M is the number of queries of a row, at most 64. start is int64 (R,), length int32 (R,), `most` the largest length.
    A query sees the slots whose pos, int32 (S2,), is at most its q_pos, int32 (R, M), and above q_pos - window; all if
    pos is None. bias, fp32 (S2,), is added to the logits. A row begins at col_start[r] in pos and bias, int64 (R,), at
    start[r] if that is None. Slots outside the rows are never read.

    Returns o (R, M, Dv) in q's dtype, zeros for a query that sees nothing. With `lse`, o is fp32 and followed by the
    logarithm of the softmax's denominator, fp32 (R, M), -inf where nothing is seen. With `probs` comes
    last p, fp32 (R, M, most), zeros beyond a row's length. NotImplementedError where the kernel is not made for it.
    """
    check(q, k, v)
    own = blocks(k.dtype, q.shape[1], k.shape[1], v.shape[1]) | payload(k, v, start)
    columns = start if col_start is None else col_start
    return run(decode_split, own, q, v.shape[1], length, columns=columns, **more)


def payload(k: Tensor, v: Tensor, start: Tensor) -> dict:
    """Return the arguments of a split kernel that say where keys and values lie."""
    upcast = INTERPRETED and k.dtype == torch.bfloat16
    return {"p_k": k, "p_v": v, "p_start": start, "ROW_K": k.stride(0), "ROW_V": v.stride(0), "UPCAST": upcast}


def run(kernel, own: dict, q: Tensor, DV: int, length: Tensor, *, scale: float, most: int, columns: Tensor | None,
        pos: Tensor | None = None, q_pos: Tensor | None = None, bias: Tensor | None = None, window: int | None = None,
        probs: bool = False, lse: bool = False, splits: int | None = None):  # fmt: skip
    """Launch a split kernel, `combine` and `finish`. `own` holds sizes and what only this kernel takes."""
    if (pos is None) != (q_pos is None) or (pos is None and window is not None):
        raise ValueError("pos and q_pos come together, and a window needs both")
    if columns is None and (pos is not None or bias is not None):
        raise ValueError("pos and bias need col_start")
    (R, M, _), dev = q.shape, q.device
    splits, split_len = cut(most, R, own["BT"], splits)
    out = torch.empty(R, M, DV, dtype=torch.float32 if lse else q.dtype, device=dev)
    total = torch.empty(R, M, dtype=torch.float32, device=dev)
    p = torch.empty(R, M, most, dtype=torch.float32, device=dev) if probs else None
    acc, part = out, total  # a single split has the last word
    if splits > 1:
        acc = torch.empty(R, splits, M, DV, dtype=torch.float32, device=dev)
        part = torch.empty(R, splits, M, dtype=torch.float32, device=dev)
    kernel[(R, splits)](
        p_q=q.contiguous(), p_length=length, p_columns=length if columns is None else columns,
        p_pos=length if pos is None else pos, p_q_pos=length if pos is None else q_pos.contiguous(),
        p_bias=total if bias is None else bias, p_acc=acc, p_lse=part, p_s=total if p is None else p,
        scale=scale * LOG2E.value, window=window or 0, split_len=split_len, n_splits=splits, most=most,
        HAS_POS=pos is not None, HAS_WINDOW=window is not None, HAS_BIAS=bias is not None, PROBS=probs,
        **own)  # fmt: skip
    if splits > 1:
        combine[(R * M,)](
            acc, part, out, total, splits, M, DV, triton.next_power_of_2(DV), triton.next_power_of_2(splits)
        )
    if probs and most:
        finish[(R, triton.cdiv(most, 128))](p, total, length, most, M, own["BM"], 128)
    return results(out, total * math.log(2) if lse else None, p)


def apart(attend, rows: int, q: Tensor, q_pos: Tensor | None):
    """Return what attend(q, q_pos) does, called for `rows` queries of every row at a time; entries are read again."""
    places = q_pos.split(rows, 1) if q_pos is not None else (None,) * -(-q.shape[1] // rows)
    parts = [attend(x, at) for x, at in zip(q.split(rows, 1), places, strict=True)]
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True)) if type(parts[0]) is tuple else torch.cat(parts, 1)


def check(q, k, v) -> None:
    """Raise if these are not the arguments a kernel was made for."""
    if q.shape[1] > ROWS:
        raise NotImplementedError(f"decode kernels take up to {ROWS} query rows per KV head, not {q.shape[1]}")
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


def blocks(dtype, M: int, D: int, DV: int, tile: int = 2**14, amd: bool = torch.version.hip is not None) -> dict:
    """Return the sizes a split kernel is compiled for: those of the problem, of its tiles, warps and stages.

    `tile` is in bytes of keys; where there are many queries a tile is smaller. With two warps, not four, Triton takes
    the tensor cores' plain instructions, which suit thin products better than those of Hopper and Blackwell.
    """
    BD, BDV = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    BM = max(16 if amd else 8, triton.next_power_of_2(M))
    width = max(BD, BDV) * dtype.itemsize  # bytes of an entry's key or value
    most = 128 if dtype.itemsize < 4 else 64
    BT = max(16 if width > 512 else 32, min(most, tile // width) * 8 // max(8, triton.next_power_of_2(M)))
    if amd and BM * BDV > 4096:
        BT = min(BT, 16)
    warps = 2 if BM * BDV <= 2048 else 4 if BM * BDV <= 4096 or amd else 8
    return {"M": M, "D": D, "DV": DV, "BM": BM, "BD": BD, "BDV": BDV, "BT": BT,
            "num_warps": warps, "num_stages": 1 if amd else 2}  # fmt: skip


def results(o, lse, p):
    """Return o alone, or with what else was asked for."""
    more = [x for x in (lse, p) if x is not None]
    return (o, *more) if more else o


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time: name -> (fn, types, constants, aligned, options).

    options maps each target that a case is meant for to its num_warps and num_stages.
    """
    every = {"HAS_POS": True, "HAS_WINDOW": True, "HAS_BIAS": True, "PROBS": True}
    cases = {}
    for dtype, M, D, flags in (
        (torch.float16, 3, 64, {}), (torch.bfloat16, 3, 64, {}), (torch.float32, 3, 64, {}),
        (torch.float16, 8, 80, {}), (torch.float16, 8, 96, {}), (torch.float16, 4, 128, {}),
        (torch.float16, 64, 128, {}), (torch.bfloat16, 4, 128, {}), (torch.float32, 4, 128, {}),
        (torch.float16, 3, 64, {"HAS_POS": True}), (torch.float16, 3, 64, every), (torch.float16, 4, 128, every),
        (torch.float16, 64, 128, every),
    ):  # fmt: skip
        cases |= aot_case(f"decode {TYPES[dtype]}", decode_split, dtype, M, D, D, ROW_K=D, ROW_V=D, UPCAST=False,
                          **flags)  # fmt: skip
    same = {target: {"num_warps": 4, "num_stages": 1} for target in ("cuda", "hip")}
    cases["combine D=64"] = (
        combine, {"p_acc": "*fp32", "p_lse": "*fp32", "p_o": "*fp16", "p_total": "*fp32", "n_splits": "i32"},
        {"M": 3, "DV": 64, "BDV": 64, "BS": MOST_SPLITS}, (), same)  # fmt: skip
    cases["finish M=3"] = (
        finish, {"p_s": "*fp32", "p_lse": "*fp32", "p_length": "*i32", "most": "i32"},
        {"M": 3, "BM": 8, "BT": 128}, (), same)  # fmt: skip
    return cases


def aot_case(name: str, kernel, dtype, M: int, D: int, DV: int, types: dict | None = None, sizes=None,
             **constants) -> dict:  # fmt: skip
    """Return the cases of a split kernel, for NVIDIA and AMD; constants not given are those of the plain path."""
    t = f"*{TYPES[dtype]}"
    every = {
        "p_q": t, "p_k": t, "p_v": t, "p_start": "*i64", "p_length": "*i32", "p_pos": "*i32", "p_q_pos": "*i32",
        "p_bias": "*fp32", "p_columns": "*i64", "p_acc": "*fp32", "p_lse": "*fp32", "p_s": "*fp32", "scale": "fp32",
        "window": "i32", "split_len": "i32", "n_splits": "i32", "most": "i32", **(types or {})}  # fmt: skip
    flags = dict.fromkeys(("HAS_POS", "HAS_WINDOW", "HAS_BIAS", "PROBS"), False)
    title = f"{name} D={D}{f'+{DV}' * (DV != D)} M={M}"
    title += "".join(f" {n.split('_')[-1].lower()}" for n, on in constants.items() if on is True)
    cases = {}
    for suffix, target in (("", "cuda"), (" (AMD)", "hip")):
        own = (sizes or blocks)(dtype, M, D, DV, amd=bool(suffix))
        options = {n: own.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in own}
        values = own | flags | constants
        cases[title + suffix] = kernel, every, values, ("split_len",), {target: options}
    return cases
