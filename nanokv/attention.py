"""What attention over a cache means, in plain PyTorch, and the quickest PyTorch way to compute it.

`reference` is the specification: softmax in fp32 over the entries a query may see. `attend` computes the same with
`scaled_dot_product_attention`, never copying keys or values for the query heads that share them.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Mask:
    """What T queries see of N slots.

    `causal`: queries are the last T of slots 0..N-1. `see`: bool (B, 1 or Hkv, T, N). Neither: everything.
    `bias`: fp32 (B, Hkv, N), added to the logits.
    """

    T: int
    N: int
    causal: bool = False
    see: Tensor | None = None
    bias: Tensor | None = None
    device: object = None
    made: dict = field(default_factory=dict)  # dtype -> what `additive` returned

    def additive(self, dtype=torch.float32) -> Tensor | None:
        """Return the mask as a tensor to add to the logits, (B, Hkv, T, N) or broadcastable, None if all is seen."""
        if dtype not in self.made:
            self.made[dtype] = self._additive(dtype)
        return self.made[dtype]

    def _additive(self, dtype) -> Tensor | None:
        if self.causal:
            return _causal(self.T, self.N, dtype, self.device)
        out = None if self.see is None else torch.where(self.see, *_seen_or_not(dtype, self.see.device))
        if self.bias is not None:
            bias = self.bias.to(dtype)[:, :, None, :]
            out = bias if out is None else out + bias
        return out


@lru_cache(maxsize=8)
def _seen_or_not(dtype, device) -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=dtype, device=device), torch.full((), -torch.inf, dtype=dtype, device=device)


@lru_cache(maxsize=2)  # the layers of one pass share it
def _causal(T: int, N: int, dtype, device) -> Tensor:
    return torch.full((T, N), -torch.inf, dtype=dtype, device=device).triu_(N - T + 1)[None, None]


def forget_masks() -> None:
    """Free the masks that the layers of a pass have shared."""
    _causal.cache_clear()


def probs(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """Return the attention probabilities of rotated q (B, H, T, D) over k (B, Hkv, N, D): fp32 (B, H, T, N)."""
    (B, H, T, D), Hkv = q.shape, k.shape[1]
    s = torch.bmm((q.float() / math.sqrt(D)).reshape(B * Hkv, -1, D), k.float().flatten(0, 1).mT)  # (R, G*T, N)
    s = s.view(B, Hkv, H // Hkv, T, -1)
    add = mask.additive()
    if add is not None:
        s.add_(add[:, :, None])
    p = s.softmax(-1)
    if mask.see is not None:  # a query that sees nothing (padding) attends to nothing
        p = p.nan_to_num_(0.0)
    return p.view(B, H, T, -1)


def mix(p: Tensor, v: Tensor) -> Tensor:
    """Return the average of values v (B, Hkv, N, D) under probabilities p (B, H, T, N): fp32 (B, H, T, D)."""
    B, H, T, N = p.shape
    return torch.bmm(p.view(B * v.shape[1], -1, N), v.float().flatten(0, 1)).view(B, H, T, -1)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend from q (B, H, T, D) to k, v (B, Hkv, N, D), the specification: fp32 (B, H, T, D)."""
    return mix(probs(q, k, mask), v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Compute `reference` in q's dtype, quickly."""
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    if mask.causal and T == mask.N:  # the first part of a prompt: half of the work can be skipped
        return _grouped(q, k, v, is_causal=True)
    if mask.causal and T > 16 and q.is_cpu and v.shape[-1] == D:
        return _past_and_present(q, k, v)
    add = mask.additive(q.dtype)
    if T > 16 or (GROUPED and T == 1 and add is None and q.is_cpu and q.element_size() == 2):
        return _grouped(q, k, v, attn_mask=add)
    if add is not None and T > 1:
        add = add[:, :, None].expand(-1, -1, H // Hkv, T, -1).flatten(2, 3)
    return _rows(q.reshape(B, Hkv, -1, D), k, v, add).view(B, H, T, -1)  # a group's queries are rows of one problem


def _grouped(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attend from q (B, H, T, D) to k, v (B, Hkv, N, D), which are not copied for the heads of a group."""
    if GROUPED and q.is_cpu and (attn_mask is None or attn_mask.shape[1] == 1):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, enable_gqa=True)
    G = q.shape[1] // k.shape[1]
    heads = [F.scaled_dot_product_attention(q[:, g::G], k, v, attn_mask, is_causal=is_causal) for g in range(G)]
    return torch.stack(heads, 2).view(*q.shape[:3], -1)


GROUPED = torch.__version__ >= (2, 9)  # before, PyTorch copied keys and values on a CPU when told of groups


def _past_and_present(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally from the newest entries' queries: to all older entries, and to each other, without any mask."""
    (B, H, T, D), (_, Hkv, N, _) = q.shape, k.shape
    past, lse_past = _with_lse(q.reshape(B, Hkv, -1, D), k[:, :, : N - T], v[:, :, : N - T])
    k, v = k[:, :, N - T :], v[:, :, N - T :]
    heads = [_with_lse(q[:, g :: H // Hkv], k, v, is_causal=True) for g in range(H // Hkv)]
    present, lse = (torch.stack(part, 2).view(B, H, T, -1) for part in zip(*heads, strict=True))
    share = torch.sigmoid(lse_past.reshape(B, H, T, 1) - lse)  # of the past in the softmax's denominator, at least fp32
    return torch.lerp(present.to(share.dtype), past.reshape(B, H, T, -1).to(share.dtype), share).to(q.dtype)


def _rows(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None) -> Tensor:
    """Attend from a few rows q (B, Hkv, n, D) to k, v (B, Hkv, N, D): (B, Hkv, n, D).

    On a CPU PyTorch gives each KV head to one thread. Where heads do not divide among the threads, a long cache is cut
    into as many parts as there are threads, whose results are averaged by their share of the softmax's denominator.
    """
    (B, Hkv, n, _), N = q.shape, k.shape[2]
    parts = torch.get_num_threads()
    whole = N // parts * parts
    if q.device.type != "cpu" or add is not None or B * Hkv % parts == 0 or N < SPLIT or v.shape[-1] != q.shape[-1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=add)
    split = [t.flatten(0, 1)[:, :whole].unflatten(1, (parts, -1)) for t in (k, v)]  # (B * Hkv, parts, N / parts, D)
    q = q.flatten(0, 1)[:, None]  # (B * Hkv, 1, n, D)
    o, lse = _with_lse(q.expand(-1, parts, -1, -1), *split)
    if whole < N:
        rest = _with_lse(q, *(t.flatten(0, 1)[:, None, whole:] for t in (k, v)))
        o, lse = torch.cat([o, rest[0]], 1), torch.cat([lse, rest[1]], 1)
    return (lse.softmax(1).to(o.dtype)[..., None] * o).sum(1).view(B, Hkv, n, -1)


# also returns the log of the denominator; takes values as wide as keys only
_with_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SPLIT = 6144  # entries from which cutting a cache into parts pays for its dozen of small operations


def ragged(q: Tensor, rows: list, mask: Mask) -> Tensor:
    """Compute `attend` for rows of unequal length: rows[r] is k, v (n_r, D) of KV head r % Hkv of sequence r // Hkv."""
    B, H, T, D = q.shape
    Hkv = len(rows) // B
    add = mask.additive(q.dtype)
    add = None if add is None else add.expand(B, Hkv, T, -1)
    q = q.reshape(B * Hkv, 1, 1, -1, D)  # the G queries of a group are rows of one problem: (R, 1, 1, G * T, D)
    out = []
    for r, (k, v) in enumerate(rows):
        see = None if add is None else add[r // Hkv, r % Hkv, :, : len(k)].repeat(H // Hkv, 1)  # (G * T, n_r)
        out.append(F.scaled_dot_product_attention(q[r], k[None, None], v[None, None], attn_mask=see))
    return torch.cat(out).view(B, H, T, -1)


def attend_and_sum(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: str = "sum") -> tuple[Tensor, Tensor]:
    """Compute `reference` in q's dtype, and what each entry is paid by all queries together: fp32 (B, Hkv, N).

    Each query's probabilities are reduced over its group by `how` ("mean", "max" or "sum"), then added up. On
    a CPU BLOCK queries of one head at a time, whose probabilities its cache can hold.
    """
    (B, H, T, D), (_, Hkv, N, _) = q.shape, k.shape
    G, add = H // Hkv, None if mask.causal else mask.additive()
    add = None if add is None else add.expand(B, Hkv, T, N)
    later = torch.full((min(T, BLOCK),) * 2, -torch.inf, device=q.device).triu_(1)  # of a block's own entries
    q, k, v, dtype = (q.float() / math.sqrt(D)).view(B, Hkv, G, T, D), k.float(), v.float(), q.dtype
    o, paid = q.new_empty(q.shape), q.new_zeros(B, Hkv, N)
    one = [(slice(b, b + 1), slice(h, h + 1)) for b in range(B) for h in range(Hkv)]
    for at in one if q.device.type == "cpu" else [(slice(None), slice(None))]:
        for i in range(0, T, BLOCK):
            j = min(i + BLOCK, T)
            n = N - T + j if mask.causal else N  # what the last of the block can see
            shares = []
            for g in range(G):
                s = q[at][:, :, g, i:j] @ k[at][:, :, :n].mT  # (.., .., block, n)
                if mask.causal:
                    s[..., n - (j - i) :] += later[: j - i, : j - i]
                elif add is not None:
                    s += add[at][:, :, i:j]
                p = torch.softmax(s, -1, out=s)  # row by row, so that a row is read before it is overwritten
                p = p.nan_to_num_(0.0) if mask.see is not None else p  # a query that sees nothing (padding)
                o[at][:, :, g, i:j] = p @ v[at][:, :, :n]
                shares.append(p if how == "max" else p.new_ones(1, j - i) @ p)
            paid[at][..., :n] += torch.stack(shares).amax(0).sum(2) if how == "max" else sum(shares)[:, :, 0]
    paid = paid / G if how == "mean" else paid
    return o.view(B, H, T, D).to(dtype), paid


BLOCK = 128  # queries of `attend_and_sum`, whose probabilities over some thousand entries fit a core's second cache


def reduce_group(s: Tensor, n_kv_heads: int, how: str) -> Tensor:
    """Reduce s (B, H, ...) over the query heads that share a KV head, by "mean", "max" or "sum": (B, Hkv, ...)."""
    s = s.unflatten(1, (n_kv_heads, -1))  # (B, Hkv, G, ...)
    return {"mean": s.mean, "max": s.amax, "sum": s.sum}[how](2)


def window_scores(cache, window: int, kernel: int, pooling: str, reduce: str) -> Tensor:
    """Score entries by the attention that the last `window` queries of a prompt pay them (SnapKV, arXiv 2404.14469).

    `cache` is a LayerCache in phase "last" of a method that `observes` at least `window` queries. Returns fp32
    (B, Hkv, N), 0 but for the live entries older than the newest `window` ones.
    Probabilities are summed over the queries, reduced over each query group, then pooled over `kernel` neighbouring
    entries ("max" or "avg", zeros beyond both ends). Neighbours are the nearest live entries, hidden ones do not count.
    """
    p = cache.probs(*cache.observed(window))  # (B, H, W, N)
    s = reduce_group(p.sum(2), cache.config.n_kv_heads, reduce)  # (B, Hkv, N)
    return pool_neighbours(s, cache.between(0, window).expand_as(s), kernel, pooling)


def pool_neighbours(score: Tensor, among: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool score (B, Hkv, N) by "max" or "avg" over `kernel` neighbouring slots of `among`, bool (B, Hkv, N).

    Slots in between that are not of `among` do not count, beyond both ends are zeros. Returns (B, Hkv, N), 0 elsewhere.
    """
    place = (among.cumsum(-1) - 1).clamp_(min=0)  # of each slot on a line without gaps
    line = torch.zeros_like(score).scatter_add_(-1, place, torch.where(among, score, 0.0))
    pool = {"max": F.max_pool1d, "avg": F.avg_pool1d}[pooling]
    return torch.where(among, pool(line, kernel, stride=1, padding=kernel // 2).gather(-1, place), 0.0)
