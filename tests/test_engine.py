"""Prefill in parts, the decode loop, sampling, stopping."""

import pytest
import tiny
import torch

from nanokv import KVCache, engine, generate
from nanokv.engine import prefill, sample, text


def _greedy(m, ids, n):
    """Continue by running the whole text again for every token."""
    for _ in range(n):
        ids = torch.cat([ids, m(ids, KVCache(m))[:, -1:].argmax(-1)], 1)
    return ids[0, -n:].tolist()


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_greedy_equals_recomputation(chunk):
    m = tiny.model()
    ids = tiny.ids(30)
    assert list(generate(m, KVCache(m), ids[0], 25, chunk=chunk)) == _greedy(m, ids, 25)


def test_prefill_returns_the_last_logits_and_reports_progress():
    m, seen = tiny.model(), []
    got = prefill(m, KVCache(m), tiny.ids(70), 32, seen.append)
    assert tiny.rms(got, m(tiny.ids(70), KVCache(m))[:, -1]) < 2e-6
    assert seen == [32, 32, 6]


def test_continuing_gives_the_same_text():
    m = tiny.model()
    ids = tiny.ids(30)[0]
    whole = list(generate(m, KVCache(m), ids, 20))
    cache = KVCache(m)
    first = list(generate(m, cache, ids, 8))
    assert first + list(generate(m, cache, first[-1:], 12)) == whole


def test_same_seed_same_text():
    m = tiny.model()
    run = lambda seed: list(generate(m, KVCache(m), tiny.ids(9)[0], 20, temperature=1.5, seed=seed))  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_stop_tokens_end_the_text():
    m = tiny.model()
    whole = list(generate(m, KVCache(m), tiny.ids(9)[0], 20))
    stop = whole[7]
    assert list(generate(m, KVCache(m), tiny.ids(9)[0], 20, stop=[stop])) == whole[: whole.index(stop)]


def test_the_context_ends_the_text_unless_positions_are_renumbered():
    m = tiny.model(context=40)
    assert len(list(generate(m, KVCache(m), tiny.ids(30)[0], 100))) == 11  # 10 more are read, the last is not
    assert len(list(generate(m, KVCache(m, "streamingllm(budget=20)"), tiny.ids(60)[0], 100))) == 100
    with pytest.raises(ValueError, match="41 tokens, the model's context 40; .*streamingllm"):
        next(generate(m, KVCache(m), tiny.ids(41)[0], 1))


BAD = [
    ("temperature", -1),
    ("top_k", -1),
    ("top_p", 0),
    ("top_p", 1.1),
    ("min_p", 1),
    ("min_p", -0.1),
    ("repetition_penalty", 0),
]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_sampling_is_refused(name, value):
    m = tiny.model()
    with pytest.raises(ValueError, match=name):
        next(generate(m, KVCache(m), [1], 1, **{name: value}))
    with pytest.raises(ValueError, match="empty"):
        next(generate(m, KVCache(m), [], 1))


def _frequencies(p, **kw):
    options = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seen": torch.tensor([], dtype=torch.int32),
    } | kw
    rng = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(torch.tensor(p).log(), **options, rng=rng) for _ in range(4000)])
    return (draws.bincount(minlength=len(p)) / 4000).tolist()


P = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize("options, expected", [
    ({}, P),
    ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"top_p": 0.01}, [0, 1, 0, 0]),
    ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ({"temperature": 0.0}, [0, 1, 0, 0]),
    ({"temperature": 0.0, "repetition_penalty": 2.0, "seen": torch.tensor([1])}, [0, 0, 0, 1]),  # log 0.4 * 2 < log 0.3
])  # fmt: skip
def test_sampling_follows_its_distribution(options, expected):
    got = _frequencies(P, **options)
    for g, e in zip(got, expected, strict=True):
        assert (g == e) if e in (0, 1) else abs(g - e) < 4 * (e * (1 - e) / 4000) ** 0.5  # four standard errors


class Letters:
    """A tokenizer of one character per token."""

    def stream(self):
        return self

    def push(self, token):
        return chr(token)

    def flush(self):
        return ""


@pytest.mark.parametrize("stop, pieces, whole", [
    ([], list("abcabd"), "abcabd"),
    (["abd"], ["abc"], "abc"),
    (["cab"], ["ab"], "ab"),
    (["ab"], [], ""),
    (["dx"], ["a", "b", "c", "a", "b", "d"], "abcabd"),
    (["bd", "ca"], ["a", "b"], "ab"),
])  # fmt: skip
def test_stop_strings_are_never_shown(stop, pieces, whole):
    got = list(text(map(ord, "abcabd"), Letters(), stop))
    assert "".join(got) == whole
    if not stop:
        assert got == pieces


def test_text_is_not_held_back_longer_than_needed():
    seen = []
    tokens = (seen.append(c) or ord(c) for c in "abcabd")
    stream = text(tokens, Letters(), ["abd"])
    assert next(stream) == "abc" and "".join(seen) == "abc"


def test_extreme_temperatures_are_safe():
    m = tiny.model()
    cold = list(generate(m, KVCache(m), tiny.ids(9)[0], 10, temperature=1e-300, seed=1))
    assert cold == list(generate(m, KVCache(m), tiny.ids(9)[0], 10))
    assert len(list(generate(m, KVCache(m), tiny.ids(9)[0], 10, temperature=1e300, seed=1, chunk=10**30))) == 10


def test_what_is_no_prompt_is_refused():
    m = tiny.model()
    bad = ([[1, 2], [3, 4]], "not 2; use generate_batch"), ([101], "got 101"), ([-1], "got -1"), ([1.5], "got 1.5")
    for ids, words in bad:
        with pytest.raises(ValueError, match=words):
            next(generate(m, KVCache(m), ids, 1))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        next(generate(m, KVCache(m), [1], 1, chunk=0))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_end_the_text_in_words(options, bad):
    m = tiny.model(dtype=torch.bfloat16)
    texts = generate(m, KVCache(m), tiny.ids(9)[0], 20, **options)
    next(texts)
    m.lm_head.weight[7] = bad
    with pytest.raises(FloatingPointError, match="logits for the next token are not finite in bfloat16"):
        next(texts)
    batch = engine.generate_batch(m, KVCache(m), [[1, 2], [3]], 1, **options)
    with pytest.raises(FloatingPointError, match="of text 0 are not finite"):
        next(batch)


def test_no_new_tokens_means_reading_the_prompt():
    m = tiny.model()
    cache = KVCache(m)
    assert list(generate(m, cache, tiny.ids(9)[0], 0)) == [] and cache.next_position == [9]


@pytest.mark.parametrize("dtype, want", [(torch.float32, [8, 8, 4]), (torch.bfloat16, [16, 4])])
def test_prompts_are_read_in_parts_of_as_many_bytes(dtype, want, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 8)
    m, parts = tiny.model().to(dtype), []
    prefill(m, KVCache(m), tiny.ids(20), progress=parts.append)
    assert parts == want
