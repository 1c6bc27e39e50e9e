"""What attention over a cache means, in plain PyTorch. Faster ways are held to this file by tests."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def probs(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention probabilities of rotated q (B, H, T, D) over k (B, Hkv, N, D): fp32 (B, H, T, N).

    mask is added to the logits, (B, 1 or Hkv, T, N), or None: everything is seen. A query that may see nothing at all,
    such as padding, attends to nothing; any other NaN stays one.
    """
    q = q.float().unflatten(1, (k.shape[1], -1)) / math.sqrt(q.shape[-1])  # (B, Hkv, G, T, D)
    s = (q.flatten(2, 3) @ k.float().mT).unflatten(2, (q.shape[2], -1))  # (B, Hkv, G, T, N)
    if mask is None:
        return s.softmax(-1).flatten(1, 2)
    blind = (mask == -torch.inf).all(-1, keepdim=True)
    return (s + mask[:, :, None]).softmax(-1).masked_fill(blind[:, :, None], 0.0).flatten(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from q to k, v (B, Hkv, N, D): the specification, fp32 (B, H, T, D)."""
    p = probs(q, k, mask).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, T, N)
    return (p.flatten(2, 3) @ v.float()).unflatten(2, (p.shape[2], -1)).flatten(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Compute `reference` in q's dtype with one call of PyTorch. causal, in place of a mask: q are the newest T."""
    (B, H, T, D), Hkv, N = q.shape, k.shape[1], k.shape[2]
    if T == 1:  # the queries of a group are rows of one problem
        mask = mask if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q.view(B, Hkv, -1, D), k, v, attn_mask=mask).view(B, H, 1, -1)
    if mask is not None:
        mask = mask.to(q.dtype)
        mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(H // Hkv, 1)
    elif causal and T < N:
        mask = torch.ones(T, N, dtype=torch.bool, device=q.device).tril(N - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and T == N, enable_gqa=True)


def in_parts(q: Tensor, keys: list, values: list, mask: Tensor | None) -> Tensor:
    """Attend over parts in different coordinates: scores part by part, one softmax, mixes part by part.

    A part is x (R, n, C) and either None or the basis U (R, D, C) in which it is written; R = B * Hkv.
    """
    (B, H, T, D), R, dtype = q.shape, len(keys[0][0]), q.dtype
    q = q.float().reshape(R, -1, D) / math.sqrt(D)  # (R, G*T, D)
    s = torch.cat([(q if U is None else q @ U) @ x.float().mT for x, U in keys], -1)  # (R, G*T, N)
    if mask is not None:
        s = (s.view(B, R // B, -1, T, s.shape[-1]) + mask[:, :, None]).view_as(s)
        blind = (s == -torch.inf).all(-1, keepdim=True)
    p = s.softmax(-1) if mask is None else s.softmax(-1).masked_fill(blind, 0.0)
    o = 0.0
    for part, (x, U) in zip(p.split([x.shape[1] for x, _ in values], -1), values, strict=True):
        mixed = part @ x.float()
        o = o + (mixed if U is None else mixed @ U.mT)
    return o.view(B, H, T, -1).to(dtype)


def paid(q: Tensor, k: Tensor, mask, reduce: str, block: int = 128) -> Tensor:
    """Return what all queries together pay each entry, probabilities reduced over the group: fp32 (B, Hkv, N).

    mask(i, j) is that of queries i to j - 1. In blocks of queries, never as a T x T matrix.
    """
    out, k = 0.0, k.float()
    for i in range(0, q.shape[2], block):
        p = probs(q[:, :, i : i + block], k, mask(i, i + block))
        out = out + reduce_group(p, k.shape[1], reduce).sum(2)
    return out


def reduce_group(s: Tensor, n_kv_heads: int, how: str) -> Tensor:
    """Reduce s (B, H, ...) over the query heads that share a KV head, by "mean", "max" or "sum": (B, Hkv, ...)."""
    s = s.unflatten(1, (n_kv_heads, -1))
    return {"mean": s.mean, "max": s.amax, "sum": s.sum}[how](2)


def pool(score: Tensor, among: Tensor, kernel: int, how: str) -> Tensor:
    """Pool score (B, Hkv, N) by "max" or "avg" over `kernel` neighbouring slots of `among`, bool; 0 elsewhere."""
    place = (among.cumsum(-1) - 1).clamp_(min=0)  # of each slot on a line without gaps
    line = torch.zeros_like(score).scatter_add_(-1, place, torch.where(among, score, 0.0))
    pooled = {"max": F.max_pool1d, "avg": F.avg_pool1d}[how](line, kernel, stride=1, padding=kernel // 2)
    return torch.where(among, pooled.gather(-1, place), 0.0)


def lowest(score: Tensor, n: int) -> Tensor:
    """Return the n lowest slots per row, int64 (B, Hkv, n), lowest first, of equals the newest first."""
    back = score.flip(-1)
    at = back.argmin(-1, keepdim=True) if n == 1 else back.argsort(dim=-1, stable=True)[..., :n]
    return score.shape[-1] - 1 - at


def top(score: Tensor, n, among: Tensor) -> Tensor:
    """Return which n slots per row score highest among the candidates, bool (B, Hkv, N); ties go to the older.

    n is an int or integers (B, Hkv, 1); `among` is bool, broadcastable.
    """
    least = torch.finfo(score.dtype).min
    among, score = among.expand_as(score), score.nan_to_num(least, torch.inf, least)
    order = score.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, place) < n) & among
