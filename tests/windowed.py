"""SnapKV's scores by loops in fp64, and what the tests of policies share."""

import tiny
import torch

from nanokv import KVCache
from nanokv.entries import HIDDEN
from nanokv.layer import LayerCache
from nanokv.method import Policy

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
    """Note, before the policies after it act, what each KV head of a sequence holds and how its old entries score.

    heads[layer, h] is (old, new): {token: pooled score} of the entries before the window, and the window's tokens.
    Reads the queries of the pass itself, so the last prompt must be read in one pass of at least `window` tokens.
    """

    def __init__(self, window, kernel=7, pooling="max", reduce="mean"):
        self.window, self.kernel, self.pooling, self.reduce = window, kernel, pooling, reduce
        self.heads = {}

    def after_part(self, cache, q, pos):
        if cache.phase != "last":
            return
        q, pos = q[0, :, -self.window :].double(), pos[0, -self.window :]
        for h, (tokens, k) in enumerate(rows(cache)):
            per_head = []
            for x in q.unflatten(0, (cache.config.n_kv_heads, -1))[h]:
                logits = x @ k.double().T / k.shape[1] ** 0.5  # (W, n)
                p = logits.masked_fill(torch.tensor(tokens) > pos[:, None], -torch.inf).softmax(-1)
                per_head.append(p.nan_to_num(0.0).sum(0).tolist())  # a query may see nothing
            s = [REDUCE[self.reduce](column) for column in zip(*per_head, strict=True)]
            n_old = max(0, len(tokens) - self.window)
            scores = pooled(s[:n_old], self.kernel, self.pooling)
            self.heads[cache.layer, h] = dict(zip(tokens[:n_old], scores, strict=True)), set(tokens[n_old:])


class Drop(Policy):
    """Forget tokens, of one KV head or of all (None), when `at` tokens were read."""

    def __init__(self, at, head, tokens):
        self.at, self.head, self.tokens = at, head, tokens

    def after_part(self, cache, q, pos):
        if max(cache.next_position) == self.at:
            gone = torch.isin(cache.token, torch.tensor(self.tokens, dtype=torch.int32))
            heads = torch.arange(cache.config.n_kv_heads).view(1, -1, 1)
            cache.keep(~(gone & ((heads == self.head) | (self.head is None))))

    after_step = after_part


def rows(cache, b=0):
    """Return what each KV head of a sequence of a layer holds: its tokens, a list, and keys (n, D)."""
    k, token = cache.read()[0][b], cache.token.expand(cache.B, cache.config.n_kv_heads, -1)[b]
    return [(t[t != HIDDEN].tolist(), x[t != HIDDEN].clone()) for t, x in zip(token, k, strict=True)]


def kept(cache, b=0):
    """Return the sets of live tokens of a sequence, {(layer, kv head): set}."""
    c = cache.config
    return {(i, h): set(cache.live_positions(i, h, b).tolist()) for i in range(c.n_layers) for h in range(c.n_kv_heads)}


def held(cache):
    """Return the bytes that all layers hold, without the tokens' ids."""
    return sum(row["held"] for row in cache.ledger()["layers"])


def give_scores(monkeypatch, prefix):
    """Make the window's queries pay the attention `prefix`, one list per query head, to the entries before it."""
    s = torch.tensor(prefix)  # (H, n)

    def probs(cache, q, pos):
        W = q.shape[2]
        rows = torch.cat([s, torch.zeros(len(s), W)], 1) / W
        return rows[None, :, None].expand(1, -1, W, -1)

    monkeypatch.setattr(LayerCache, "probs", probs)


def run(m, policies, text, steps=0, chunk=None):
    """Read text (B, T), in parts of `chunk`, then `steps` more tokens, and return the cache."""
    cache = KVCache(m, policies)
    tiny.feed(m, cache, text, chunk)
    if steps:
        tiny.steps(m, cache, tiny.ids(steps, seed=77, batch=text.shape[0]))
    return cache


def read_exactly(m, spec, budget, online, T):
    """Assert that a prompt of T tokens is read exactly and cut to `budget`, then and after a second one, and what 7
    steps between them do: forget as many with `online`, else nothing; return what was kept of the first prompt."""
    text = tiny.ids(T)
    cache = KVCache(m, spec)
    assert torch.equal(tiny.feed(m, cache, text), m(text, KVCache(m)))
    before = kept(cache)
    assert all(len(tokens) == min(T, budget) for tokens in before.values())
    tiny.steps(m, cache, tiny.ids(7))
    after = kept(cache)
    if online:
        assert all(len(tokens) == min(T + 7, budget) for tokens in after.values())
    else:
        assert after == {key: tokens | set(range(T, T + 7)) for key, tokens in before.items()}
    tiny.feed(m, cache, tiny.ids(60))
    assert all(len(tokens) == min(T + 67, budget) for tokens in kept(cache).values())
    return before


def within_budget_is_full(m, spec, T, steps):
    """Assert that a cache of `spec` gives the full cache's logits bit by bit on a text of T + steps tokens."""
    text, out = tiny.ids(T + steps), []
    for cache in (KVCache(m), KVCache(m, spec)):
        out.append(torch.cat([tiny.feed(m, cache, text[:, :T]), tiny.steps(m, cache, text[:, T:])], 1))
    assert torch.equal(*out)
