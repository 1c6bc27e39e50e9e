"""Give low layers a large cache and high layers a small one, and choose entries as SnapKV does.

Paper: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069
Axis: layer, token
Idea: Low layers spread their attention over many tokens, high layers gather it on few. So the layers' budgets fall
    linearly from the first to the last, at an unchanged total. Inside a layer the attention of the prompt's last
    `window` queries decides which entries stay.
Stores: the storage's entries and the token number of each, int32; equally many for the KV heads of a layer.
Bytes: under `full`, after a prompt of T > budget tokens, layer l: held = S * Hkv * (2 * D * itemsize + 4) with
    S = B_l + max(16, B_l // 16) slots, where the B_l are `budgets(n_layers, T)`, which average to `budget`. Every
    further token takes one slot more per layer.
Acts: once per layer, when the last token of a prompt is in; the first generated token sees the exact prompt. Then at
    most B_l entries per KV head live in layer l, the window among them; B_l <= 2 * budget. Each generated token adds
    one, until the next prompt ends. A prompt of at most `budget` tokens is kept whole.
Differs: mode "exact" rounds the budgets so that their sum is n_layers * budget, and leaves every layer at least one
    entry beyond the window if the budget does. "reference" rounds the step down, as the authors do, which exceeds
    the sum, and is uniform for prompts shorter than twice the part of the budget beyond the window. "kvpress" counts
    the window inside the slope, and is uniform if the last layer would get less than the window. A single layer gets
    the budget. Selection is per KV head, with the group reduced before pooling. On a later prompt, T counts all tokens
    read so far.
"""

from nanokv.attention import window_scores
from nanokv.cache import Plan


class PyramidKV(Plan):
    """Cut a prompt to budget entries per KV head and layer on average. beta: the first layer gets about 2 * beta - 1
    times as many entries beyond the window as the last; mode: exact, reference or kvpress; the rest as in SnapKV.
    """

    def __init__(self, budget: int = 512, beta: int = 20, window: int = 32, kernel: int = 7, pooling: str = "max",
                 reduce: str = "mean", mode: str = "exact"):  # fmt: skip
        for name, value, ok, what in (
            ("budget", budget, budget >= 1, "at least 1"),
            ("beta", beta, beta >= 1 and beta == int(beta), "a whole number of at least 1"),
            ("window", window, window >= 1, "at least 1"),
            ("kernel", kernel, kernel >= 1 and kernel % 2, "odd and at least 1"),
            ("pooling", pooling, pooling in ("max", "avg"), "max or avg"),
            ("reduce", reduce, reduce in ("mean", "max", "sum"), "mean, max or sum"),
            ("mode", mode, mode in ("exact", "reference", "kvpress"), "exact, reference or kvpress"),
        ):
            if not ok:
                raise ValueError(f"pyramidkv: {name} must be {what}, got {value}")
        self.budget, self.beta, self.window = budget, int(beta), min(window, budget)
        self.kernel, self.pooling, self.reduce, self.mode = kernel, pooling, reduce, mode
        self.observes = self.window

    def most(self, prompt, new):
        return min(prompt, self.budget if self.mode == "exact" else 2 * self.budget) + new

    def __call__(self, cache, q, pos):
        read = cache.parent.next_position + q.shape[2]  # not n_live, which differs from layer to layer
        if cache.phase != "last" or cache.n_live <= self.window:
            return
        totals = [read - pad for pad in cache.parent.pads or [0] * cache.B]
        budgets = [self.budgets(cache.config.n_layers, total)[cache.layer] for total in totals]
        if cache.n_live > min(budgets):
            score = window_scores(cache, self.window, self.kernel, self.pooling, self.reduce)
            cache.keep_best(score, budgets, last=self.window)

    def budgets(self, n_layers: int, total: int) -> list[int]:
        """Return the entries that each layer keeps of a prompt of `total` tokens, the window included."""
        if n_layers == 1 or total <= self.budget:
            return [self.budget] * n_layers
        past = getattr(self, "_" + self.mode)(self.budget - self.window, total - self.window, n_layers)
        return [n + self.window for n in past]

    def _exact(self, b, n, L):
        """b entries on average out of n, in integers: ends are scaled by beta, so that no rounding comes in."""
        low = min(b * self.beta, max(b, self.beta))  # b / beta, but an entry at least if b is not 0
        high = 2 * b * self.beta - low
        if high >= n * self.beta:
            high = n * self.beta
            low = 2 * b * self.beta - high
        past = [(high * (L - 1) - i * (high - low)) // (self.beta * (L - 1)) for i in range(L)]
        missing = L * b - sum(past)  # fewer than there are layers below n
        for i in range(L):
            if missing and past[i] < n:
                past[i], missing = past[i] + 1, missing - 1
        return past

    def _reference(self, b, n, L):
        low = b // self.beta
        high = 2 * b - low
        if high >= n:
            high, low = n, 2 * b - n
        step = (high - low) // (L - 1)
        return [b if n + self.window < 2 * b else high - i * step for i in range(L)]

    def _kvpress(self, b, n, L):
        low = self.budget / self.beta
        high = 2 * self.budget - low
        if high >= n:
            high, low = n, 2 * self.budget - n
        if not n + self.window >= high >= low >= self.window:
            return [b] * L
        return [round(high - i * (high - low) / (L - 1)) - self.window for i in range(L)]
