"""The kept sets of kvpress 0.5.5, on the same weights and text: one set per layer and KV head.

kvpress asks for a ratio to remove and keeps int(T * (1 - ratio)) entries, at least one; the budget given here is that
number. It sorts by score and not by position, so sets are compared. Left out, as kvpress leaves it to torch.topk, which
promises nothing about equal scores: budgets below the window or the sinks, and max-pooling, which it has not. A peak of
attention gives average-pooled neighbours scores that differ by less than fp32 can tell; there, and only there, the two
may choose differently. Where its rule is not the authors', a twin below has it. knorm, keydiff, tova and
expected_attention are compared with it in their own tests.
"""

import itertools
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_pyramidkv import kvpress as its_budgets

from nanokv import KVCache
from nanokv.attention import top
from nanokv.methods.adakv import AdaKV, of_each_head
from nanokv.methods.h2o import H2O
from nanokv.methods.pyramidkv import PyramidKV
from nanokv.methods.snapkv import SnapKV
from nanokv.methods.streamingllm import StreamingLLM
from weights import checkpoint_name

kvpress = pytest.importorskip("kvpress")
transformers = pytest.importorskip("transformers")

SHAPES = pytest.mark.parametrize("G", [1, 3, 4])
CASES = pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.3), (131, 0.8), (400, 0.9)])


def twin(m, attention="sdpa"):
    """Return transformers' model with the weights of ours."""
    c = m.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.eps,
        max_position_embeddings=c.context, tie_word_embeddings=False, attn_implementation=attention,
        rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"},
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    hf.load_state_dict({checkpoint_name(name): t for name, t in m.state_dict().items()})
    return hf


@torch.no_grad()
def pressed(m, press, text, attention="sdpa"):
    """Return the tokens that kvpress keeps, {(layer, kv head): set}."""
    hf = twin(m, attention)
    full, cut = transformers.DynamicCache(), transformers.DynamicCache()
    want = hf(text, past_key_values=full).logits
    assert tiny.rms(m(text, KVCache(m)), want) < 1e-4  # the two models are one: fp32, other kernels
    with press(hf):
        hf(text, past_key_values=cut)
    out = {}
    for i, layer in enumerate(hf.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        for h in range(m.config.n_kv_heads):
            k, whole = cut.layers[i].keys[0, h], full.layers[i].keys[0, h]
            same = (k[:, None] == whole[None]).all(-1)  # (kept, T): each kept key is one of all keys, bit for bit
            assert (same.sum(1) == 1).all()
            out[i, h] = set(same.int().argmax(1).tolist())
            if masked is not None:  # Ada-KV keeps all keys and hides some from attention
                out[i, h] -= set(masked[2][masked[1] == h].tolist())
    return out


def kept(cache):
    """Return the tokens that a cache holds, {(layer, kv head): set}."""
    c = cache.config
    return {(i, h): set(cache.live_positions(i, h).tolist()) for i in range(c.n_layers) for h in range(c.n_kv_heads)}


def compare(m, policy, press, text, plan=(), attention="sdpa"):
    """Assert that a policy, under a plan, keeps what `press` keeps, but for scores that are equal; return the sets."""
    scores, score = {}, policy.score

    def tell(cache, q, pos):
        scores[cache.layer] = score(cache, q, pos).expand(1, m.config.n_kv_heads, -1)
        return scores[cache.layer]

    policy.score = tell
    cache = KVCache(m, [policy, *plan])
    tiny.feed(m, cache, text)
    mine, theirs = kept(cache), pressed(m, press, text, attention)
    for i in range(m.config.n_layers):
        heads = range(m.config.n_kv_heads)
        assert sum(len(mine[i, h]) for h in heads) == sum(len(theirs[i, h]) for h in heads)
        tied = [float(scores[i][0, h, t]) for h in heads for t in mine[i, h] ^ theirs[i, h]]
        # a logit of up to 10 carries an error of 1e-6 in fp32, so a probability one of 1e-6 of its size, or a few
        assert not tied or max(tied) - min(tied) < 1e-5 * max(map(abs, tied))
    return mine


# Rules of kvpress that are not the authors'


class Guard(AdaKV):
    """Each head's best alpha * budget entries, window and all, are safe; the rest goes to the best of all heads'."""

    def shares(self, cache, score, policy):
        b, window, Hkv = policy.budget, policy.n_recent, cache.config.n_kv_heads
        old = cache.between(0, window).expand_as(score)
        safe = top(score, max(0, int(self.alpha * b) - window), old)
        n = safe.sum(-1, keepdim=True)  # (B, Hkv, 1)
        others = of_each_head(score, (b - window) * Hkv - n.sum(1, keepdim=True), old & ~safe)
        return (window + n + others).flatten().tolist()


class Slope(PyramidKV):
    """The window is part of the slope."""

    def budgets(self, n_layers, total, budget, fixed):
        return its_budgets(n_layers, total, budget, self.beta, fixed)


class Observed(H2O):
    """The sums are divided by the number of queries that could see the entry."""

    def score(self, cache, q, pos):
        return super().score(cache, q, pos) / (max(cache.next_position) - cache.token)


def budget(T, ratio):
    return max(1, int(T * (1 - ratio)))


def averages(budget, window):
    return SnapKV(budget, window, kernel=5, pooling="avg")


@SHAPES
@CASES
def test_snapkv(G, T, ratio):
    press = kvpress.SnapKVPress(ratio, window_size=16, kernel_size=5)
    compare(tiny.model(G=G), averages(budget(T, ratio), 16), press, tiny.ids(T))


@SHAPES
@CASES
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
def test_adakv(G, T, ratio, alpha):
    m = tiny.model(G=G)
    snap = kvpress.SnapKVPress(ratio, window_size=16, kernel_size=5)
    press = kvpress.AdaKVPress(snap, alpha_safeguard=alpha)
    mine = compare(m, averages(budget(T, ratio), 16), press, tiny.ids(T), [Guard(alpha)])
    assert any(len(mine[i, 0]) != len(mine[i, 1]) for i in (0, 1)) or alpha == 0.7


@SHAPES
@pytest.mark.parametrize("T, ratio, beta", [(60, 0.5, 2), (128, 0.25, 20), (128, 0.75, 2), (400, 0.75, 5)])
def test_pyramidkv(G, T, ratio, beta):
    m = tiny.model(G=G, n_layers=4)
    press = kvpress.PyramidKVPress(ratio, window_size=10, kernel_size=5, beta=beta)
    # the budget is exact in these cases: kvpress computes with T * (1 - ratio) as it is
    compare(m, averages(budget(T, ratio), 10), press, tiny.ids(T), [Slope(beta)])


@pytest.mark.parametrize("window", [1, 16, 64])
def test_the_budgets_of_pyramidkv(window):
    for T, r, beta, L in itertools.product((64, 100, 516, 4096), (0.25, 0.5, 0.75), (1, 3, 20), (2, 5, 32)):
        press = kvpress.PyramidKVPress(r, window_size=window, beta=beta)
        layer = [SimpleNamespace(layer_idx=i, config=SimpleNamespace(num_hidden_layers=L)) for i in range(L)]
        b = budget(T, r)
        if b > window:
            assert its_budgets(L, T, b, beta, window) == [press.get_layer_budget(x, T) for x in layer]


@SHAPES
@CASES
def test_streamingllm(G, T, ratio):
    m, text = tiny.model(G=G), tiny.ids(T)
    cache = KVCache(m, [StreamingLLM(budget(T, ratio), reindex=False)])
    tiny.feed(m, cache, text)
    assert kept(cache) == pressed(m, kvpress.StreamingLLMPress(ratio, n_sink=4), text)


@SHAPES
@CASES
def test_h2o_without_recent_entries_is_observed_attention(G, T, ratio):
    policy, press = Observed(budget(T, ratio), recent=0.0), kvpress.ObservedAttentionPress(ratio)
    compare(tiny.model(G=G), policy, press, tiny.ids(T), attention="eager")
