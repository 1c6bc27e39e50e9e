"""Tokenizers against transformers and against naive ones: ids, round trips, streaming, chat templates."""

import copy
import json
import re

import pytest
import regex
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from nanokv.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    " leading",
    "trailing ",
    "  a   b\t\tc \n\n\n d\r\ne  ",
    "x1234y 007 3.14159 1e-9 ½²",
    "count  42,   7",
    "def f(x: int) -> int:\n    return x**2  # square\n\n\nif __name__ == '__main__':\n\tprint(f(12))",
    "<|im_start|>user\nhi <|im_end|>\n<|endoftext|><|im_end",
    "日本語のテキスト、中文和한국어",
    "Ελληνικά, русский, العربية, हिन्दी, ไทย",
    "👩‍👩‍👧‍👦 🙂🏽 🇩🇪 ☃",
    "I'll've DON'T they're it's O'Neill",
    "e\u0301 \u00e9 \ufb01 \u200b\u00a0\u3000",
    "don't  stop\x00\x7f",
    "",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Hi</b>  é🙂 <|im_end|>\n"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "1 + 1?"},
]


# ---------------------------------------------------------------------------------------------------- default model


def test_default_ids_equal_transformers(smollm2, smollm2_peer):
    tokenizer, peer = smollm2[1], copy.deepcopy(smollm2_peer[1])
    for text in TEXTS:
        if "½" not in text and "  42" not in text:
            assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False), text
    # Reading a GGUF file, transformers forgets what `smollm` means: each digit is cut off first, so that the spaces
    # before one stay together. With that put right all texts agree.
    peer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False), text


def test_default_specials(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.bos, tokenizer.eos, tokenizer.raw.get_vocab_size()) == (1, (2,), 49152)
    assert model.config.eos == (2,) and model.config.vocab == 49152
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, 81, 2]
    assert tokenizer.encode("a", special=True) == [81]  # this model's habit is to add nothing


def test_default_round_trip(smollm2):
    for text in TEXTS:
        assert smollm2[1].decode(smollm2[1].encode(text)) == text


# This vocabulary has no token for bytes F1, F2, F5, ..., which begin the unassigned planes, nor for some control codes.
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cn", "Co", "Cs"]), max_size=60))
def test_default_round_trip_of_any_text(smollm2, text):
    assert smollm2[1].decode(smollm2[1].encode(text)) == text


def test_default_chat_equals_transformers(smollm2, smollm2_peer):
    tokenizer, peer = smollm2[1], smollm2_peer[1]
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
        for prompt in (True, False):
            text = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.chat(messages, add_generation_prompt=prompt) == text
    ids = tokenizer.encode(tokenizer.chat(MESSAGES[:2]))
    assert ids == peer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.eos[0]) == 3  # the one that the user wrote counts


# -------------------------------------------------------------------------------------------------------- streaming


def test_stream_holds_back_unfinished_characters(smollm2):
    tokenizer, text = smollm2[1], "naïve 🙂🏽 日本語の鰯 👩‍👩‍👧‍👦!"
    ids, stream = tokenizer.encode(text), tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == text and stream.flush() == ""
    assert "\ufffd" not in "".join(parts) and "" in parts  # some characters take several tokens
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)


def test_stream_flushes_the_rest(smollm2):
    tokenizer = smollm2[1]
    cut = tokenizer.encode("鰯")[:-1]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in cut] == [""] * len(cut)
    assert stream.flush() == tokenizer.decode(cut) == "\ufffd"
    assert stream.flush() == ""


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 280), max_size=30))
def test_stream_equals_decode_for_any_ids(smollm2, ids):
    stream = smollm2[1].stream()
    assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == smollm2[1].decode(ids)


# ------------------------------------------------------------------------------------------------- GGUF vocabularies


def byte_level(vocab_size=420):
    """Train a small byte-level BPE; return its tokens in order and its merges as GGUF writes them."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(TEXTS * 3 + ["12 123 1234 12345 the then there   "] * 4, trainer)
    model = json.loads(raw.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(m) for m in model["merges"]]


def bpe_fields(pre, **more):
    tokens, merges = byte_level()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [1] * len(tokens) + [3, 3, 3, 4]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens + specials, "merges": merges, "token_type": types}
    fields |= {"bos_token_id": len(tokens), "eos_token_id": len(tokens) + 2, **more}
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}


def naive_bpe(fields, text, pre):
    """Encode by the book: cut with the family's regex, write bytes as characters, join the earliest merge first."""
    vocab = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])}
    rank = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"])}
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    rest = [b for b in range(256) if b not in keep]
    letter = {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}
    runs = [text]
    if pre == "smollm":
        runs = [r for r in regex.split(r"(\p{N})", text) if r]
    pattern = {"llama-bpe": SPLIT % "{1,3}", "qwen2": SPLIT % ""}.get(pre, GPT2)
    ids = []
    for word in (w for run in runs for w in regex.findall(pattern, run)):
        parts = [letter[b] for b in word.encode()]
        if pre == "llama-bpe" and "".join(parts) in vocab:
            parts = ["".join(parts)]
        while pairs := [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:], strict=False)) if p in rank]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocab[p] for p in parts]
    return ids


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_gguf_bpe_equals_naive(pre):
    fields = bpe_fields(pre)
    tokenizer = Tokenizer.from_gguf(fields)
    for text in TEXTS:
        if "<|" in text or (pre == "qwen2" and "e\u0301" in text):
            continue
        assert tokenizer.encode(text) == naive_bpe(fields, text, pre), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_families_cut_differently():
    text = "  12345 DON'T\n\n x"
    ids = {
        tuple(Tokenizer.from_gguf(bpe_fields(pre)).encode(text)) for pre in ("smollm", "llama-bpe", "qwen2", "gpt-2")
    }
    assert len(ids) == 4


def test_gguf_qwen2_composes_accents():
    tokenizer = Tokenizer.from_gguf(bpe_fields("qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_gguf_llama_bpe_prefers_whole_tokens():
    fields = bpe_fields("llama-bpe")
    fields["tokenizer.ggml.tokens"] += ["xyzzy"]
    fields["tokenizer.ggml.token_type"] += [1]
    assert Tokenizer.from_gguf(fields).encode("xyzzy") == [len(fields["tokenizer.ggml.tokens"]) - 1]
    assert len(Tokenizer.from_gguf(fields | {"tokenizer.ggml.pre": "qwen2"}).encode("xyzzy")) > 1


def test_gguf_bpe_specials_and_frame():
    plain = Tokenizer.from_gguf(bpe_fields("qwen2"))
    n = plain.raw.get_vocab_size() - 4
    assert plain.encode("<|im_start|><tool><|im_end|>") == [n + 1, n + 3, n + 2]
    assert (plain.bos, plain.eos) == (n, (n + 2,))
    assert plain.encode("a", special=True) == plain.encode("a")
    assert Tokenizer.from_gguf(bpe_fields("llama-bpe")).encode("a", special=True) == [n, *plain.encode("a")]
    never = Tokenizer.from_gguf(bpe_fields("llama-bpe", add_bos_token=False))
    assert never.encode("a", special=True) == plain.encode("a")
    both = Tokenizer.from_gguf(bpe_fields("qwen2", add_bos_token=True, add_eos_token=True, eot_token_id=n + 1))
    assert both.encode("a", special=True) == [n, *plain.encode("a"), n + 2]
    assert both.eos == (n + 2, n + 1)


def spm_fields(**more):
    """Train a small vocabulary of SentencePiece's kind: control, byte, character and merged pieces with scores."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    raw.train_from_iterator([("▁" + t).replace(" ", "▁") for t in TEXTS[:9] * 3 + ["the then  there"] * 9], trainer)
    model = json.loads(raw.to_str())["model"]
    merged = ["".join(m) for m in model["merges"]]
    letters = sorted(t for t in model["vocab"] if len(t) == 1 and t not in "日本👩q")
    merged = [m for m in dict.fromkeys(merged) if set(m) <= set(letters)]
    pieces = [(m, -float(i), 1) for i, m in enumerate(merged)] + [(c, -1000.0 - i, 1) for i, c in enumerate(letters)]
    pieces = (
        [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)] + pieces
    )
    tokens, scores, types = (list(x) for x in zip(*pieces, strict=True))
    fields = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more}
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items()}


def naive_spm(fields, text, prefix=True):
    """Encode by the book: join the two neighbours whose union scores best, the left ones on a tie."""
    tokens = fields["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    parts = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
    while pairs := [
        (-score[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in score
    ]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    index = {t: i for i, t in enumerate(tokens)}
    return [i for p in parts for i in ([index[p]] if p in index else [3 + b for b in p.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece_equals_naive(prefix):
    fields = spm_fields(**({} if prefix else {"add_space_prefix": False}))
    tokenizer = Tokenizer.from_gguf(fields)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == naive_spm(fields, text, prefix), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, special=True) == [1, *ids]
        stream = tokenizer.stream()
        assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == text
    assert any(3 <= i < 259 for i in tokenizer.encode(TEXTS[10]))  # bytes stand in for what has no token
    assert (tokenizer.bos, tokenizer.eos) == (1, (2,))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (bpe_fields("tekken"), "tekken"),
        (bpe_fields("qwen2", model="t5"), "t5"),
        (spm_fields(scores=[]), "scores"),
        (bpe_fields("qwen2", merges=["zz qq"]), "merges"),
        ({}, "None"),
    ],
)
def test_gguf_errors(fields, named):
    with pytest.raises(ValueError, match=named) as e:
        Tokenizer.from_gguf(fields)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------- folders


def test_save_and_from_folder(tmp_path):
    fields = bpe_fields("llama-bpe") | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    before = Tokenizer.from_gguf(fields)
    before.save(tmp_path)
    after, peer = Tokenizer.from_folder(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert after.encode(text, special=True) == before.encode(text, special=True) == peer.encode(text)
    assert (after.bos, after.eos, after.raw.get_vocab_size()) == (before.bos, before.eos, before.raw.get_vocab_size())
    assert after.chat([{"content": "x"}]) == "<|endoftext|>x"


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("says", [True, False, None])
def test_folder_saved_by_transformers(tmp_path, adds_bos, says):
    raw = Tokenizer.from_gguf(spm_fields(add_bos_token=adds_bos)).raw
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    peer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    peer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config = {k: v for k, v in config.items() if k != "add_bos_token"} | (
        {} if says is None else {"add_bos_token": says}
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, peer = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, special=True) == peer.encode(text), text
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False), text
    assert (ours.encode("a", special=True)[0] == 1) == adds_bos  # tokenizer.json decides
    assert ours.chat(MESSAGES) == peer.apply_chat_template(MESSAGES, tokenize=False)


@pytest.mark.parametrize("style", ["string", "named", "file", "dict token"])
def test_folder_styles(tmp_path, style):
    Tokenizer.from_gguf(bpe_fields("qwen2")).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    text = "{{ bos_token }}!"
    config["chat_template"] = text if style in ("string", "dict token") else None
    if style == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": text}]
    if style == "file":
        (tmp_path / "chat_template.jinja").write_text(text)
    if style == "dict token":
        del config["bos_token"]
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).chat([]) == "<|endoftext|>!"


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"SentencePiece tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


# --------------------------------------------------------------------------------------------------- chat templates


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\nU: {{ m.content | trim }}\n  {% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% if tools is none %}no tools{% endif %}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}{{ pad_token }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ add_generation_prompt }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_equals_transformers(template, smollm2):
    raw = smollm2[1].raw
    ours = Tokenizer(raw, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, template)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>")
    for more in ({}, {"enable_thinking": False}):
        text = peer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True, **more
        )
        assert ours.chat(MESSAGES, **more) == text


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "failed"),
        ("{{ messages[0].content.nothing.more }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "unsafe"),
    ],
)
def test_chat_errors(template, named, smollm2):
    with pytest.raises(ValueError, match=named) as e:
        Tokenizer(smollm2[1].raw, template=template).chat(MESSAGES)
    assert "\n" not in str(e.value)
