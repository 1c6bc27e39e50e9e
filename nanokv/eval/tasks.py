"""What caches are asked: English prose to go on with, and facts hidden in it to find again. All seeded, all offline.

A retrieval sample is made of three parts: the context, in which the answer is hidden, the question, and the answer,
which is scored token by token behind its forced beginning ("The secret code is "). *Agnostic*: the context is
compressed before the question is seen, as when a document is read once for many questions. *Aware*: the question
belongs to the prompt that is compressed, which flatters methods that look at the prompt's last queries.
"""

import random
from dataclasses import dataclass

LIMIT = 40960  # tokens of the text that samples are taken from
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
WORDS = ["blue", "red", "green", "white", "black", "yellow", "purple", "orange", "grey", "brown", "pink", "golden",
         "silver", "violet", "scarlet", "amber"]  # fmt: skip
KINDS = ["phone number", "account number", "serial number", "ticket number", "room number", "licence number"]
PLACES = ["warehouse", "station", "harbour", "library", "tower", "garden", "bridge", "mill", "castle", "school"]
HUB = {"wikitext2": "hub:Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"}


def prose(path: str | None = None) -> str:
    """Return a text: the standard library's documentation of the language, or what `path` names.

    That is a UTF-8 file, a key of HUB, or hub:OWNER/NAME/FILE for a file of a data set on the hub. In a .parquet file
    the text is its column `text`. ValueError in one line for what cannot be had, or is no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[k] for k in sorted(topics))
    at = HUB.get(path, path)
    file = _from_hub(at) if at.startswith("hub:") else at
    try:
        if file.endswith(".parquet"):
            return _parquet(file)
        with open(file, encoding="utf-8") as f:
            return f.read()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _from_hub(at: str) -> str:
    """Fetch hub:OWNER/NAME/FILE unless the hub's cache has it; return where it lies."""
    import huggingface_hub

    parts = at.removeprefix("hub:").split("/", 2)
    if len(parts) < 3:
        raise ValueError(f"a text on the hub is hub:OWNER/NAME/FILE, not {at}")
    try:
        return huggingface_hub.hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")
    except Exception as error:  # http libraries, disks and proxies fail in their own ways
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot download {at}: {type(error).__name__}: {why}") from None


def _parquet(file: str) -> str:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("a .parquet text needs pyarrow: pip install pyarrow") from None
    try:
        return "".join(t or "" for t in parquet.read_table(file, columns=["text"])["text"].to_pylist())
    except (ArrowException, KeyError, TypeError) as error:
        raise ValueError(f"{file} has no column of text: {str(error).splitlines()[0]}") from None


def corpus(tokenizer, path: str | None = None) -> list[int]:
    """Return the first LIMIT tokens of `prose`."""
    return tokenizer.encode(prose(path)[: 8 * LIMIT])[:LIMIT]


def windows(n: int, context: int, tokens: int, count: int) -> list[int]:
    """Return where `count` windows of context + tokens begin, spread evenly over n tokens. ValueError if none fits."""
    if n < context + tokens:
        raise ValueError(f"the text has {n} tokens, fewer than the {context + tokens} of one window")
    step = (n - context - tokens) // max(1, count - 1)
    if count > 1 and step < tokens:
        raise ValueError(f"{count} windows need {context + tokens * count} tokens of text, there are {n}")
    return [w * step for w in range(count)]


@dataclass
class Sample:
    """One retrieval question, in token ids; `depth` is where in the filler the answer lies, 0 to 1.

    `scored` says which tokens of the answer are: codes are, the words that join two of them are not.
    """

    task: str
    depth: float
    context: list
    question: list
    answer: list
    scored: list


def _code(rng) -> str:
    return str(rng.randrange(10000, 99999))


def _facts(facts) -> list[tuple]:
    return [(at, f"\nThe {kind} of the {name} is {code}.\n") for at, kind, name, code in facts]


def _ask(name: str, kind: str = "secret code") -> tuple[str, str]:
    """Return the question, and the beginning of its answer."""
    return f"What is the {kind} of the {name}?", f"The {kind} of the {name} is "


# Each returns what is told as (depth, text) pairs, the question and its answer's beginning, and the answer: codes, with
# the words between them at odd places. They are as hard as the default model's full cache can nearly always answer.


def passkey(rng, depth):
    """One secret code in prose."""
    key = _code(rng)
    return _facts([(depth, "secret code", "blue warehouse", key)]), _ask("blue warehouse"), [key]


def needle(rng, depth):
    """The same among four other numbers, of other kinds and places."""
    facts, kinds = [(depth, "secret code", "blue warehouse", _code(rng))], rng.sample(KINDS, 4)
    for i, (kind, place) in enumerate(zip(kinds, rng.sample(PLACES[1:], 4), strict=True)):
        facts.append(((depth + (i + 1) / 5) % 1, kind, f"{rng.choice(WORDS[1:])} {place}", _code(rng)))
    return _facts(facts), _ask("blue warehouse"), [facts[0][3]]


def multikey(rng, depth):
    """Four codes of four places, one of which is asked for."""
    names = [f"{w} {p}" for w, p in zip(rng.sample(WORDS, 4), rng.sample(PLACES, 4), strict=True)]
    facts = [((depth + i / 4) % 1, "secret code", name, _code(rng)) for i, name in enumerate(names)]
    return _facts(facts), _ask(names[0]), [facts[0][3]]


def multivalue(rng, depth):
    """Two codes of one place, told far from each other and asked for together."""
    ends, codes = sorted((depth, (depth + 0.5) % 1)), [_code(rng), _code(rng)]
    kinds = ["first secret code", "second secret code"]
    told = [(at, kind, "blue warehouse", code) for at, kind, code in zip(ends, kinds, codes, strict=True)]
    question = (
        "What are the first and the second secret code of the blue warehouse?",
        _ask("blue warehouse", kinds[0])[1],
    )
    return _facts(told), question, [codes[0], f", and the {kinds[1]} of the blue warehouse is ", codes[1]]


def recall(rng, depth):
    """A list of four codes in one place."""
    names = [f"{w} {p}" for p, w in zip(rng.sample(PLACES, 4), rng.sample(WORDS, 4), strict=True)]
    codes, i = [_code(rng) for _ in names], rng.randrange(4)
    told = "".join(f"The secret code of the {n} is {c}.\n" for n, c in zip(names, codes, strict=True))
    return [(depth, "\n" + told)], _ask(names[i]), [codes[i]]


def tracking(rng, depth):
    """A chain of three: the code that was asked for is another's, which is another's."""
    a, b = rng.sample(WORDS[1:], 2)
    key = _code(rng)
    told = [f"{a} warehouse is {key}", f"{b} warehouse is that of the {a} warehouse"]
    chain = [f"The secret code of the {what}." for what in (*told, f"blue warehouse is that of the {b} warehouse")]
    return [((depth + i / 3) % 1, f"\n{line}\n") for i, line in enumerate(chain)], _ask("blue warehouse"), [key]


TASKS = {f.__name__: f for f in (passkey, needle, multikey, multivalue, recall, tracking)}


def sample(task: str, tokenizer, text: list[int], length: int, depth: float, rng: random.Random) -> Sample:
    """Return one question of about `length` tokens in all, with a filler from a random place of `text`."""
    pieces, (asked, begin), parts = TASKS[task](rng, depth)
    start = rng.randrange(0, len(text) - length)  # after the codes, so that seeds of other tools give the same numbers
    head = tokenizer.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
    question = tokenizer.encode(f"\n{asked}<|im_end|>\n<|im_start|>assistant\n{begin}")
    parts = [tokenizer.encode(part) for part in parts]
    answer = [t for ids in parts for t in ids]
    told = [(at, tokenizer.encode(piece)) for at, piece in sorted(pieces, key=lambda p: p[0])]
    n = length - len(head) - len(question) - len(answer) - sum(len(ids) for _, ids in told)
    if n < 0:
        raise ValueError(f"{task} needs more than {length} tokens")
    filler, context, done = text[start : start + n], list(head), 0
    for at, ids in told:
        cut = int(at * n)
        context += filler[done:cut] + ids
        done = cut
    scored = [i % 2 == 0 for i, ids in enumerate(parts) for _ in ids]
    return Sample(task, depth, context + filler[done:], question, answer, scored)


def samples(task: str, tokenizer, text: list[int], length: int, count: int, seed: int | None = None) -> list[Sample]:
    """Return `count` questions at evenly spread depths."""
    rng = random.Random(length if seed is None else seed)
    return [sample(task, tokenizer, text, length, (i + 0.5) / count, rng) for i in range(count)]
