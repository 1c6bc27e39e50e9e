"""Keep entries drawn by lot: what any method that chooses must beat.

Paper: none; a control.
Axis: token
Idea: Half of a cache is worth something whichever half it is. Only what a method keeps beyond a random choice of the
    same size is to its credit, and on some tasks, such as finding one fact, that is less than nothing.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
Bytes: under `full`, after a prompt of T > budget tokens: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots. Every further token takes one slot more.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then `budget` entries per KV head live; each generated token adds one, which no lot is drawn for until the next
    prompt ends and the same is done to all that lives.
Differs: nothing is protected, neither first nor newest entries. Every layer and KV head draws for itself, by a seed of
    its own on the CPU, so that all devices agree. A sequence draws in a batch as it would alone, so sequences of equal
    length keep the same places.
"""

from dataclasses import dataclass

import torch

from nanokv.method import Evict, at_least


@dataclass
class Random(Evict):
    """A random subset. budget: entries per KV head; seed: another seed, another subset."""

    budget: int = 512
    seed: int = 0
    limits = {"budget": at_least(1), "seed": (lambda x: 0 <= x < 1_000_000, "at least 0 and below a million")}

    def score(self, cache, q, pos):
        """Draw a number from [0, 1) for each live entry of each row, oldest first, whatever slots are hidden."""
        heads, lots = cache.config.n_kv_heads, torch.zeros(cache.n_rows, cache.n_live)
        for r, n in enumerate(cache.counts):
            own = (self.seed * cache.config.n_layers + cache.layer) * heads + r % heads  # one for each layer and head
            lots[r, :n] = torch.rand(n, generator=torch.Generator().manual_seed(own))
        lots = lots.unflatten(0, (cache.B, heads)).to(cache.device)  # (B, Hkv, n_live)
        return lots.gather(-1, cache.rank.expand(*lots.shape[:2], -1).clamp(min=0))
