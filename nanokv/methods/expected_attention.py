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
from dataclasses import dataclass

import torch

from nanokv.method import Evict, at_least


def log_attention(k, mean, cov=None):
    """Return ln E[exp(q.k / sqrt(D))] for keys k (..., N, D) and Gaussian q of mean (..., 1, D) and covariance
    (..., D, D): fp32 (..., N)."""
    D = k.shape[-1]
    z = (k * mean).sum(-1) / math.sqrt(D)
    return z if cov is None else z + ((k @ cov) * k).sum(-1) / (2 * D)


@dataclass
class ExpectedAttention(Evict):
    """Attention from Gaussian queries. budget: entries per KV head; n_future: positions ahead that count; n_sink,
    window: first and newest entries, which stay; epsilon: added to attention before use_vnorm multiplies it by the
    norm of the value; use_covariance: else queries are taken to be all alike.
    """

    budget: int = 512
    n_future: int = 512
    n_sink: int = 4
    window: int = 32
    epsilon: float = 0.0
    use_covariance: bool = True
    use_vnorm: bool = True
    limits = {
        "budget": at_least(1),
        "n_future": (lambda x: 1 <= x <= 65536, "from 1 to 65,536"),
        "n_sink": at_least(0),
        "window": at_least(0),
        "epsilon": (lambda x: 0 <= x <= 1e6, "from 0 to 1,000,000"),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.budget < self.n_sink:
            raise ValueError(f"{self.name}: budget must be at least {self.n_sink}, the sinks, got {self.budget}")
        self.n_recent = min(self.window, self.budget - self.n_sink)

    def after_part(self, cache, q, pos):
        """Merge the part's queries, before RoPE, into their number, mean and scatter, fp64."""
        q = cache.unrotated.float().unflatten(1, (cache.config.n_kv_heads, -1))  # (B, Hkv, G, T, D)
        counts = (pos >= self.n_sink).reshape(len(q), -1, 1, q.shape[3], 1)  # neither sinks nor padding
        new = counts.double().sum(3, keepdim=True)  # (B, *, 1, 1, 1)
        center = (q * counts).sum(3, keepdim=True) / new.float().clamp(min=1)  # (B, Hkv, G, 1, D)
        off = (q - center) * counts
        zeros = torch.zeros_like(center, dtype=torch.float64)
        n = cache.notes.get("queries", torch.zeros_like(new))
        mean, scatter = cache.notes.get("mean", zeros), cache.notes.get("scatter", zeros.mT @ zeros)
        share, shift = new / (n + new).clamp(min=1), center - mean
        scatter = scatter + off.mT @ off + n * share * (shift.mT @ shift)
        cache.notes |= {"queries": n + new, "mean": mean + share * shift, "scatter": scatter}

    def after_prompt(self, cache):
        super().after_prompt(cache)
        for name in ("queries", "mean", "scatter"):
            cache.notes.pop(name)

    def score(self, cache, q, pos):
        mean, cov = self._ahead(cache)
        k, v = cache.read()
        rank = cache.rank.expand(k.shape[:3])
        z = log_attention(k.float()[:, :, None], mean, cov if self.use_covariance else None)  # (B, Hkv, G, N)
        others = (rank >= self.n_sink)[:, :, None]  # neither sinks nor hidden
        score = z.masked_fill(~others, -torch.inf).softmax(-1)
        score = torch.where(others, score, 0.0).mean(2)  # (B, Hkv, N)
        return (score + self.epsilon) * v.float().norm(dim=-1) if self.use_vnorm else score

    def _ahead(self, cache):
        """Return the mean (B, Hkv, G, 1, D) and covariance (B, Hkv, G, D, D) of the queries, rotated to come next."""
        n, mean, scatter = (cache.notes[name] for name in ("queries", "mean", "scatter"))
        cov = scatter / n.clamp(min=1)
        first = torch.tensor(cache.counts if cache.renumbers else cache.next_position, device=mean.device)
        following = first.view(cache.B, -1, 1) + torch.arange(self.n_future, device=mean.device)
        angle = following[..., None] * cache.rope.inv_freq.double()  # (B, 1 or Hkv, F, D/2)
        cos, sin = (t.mean(2)[:, :, None, None] for t in (angle.cos(), angle.sin()))  # (B, 1 or Hkv, 1, 1, D/2)

        def turn(x):  # R x, with R the average rotation of the pairs (i, i + D/2)
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return turn(mean).float(), turn(turn(cov).mT).float()  # R mean, R cov R^T
