"""Going on: batches whose members stop, pause and come back, later prompts, drafts, and what is refused in words."""

import pytest
import tiny
import torch

from nanokv import KVCache, generate, generate_batch
from nanokv.engine import prefill

SPECS = ["full", "snapkv(budget=16, window=4)", "h2o(budget=16)", "adakv(budget=16)+kivi(group=16, residual=16)",
         "cake(budget=16, window=4)", "random(budget=16)", "knorm(budget=16)", "expected_attention(budget=16)",
         "streamingllm(budget=16)", "pca(rank=16, least=16)"]  # fmt: skip
TEXTS = [tiny.ids(n, seed=n)[0].tolist() for n in (40, 11, 3)]


def columns(batch) -> list[list]:
    """Return what each sequence of a batch got."""
    return [[t for t in own if t is not None] for own in zip(*batch, strict=True)]


def model(**options):
    return tiny.model(**({"dtype": torch.float64} | options))


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_goes_on_after_its_members_have_stopped(spec):
    m, cache = model(), KVCache(model(), spec)
    cache = KVCache(m, spec)
    whole = [list(generate(m, KVCache(m, spec), text, 25)) for text in TEXTS]
    stop = [whole[0][3], whole[1][9]]
    first = columns(generate_batch(m, cache, TEXTS, 25, stop=stop))
    read = [len(text) + len(own) for text, own in zip(TEXTS, first, strict=True)]
    stopped = [own != w for own, w in zip(first, whole, strict=True)]
    assert any(stopped) and len(set(map(len, first))) > 1
    assert cache.next_position == [n - (not s) for n, s in zip(read, stopped, strict=True)]  # the last is not read yet
    later = [[7, 8, 9, 10], [5] * 30, [1, 2]]
    second = columns(generate_batch(m, cache, later, 15))
    for b, text in enumerate(TEXTS):
        alone = KVCache(m, spec)
        assert list(generate(m, alone, text, 25, stop=stop)) == first[b]
        assert list(generate(m, alone, later[b], 15)) == second[b]
        assert alone.ids[0].tolist() == cache.ids[b].tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_one_token_after_others_is_a_step(spec):
    m = model()
    whole = list(generate(m, KVCache(m, spec), TEXTS[0], 20))
    cache = KVCache(m, spec)
    first = list(generate(m, cache, TEXTS[0], 8))
    assert first + list(generate(m, cache, first[-1:], 12)) == whole


@pytest.mark.parametrize("spec", SPECS)
def test_one_token_beside_longer_prompts_is_a_step_too(spec):
    m = model()
    cache = KVCache(m, spec)
    first = columns(generate_batch(m, cache, TEXTS, 6))
    later = [first[0][-1:], [4, 5, 6, 7], []]
    second = columns(generate_batch(m, cache, later, 10))
    assert second[2] == []
    for b in range(2):
        alone = KVCache(m, spec)
        assert list(generate(m, alone, TEXTS[b], 6)) == first[b]
        assert list(generate(m, alone, later[b], 10)) == second[b]
    third = columns(generate_batch(m, cache, [[], [], first[2][-1:]], 5))  # who paused goes on as if nothing had been
    assert first[2] + third[2] == list(generate(m, KVCache(m, spec), TEXTS[2], 11))


def test_the_repetition_penalty_sees_all_that_the_cache_has_read():
    m = model()
    whole = list(generate(m, KVCache(m), TEXTS[0], 30, repetition_penalty=1.5))
    cache = KVCache(m)
    first = list(generate(m, cache, TEXTS[0], 12, repetition_penalty=1.5))
    assert first + list(generate(m, cache, first[-1:], 18, repetition_penalty=1.5)) == whole
    assert whole != list(generate(m, KVCache(m), TEXTS[0], 30))
    batch = KVCache(m)
    assert columns(generate_batch(m, batch, TEXTS, 30, repetition_penalty=1.5))[0] == whole


@pytest.mark.parametrize("spec", ["full", "h2o(budget=16)", "streamingllm(budget=16)"])
def test_near_the_contexts_end_each_gets_what_it_would_alone(spec):
    m = model(context=48)
    cache = KVCache(m, spec)
    got = columns(generate_batch(m, cache, TEXTS, 60))
    alone = [list(generate(m, KVCache(m, spec), text, 60)) for text in TEXTS]
    assert got == alone
    assert [len(own) for own in got] == ([60] * 3 if cache.renumbers else [9, 38, 46])
    if not cache.renumbers:
        assert cache.next_position == [48] * 3
        with pytest.raises(ValueError, match="2 tokens after the 48 already read, the model's context 48"):
            next(generate_batch(m, cache, [[1, 2], [], []], 1))


@pytest.mark.parametrize("seed", range(3))
def test_each_sequence_draws_as_it_would_alone(seed):
    m = model()
    got = columns(generate_batch(m, KVCache(m), TEXTS, 12, temperature=1.3, top_k=30, seed=seed))
    assert got == [list(generate(m, KVCache(m), t, 12, temperature=1.3, top_k=30, seed=seed)) for t in TEXTS]


@pytest.mark.parametrize("spec", ["full", "kivi(group=16, residual=64)", "h2o(budget=46)", "window(budget=46)"])
def test_a_draft_is_rolled_back_sequence_by_sequence(spec):
    m = model()
    cache, want = KVCache(m, spec), KVCache(m, spec)
    for c in (cache, want):
        prefill(m, c, TEXTS)
    draft = torch.stack([tiny.ids(6, seed=s)[0] for s in range(3)])
    draft[2, :3] = -1  # a shorter one
    assert cache.ahead() is None or cache.ahead() >= 4
    logits = m(draft, cache, "draft")
    n = [4, 0, 3]
    cache.accept(n)
    rows = [draft[b][draft[b] >= 0][: n[b]].tolist() for b in range(3)]
    for i in range(4):
        m(torch.tensor([[row[i] if i < len(row) else -1] for row in rows]), want, "decode")
    assert cache.next_position == want.next_position == [44, 11, 6]
    more = tiny.ids(9, seed=9, batch=3)
    assert tiny.rms(tiny.steps(m, cache, more), tiny.steps(m, want, more)) < 1e-6
    assert logits.isfinite().all()
    for b in range(3):
        assert cache.live_positions(1, 0, b).tolist() == want.live_positions(1, 0, b).tolist()


def test_what_cannot_be_is_refused_in_words():
    m, other = model(), model(seed=1)
    cache = KVCache(m)
    for call, words in (
        (lambda: next(generate_batch(m, cache, [], 1)), "the batch is empty"),
        (lambda: next(generate(m, cache, [], 1)), "the prompt is empty"),
        (lambda: next(generate_batch(m, cache, [[1], []], 1)), "the prompt is empty"),
        (lambda: next(generate(m, cache, [101], 1)), "from 0 to 100, got 101"),
        (lambda: m(torch.empty(0, 3, dtype=torch.int64), cache), "a pass over 0 sequences and 3 tokens reads nothing"),
        (lambda: m(torch.empty(2, 0, dtype=torch.int64), cache), "a pass over 2 sequences and 0 tokens reads nothing"),
        (lambda: m(torch.tensor([[3, -1]]), cache), "-1 stand before a sequence's tokens"),
        (lambda: m(torch.tensor([[3, -1, 4]]), cache), "-1 stand before a sequence's tokens"),
        (lambda: m(torch.full((2, 2), -1), cache), "a pass over 2 sequences and 2 tokens reads nothing"),
        (lambda: m(torch.tensor([[101]]), cache), "ids are whole numbers from 0 to 100, or -1"),
        (lambda: m(torch.tensor([[1, -2]]), cache), "ids are whole numbers from 0 to 100, or -1"),
        (lambda: m(torch.tensor([[1.0]]), cache), "ids are whole numbers from 0 to 100, or -1"),
        (lambda: prefill(m, cache, [[]]), "the prompt is empty"),
        (lambda: prefill(m, cache, []), "the prompt is empty"),
        (lambda: prefill(m, cache, [[1]], chunk=-1), "chunk must be at least 1"),
        (lambda: m(tiny.ids(3), cache, "later"), "phase must be one of prompt, last, decode, draft"),
        (lambda: other(tiny.ids(3), cache), "this cache was made for another model"),
        (lambda: cache.accept(1), "there is no draft to accept"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
        assert not cache.B and not cache.ids
    m(tiny.ids(5), cache)
    with pytest.raises(ValueError, match="holds a batch of 1, not 2"):
        m(tiny.ids(5, batch=2), cache)
    m(tiny.ids(3), cache, "draft")
    for call, words in (
        (lambda: m(tiny.ids(1), cache), "a draft is open"),
        (lambda: cache.accept(4), "a draft of 3 tokens has no first 4"),
        (lambda: cache.accept(-1), "a draft of 3 tokens has no first -1"),
        (lambda: cache.accept([1, 2]), "accept takes one number, or one for each of 1 sequences, not 2"),
        (lambda: cache.truncate(3), "a draft or a pass is open"),
        (lambda: cache.expand(2), "a draft or a pass is open"),
        (lambda: cache.save("x"), "not in the middle of it"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    cache.accept(2)
    assert cache.next_position == [7]


def test_a_pass_in_which_nobody_reads_changes_nothing():
    m = model()
    cache = KVCache(m, "h2o(budget=16)")
    prefill(m, cache, TEXTS)
    before = [cache.live_positions(0, 0, b).tolist() for b in range(3)]
    m(torch.full((3, 1), -1), cache, "decode")
    assert cache.next_position == [40, 11, 3]
    assert before == [cache.live_positions(0, 0, b).tolist() for b in range(3)]


def test_a_refused_truncate_leaves_every_layer_as_it_was():
    m = model(windows=(None, 24))
    cache, want = KVCache(m), KVCache(m)
    for c in (cache, want):
        tiny.feed(m, c, tiny.ids(40))
    with pytest.raises(NotImplementedError, match="forgets nothing"):
        cache.truncate(30)
    assert torch.equal(m(tiny.ids(1), cache), m(tiny.ids(1), want))


def test_a_cache_can_be_cut_again_and_after_drafts_and_expanding():
    m = model()
    cache, want = KVCache(m), KVCache(m)
    tiny.feed(m, cache, tiny.ids(20))
    cache.truncate(12)
    cache.truncate(10)
    m(tiny.ids(4), cache, "draft")
    cache.accept(0)
    cache.truncate(8)
    cache.expand(2)
    cache.truncate(6)
    assert cache.next_position == [6, 6] and [len(row) for row in cache.ids] == [6, 6]
    tiny.feed(m, want, tiny.ids(20)[:, :6])
    more = tiny.ids(5, seed=3)
    assert tiny.rms(tiny.steps(m, cache, more.expand(2, -1))[1:], tiny.steps(m, want, more)) < 1e-12


@pytest.mark.parametrize("spec", ["h2o(budget=40)+pyramidkv", "h2o(budget=30)+adakv"])
def test_a_sequence_that_pauses_keeps_its_shares_when_another_reads_a_prompt(spec):
    m, text = model(), list(range(12))
    cache, alone = KVCache(m, spec), KVCache(m, spec)
    prefill(m, cache, [text, text])
    prefill(m, alone, [text])
    for t in range(40):
        m(torch.tensor([[t], [t]]), cache)
        m(torch.tensor([[t]]), alone)
    prefill(m, cache, [[], list(range(60))])
    for t in range(20):
        both, own = m(torch.tensor([[t], [t]]), cache), m(torch.tensor([[t]]), alone)
    assert tiny.rms(both[:1], own) < 1e-9


def test_a_draft_may_be_longer_than_the_parts_in_which_prompts_are_read():
    m = model()
    cache, want = KVCache(m, "streamingllm(budget=40)"), KVCache(m, "streamingllm(budget=40)")
    for c in (cache, want):
        tiny.feed(m, c, tiny.ids(2))
    n = cache.ahead()
    assert n > cache.chunk
    more = tiny.ids(n, seed=4)
    draft = m(more, cache, "draft")
    assert tiny.rms(draft, tiny.steps(m, want, more)) < 1e-9


def test_drafts_beside_a_window_and_blocks_are_what_steps_are():
    m = model(G=1, n_kv_heads=1, windows=(24, None))
    spec = "kivi(bits=3, group=16, residual=16, n_sink=3, block=32)"
    cache, want, more = KVCache(m, spec), KVCache(m, spec), tiny.ids(60, seed=5)
    for c in (cache, want):
        tiny.feed(m, c, tiny.ids(20))
    i = 0
    while i < 60:
        part = more[:, i : i + min(7, max(1, cache.ahead()))]
        draft = m(part, cache, "draft")
        cache.accept(part.shape[1])
        assert tiny.rms(draft, tiny.steps(m, want, part)) < 1e-9
        i += part.shape[1]
