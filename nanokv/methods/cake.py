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
    layers 0..l are cut to their shares. Then every step attends to at most b_l + window + 1 entries and forgets the one
    that this step's query cares least for. Prompts of at most `budget` tokens are kept whole, bit by bit; what they
    leave of C is shared equally, and until that is full every step is the full cache's, bit by bit. When a prompt is
    read in parts, only the last part has the window, and earlier parts are held by all layers: the cascade bounds the
    memory of a prompt only if it is read in one part. A storage packs once the last layer has been read.
Differs: shares are rounded by divisors (Jefferson's rule): b_l = floor(P_l / x), not below `floor` and not above what
    there is, with the x that makes the sum exact. The authors' code truncates, spreads what capped layers leave
    equally, and repairs single slots. Jefferson's rule only ever takes from a layer when others join, so cascade and
    one-shot keep the same entries, whatever is capped. `floor` is new: a layer with constant attention would get
    nothing. Nothing is forgotten up to budget tokens (the authors: budget + window, and for prompts of that length
    uniform layers). In steps the neighbours over which attention is pooled are those in the text; in the authors' code
    they lie in the order of the prompt's scores. Sequences of a batch get budgets of their own.
"""

from dataclasses import dataclass

from nanokv.attention import pool
from nanokv.method import Plan, at_least

KERNEL = 5  # neighbours over which indicators are averaged


def allot(weights, total, caps, floor):
    """Return integers within [floor, cap] in proportion to weights that add up to total, or all caps if that is less.

    They are floor(weight / x) for one x, clamped; slots that several layers have an equal right to go to the earlier.
    """
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
    """Layer budgets from attention. budget: entries per KV head and layer, on average; window: newest entries, which
    are kept and whose queries decide; gamma: weight of the variance in an entry's indicator; tau1, tau2: temperatures
    of entropy and variance; floor: entries that every layer gets.
    """

    budget: int = 512
    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    floor: int = 16
    limits = {"window": at_least(2), "gamma": (lambda x: 0 <= x <= 1e6, "from 0 to 1,000,000"),
              "tau1": at_least(0.05), "tau2": at_least(0.05), "floor": at_least(0)}  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.budget <= self.window:
            raise ValueError(f"cake: budget must be above the window, {self.window}, got {self.budget}")
        self.past, self.observes = self.budget - self.window, self.window

    @property
    def protects(self):
        return 0, self.window

    def most(self, prompt, new):
        return min(prompt + new, self.budget)

    def after_prompt(self, cache):
        """Note the layer's preference, entropy^(1/tau1) * variance^(1/tau2), and the indicator of each entry."""
        prefix, (q, pos) = self._prefix(cache), cache.observed(self.window)
        p = cache.probs(q, pos).unflatten(1, (cache.config.n_kv_heads, -1)) * prefix[:, :, None, None]
        real = (pos >= 0)[:, None, None, :, None]  # a short prompt beside a longer one has fewer queries
        n = real.sum(3).clamp(min=1)
        mean = p.sum(3) / n  # (B, Hkv, G, N)
        var = ((p - mean.unsqueeze(3)) * real).square_().sum(3) / (n - 1).clamp(min=1)
        entropy = (-p * (p + 1e-10).log()).flatten(1).sum(1).clamp(min=0)  # (B,)
        both = zip(entropy.tolist(), var.flatten(1).sum(1).tolist(), strict=True)
        cache.notes["preference"] = [h ** (1 / self.tau1) * v ** (1 / self.tau2) for h, v in both]
        cache.set_column("indicator", pool((mean + self.gamma * var).mean(2), prefix, KERNEL, "avg"))

    def after_layer(self, cache, i, x, pos):
        if cache.phase == "last":
            self.cut(cache.layers[: i + 1])
        return x, pos

    def after_pass(self, cache):
        for layer in cache.layers if cache.phase == "last" else ():
            layer.drop_column("indicator")

    def after_step(self, cache, q, pos):
        if self.ahead(cache) < 1:
            p = cache.probs(q, pos)[:, :, -1].unflatten(1, (cache.config.n_kv_heads, -1))  # (B, Hkv, G, N)
            # neighbours share the largest of what they pool; behind it fp32 would hide what makes them different
            score = pool(p.mean(2).double(), self._prefix(cache), KERNEL, "avg")
            cache.keep_best(score, self._budgets(cache), last=self.window)

    def ahead(self, cache):
        return 1 + min(n - c for n, c in zip(self._budgets(cache), cache.counts, strict=True))

    def cut(self, layers):
        """Cut layers, the first ones of the model, to their shares of the whole, and note these as budgets."""
        total, Hkv = self.past * layers[0].config.n_layers, layers[0].config.n_kv_heads
        for b in [b for b, n in enumerate(layers[0].reads) if n]:  # sequences that this prompt is of
            rows = slice(b * Hkv, (b + 1) * Hkv)
            stored = [max(0, max(c.counts[rows]) - self.window) for c in layers]
            shares = allot([c.notes["preference"][b] for c in layers], total, stored, min(self.floor, self.past))
            rest = (total - sum(shares)) // len(layers)  # 0 but where all fits: a short text grows into it
            for c, n in zip(layers, shares, strict=True):
                self._budgets(c)[rows] = [n + rest + self.window] * Hkv
        for c in layers:
            c.keep_best(c.column("indicator"), self._budgets(c), last=self.window)

    def _budgets(self, cache):
        """Return how many entries each row may hold, the window included: a list to write to."""
        return cache.notes.setdefault("budget", [self.budget] * cache.n_rows)

    def _prefix(self, cache):
        """Return which slots hold entries older than the window, bool (B, Hkv, N)."""
        return cache.between(0, self.window).expand(cache.B, cache.config.n_kv_heads, -1)
