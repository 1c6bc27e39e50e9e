"""Merge entries that must go into entries that stay, so that the attention of the moment does not change at all.

Paper: KeepKV: Achieving Periodic Lossless KV Cache Compression for Efficient LLM Inference, arXiv 2504.09936
Axis: token
Idea: An average of two entries gets the attention of one. So let each entry count as many times as it has votes, and
    scale a merged key such that votes * exp(q.k / sqrt(D)) is the sum over what was merged: numerator and denominator
    of the softmax stay as they were. To be right for coming queries too, use a moving average of exp(q.k / sqrt(D))
    over the last queries, and merge only keys that point the same way.
Stores: at most budget entries per KV head as the model made them, keys rotated, and of each: its token number, int32,
    the logarithm of its moving average, fp32, how many queries that has seen, int16, and the logarithm of its weight in
    attention, its votes or what stands for them (`bias`, fp32).
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 14) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly and merged down to `budget` entries per KV head when its last token is in, so the first
    generated token sees all of it. Then every step attends to at most budget + 1 entries, updates the moving averages,
    and merges or drops one. Until there are more than `budget` entries every step is the full cache's, bit by bit.
Differs: entries stay by their mass (weight times moving average), the same in prompt and decode; the authors' code
    ranks by recency-weighted attention without the votes. With grouped queries the mean query of a group decides: the
    merge is exact for that one. Each entry counts its own queries for the bias correction 1 - alpha^n. The paper's
    factor is singular where the mean logit is near 0; outside [0.5, 2] its merge is replaced by key_form="bias", which
    averages keys and lowers the weight instead, as exact and always stable. A merged entry's moving
    average is what makes its mass the sum of the merged ones. key_form="shift" moves the key along the query, "mean" is
    the authors' code (not exact). Layer budgets are uniform unless a plan says otherwise.
"""

from dataclasses import dataclass

import torch

from nanokv.attention import reduce_group
from nanokv.method import Evict, at_least, one_of


def merge(k, v, z, b, to, form="paper", q=None):
    """Merge entries k, v (..., N, D) of logits z and log weights b (..., N), each into slot `to` (..., N), which may be
    its own. Return k, v, b and the log mass, of exp(b + z), per slot, in z's dtype. q (..., 1, D): what z is of.
    """
    row = torch.arange(to[..., 0].numel(), device=to.device).view(*to.shape[:-1], 1)
    flat = (row * to.shape[-1] + to).flatten()

    def add(x):
        lines = x.flatten(0, to.dim() - 1)
        return torch.zeros_like(lines).index_add_(0, flat, lines).view_as(x)

    most = torch.zeros_like(z).scatter_reduce_(-1, to, b + z, "amax", include_self=False)  # exp cannot overflow
    u = (b + z - most.gather(-1, to)).exp()
    total = add(u)
    mass, votes = most + total.log(), add(b.exp()).log()  # ln W, ln P
    w = u / total.gather(-1, to)  # (..., N), sums to 1 over what is merged
    k, v, z = add(w[..., None] * k.to(z.dtype)), add(w[..., None] * v.to(z.dtype)), add(w * z)
    gap = torch.where(total > 0, mass - votes - z, 0.0)  # minus the divergence of masses from votes, at most 0
    if form in ("mean", "bias"):
        return k, v, votes + gap * (form == "bias"), mass
    if form == "shift":  # the smallest change of k with q.k / sqrt(D) = ln(W / P)
        return k + k.shape[-1] ** 0.5 * (gap / q.square().sum(-1))[..., None] * q, v, votes, mass
    factor = (mass - votes) / z  # eq. 7
    safe = (z.abs() > 1e-3) & (factor >= 0.5) & (factor <= 2)
    return k * torch.where(safe, factor, 1.0)[..., None], v, torch.where(safe, votes, votes + gap), mass


def nearest(k, left, stay, n_stay, threshold):
    """Return for each slot of left (B, Hkv, m) that one of `stay`, bool (B, Hkv, N), at most n_stay a row, whose key in
    k (B, Hkv, N, D) has the highest cosine, or the slot itself if none is above threshold.
    """
    keys = unit = torch.nn.functional.normalize(k, dim=-1)
    at, out = torch.arange(k.shape[2], device=k.device).expand_as(stay), []
    if 2 * n_stay < k.shape[2]:  # to compare with few, copy them
        at = stay.byte().topk(n_stay, sorted=False).indices
        keys, stay = take(unit, at), stay.gather(-1, at)
    for part in left.split(128, -1):
        cosine, i = (take(unit, part) @ keys.mT).masked_fill_(~stay[:, :, None], -torch.inf).max(-1)
        out.append(torch.where(cosine > threshold, at.gather(-1, i), part))
    return torch.cat(out, -1)


def take(x, index):
    """Return slots index (B, Hkv, M) of x (B, Hkv, N, D): (B, Hkv, M, D)."""
    return x.take_along_dim(index[..., None], 2)


@dataclass
class KeepKV(Evict):
    """Votes and merging. budget: entries per KV head; n_sink, recent: first entries and share of newest, which stay;
    threshold: cosine above which keys merge; alpha: of averages; window: a prompt's queries in it; key_form: above.
    """

    budget: int = 512
    n_sink: int = 4
    recent: float = 0.2
    threshold: float = 0.8
    alpha: float = 0.9
    window: int = 32
    key_form: str = "paper"
    limits = {"n_sink": at_least(0), "recent": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
              "threshold": at_least(-1), "alpha": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
              "window": at_least(1), "key_form": one_of("paper", "bias", "shift", "mean")}  # fmt: skip
    merges = online = True

    def __post_init__(self):
        super().__post_init__()
        self.n_recent, self.observes = int(self.recent * self.budget), self.window
        least = max(1, self.n_sink + self.n_recent)
        if self.budget < least:
            raise ValueError(f"keepkv: budget must be at least {least}, the sinks and recent ones, got {self.budget}")

    def check(self, config):
        if any(config.windows):
            raise NotImplementedError("keepkv merges tokens, and a sliding window would forget them by number")

    def after_prompt(self, cache):
        self.average(cache, *cache.observed(self.window))
        super().after_prompt(cache)

    def after_step(self, cache, q, pos):
        self.average(cache, q, pos)
        super().after_step(cache, q, pos)

    def average(self, cache, q, pos):
        """Update S <- alpha * S + (1 - alpha) * exp(z), as logarithms, by the logits z of each group's mean query."""
        q, k = reduce_group(q.float(), cache.config.n_kv_heads, "mean"), cache.read()[0].float()
        see, real = cache.pos[:, :, None] <= pos[:, None, :, None], (pos >= 0).long()
        later = real.flip(1).cumsum(1).flip(1) - real  # (B, T): how many queries come after each
        weight = ((1 - self.alpha) * self.alpha**later).log()[:, None, :, None]
        new = (q @ k.mT / k.shape[-1] ** 0.5 + weight).masked_fill_(~see, -torch.inf).logsumexp(2)  # (B, Hkv, N)
        old = cache.column("logS", -torch.inf) + (self.alpha ** real.sum(1)).log()[:, None, None]
        cache.set_column("logS", torch.logaddexp(old, new))
        cache.set_column("age", (cache.column("age", 0, torch.int16) + see.sum(2)).clamp(max=2**15 - 1))

    def score(self, cache, q, pos):
        return cache.column("bias") + self._logits(cache)

    def forget(self, cache, score, n, q):
        """Merge the entries of the lowest scores into others, or drop them."""
        left, gone = cache.leaving(score, n, *self.protects)  # (B, Hkv, m)
        if not any(gone):
            return
        (k, v), z, b, live = cache.read(), self._logits(cache), cache.column("bias"), cache.live.expand(score.shape)
        leaves = (torch.arange(max(gone)) < torch.tensor(gone).view(cache.B, -1, 1)).to(k.device)
        stay = live.scatter(-1, left, live.gather(-1, left) & ~leaves)
        n_stay = max(c - g for c, g in zip(cache.counts, gone, strict=True))
        to = torch.where(leaves, nearest(k.float(), left, stay, n_stay, self.threshold), left)
        into = torch.arange(k.shape[2], device=k.device).expand_as(stay).scatter(-1, left, to)
        grows = torch.zeros_like(into).scatter_add_(-1, into, torch.ones_like(into)) > 1
        q = reduce_group(q[:, :, -1:].float(), k.shape[1], "mean")
        k, v, weight, mass = merge(k, v, z, b, into, self.key_form, q)
        cache.set_column("bias", torch.where(grows, weight, b))
        logS = cache.column("logS")
        cache.set_column("logS", torch.where(grows, mass - weight - z + logS, logS))
        cache.merge(left, torch.where(to != left, to, -1), take(k, to), take(v, to))
        cache.keep(stay)

    def _logits(self, cache):
        """Return ln(S / (1 - alpha^n)) of each entry, which n queries have seen; 0 where none lives."""
        age = cache.column("age", 0, torch.int16).float()
        return torch.where(cache.live, cache.column("logS") - torch.log1p(-(self.alpha**age)), 0.0)
