"""Share one layer's budget out among its KV heads by their scores: heads with flat attention get more.

Paper: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv 2407.11550
Axis: head, token
Idea: A head that looks at few entries needs few. Put the scores of all KV heads of a layer into one list and count how
    many of the list's best are each head's: that loses the least attention mass that a layer's budget allows. Each head
    gets the mean of this and of an even share, with weights 1 - alpha and alpha, in case the scores mislead.
Stores: what the policy stores, for every KV head as many entries as it was given.
Bytes: those of the policy, whose budget becomes the average over the KV heads of a layer. With snapkv under `full`,
    after a prompt of T > budget tokens, per layer: held = sum over KV heads h of
    (S_h + max(16, S_h // 16)) * (2 * D * itemsize + 4), where the S_h average to `budget`. Every further token takes
    one slot more per KV head.
Acts: when the policy cuts a prompt, with snapkv once its last token is in, so that the first generated token sees the
    exact prompt. A KV head keeps what the policy protects, with snapkv the window, and at least
    floor(alpha * b) of the b entries that an even share would leave it besides; heads average to `budget`.
    A policy that goes on forgetting keeps each head at its number.
Differs: works with any policy that scores entries; snapkv, the paper's, is taken where none is written. The authors
    round each head's share for itself, so that a layer may get a few entries more or less than its budget; here the
    largest remainders are rounded up and the sum is exact. Scores are per KV head, with the query group reduced before
    pooling. Equal scores: the older entry, then the lower head, counts. Their option `normalize` is left out.
"""

from dataclasses import dataclass

from nanokv.attention import top
from nanokv.method import Plan


@dataclass
class AdaKV(Plan):
    """Share a layer's budget out among its KV heads. alpha: the weight of an even share."""

    alpha: float = 0.2
    brings = ("snapkv", {})
    limits = {"alpha": (lambda x: 0 <= x <= 1, "from 0 to 1")}

    def shares(self, cache, score, policy):
        first, last = policy.protects
        Hkv = cache.config.n_kv_heads
        total = (policy.budget - first - last) * Hkv
        among = cache.between(first, last).expand(cache.B, Hkv, -1)
        free = of_each_head(score.expand(among.shape), total, among)
        # the free part less an entry's place in its head falls by 1 from entry to entry: the `total` highest are the
        # shares, largest remainders rounded up; the even part, the same for all heads, makes no difference to that
        share = of_each_head((1 - self.alpha) * free.double() - among.cumsum(-1), total, among)
        left = (total - share.sum(1, keepdim=True)).clamp(min=0) // Hkv  # a short text grows into it
        return (share + left + first + last).flatten().tolist()


def of_each_head(score, n, among):
    """Return how many of the n best candidates of all heads together each head has, (B, Hkv, 1)."""
    in_a_row = [t.transpose(1, 2).flatten(1)[:, None] for t in (score, among)]  # (B, 1, N * Hkv), older slots first
    best = top(in_a_row[0], n, in_a_row[1])
    return best.unflatten(-1, (-1, score.shape[1]))[:, 0].sum(1).unsqueeze(-1)
