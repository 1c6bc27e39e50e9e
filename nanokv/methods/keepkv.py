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
    and merges or drops one.
Differs: entries stay by their mass (weight times moving average), the same in prompt and decode; the authors' code
    ranks by recency-weighted attention without the votes. With grouped queries the mean query of a group decides: the
    merge is exact for that one. Each entry counts its own queries for the bias correction 1 - alpha^n. The paper's
    factor is singular where the mean logit is near 0; outside [0.5, 2] its merge is replaced by key_form="bias", which
    averages keys and lowers the weight instead, as exact and always stable. A merged entry's moving
    average is what makes its mass the sum of the merged ones. key_form="shift" moves the key along the query, "mean" is
    the authors' code (not exact). Layer budgets are uniform.
"""

import torch

from nanokv.cache import Policy, some, take


def merge(k, v, z, b, to, form="paper", q=None):
    """Merge entries k, v (..., N, D) of logits z and log weights b (..., N), each into slot `to` (..., N), which may be
    its own. Return k, v, b and the log mass, of exp(b + z), per slot, in z's dtype. q (..., 1, D): what z is of."""

    def add(x):
        at = to if x.dim() == to.dim() else to[..., None].expand_as(x)
        return torch.zeros_like(x).scatter_add_(to.dim() - 1, at, x)

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


def nearest(k, left, leaves, stay, n_stay, threshold):
    """Return for each slot of left (B, Hkv, n) the one of `stay` (at most n_stay a row) whose key k has the highest
    cosine, if that is above threshold and `leaves` (B, Hkv, n) says that it leaves; else the slot itself."""
    norm = k.norm(dim=-1).clamp(min=1e-12)
    at = some(stay, n_stay) if 2 * n_stay < k.shape[2] else None  # to compare with few, copy them
    keys, scale = (k, norm) if at is None else (take(k, at), norm.gather(-1, at))
    scale = torch.where(stay if at is None else stay.gather(-1, at), 1 / scale, torch.nan)  # nan: not one of them
    out = []
    for part in left.split(128, -1):  # cosines over (B, Hkv, 128, N), times the norm of what leaves
        best, i = (take(k, part) @ keys.mT).mul_(scale[:, :, None]).nan_to_num_(-torch.inf).max(-1)
        out.append(torch.where(best > threshold * norm.gather(-1, part), i if at is None else at.gather(-1, i), part))
    return torch.where(leaves, torch.cat(out, -1), left)


class KeepKV(Policy):
    """Votes and merging. budget: entries per KV head; n_sink, recent: first entries and share of newest, which stay;
    threshold: cosine above which keys merge; alpha: of averages; window: a prompt's queries in it; key_form: above."""

    merges = True

    def __init__(self, budget: int = 512, n_sink: int = 4, recent: float = 0.2, threshold: float = 0.8,
                 alpha: float = 0.9, window: int = 32, key_form: str = "paper"):  # fmt: skip
        least = max(1, n_sink + int(recent * budget))
        for name, value, ok, what in (
            ("n_sink", n_sink, n_sink >= 0, "at least 0"),
            ("recent", recent, 0 <= recent < 1, "at least 0 and below 1"),
            ("budget", budget, budget >= least, f"at least {least}, the sinks and recent entries"),
            ("threshold", threshold, threshold >= -1, "at least -1"),
            ("alpha", alpha, 0 <= alpha < 1, "at least 0 and below 1"),
            ("window", window, window >= 1, "at least 1"),
            ("key_form", key_form, key_form in ("paper", "bias", "shift", "mean"), "paper, bias, shift or mean"),
        ):
            if not ok:
                raise ValueError(f"keepkv: {name} must be {what}, got {value}")
        self.budget, self.n_sink, self.n_recent = budget, n_sink, int(recent * budget)
        self.threshold, self.alpha, self.observes, self.key_form = threshold, alpha, window, key_form

    def check(self, config):
        if any(config.windows):
            raise NotImplementedError("keepkv merges tokens, and a sliding window would forget them by number")

    def most(self, prompt, new):
        return min(prompt + new, self.budget)

    def __call__(self, cache, q, pos):
        if cache.phase == "prompt":
            return
        q, pos = cache.observed(self.observes) if cache.phase == "last" else (cache.rope(q, pos), pos)
        q = q.float().unflatten(1, (cache.config.n_kv_heads, -1)).mean(2)  # (B, Hkv, T, D)
        k, v = cache.read()
        self._average(cache, q @ k.float().mT / k.shape[-1] ** 0.5, pos)
        if cache.n_live > self.budget:
            self._shrink(cache, q[:, :, -1:], k, v)

    def _average(self, cache, z, pos):
        """Update S <- alpha * S + (1 - alpha) * exp(z), as logarithms, by logits z (B, Hkv, T, N) of T queries."""
        see = cache.pos[:, :, None] <= pos[:, None, :, None]  # (B, Hkv, T, N), sizes of 1 broadcast
        weight = (1 - self.alpha) * self.alpha ** torch.arange(pos.shape[1] - 1, -1, -1, device=z.device)
        new = (z + weight.log()[:, None]).masked_fill(~see, -torch.inf)
        new = new.logsumexp(2) if len(weight) > 1 else new[:, :, 0]  # (B, Hkv, N)
        old = cache.column("logS", -torch.inf) + torch.tensor(self.alpha ** pos.shape[1], device=z.device).log()
        cache.set_column("logS", torch.logaddexp(old, new))
        cache.set_column("age", (cache.column("age", 0, torch.int16) + see.sum(2)).clamp(max=2**15 - 1))

    def _shrink(self, cache, q, k, v):
        """Choose the entries that stay, merge the others into them or drop them."""
        b, live = cache.column("bias"), cache.live.expand(k.shape[:3])
        correct = torch.log1p(-(self.alpha ** cache.column("age", 0, torch.int16).float()))  # ln(1 - alpha^n)
        z = torch.where(live, cache.column("logS") - correct, 0.0)
        left, leaves = cache.leaving(b + z, self.budget, self.n_sink, self.n_recent)
        stay = live.scatter(-1, left, live.gather(-1, left) & ~leaves)
        to = nearest(k.float(), left, leaves, stay, self.budget, self.threshold)
        near = torch.arange(k.shape[2], device=k.device).expand_as(live)
        near_to = near.scatter(-1, left, to)
        if left.shape[-1] == 1:  # two slots matter
            near, near_to = torch.cat([left, to], -1), torch.cat([to != left, to == to], -1).long()
        grows = torch.zeros_like(near).scatter_add_(-1, near_to, torch.ones_like(near)) > 1  # something came
        z, b, correct = (x.gather(-1, near) for x in (z, b, correct))
        k, v, b, mass = merge(take(k, near), take(v, near), z, b, near_to, self.key_form, q)
        for name, new in (("bias", b), ("logS", mass - b + correct)):
            old = cache.column(name)
            cache.set_column(name, old.scatter(-1, near, torch.where(grows, new.to(old.dtype), old.gather(-1, near))))
        cache.write(torch.where(grows, near, -1), k, v)
        cache.keep(stay)
