"""Keep what queries still to come are expected to attend to, judging by all queries of the prompt.

Paper: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution,
    arXiv 2510.00636
Axis: token
Idea: Before they are rotated, the queries of a head are close to Gaussian. Take their mean and covariance over the
    prompt, rotate these to the next positions, and E[exp(q.k / sqrt(D))] has a closed form:
    exp(mean.k / sqrt(D) + k.cov.k / 2D). Times the size of the value, this is what an entry will add to the output.
    It takes no question at the end of the prompt to judge by.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
    While a prompt is being read also, per query head, the sum of its queries and of their outer products, fp64.
Bytes: under `full`, after a prompt of T > budget tokens: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots. Every further token takes one slot more.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then at most `budget` entries per KV head live, the first and the newest ones among them; each generated token
    adds one, until the next prompt ends and the same is done to all that lives, by that prompt's queries.
Differs: the newest `window` entries stay, as they do in other methods; the authors' code protects the sinks alone, as
    window=0 does. Moments are summed in fp64, so they do not depend on how the prompt was cut. As in the authors' code,
    one rotation, the average over the n_future next positions, stands for all of them; expected attention is normalised
    over all entries but the sinks; and query groups are reduced by their mean. Equal scores: the older entry stays.
"""

import math

import torch

from nanokv.cache import Policy, top


class ExpectedAttention(Policy):
    """Attention from Gaussian queries. budget: entries per KV head; n_future: positions ahead that count; n_sink,
    window: first and newest entries, which stay; epsilon: added to attention before use_vnorm multiplies it by the
    norm of the value; use_covariance: else queries are taken to be all alike.
    """

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
        q = q.double().unflatten(1, (cache.config.n_kv_heads, -1))  # (B, Hkv, G, T, D)
        counts = (pos >= self.n_sink).reshape(len(q), -1, 1, q.shape[3], 1)  # neither sinks nor padding
        q = q * counts
        new = [counts.double().sum(3, keepdim=True), q.sum(3, keepdim=True), q.mT @ q]
        moments = [a + b for a, b in zip(cache.notes.pop("moments", [0, 0, 0]), new, strict=True)]
        if cache.phase == "prompt":
            cache.notes["moments"] = moments
        elif cache.n_live > self.budget:
            self._cut(cache, *self._ahead(cache, pos, *moments))

    def _ahead(self, cache, pos, n, total, outer):
        """Return the mean (B, Hkv, G, 1, D) and covariance (B, Hkv, G, D, D) of the queries, rotated to come next."""
        n = n.clamp(min=1)
        mean = total / n
        cov = outer / n - mean.mT @ mean
        ahead = pos[..., -1:] + 1 + torch.arange(self.n_future, device=pos.device)  # (B, F) or (B, Hkv, F)
        angle = ahead.unsqueeze(-1) * cache.rope.inv_freq.double()
        cos, sin = (t.mean(-2).reshape(len(n), -1, 1, 1, t.shape[-1]) for t in (angle.cos(), angle.sin()))

        def turn(x):  # R x, with R the average rotation of the pairs (i, i + D/2)
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return turn(mean).float(), turn(turn(cov).mT).float()  # R mean, R cov R^T

    def _cut(self, cache, mean, cov):
        """Forget all but the sinks, the window and what scores highest of the others."""
        k, v = cache.read()
        D, rank = k.shape[-1], cache.rank.expand(k.shape[:3])
        k = k.float()[:, :, None]  # (B, Hkv, 1, N, D)
        z = (k * mean).sum(-1) / math.sqrt(D)  # (B, Hkv, G, N)
        if self.use_covariance:
            z += ((k @ cov) * k).sum(-1) / (2 * D)
        sink = (rank >= 0) & (rank < self.n_sink)
        z = z.masked_fill((sink | (rank < 0))[:, :, None], -torch.inf)
        score = z.softmax(-1).nan_to_num(0.0).mean(2)  # (B, Hkv, N)
        if self.use_vnorm:
            score = (score + self.epsilon) * v.float().norm(dim=-1)
        must = sink | ((rank >= 0) & (rank > rank.amax(-1, keepdim=True) - self.window))
        n = self.budget - must.sum(-1, keepdim=True)
        cache.keep(top(score, n, (rank >= 0) & ~must) | must)
