"""Give low layers a large cache and high layers a small one.

Paper: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069
Axis: layer, token
Idea: Low layers spread their attention over many tokens, high layers gather it on few. So the layers' budgets fall
    linearly from the first to the last, at an unchanged total. Which entries stay in a layer is the policy's choice.
Stores: what the policy stores; with snapkv equally many entries for the KV heads of a layer.
Bytes: those of the policy, whose budget becomes the average over layers. With snapkv under `full`, after a prompt of
    T > budget tokens, layer l: held = S * Hkv * (2 * D * itemsize + 4) with S = B_l + max(16, B_l // 16) slots, where
    the B_l are `budgets`, which average to `budget`. Every further token takes one slot more per layer.
Acts: when the policy cuts a prompt, with snapkv once its last token is in, so that the first generated token sees the
    exact prompt. Then at most B_l entries per KV head live in layer l, those that the policy protects among them;
    B_l <= 2 * budget. Each generated token adds one, until the next prompt ends; a policy that goes on forgetting keeps
    each layer at its B_l. A prompt of at most `budget` tokens is kept whole.
Differs: works with any policy that scores entries; snapkv with the authors' window of 8 is taken where none is written.
    Budgets are rounded so that their sum is n_layers * budget, and every layer gets at least one entry beyond the
    protected ones if the budget does; the authors round the step down, which exceeds the sum (by 1.4 % in 30 layers
    of 480), and are uniform for prompts shorter than twice the part of the budget beyond the window. A single layer
    gets the budget. On a later prompt, T counts all tokens read so far.
"""

from dataclasses import dataclass

from nanokv.method import Plan, at_least


@dataclass
class PyramidKV(Plan):
    """Budgets that fall with depth. beta: where layers get b entries beyond the protected ones on average, the last
    gets b / beta.
    """

    beta: int = 20
    brings = ("snapkv", {"window": 8})
    limits = {"beta": at_least(1)}

    def shares(self, cache, score, policy):
        L, fixed, out = cache.config.n_layers, sum(policy.protects), []
        for total in cache.next_position:  # not n_live, which differs from layer to layer
            n = self.budgets(L, total, policy.budget, fixed)[cache.layer]
            out += [n] * cache.config.n_kv_heads
        return out

    def budgets(self, n_layers: int, total: int, budget: int, fixed: int) -> list[int]:
        """Return the entries that each layer keeps of a text of `total` tokens, `fixed` of which stay in any case."""
        b, n, last = budget - fixed, total - fixed, n_layers - 1
        if not last or total <= budget or b <= 0:
            return [budget] * n_layers
        # b entries on average out of n, in integers: ends are scaled by beta, so that no rounding comes in
        low = min(b * self.beta, max(b, self.beta))  # b / beta, but an entry at least
        high = 2 * b * self.beta - low
        if high >= n * self.beta:
            high = n * self.beta
            low = 2 * b * self.beta - high
        out = [(high * last - i * (high - low)) // (self.beta * last) for i in range(n_layers)]
        missing = n_layers * b - sum(out)  # fewer than there are layers below n
        for i in range(n_layers):
            if missing and out[i] < n:
                out[i] += 1
                missing -= 1
        return [m + fixed for m in out]
