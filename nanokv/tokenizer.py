"""Text to token ids and back, streaming, and the model's chat template.

A vocabulary comes from a hub folder (tokenizer.json) or from the metadata of a GGUF file, for which the pipeline of
normaliser, pre-tokeniser, BPE and decoder is put together here. The `tokenizers` library does the work.
"""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors

# How the byte-level BPE families cut text before merging; {} is the longest run of digits that stays together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {"smollm": "smollm", "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2", "gpt-2": "gpt-2", "default": "gpt-2"}
_PRE |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama-bpe")
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # GGUF token types; 5 is unused, 6 a byte


class Tokenizer:
    """Turn text into ids and back. `eos` are the ids that end a text, `bos` the id that begins one, or None."""

    def __init__(self, raw: tokenizers.Tokenizer, specials: dict | None = None, template: str | None = None, eos=()):
        self.raw, self.template = raw, template
        self.specials = specials or {}  # {"bos_token": "<s>", ...}, which chat templates may use
        self.bos = self._id("bos_token")
        own = self._id("eos_token")
        self.eos = tuple(dict.fromkeys([*([] if own is None else [own]), *eos]))

    def _id(self, role: str) -> int | None:
        return self.raw.token_to_id(self.specials[role]) if self.specials.get(role) else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens written out in it count as such.

        With `special` the model's own frame is added, usually a BOS. Chat templates write their own: leave it off.
        """
        return self.raw.encode(text, add_special_tokens=special).ids

    def decode(self, ids) -> str:
        """Return the text of ids, special tokens written out; bytes that are no UTF-8 become U+FFFD."""
        return self.raw.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> "Stream":
        """Return a decoder to push one id after another into."""
        return Stream(self)

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """Render messages [{"role": ..., "content": ...}] with the model's chat template.

        Further keywords reach the template (enable_thinking=False for Qwen3). Raises ValueError in one line where the
        model has no template or the template refuses the messages.
        """
        if self.template is None:
            raise ValueError("this model has no chat template; pass plain text instead")
        known = {"tools": None, "documents": None, **self.specials, **variables}
        try:
            template = _compile(self.template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **known)
        except Exception as e:  # a template is foreign code: it may fail in any way
            raise ValueError(" ".join(f"the chat template failed: {e}".split())) from e

    def save(self, folder) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing folder."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials, "chat_template": self.template}
        Path(folder, "tokenizer.json").write_text(self.raw.to_str(pretty=True), "utf-8")
        text = json.dumps({k: v for k, v in config.items() if v is not None}, indent=2, ensure_ascii=False)
        Path(folder, "tokenizer_config.json").write_text(text, "utf-8")

    @classmethod
    def from_folder(cls, folder) -> "Tokenizer":
        """Read a folder in the hub's layout. Raises ValueError, naming the file, where that cannot be done."""
        folder = Path(folder)
        file, config = folder / "tokenizer.json", _read_json(folder / "tokenizer_config.json")
        if not file.is_file():
            if (folder / "tokenizer.model").is_file():
                raise ValueError(
                    f"{folder} has a SentencePiece tokenizer.model but no tokenizer.json, which nanokv reads; "
                    "transformers' AutoTokenizer can convert it with save_pretrained"
                )
            raise ValueError(f"{folder} has no tokenizer.json")
        try:
            raw = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
        except Exception as e:  # the library raises plain Exceptions
            raise ValueError(f"{file} cannot be read: {e}") from e
        named = _read_json(folder / "special_tokens_map.json") | config
        specials = {role: named.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
        specials = {role: t["content"] if isinstance(t, dict) else t for role, t in specials.items() if t}
        template = config.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text("utf-8")
        return cls(raw, specials, template)

    @classmethod
    def from_gguf(cls, fields: dict) -> "Tokenizer":
        """Build the tokenizer from a GGUF file's metadata {key: value}. Raises ValueError if its kind is unknown."""
        get = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items() if k.startswith("tokenizer.")}.get
        kind, tokens = get("model"), get("tokens")
        if not tokens or kind not in ("gpt2", "llama"):
            raise ValueError(f"tokenizer kind {kind!r} is not supported (supported: gpt2, llama)")
        types = get("token_type") or [_NORMAL] * len(tokens)
        ids = {name: get(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
        ids = {name: i for name, i in ids.items() if i is not None}
        if any(not 0 <= i < len(tokens) for i in ids.values()):
            raise ValueError(f"special token ids {ids} do not all lie in the vocabulary of {len(tokens)}")
        if kind == "gpt2":
            pre = get("pre") or "default"
            raw, add_bos = _byte_level(tokens, get("merges") or [], pre), _PRE[pre] == "llama-bpe"
        else:
            unknown = tokens[ids.get("unknown", 0)]
            raw, add_bos = _sentencepiece(tokens, types, get("scores"), unknown, get("add_space_prefix", True)), True
        marked = [(t, n) for t, n in zip(tokens, types, strict=True) if n in (_UNKNOWN, _CONTROL, _USER)]
        raw.add_tokens([AddedToken(t, special=n != _USER, normalized=False) for t, n in marked])
        roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        specials = {role: tokens[ids[name]] for name, role in roles.items() if name in ids}
        ends = [ids[name] for name in ("eot", "eom") if name in ids]  # end of turn, of message
        self = cls(raw, specials, fields.get("tokenizer.chat_template"), ends)
        self._frame(get("add_bos_token", add_bos), get("add_eos_token", False))
        return self

    def _frame(self, add_bos: bool, add_eos: bool) -> None:
        """Make encode(special=True) add BOS, EOS, both or none."""
        bos = [self.specials["bos_token"]] if add_bos and self.bos is not None else []
        eos = [self.specials["eos_token"]] if add_eos and self._id("eos_token") is not None else []
        pairs = [(t, self.raw.token_to_id(t)) for t in dict.fromkeys(bos + eos)]
        self.raw.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=pairs)


class Stream:
    """Decode ids as they come. `push` returns what may be printed: it holds back a character whose bytes are not all
    there yet, and `flush` gives that up at the end. The parts put together equal decode() of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        self.done, self.held = [], []  # ids printed last, as context for what follows them; ids not yet printed

    def push(self, token: int) -> str:
        """Take the next id and return the text that is now certain, perhaps none."""
        self.held.append(token)
        return "" if self.decode(self.done + self.held).endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        """Return what is held back, U+FFFD for each part that is no UTF-8."""
        # Decoding depends on the neighbour to the left (a first space is dropped), hence the difference of two texts.
        text = self.decode(self.done + self.held)[len(self.decode(self.done)) :]
        self.done, self.held = self.held, []
        return text


def _byte_level(tokens: list[str], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    """Build a BPE over bytes written as printable characters, as in GPT-2."""
    if pre not in _PRE:
        raise ValueError(f"pre-tokenizer {pre!r} is not supported (supported: {', '.join(_PRE)})")
    pre = _PRE[pre]
    vocab = {t: i for i, t in enumerate(tokens)}
    pairs = [(m[:i], m[i + 1 :]) for m in merges for i in [m.index(" ", 1)]]
    raw = _bpe(vocab, pairs, ignore_merges=pre == "llama-bpe")
    if pre in ("llama-bpe", "qwen2"):
        cut = pre_tokenizers.Split(Regex(_SPLIT.replace("{}", "{1,3}" if pre == "llama-bpe" else "")), "isolated")
    else:
        cut = pre_tokenizers.Digits(individual_digits=True) if pre == "smollm" else None
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes]) if cut else to_bytes
    if pre == "qwen2":
        raw.normalizer = normalizers.NFC()
    raw.decoder = decoders.ByteLevel()
    return raw


def _sentencepiece(tokens, types, scores, unknown: str, add_prefix: bool) -> tokenizers.Tokenizer:
    """Build a BPE over characters with spaces as U+2581 and bytes (<0x0A>) for what has no token, as in Llama 2."""
    if not scores:
        raise ValueError("a SentencePiece vocabulary needs tokenizer.ggml.scores")
    score = dict(zip(tokens, scores, strict=True))
    # SentencePiece joins the neighbours whose union scores best; as a merge list: every way to cut every piece.
    words = [t for t, n in zip(tokens, types, strict=True) if n == _NORMAL]
    pairs = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in score and w[i:] in score]
    pairs.sort(key=lambda p: (score[p[0] + p[1]], score[p[0]], score[p[1]]), reverse=True)
    vocab = {t: i for i, t in enumerate(tokens)}
    raw = _bpe(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    space = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if add_prefix else space
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return raw


def _bpe(vocab: dict, pairs: list, **options) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, **options))
    except Exception as e:  # the library raises plain Exceptions
        raise ValueError(f"the vocabulary and its merges do not fit together: {e}") from e


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from e


class _Generation(Extension):
    """Read {% generation %} ... {% endgeneration %}, which marks the assistant's words, as its plain content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(template: str):
    """Compile a template with the settings and helpers that hub templates rely on, sandboxed."""

    def fail(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = tojson  # jinja's own escapes HTML
    env.globals |= {"raise_exception": fail, "strftime_now": lambda format: datetime.now().strftime(format)}
    return env.from_string(template)
