"""SnapKV's window scores by loops in fp64, for what the methods that build on them are compared with."""

import torch

from nanokv import KVCache
from nanokv.cache import HIDDEN, LayerCache, Policy

REDUCE = {"mean": lambda x: sum(x) / len(x), "max": max, "sum": sum}


def pooled(s, kernel, pooling):
    """Pool a list of scores; beyond its ends there are zeros, which "avg" counts."""
    out = []
    for j in range(len(s)):
        near = s[max(0, j - kernel // 2) : j + kernel // 2 + 1]
        out.append(max(near) if pooling == "max" else sum(near) / kernel)
    return out


def best(candidates, n):
    """Return the keys of the n highest values of a {key: value}; the lower key wins ties."""
    return set(sorted(candidates, key=lambda key: (-candidates[key], key))[: max(0, n)])


class Spy(Policy):
    """Note, before the policies after it act, what each KV head holds and how its old entries score.

    heads[layer][b, h] is (old, new): {token: pooled score} of the entries before the window, and the window's tokens.
    Reads the queries of the pass itself, so the last prompt must be read in one pass of at least `window` tokens.
    """

    name = "spy"

    def __init__(self, window, kernel=7, pooling="max", reduce="mean"):
        self.window, self.kernel, self.pooling, self.reduce = window, kernel, pooling, reduce
        self.heads = {}

    def __call__(self, cache, q, pos):
        if cache.phase != "last":
            return
        q, pos = cache.rope(q, pos)[:, :, -self.window :].double(), pos[:, -self.window :]
        k, (B, H, W, D), Hkv = cache.read()[0].double(), q.shape, cache.config.n_kv_heads
        token = cache.token.expand(B, Hkv, -1)
        self.heads[cache.layer] = {}
        for b in range(B):
            for h in range(Hkv):
                live = (token[b, h] != HIDDEN).nonzero().flatten()
                tokens = token[b, h, live]
                per_head = []
                for g in range(h * H // Hkv, (h + 1) * H // Hkv):
                    total = torch.zeros(len(live), dtype=torch.float64)
                    for i in range(W):
                        if pos[b, i] >= 0:
                            logits = k[b, h, live] @ q[b, g, i] / D**0.5
                            total += logits.masked_fill(tokens > pos[b, i], -torch.inf).softmax(0)
                    per_head.append(total.tolist())
                s = [REDUCE[self.reduce](column) for column in zip(*per_head, strict=True)]
                n_old = max(0, len(live) - self.window)
                scores = pooled(s[:n_old], self.kernel, self.pooling)
                tokens = tokens.tolist()
                self.heads[cache.layer][b, h] = (
                    dict(zip(tokens[:n_old], scores, strict=True)),
                    set(tokens[n_old:]),
                )


class Drop(Policy):
    """Forget the tokens {(kv_head or None, tokens)} when `at` tokens were read."""

    name = "drop"

    def __init__(self, at, head, tokens):
        self.at, self.head, self.tokens = at, head, tokens

    def __call__(self, cache, q, pos):
        if cache.parent.next_position + q.shape[2] == self.at:
            gone = torch.isin(cache.token, torch.tensor(self.tokens, dtype=torch.int32))
            heads = torch.arange(cache.config.n_kv_heads).view(1, -1, 1)
            cache.keep(~(gone & ((heads == self.head) | (self.head is None))))


def kept(cache, b=0):
    """Return the sets of live tokens of a sequence, {(layer, kv head): set}."""
    c = cache.config
    return {(i, h): set(cache.live_positions(i, h, b).tolist()) for i in range(c.n_layers) for h in range(c.n_kv_heads)}


def give_scores(monkeypatch, prefix):
    """Make the window's queries pay the attention `prefix`, one list per query head, to the entries before it."""
    s = torch.tensor(prefix)  # (H, n)

    def probs(cache, q, pos):
        W = q.shape[2]
        rows = torch.cat([s, torch.zeros(len(s), W)], 1) / W
        return rows[None, :, None].expand(1, -1, W, -1)

    monkeypatch.setattr(LayerCache, "probs", probs)


def run(m, policies, text, steps=0):
    """Read text (B, T) in one pass, then `steps` more tokens, and return the cache."""
    import tiny

    cache = KVCache(m, policies)
    tiny.feed(m, cache, text)
    if steps:
        tiny.steps(m, cache, tiny.ids(steps, seed=77, batch=text.shape[0]))
    return cache
