"""StreamingLLM: which tokens stay, where they stand, and that text may go on for ever."""

import pytest
import tiny
import torch
from windowed import held, kept, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.attention import reference
from nanokv.method import Dense, Policy, Storage
from nanokv.methods.streamingllm import StreamingLLM
from nanokv.model import RoPE


def watch(layer):
    """Return the list of (queries, positions, live entries) of what this layer attends to from now on."""
    seen, attend = [], layer.attend
    layer.attend = lambda q, pos: (seen.append((q, pos, layer.n_live)), attend(q, pos))[1]
    return seen


def test_the_kept_set_and_positions_of_a_small_example():
    m = tiny.model(n_layers=1)
    cache = run(m, "streamingllm(budget=5,n_sink=2)", tiny.ids(8), chunk=1)
    assert set(map(frozenset, kept(cache).values())) == {frozenset({0, 1, 5, 6, 7})}
    c = cache.layers[0]
    assert c.pos.flatten().tolist() == [0, 1, 2, 3, 4]
    seen = watch(c)
    m(tiny.ids(1, seed=8), cache)
    _, pos, n = seen[0]
    assert pos.tolist() == [[4]] and n == 5  # the query stands at position 4 and attends to 5 entries, itself included
    assert set(map(frozenset, kept(cache).values())) == {frozenset({0, 1, 6, 7, 8})}


def _oracle(m, text, budget, n_sink):
    """Run sinks and window by recomputing, per step, attention over un-rotated keys at their cache positions."""
    c = m.config
    store = [([], []) for _ in m.layers]
    logits = []
    for t in range(text.shape[1]):
        x = m.embed_tokens(text[:, t : t + 1])
        for block, (ks, vs) in zip(m.layers, store, strict=True):
            attn, y = block.self_attn, block.input_layernorm(x)
            q, k, v = (p(y).view(1, 1, -1, c.head_dim).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            ks.append(k)
            vs.append(v)
            if len(ks) > budget:
                del ks[n_sink], vs[n_sink]
            K, V = torch.cat(ks, 2), torch.cat(vs, 2)
            pos = torch.arange(len(ks))[None]
            o = reference(m.rope(q, pos[:, -1:]), m.rope(K, pos), V, None)
            x = x + attn.o_proj(o.transpose(1, 2).reshape(1, 1, -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(m.lm_head(m.norm(x)))
    return torch.cat(logits, 1)


# Turns red when room is made in steps only, so that a prompt's tokens see more than the window.
@pytest.mark.parametrize("prompt", [0, 100, 150])
def test_mutation_token_by_token_equals_the_paper(prompt):
    m, text, got = tiny.model(G=2), tiny.ids(150), []
    cache = KVCache(m, "streamingllm(budget=24,n_sink=4)")
    if prompt:
        got.append(tiny.feed(m, cache, text[:, :prompt], 1))
    if prompt < 150:
        got.append(tiny.steps(m, cache, text[:, prompt:]))
    assert tiny.rms(torch.cat(got, 1), _oracle(m, text, 24, 4)) < 1e-5  # fp32, other order of sums
    assert set(map(frozenset, kept(cache).values())) == {frozenset({0, 1, 2, 3, *range(130, 150)})}


def test_a_budget_that_is_never_reached_changes_nothing():
    m, text, out = tiny.model(), tiny.ids(120), []
    for cache in (KVCache(m), KVCache(m, "streamingllm(budget=400)")):
        out.append(torch.cat([tiny.feed(m, cache, text[:, :90], 90), tiny.steps(m, cache, text[:, 90:])], 1))
    assert tiny.rms(*out) < 2e-6  # fp32; keys are rotated after they were stored
    within_budget_is_full(m, "streamingllm(budget=120,reindex=False)", 90, 30)


@pytest.mark.parametrize("chunk", [None, 10, 33])
def test_original_positions_read_the_prompt_exactly_and_mask_the_middle(chunk):
    m, text = tiny.model(), tiny.ids(130)
    full, cache = KVCache(m), KVCache(m, "streamingllm(budget=40,reindex=False)")
    assert torch.equal(tiny.feed(m, cache, text[:, :100], chunk), tiny.feed(m, full, text[:, :100], chunk))
    c = cache.layers[0]
    assert set(map(frozenset, kept(cache).values())) == {frozenset({0, 1, 2, 3, *range(64, 100)})}
    assert torch.equal(c.read()[0], full.layers[0].read()[0][:, :, [0, 1, 2, 3, *range(64, 100)]])
    seen = watch(c)
    tiny.steps(m, cache, text[:, 100:])
    assert [(pos.tolist(), n) for _, pos, n in seen] == [([[t]], 40) for t in range(100, 130)]
    assert set(map(frozenset, kept(cache).values())) == {frozenset({0, 1, 2, 3, *range(94, 130)})}


def test_never_more_than_the_budget_and_bytes_stay_flat():
    m, bytes_held = tiny.model(context=128), set()  # the text runs far past the context
    cache = KVCache(m, "streamingllm(budget=64)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(500)[0], 1000)):
        assert all(c.n_live <= 64 for c in cache.layers)
        if i:
            bytes_held.add(held(cache))
    assert bytes_held == {2 * 2 * (64 + 16) * (2 * 32 * 4 + 4)}  # layers, KV heads, slots
    assert cache.next_position == [1499]


def test_moving_all_positions_changes_nothing_without_sinks():
    rope = RoPE(tiny.model(n_layers=1).config)
    rope.reserve(320)
    q, k = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 20, 32)
    near = rope(q, torch.tensor([[19]])) @ rope(k, torch.arange(20)[None]).mT
    far = rope(q, torch.tensor([[319]])) @ rope(k, torch.arange(300, 320)[None]).mT
    assert tiny.rms(far, near) < 1e-4  # angles of 320 rad carry 2^-15 in fp32


def test_the_prompt_is_read_in_parts_of_a_quarter_window():
    assert StreamingLLM(budget=1024).chunk == 255
    assert StreamingLLM(budget=1024, reindex=False).chunk is None
    assert StreamingLLM(budget=5).chunk == 1
    m, text, parts = tiny.model(), tiny.ids(100)[0].tolist(), []
    cache = KVCache(m, "streamingllm(budget=44)")
    m(tiny.ids(1), cache)
    seen = watch(cache.layers[0])
    list(generate(m, cache, text, 0, progress=parts.append))
    assert parts == [10] * 10
    assert [n for _, _, n in seen] == [11, 21, 31, 41, *[44] * 6]  # the part's own tokens included
    with pytest.raises(ValueError, match="reads at most 10 tokens per pass, not 11"):
        m(tiny.ids(11), cache)


@pytest.mark.parametrize("reindex", [True, False])
def test_a_step_of_several_tokens_leaves_no_more_than_the_budget(reindex):
    m, n = tiny.model(), 4 if reindex else 30
    cache = run(m, [StreamingLLM(budget=20, reindex=reindex)], tiny.ids(60))
    m(tiny.ids(n), cache, "decode")
    assert set(map(frozenset, kept(cache).values())) == {frozenset({0, 1, 2, 3, *range(44 + n, 60 + n)})}


@pytest.mark.parametrize("reindex", [True, False])
def test_it_says_how_many_tokens_come_before_it_forgets(reindex):
    m = tiny.model()
    cache = run(m, [StreamingLLM(budget=20, reindex=reindex)], tiny.ids(16))
    whole = {key: set(range(16)) for key in kept(cache)}
    for n in range(4):
        assert cache.ahead() == 4 - n and kept(cache) == {key: t | set(range(16 + n)) for key, t in whole.items()}
        tiny.steps(m, cache, tiny.ids(1))
    assert cache.ahead() == 0  # the next token's own step makes room before it looks back
    tiny.steps(m, cache, tiny.ids(1))
    assert cache.ahead() == 0 and all(4 not in t and len(t) == 20 for t in kept(cache).values())


@pytest.mark.parametrize("reindex", [True, False])
def test_a_paused_sequence_loses_nothing_and_stands_where_it_would(reindex):
    m, text, more = tiny.model(), tiny.ids(40, batch=2), tiny.ids(12, seed=5, batch=2)
    cache = run(m, [StreamingLLM(budget=20, reindex=reindex)], text)
    before = kept(cache, 1)
    tiny.steps(m, cache, torch.stack([more[0, :6], torch.full((6,), -1)]))
    assert kept(cache, 1) == before
    got = tiny.steps(m, cache, torch.stack([more[0, 6:], more[1, :6]]))
    for b, n in ((0, 12), (1, 6)):
        alone = run(m, [StreamingLLM(budget=20, reindex=reindex)], text[b : b + 1])
        want = tiny.steps(m, alone, more[b : b + 1, :n])[:, -6:]
        assert kept(cache, b) == kept(alone) and tiny.rms(got[b], want[0]) < 1e-5


def test_rows_of_unequal_length_are_renumbered_each_for_itself():
    class Halve(Policy):
        def after_prompt(self, cache):
            heads = torch.arange(2).view(1, 2, 1)
            cache.keep((heads == 1) | (cache.rank % 2 == 0))

    m = tiny.model(n_layers=1)
    cache = run(m, [StreamingLLM(budget=400), Halve()], tiny.ids(60))
    c = cache.layers[0]
    seen = watch(c)
    tiny.steps(m, cache, tiny.ids(1))
    q, pos, _ = seen[0]
    assert pos.tolist() == [[[30], [60]]]
    k, v = c.read()
    out = c.attend(q, pos)
    for h, n in ((0, 31), (1, 61)):
        one = reference(q[:, 3 * h : 3 * h + 3], k[:, h : h + 1, :n], v[:, h : h + 1, :n], None)
        assert tiny.rms(out[:, 3 * h : 3 * h + 3], one) < 5e-6  # logits up to 10, each with an error of 2^-24 of that


def test_a_cache_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="streamingllm: budget must be at most the model's context, 512"):
        KVCache(tiny.model(), "streamingllm(budget=513)")
    KVCache(tiny.model(), "streamingllm(budget=513,reindex=False)")


def test_positions_past_the_context_have_their_angles():
    m = tiny.model(context=32)
    cache = run(m, [StreamingLLM(budget=32)], tiny.ids(200), chunk=7)
    assert tiny.steps(m, cache, tiny.ids(50)).isfinite().all()


SLIDING = ["(budget=40)", "(budget=40,n_sink=0)", "(budget=40,reindex=False)", "(budget=40)+h2o(budget=60)"]


@pytest.mark.parametrize("spec", SLIDING)
def test_sliding_a_run_out_forgets_what_a_mask_would_and_holds_no_hole(spec, monkeypatch):
    m, holes, out = tiny.model(), [], []
    text = tiny.ids(300)
    for slides in (True, False):
        if not slides:
            monkeypatch.setattr(Dense, "drop_run", Storage.drop_run)
        cache = KVCache(m, "streamingllm" + spec)
        out.append(torch.cat([tiny.feed(m, cache, text[:, :100], 9), tiny.steps(m, cache, text[:, 100:])], 1))
        holes.append([c.N - c.n_live for c in cache.layers])
        assert sorted(kept(cache)[1, 1])[-36:] == list(range(264, 300))
    assert max(holes[0]) == 0 < max(holes[1])
    assert tiny.rms(*out) < 1e-5


@pytest.mark.parametrize("bad", [{"budget": 0}, {"budget": 4}, {"budget": -1}, {"n_sink": -1}], ids=str)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"streamingllm: {next(iter(bad))} must be"):
        StreamingLLM(**bad)
