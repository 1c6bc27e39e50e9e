"""The kept sets of kvpress 0.5.5, on the same weights and text: one set per layer and KV head.

kvpress asks for a ratio to remove and keeps int(T * (1 - ratio)) entries, at least one; the budget given here is that
number. It sorts by score and not by position, so sets are compared. Left out, as kvpress leaves it to torch.topk, which
promises nothing about equal scores: budgets below the window or the sinks, and max-pooling, which it has not. A peak of
attention gives average-pooled neighbours scores that differ by less than fp32 can tell; there, and only there, the two
may choose differently.
"""

import itertools
from types import SimpleNamespace

import pytest
import tiny
import torch
from windowed import Spy, kept

from nanokv import KVCache
from nanokv.methods.adakv import AdaKV
from nanokv.methods.h2o import H2O
from nanokv.methods.pyramidkv import PyramidKV
from nanokv.methods.snapkv import SnapKV
from nanokv.methods.streamingllm import StreamingLLM

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
    hf.load_state_dict(m.slots())
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


def compare(m, method, press, text):
    """Assert that `method`, which scores by a window, keeps what `press` keeps; return the sets."""
    spy, cache = Spy(method.window, method.kernel, "avg"), KVCache(m, [method])
    tiny.feed(m, KVCache(m, [spy]), text)
    tiny.feed(m, cache, text)
    mine, theirs = kept(cache), pressed(m, press, text)
    for i in range(m.config.n_layers):
        heads = range(m.config.n_kv_heads)
        assert sum(len(mine[i, h]) for h in heads) == sum(len(theirs[i, h]) for h in heads)
        tied = [spy.heads[i][0, h][0][t] for h in heads for t in mine[i, h] ^ theirs[i, h]]
        # a logit of up to 10 carries an error of 1e-6 in fp32, so a probability one of 1e-6 of its size, or a few
        assert not tied or max(tied) < min(tied) * (1 + 1e-5)
    return mine


def budget(T, ratio):
    return max(1, int(T * (1 - ratio)))


@SHAPES
@CASES
def test_snapkv(G, T, ratio):
    m, text = tiny.model(G=G), tiny.ids(T)
    press = kvpress.SnapKVPress(compression_ratio=ratio, window_size=16, kernel_size=5)
    mine = SnapKV(budget=budget(T, ratio), window=16, kernel=5, pooling="avg")
    compare(m, mine, press, text)


@SHAPES
@CASES
def test_streamingllm(G, T, ratio):
    m, text = tiny.model(G=G), tiny.ids(T)
    press = kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=4)
    cache = KVCache(m, [StreamingLLM(budget=budget(T, ratio), reindex=False)])
    tiny.feed(m, cache, text)
    assert kept(cache) == pressed(m, press, text)


@SHAPES
@CASES
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
def test_adakv(G, T, ratio, alpha):
    m, text = tiny.model(G=G), tiny.ids(T)
    press = kvpress.AdaKVPress(
        kvpress.SnapKVPress(compression_ratio=ratio, window_size=16, kernel_size=5), alpha_safeguard=alpha
    )
    mine = AdaKV(budget=budget(T, ratio), window=16, alpha=alpha, kernel=5, pooling="avg", variant="kvpress")
    got = compare(m, mine, press, text)
    assert any(len(got[i, 0]) != len(got[i, 1]) for i in (0, 1)) or alpha == 0.7


@SHAPES
@pytest.mark.parametrize("T, ratio, beta", [(60, 0.5, 2), (128, 0.25, 20), (128, 0.75, 2), (400, 0.75, 5)])
def test_pyramidkv(G, T, ratio, beta):
    m, text = tiny.model(G=G, n_layers=4), tiny.ids(T)
    press = kvpress.PyramidKVPress(compression_ratio=ratio, window_size=10, kernel_size=5, beta=beta)
    b = budget(T, ratio)  # exact in these cases: kvpress computes with T * (1 - ratio) as it is
    mine = PyramidKV(budget=b, beta=beta, window=10, kernel=5, pooling="avg", mode="kvpress")
    compare(m, mine, press, text)


@pytest.mark.parametrize("window", [1, 16, 64])
def test_the_budgets_of_pyramidkv(window):
    for T, r, beta, L in itertools.product((64, 100, 516, 4096), (0.25, 0.5, 0.75), (1, 3, 20), (2, 5, 32)):
        press = kvpress.PyramidKVPress(compression_ratio=r, window_size=window, beta=beta)
        layer = [SimpleNamespace(layer_idx=i, config=SimpleNamespace(num_hidden_layers=L)) for i in range(L)]
        mine = PyramidKV(budget=budget(T, r), beta=beta, window=window, mode="kvpress")
        if mine.budget > window:
            assert mine.budgets(L, T) == [press.get_layer_budget(x, T) for x in layer]


@SHAPES
@CASES
def test_h2o_without_recent_entries_is_observed_attention(G, T, ratio):
    m, text = tiny.model(G=G), tiny.ids(T)
    press = kvpress.ObservedAttentionPress(compression_ratio=ratio)
    mine = H2O(budget=budget(T, ratio), recent=0, normalize=True, n_sink=0)
    cache = KVCache(m, [mine])
    tiny.feed(m, cache, text)
    assert kept(cache) == pressed(m, press, text, "eager")
