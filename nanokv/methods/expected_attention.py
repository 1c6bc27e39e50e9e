"""Keep what queries still to come are expected to attend to, judging by all queries of the prompt.

Paper: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution,
    arXiv 2510.00636
Axis: token
Idea: Before they are rotated, the queries of a head are close to Gaussian. Take their mean and covariance over the
    prompt, rotate these to the next positions, and E[exp(q.k / sqrt(D))] has a closed form:
    exp(mean.k / sqrt(D) + k.cov.k / 2D). Times the size of the value, this is what an entry will add to the output.
    It takes no question at the end of the prompt to judge by.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
    While a prompt is being read also, per query head, the mean of its queries and the sum of the outer products of what
    they differ from it by, fp64.
Bytes: under `full`, after a prompt of T > budget tokens: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots. Every further token takes one slot more.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then at most `budget` entries per KV head live, the first and the newest ones among them; each generated token
    adds one, until the next prompt ends and the same is done to all that lives, by that prompt's queries.
Differs: the newest `window` entries stay, as they do in other methods; the authors' code protects the sinks alone, as
    window=0 does. Moments are merged part by part and do not depend on how the prompt was cut. As in the authors' code,
    one rotation, the average over the n_future next positions, stands for all of them; expected attention is normalised
    over all entries but the sinks; and query groups are reduced by their mean. Equal scores: the older entry stays.
"""

import math

import torch

from nanokv.cache import Policy


def log_attention(k, mean, cov=None):
    """Return ln E[exp(q.k / sqrt(D))] for keys k (..., N, D) and Gaussian q of mean (..., 1, D) and covariance
    (..., D, D): fp32 (..., N)."""
    D, z = k.shape[-1], (k * mean).sum(-1) / math.sqrt(k.shape[-1])
    return z if cov is None else z + ((k @ cov) * k).sum(-1) / (2 * D)


class ExpectedAttention(Policy):
    """Attention from Gaussian queries. budget: entries per KV head; n_future: positions ahead that count; n_sink,
    window: first and newest entries, which stay; epsilon: added to attention before use_vnorm multiplies it by the
    norm of the value; use_covariance: else queries are taken to be all alike.
    """

    early = True

    def __init__(self, budget: int = 512, n_future: int = 512, n_sink: int = 4, window: int = 32, epsilon: float = 0.0,
                 use_covariance: bool = True, use_vnorm: bool = True):  # fmt: skip
        least = max(1, n_sink)
        for name, value, ok, what in (
            ("n_future", n_future, n_future >= 1, "at least 1"),
            ("n_sink", n_sink, n_sink >= 0, "at least 0"),
            ("window", window, window >= 0, "at least 0"),
            ("epsilon", epsilon, epsilon >= 0, "at least 0"),
            ("budget", budget, budget >= least, f"at least {least}, the sinks"),
        ):
            if not ok:
                raise ValueError(f"expected_attention: {name} must be {what}, got {value}")
        self.budget, self.n_sink, self.window = budget, n_sink, min(window, budget - n_sink)
        self.n_future, self.epsilon = n_future, epsilon
        self.use_covariance, self.use_vnorm = use_covariance, use_vnorm

    def most(self, prompt, new):
        return min(prompt, self.budget) + new

    def __call__(self, cache, q, pos):
        if cache.phase == "decode":
            return
        moments = self._moments(cache.notes.pop("moments", [0.0, 0.0, 0.0]), cache, q, pos)
        if cache.phase == "prompt":
            cache.notes["moments"] = moments
        elif cache.n_live > self.budget:
            self._cut(cache, *self._ahead(cache, pos, *moments))

    def _moments(self, old, cache, q, pos):
        """Merge q into the number (B, *, 1, 1, 1), mean (B, Hkv, G, 1, D) and scatter (B, Hkv, G, D, D) of queries."""
        q = q.float().unflatten(1, (cache.config.n_kv_heads, -1))  # (B, Hkv, G, T, D)
        counts = (pos >= self.n_sink).reshape(len(q), -1, 1, q.shape[3], 1)  # neither sinks nor padding
        new = counts.double().sum(3, keepdim=True)
        center = (q * counts).sum(3, keepdim=True) / new.float().clamp(min=1)
        off = (q - center) * counts
        n, mean, scatter = old
        share, shift = new / (n + new).clamp(min=1), center - mean  # fp64 from here
        return [n + new, mean + share * shift, scatter + off.mT @ off + n * share * (shift.mT @ shift)]

    def _ahead(self, cache, pos, n, mean, scatter):
        """Return the mean (B, Hkv, G, 1, D) and covariance (B, Hkv, G, D, D) of the queries, rotated to come next."""
        cov = scatter / n.clamp(min=1)
        ahead = pos[..., -1:] + 1 + torch.arange(self.n_future, device=pos.device)  # (B, F) or (B, Hkv, F)
        angle = ahead.unsqueeze(-1) * cache.rope.inv_freq.double()
        cos, sin = (t.mean(-2).reshape(len(mean), -1, 1, 1, t.shape[-1]) for t in (angle.cos(), angle.sin()))

        def turn(x):  # R x, with R the average rotation of the pairs (i, i + D/2)
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return turn(mean).float(), turn(turn(cov).mT).float()  # R mean, R cov R^T

    def _cut(self, cache, mean, cov):
        """Forget all but the sinks, the window and what scores highest of the others."""
        k, v = cache.read()
        rank = cache.rank.expand(k.shape[:3])
        z = log_attention(k.float()[:, :, None], mean, cov if self.use_covariance else None)  # (B, Hkv, G, N)
        sink = (rank >= 0) & (rank < self.n_sink)
        z = z.masked_fill((sink | (rank < 0))[:, :, None], -torch.inf)
        score = z.softmax(-1).nan_to_num(0.0).mean(2)  # (B, Hkv, N)
        if self.use_vnorm:
            score = (score + self.epsilon) * v.float().norm(dim=-1)
        cache.keep_best(score, self.budget, self.n_sink, self.window)
