"""Conversations over one cache, and the full cache beside."""

import pytest
import tiny
import torch

from nanokv import KVCache, generate
from nanokv.chat import Beside, Conversation
from nanokv.engine import prefill


class Words:
    """A tokenizer of one id per character, with a template."""

    eos = (10,)

    def encode(self, text, special=False):
        return [ord(c) % 101 for c in text]

    def chat(self, messages, add_generation_prompt=True):
        return "".join(f"<{m['role'][0]}>{m['content']}\n" for m in messages) + "<a>"


def test_turns_read_what_the_whole_conversation_would():
    m, words = tiny.model(), Words()
    cache = KVCache(m)
    talk = Conversation(m, words, cache, system="be kind")
    text, messages = [], [{"role": "system", "content": "be kind"}]
    for message in ("hello", "why?", "and then?"):
        ids = talk.ids(message)
        reply = list(talk.say(message, 7))
        text += [t for t in ids if t not in ()] + reply
        messages.append({"role": "user", "content": message})
    # the last token of a cut reply comes first in the next turn's ids, so it stands twice in what we noted
    assert cache.next_position == [len(text) - 2 - len(talk.unread)]
    talk.settle()
    assert talk.unread == []
    start = words.encode("<s>be kind\n<u>hello\n<a>")
    assert text[: len(start)] == start


def test_a_conversation_equals_reading_everything_at_once():
    m, words = tiny.model(), Words()
    cache = KVCache(m)
    talk = Conversation(m, words, cache)
    said = talk.ids("hello")
    said += list(talk.say("hello", 9))
    second = talk.ids("more")
    assert second[:1] == said[-1:] and len(talk.unread) == 1
    reply = list(talk.say("more", 9))
    assert reply == list(generate(m, KVCache(m), said + second[1:], 9))


@pytest.mark.parametrize("spec", ["full", "snapkv(budget=20, window=4)", "knorm(budget=20)"])
def test_the_cache_knows_the_whole_conversation(spec):
    m, words = tiny.model(), Words()
    talk = Conversation(m, words, KVCache(m, spec))
    said = talk.ids("hello")
    said += list(talk.say("hello", 9))
    said += talk.ids("more")[1:]  # which begins with the token that was not read yet
    said += list(talk.say("more", 9))
    assert talk.cache.ids[0].tolist() == said[:-1]
    alone = talk.cache.clone()
    talk.settle()  # a step, not a prompt
    assert talk.cache.ids[0].tolist() == said
    m(torch.tensor([said[-1:]]), alone, "decode")
    assert all(
        talk.cache.live_positions(layer, head).tolist() == alone.live_positions(layer, head).tolist()
        for layer in range(2)
        for head in range(2)
    )
    talk.reset()
    assert not talk.unread and not talk.cache.B and talk.ids("hello") == words.encode("<u>hello\n<a>")


def test_a_template_that_leaves_out_earlier_turns_is_refused_in_words():
    class Forgetful(Words):
        def chat(self, messages, add_generation_prompt=True):
            return super().chat(messages[-1:])

    m = tiny.model()
    talk = Conversation(m, Forgetful(), KVCache(m))
    list(talk.say("hello", 3))
    with pytest.raises(ValueError, match="the chat template leaves out or alters"):
        next(talk.say("more", 3))
    assert talk.cache.next_position and len(talk.unread) == 1  # as they were


def test_beside_a_cache_that_has_begun():
    m = tiny.model()
    cache = KVCache(m)
    prefill(m, cache, tiny.ids(30))
    beside = Beside(m, cache.ids[0])
    list(generate(m, cache, [5, 6], 4, watch=beside))
    assert beside.cache.next_position == [35] and max(beside.kl) < 1e-6 and beside.parted is None


def test_a_turn_that_ends_by_a_stop_token_leaves_nothing_unread():
    m, words = tiny.model(), Words()
    talk = Conversation(m, words, KVCache(m))
    whole = list(generate(m, KVCache(m), talk.ids("abc"), 30))
    stop = whole[4]
    reply = list(talk.say("abc", 30, stop=[stop]))
    assert reply == whole[: whole.index(stop)] and talk.unread == []
    assert talk.cache.next_position == [len(words.encode("<u>abc\n<a>")) + len(reply)]


def test_a_conversation_can_be_left_in_the_middle_saved_and_continued(tmp_path):
    m, words = tiny.model(), Words()
    talk = Conversation(m, words, KVCache(m, "kivi(bits=4,residual=32)"))
    for n, _ in enumerate(talk.say("tell me everything", 60)):
        if n == 40:
            break
    talk.settle()
    talk.cache.save(tmp_path / "c")
    again = Conversation(m, words, KVCache.load(tmp_path / "c", m))
    assert list(again.say("go on", 20)) == list(talk.say("go on", 20))


def test_the_full_cache_beside_itself_never_parts():
    m = tiny.model()
    beside = Beside(m)
    list(generate(m, KVCache(m), tiny.ids(40)[0], 20, watch=beside))
    assert len(beside.kl) == 20 and max(beside.kl) < 1e-9 and all(beside.same) and beside.parted is None


def test_what_is_beside_a_lossy_cache_is_the_definition():
    m = tiny.model()
    beside, cache = Beside(m), KVCache(m, "streamingllm(budget=16)")
    tokens = list(generate(m, cache, tiny.ids(60)[0], 20, watch=beside))
    full, other = KVCache(m), KVCache(m, "streamingllm(budget=16)")
    a, b = prefill(m, full, tiny.ids(60))[0], prefill(m, other, tiny.ids(60))[0]
    for i, token in enumerate(tokens):
        p, q = a.double().softmax(-1), b.double().softmax(-1)
        assert beside.kl[i] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
        assert beside.same[i] == bool(a.argmax() == b.argmax())
        a, b = (m(torch.tensor([[token]]), c)[0, -1] for c in (full, other))
    assert beside.parted == beside.same.index(False)
