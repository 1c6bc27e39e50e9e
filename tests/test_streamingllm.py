"""StreamingLLM: which tokens stay, where they stand, and that text may go on for ever."""

import pytest
import tiny
import torch

from nanokv import KVCache, generate
from nanokv.attention import Mask, reference
from nanokv.cache import Policy, Storage
from nanokv.methods.full import Full
from nanokv.methods.streamingllm import StreamingLLM
from nanokv.model import RoPE


def test_the_kept_set_and_positions_of_a_small_example():
    m = tiny.model(n_layers=1)
    cache = KVCache(m, "streamingllm(budget=5,n_sink=2)")
    with cache.prompt(8):
        for i in range(8):
            m(tiny.ids(1, seed=i), cache)
    assert cache.live_positions(0, 0).tolist() == [0, 1, 5, 6, 7]
    c = cache.layers[0]
    assert c.pos[c.live].tolist() == [0, 1, 2, 3, 4]
    seen = []
    attend = c.attend
    c.attend = lambda q, pos: (seen.append((pos.tolist(), c.n_live)), attend(q, pos))[1]
    m(tiny.ids(1, seed=8), cache)
    assert seen == [([[4]], 5)]  # the query stands at position 4 and attends to 5 entries, itself included
    assert cache.live_positions(0, 1).tolist() == [0, 1, 6, 7, 8]


def _oracle(m, text, budget, n_sink):
    """Run sinks and window by recomputing, per step, attention over un-rotated keys at their cache positions."""
    c = m.config
    store = [([], []) for _ in m.layers]
    logits = []
    for t in range(text.shape[1]):
        x = m.embed(text[:, t : t + 1])
        for block, (ks, vs) in zip(m.layers, store, strict=True):
            h = block.attn_norm(x)
            q, k, v = (
                y.view(1, 1, -1, c.head_dim).transpose(1, 2) for y in block.attn.qkv(h).split(block.attn.widths, -1)
            )
            ks.append(k), vs.append(v)
            if len(ks) > budget:
                del ks[n_sink], vs[n_sink]
            K, V = torch.cat(ks, 2), torch.cat(vs, 2)
            pos = torch.arange(len(ks))[None]
            K = m.rope(K, pos).repeat_interleave(c.group, 1)
            s = m.rope(q, pos[:, -1:]) @ K.transpose(2, 3) / c.head_dim**0.5
            o = s.softmax(-1) @ V.repeat_interleave(c.group, 1)
            x = x + block.attn.o(o.transpose(1, 2).reshape(1, 1, -1))
            x = x + block.ffn(block.ffn_norm(x))
        logits.append(m.head(m.norm(x)))
    return torch.cat(logits, 1)


def test_token_by_token_equals_the_paper():
    m = tiny.model(G=2)
    text = tiny.ids(150)
    cache = KVCache(m, "streamingllm(budget=24,n_sink=4)")
    got = tiny.steps(m, cache, text)
    assert tiny.rms(got, _oracle(m, text, 24, 4)) < 1e-5  # fp32, other order of sums
    assert cache.live_positions(1, 0).tolist() == [0, 1, 2, 3, *range(130, 150)]


@pytest.mark.parametrize("reindex", [True, False])
def test_a_budget_that_is_never_reached_changes_nothing(reindex):
    m = tiny.model()
    text = tiny.ids(120)
    full, cache = KVCache(m), KVCache(m, f"streamingllm(budget=400,reindex={reindex})")
    a = torch.cat([tiny.feed(m, full, text[:, :90]), tiny.steps(m, full, text[:, 90:])], 1)
    b = torch.cat([tiny.feed(m, cache, text[:, :90]), tiny.steps(m, cache, text[:, 90:])], 1)
    assert tiny.rms(b, a) < 2e-6


def test_original_positions_read_the_prompt_exactly_and_mask_the_middle():
    m = tiny.model()
    text = tiny.ids(130)
    full, cache = KVCache(m), KVCache(m, "streamingllm(budget=40,reindex=False)")
    assert torch.equal(tiny.feed(m, full, text[:, :100]), tiny.feed(m, cache, text[:, :100]))
    c = cache.layers[0]
    assert cache.live_positions(0, 0).tolist() == [0, 1, 2, 3, *range(64, 100)]
    k, _ = full.layers[0].read()
    assert torch.equal(c.read()[0], k[:, :, c.token.flatten().long()])
    tiny.steps(m, cache, text[:, 100:])
    assert cache.live_positions(0, 0).tolist() == [0, 1, 2, 3, *range(94, 130)]


@pytest.mark.parametrize("spec", ["streamingllm(budget=40)", "streamingllm(budget=40,reindex=False)"])
def test_attend_equals_the_reference_with_hidden_slots(spec, monkeypatch):
    monkeypatch.setattr(Full, "slide", Storage.slide)
    m = tiny.model()
    cache = KVCache(m, spec)
    tiny.feed(m, cache, tiny.ids(100), chunk=9)
    tiny.steps(m, cache, tiny.ids(7))
    c = cache.layers[1]
    assert c.size > c.n_live  # forgotten, not yet reclaimed
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[10**6]])
    k, v = c.read()
    assert tiny.rms(c.attend(q, pos), reference(q, k, v, c.mask(pos))) < 1e-6
    live = c.live.flatten()
    plain = reference(q, k[:, :, live], v[:, :, live], type(c.mask(pos))(T=1, N=int(live.sum())))
    assert tiny.rms(c.attend(q, pos), plain) < 1e-6


def test_never_more_than_the_budget_and_bytes_stay_flat():
    m = tiny.model(context=128)  # the text runs far past the context
    cache = KVCache(m, "streamingllm(budget=64)")
    held = set()
    for i, _ in enumerate(generate(m, cache, tiny.ids(500)[0], 1000)):
        assert all(c.n_live <= 64 for c in cache.layers)
        if i:
            held.add(cache.nbytes)
    S, rows, layers, D = 64 + 16, 2, 2, 32
    assert held == {layers * rows * S * (2 * D * 4 + 4)}
    assert cache.next_position == 1499


def test_moving_all_positions_changes_nothing_without_sinks():
    m = tiny.model(n_layers=1)
    rope = RoPE(m.config)
    q, k = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 20, 32)
    near = rope(q, torch.tensor([[19]])) @ rope(k, torch.arange(20)[None]).mT
    far = rope(q, torch.tensor([[319]])) @ rope(k, torch.arange(300, 320)[None]).mT
    assert tiny.rms(far, near) < 1e-4  # angles of 320 rad carry 2^-15 in fp32


def test_the_prompt_is_read_in_parts_of_a_quarter_window():
    assert StreamingLLM(budget=1024).chunk == 255
    assert StreamingLLM(budget=1024, reindex=False).chunk is None
    assert StreamingLLM(budget=5).chunk == 1


@pytest.mark.parametrize("bad", [{"budget": 0}, {"budget": 4}, {"budget": -1}, {"n_sink": -1}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        StreamingLLM(**bad)


def test_rows_of_unequal_length_are_renumbered_each_for_itself():
    class Halve(Policy):
        name = "halve"

        def __call__(self, cache, q, pos):
            if cache.phase == "last":
                heads = torch.arange(2).view(1, 2, 1)
                cache.keep((heads == 1) | (cache.rank % 2 == 0))

    m = tiny.model(n_layers=1)
    cache = KVCache(m, [StreamingLLM(budget=400), Halve()])
    tiny.feed(m, cache, tiny.ids(60))
    seen, c = [], cache.layers[0]
    attend = c.attend
    c.attend = lambda q, pos: (seen.append((q, pos)), attend(q, pos))[1]
    tiny.steps(m, cache, tiny.ids(1))
    q, pos = seen[0]
    assert pos.tolist() == [[[30], [60]]]
    k, v = c.read()
    out = attend(q, pos)
    for h, n in ((0, 31), (1, 61)):
        one = reference(q[:, 3 * h : 3 * h + 3], k[:, h : h + 1, :n], v[:, h : h + 1, :n], Mask(1, n))
        assert (
            tiny.rms(out[:, 3 * h : 3 * h + 3], one) < 5e-6
        )  # logits up to 10, each with an error of some 2^-24 of that


def test_a_cache_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="budget must be at most the model's context, 512"):
        KVCache(tiny.model(), "streamingllm(budget=513)")
    KVCache(tiny.model(), "streamingllm(budget=513,reindex=False)")


def test_positions_past_the_context_have_their_angles():
    m = tiny.model(context=32)
    cache = KVCache(m, [StreamingLLM(budget=32), Policy()])
    tiny.feed(m, cache, tiny.ids(200), 7)
    assert tiny.steps(m, cache, tiny.ids(50)).isfinite().all()


SLIDING = ["(budget=40)", "(budget=40,n_sink=0)", "(budget=40,reindex=False)", "(budget=40)+h2o(budget=60)"]


@pytest.mark.parametrize("spec", SLIDING)
def test_sliding_a_run_out_forgets_what_a_mask_would_and_holds_no_hole(spec, monkeypatch):
    m, slid, out = tiny.model(), [], []
    text = tiny.ids(300)
    for slides in (True, False):
        if not slides:
            monkeypatch.setattr(Full, "slide", Storage.slide)
        cache = KVCache(m, "streamingllm" + spec)
        out.append(torch.cat([tiny.feed(m, cache, text[:, :100], chunk=9), tiny.steps(m, cache, text[:, 100:])], 1))
        slid.append([c.size - c.n_live for c in cache.layers])
        assert cache.live_positions(1, 1).tolist()[-36:] == list(range(264, 300))
    assert max(slid[0]) == 0 < max(slid[1])
    assert tiny.rms(*out) < 1e-5


@pytest.mark.parametrize("chunk", [None, 10, 33])
def test_without_reindexing_the_prompt_is_read_exactly_in_parts_too(chunk):
    m, text = tiny.model(), tiny.ids(100)
    cache = KVCache(m, "streamingllm(budget=30,reindex=False)")
    assert tiny.rms(tiny.feed(m, cache, text, chunk), tiny.feed(m, KVCache(m), text)) < 1e-5
    assert cache.live_positions(0, 0).tolist() == [0, 1, 2, 3, *range(74, 100)]
