"""Share one budget among the layers by how widely and how restlessly each one attends.

Paper: CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences, arXiv 2503.12491
Axis: layer, token
Idea: A layer whose attention is spread out (high entropy) and moves from query to query (high variance) needs more
    entries than one that stares at a few. A layer's share is its preference over the sum of all; as the sum grows with
    every layer that has been read, earlier layers are trimmed again, so that the whole never outgrows the budget.
Stores: under layer l b_l + window entries per KV head in the storage's form, and the token number of each, int32; KV
    heads of a layer keep equally many, but different tokens. While a prompt is being read also an eviction indicator
    per entry, fp32. Numbers per layer and sequence: preference and budget.
Bytes: the budgets b_l of all L layers add up to C = (budget - window) * L, or to all there is if that is less. Under
    `full`, after a prompt: held = S_l * Hkv * (2 * D * itemsize + 4) for layer l with S_l = n_l + max(16, n_l // 16)
    slots, n_l = b_l + window; the n_l are budget on average.
Acts: the prompt is read exactly, so the first generated token sees all of it. In its last pass, after every layer l,
    layers 0..l are cut to their shares (cascading=False: all layers once, after the last one). Then every step attends
    to at most b_l + window + 1 entries and forgets the one that this step's query cares least for. Prompts of at most
    `budget` tokens are kept whole, bit by bit; what they leave of C is shared equally. When a prompt is read in parts,
    only the last part has the window, and earlier parts are held by all layers: the cascade bounds the memory of a
    prompt only if it is read in one part.
Differs: shares are rounded by divisors (Jefferson's rule): b_l = floor(P_l / x), not below `floor` and not above what
    there is, with the x that makes the sum exact. The authors' code truncates, spreads what capped layers leave
    equally, and repairs single slots. Jefferson's rule only ever takes from a layer when others join, so cascade and
    one-shot keep the same entries, whatever is capped. `floor` is new: a layer with constant attention would get
    nothing. Nothing is forgotten up to budget tokens (the authors: budget + window). Sequences of a batch get budgets
    of their own. Steps compute attention another way than `full`'s: results are equal but for rounding.
"""

from dataclasses import dataclass

from nanokv.attention import pool
from nanokv.method import Plan, at_least

KERNEL = 5


def allot(weights, total, caps, floor):
    if sum(caps) <= total:
        return list(caps)
    largest = max(weights)
    weights = [w / largest for w in weights] if largest > 0 else [1.0] * len(weights)

    def shares(x):
        return [min(cap, max(floor, int(w / x))) for w, cap in zip(weights, caps, strict=True)]

    low, high = 0.0, 2.0
    for _ in range(100):
        x = (low + high) / 2
        low, high = (low, x) if sum(shares(x)) <= total else (x, high)
    out = shares(high)
    for _ in range(total - sum(out)):
        open_ = [i for i, n in enumerate(out) if n < caps[i]]
        out[max(open_, key=lambda i: (weights[i] / (out[i] + 1), -i))] += 1
    return out


@dataclass
class CAKE(Plan):
    """Layer budgets from attention. budget: entries per KV head and layer, on average; see the card."""

    budget: int = 512
    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    floor: int = 16
    limits = {"window": at_least(2), "gamma": at_least(0), "floor": at_least(0)}

    def __post_init__(self):
        super().__post_init__()
        if self.budget <= self.window:
            raise ValueError(f"cake: budget must be above the window, {self.window}")
        self.past, self.observes = self.budget - self.window, self.window
        self.low = min(self.floor, self.past)

    def after_prompt(self, cache):
        """Note the layer's preference, entropy^(1/tau1) * variance^(1/tau2), and the indicator of each entry."""
        prefix, (q, pos) = self._prefix(cache), cache.observed(self.window)
        p = cache.probs(q, pos).unflatten(1, (cache.config.n_kv_heads, -1)) * prefix[:, :, None, None]
        mean = p.mean(3)  # (B, Hkv, G, N)
        var = (p - mean.unsqueeze(3)).square_().sum(3) / max(1, q.shape[2] - 1)
        entropy = -(p * (p + 1e-10).log()).flatten(1).sum(1).clamp(max=0)
        both = zip((entropy.abs()).tolist(), var.flatten(1).sum(1).tolist(), strict=True)
        cache.notes["preference"] = [h ** (1 / self.tau1) * v ** (1 / self.tau2) for h, v in both]
        cache.column("indicator")
        cache.set_column("indicator", pool((mean + self.gamma * var).mean(2), prefix, KERNEL, "avg"))

    def after_layer(self, cache, i, x, pos):
        """Cut layers 0..i, the first ones of the model, to their shares of the whole, and note these as budgets."""
        if cache.phase == "last":
            layers, total = cache.layers[: i + 1], self.past * cache.config.n_layers
            stored, B = [self._stored(c) for c in layers], cache.layers[0].B
            per = [allot([c.notes["preference"][b] for c in layers], total, [n[b] for n in stored], self.low) for b in range(B)]
            rest = [(total - sum(s)) // len(layers) for s in per]
            for j, c in enumerate(layers):
                self._keep(c, c.column("indicator"), [s[j] for s in per])
                c.notes["budget"] = [s[j] + r for s, r in zip(per, rest, strict=True)]
        return x, pos

    def after_step(self, cache, q, pos):
        budgets = cache.notes.get("budget", [self.past] * cache.B)
        if any(n > b for n, b in zip(self._stored(cache), budgets, strict=True)):
            p = cache.probs(q[:, :, -1:], pos[..., -1:])[:, :, 0].unflatten(1, (cache.config.n_kv_heads, -1))
            self._keep(cache, pool(p.mean(2), self._prefix(cache), KERNEL, "avg"), budgets)

    def _stored(self, cache):
        heads = cache.config.n_kv_heads
        return [max(0, max(cache.counts[i : i + heads]) - self.window) for i in range(0, cache.n_rows, heads)]

    def _prefix(self, cache):
        return cache.between(0, self.window).expand(cache.B, cache.config.n_kv_heads, -1)

    def _keep(self, cache, score, budgets):
        rows = [n + self.window for n in budgets for _ in range(cache.config.n_kv_heads)]
        cache.keep_best(score, rows, last=self.window)
