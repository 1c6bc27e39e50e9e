"""The command line: all flags, all checks, and what runs them. The lesson is in generate.py.

Standard output carries the text and nothing else, exactly as the model made it (on a terminal, one newline more).
Progress, notes, the closing table and errors go to standard error. Exit codes: 0, 2 for anything wrong with the input
(one line says what), 130 after Ctrl-C. A reader that closes the pipe early (`| head`) ends the run quietly with 0.
"""

import argparse
import ast
import os
import re
import secrets
import select
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from safetensors import SafetensorError

import weights
from nanokv import engine, kernels
from nanokv.cache import KVCache
from nanokv.chat import Beside, Conversation
from nanokv.methods import available, find, terms
from nanokv.methods import parse as construct
from nanokv.show import Result, Wrong, console, explain, flag, held, list_methods, mute, note, report, write

PROMPT = """\
Octopuses are among the strangest animals in the sea. An octopus has three hearts: two pump blood through the \
gills and one pumps it through the rest of the body. The blood is blue, because it carries oxygen with copper \
instead of iron. Most of an octopus's five hundred million nerve cells are not in its head but in its eight arms, \
so that each arm can taste, touch and decide a little on its own. An octopus can change the colour and even the \
texture of its skin in less than a second, although it is colour-blind. It has no bones at all, and an animal as \
heavy as a large dog can squeeze through a hole the size of a coin. Octopuses open jars, use coconut shells as \
shelters, and have been seen to climb out of their tank at night, eat the fish next door, and be back home before \
morning. Most of them live for only one or two years.

What makes octopuses so intelligent?"""
MAX_PROMPT = 1 << 26  # bytes taken from a file or pipe, so that /dev/zero is an error and not a full memory
SURROGATES = re.compile("[\ud800-\udfff]")  # how Python shows bytes that are no UTF-8
STAND_IN = 1 << 30  # tokens of the prompt until they have been counted: no method finds its share too small


@contextmanager
def refusing(*kinds, because: str = ""):
    """Turn exceptions whose messages are meant for users into Wrong."""
    try:
        yield
    except kinds as e:
        raise Wrong(f"{e}{because}") from e


class Parser(argparse.ArgumentParser):
    """An argument parser that raises Wrong instead of printing its usage and leaving."""

    def error(self, message):
        raise Wrong(message)


def number(kind, what: str, fits):
    """Return an argparse type that reads an int or float and refuses one that does not fit."""

    def read(text):
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")

    return read


COUNT = number(int, "a whole number, at least 0", lambda n: n >= 0)
SIZE = number(int, "a whole number, at least 1", lambda n: 1 <= n < 2**31)
THREADS = number(int, "a whole number from 1 to 1024", lambda n: 1 <= n <= 1024)
SEED = number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
SHARE = number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)
FRACTION = number(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
HEAT = number(float, "0 or from 0.001 to 1000", lambda x: x == 0 or 0.001 <= x <= 1000)
FACTOR = number(float, "from 0.01 to 100", lambda x: 0.01 <= x <= 100)


def build_parser(own=()) -> Parser:
    """Return the parser; the flags of methods are their hyper-parameters, those of a user's `own` files too."""
    about = "Generate text with a compressed KV cache. The text goes to standard output, all else to standard error. "
    about += "Without a prompt, standard input is read if it is piped, else a built-in prompt is used."
    p = Parser(prog="generate.py", allow_abbrev=False, description=about)
    add = p.add_argument_group("model").add_argument
    add("--model", default="smollm2", help="hub id, folder or .gguf file (default: %(default)s)")
    add("--revision", help="branch, tag or commit of a model from the hub")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--threads", type=THREADS, metavar="N", help="CPU threads (default: one per core)")
    add = p.add_argument_group("cache").add_argument
    add("--method", default="full", metavar="SPEC", help="a, a+b or 'a(budget=512)+b(bits=2)' (default: %(default)s)")
    add("--ratio", type=SHARE, metavar="R",
        help="instead of --budget: budget = max(1, floor(R * prompt tokens + 0.5)) entries per KV head")  # fmt: skip
    add("--backend", default="auto", metavar="NAME",
        help="torch: the readable text; triton: kernels; auto: the fastest; both: compare (default: auto)")  # fmt: skip
    add("--compile", action="store_true", help="compile each step of the full cache as a whole, on a CPU")
    add("--list-methods", action="store_true", help="show all methods and leave")
    add("--explain", metavar="METHOD", help="show what a method does and leave")
    add("--save-cache", metavar="FILE", help="write the cache to a file at the end")
    add("--load-cache", metavar="FILE", help="go on from a saved cache, with the method it was made by")
    add("--compare", action="store_true", help="run the full cache beside, and say where the predictions part")
    group = p.add_argument_group("prompt")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="what to say to the model")
    add("--prompt-file", metavar="PATH", help="UTF-8; - is standard input; one newline at the end is dropped")
    add = group.add_argument
    add("--system", metavar="TEXT", help="system message")
    add("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    add(
        "--chunk", type=SIZE, metavar="N", help=f"tokens read per pass (default: {engine.CHUNK}, in 16 bits twice that)"
    )
    add = p.add_argument_group("text").add_argument
    add("--max-new-tokens", type=COUNT, default=200, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=HEAT, default=0.0, metavar="X", help="0 is greedy (the default)")
    add("--top-k", type=COUNT, default=0, metavar="N", help="0 is off (the default)")
    add("--top-p", type=SHARE, default=1.0, metavar="X", help="1 is off (the default)")
    add("--min-p", type=FRACTION, default=0.0, metavar="X", help="0 is off (the default)")
    add("--repetition-penalty", type=FACTOR, default=1.0, metavar="X", help="1 is off (the default)")
    add("--seed", type=SEED, metavar="N", help="for temperatures above 0 (default: a new one, shown at the end)")
    add("--stop", action="append", default=[], metavar="STR", help="end before this text; may be given several times")
    add("--ignore-eos", action="store_true", help="do not end where the model would")
    add("--chat", action="store_true", help="talk in turns over one cache; /reset, /cache and /save FILE, Ctrl-D ends")
    add("--json", action="store_true", help="write one JSON object with the text and all measurements, and no table")
    add_method_flags(p, [*available(), *own])
    return p


def add_method_flags(parser: Parser, infos: list) -> None:
    """Add a flag for every hyper-parameter of any method; its help names the methods and their defaults."""
    add = parser.add_argument_group("parameters of methods", "with the methods that have them").add_argument
    defaults: dict[str, dict] = {}  # parameter -> method -> default
    for info in infos:
        for name, default in info.parameters.items():
            defaults.setdefault(name, {})[info.name] = default
    for name, of in sorted(defaults.items()):
        help = ", ".join(f"{m} {d!r}" for m, d in of.items())
        switch = all(isinstance(d, bool) for d in of.values())
        look = {"action": argparse.BooleanOptionalAction} if switch else {"metavar": "VALUE"}
        with suppress(argparse.ArgumentError):  # a general option has this name: write the parameter inside --method
            add(flag(name), dest="parameter " + name, default=None, help=help.replace("%", "%%"), **look)


def own_methods(argv) -> list:
    """Return the methods that --method names by the path of a file; what is wrong with them is said later."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="full")
    with suppress(ValueError, SystemExit):
        return [find(name) for name, _ in terms(first.parse_known_args(argv)[0].method) if name.endswith(".py")]
    return []


def parse(argv=None) -> argparse.Namespace:
    """Read the command line; the methods' parameters that were given end up in `parameters`, as text or bool."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(own_methods(argv))
    # --n_sink is --n-sink; what follows "=" and what is no flag stays as it is
    argv = [re.sub(r"^--[\w-]+(?==|\Z)", lambda m: m[0].replace("_", "-"), a) for a in argv]
    args = parser.parse_args(argv)
    given = {k.removeprefix("parameter "): v for k, v in vars(args).items() if k.startswith("parameter ")}
    args.parameters = {k: v for k, v in given.items() if v is not None}
    return args


@dataclass
class Job:
    """What to do: the arguments and what was made of them."""

    args: argparse.Namespace
    spec: str  # the methods, with the parameters that were given
    prompt: str
    dtype: torch.dtype
    device: torch.device
    notes: list = field(default_factory=list)  # shown once nothing can be refused any more


def plan(args: argparse.Namespace) -> Job:
    """Check the arguments and read the prompt; raise Wrong."""
    with refusing(ValueError, NotImplementedError):
        dtype, device = weights.parse_dtype(args.dtype), weights.parse_device(args.device)
        kernels.use(args.backend)
        chosen = choose(args.method, args.parameters)
        if args.ratio is not None:
            leave_to_ratio(chosen, args)
        construct(spec(chosen), None if args.chat else STAND_IN)
    if not args.model:
        raise Wrong("--model is empty")
    with_kernels = args.backend == "triton" or (args.backend == "both" and device.type != "cpu")
    if with_kernels and (why := kernels.missing(device)):
        raise Wrong(f"--backend {args.backend}: {why}")
    if args.load_cache and (args.method != "full" or args.parameters or args.ratio):
        raise Wrong("--load-cache brings its own method, so --method, --ratio and their parameters do not go with it")
    if args.chat and (args.json or args.compare or args.raw or args.ratio or args.prompt or args.prompt_file):
        raise Wrong("--chat does not go with --json, --compare, --raw, --ratio, --prompt and --prompt-file")
    if args.compile and (args.method != "full" or args.load_cache or args.chat or args.compare):
        raise Wrong("--compile is for one text with the method full; not for --load-cache, --chat and --compare")
    if args.compile and (device.type != "cpu" or args.backend != "auto"):
        raise Wrong("--compile is for steps on a CPU, and is a backend of its own: it goes with --backend auto only")
    if args.save_cache is not None:
        check_writable(args.save_cache)
    if args.load_cache and args.system is not None:
        raise Wrong("--system stands before a text, and a loaded cache has begun its own")
    if args.raw and args.system is not None:
        raise Wrong("--system needs the chat template, which --raw leaves out")
    if "" in args.stop:
        raise Wrong("--stop must not be empty")
    prompt = "(a conversation)" if args.chat else read_prompt(args)
    if not prompt.strip():
        raise Wrong("the prompt is empty")
    for text in (prompt, args.system or "", *args.stop):
        if SURROGATES.search(text):
            raise Wrong(f"{text[:40]!r} is not valid UTF-8")
    job = Job(args, spec(chosen), prompt, dtype, device)
    if args.temperature == 0 and (args.top_k or args.top_p < 1 or args.min_p or args.seed is not None):
        job.notes.append("--top-k, --top-p, --min-p and --seed do nothing at temperature 0")
    return job


def choose(method: str, given: dict) -> list:
    """Return (method, parameters) for each term of --method; flags fill in what it leaves open."""
    chosen = [(find(name), parameters) for name, parameters in terms(method)]
    for name, text in given.items():
        owners = [(info, parameters) for info, parameters in chosen if name in parameters_in(info, chosen)]
        if not owners:
            raise Wrong(f"{flag(name)} is no parameter of {method}: {flags_of(chosen)}")
        if all(name in parameters for _, parameters in owners):
            raise Wrong(f"{flag(name)} is already given in --method {method}")
        for info, parameters in owners:
            parameters.setdefault(name, read_value(text, info.parameters[name]))
    return chosen


def parameters_in(info, chosen: list) -> dict:
    """Return a method's parameters beside the others: a plan's own, and its policy's if that is the one it brings."""
    bring = [other for other, _ in chosen if other.kind == "plan" and other.cls.brings]
    brought = not any(other.kind == "policy" for other, _ in chosen) and bring[:1] == [info]
    own = {f.name for f in fields(info.cls)}
    return {k: v for k, v in info.parameters.items() if brought or k in own}


def read_value(text, default):
    """Turn a flag's text into a Python value; whether its type is right is for the method to say."""
    if isinstance(text, bool) or isinstance(default, str):
        return text
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def flags_of(chosen: list) -> str:
    """Say which parameters the chosen methods have."""
    flags = [(info.name, ", ".join(map(flag, parameters_in(info, chosen)))) for info, _ in chosen]
    return "; ".join(f"{name} has {has or 'no parameters'}" for name, has in flags)


def leave_to_ratio(chosen: list, args: argparse.Namespace) -> None:
    """Give --ratio to the methods whose budget it decides."""
    if "budget" in args.parameters:
        raise Wrong("--ratio and --budget exclude each other")
    owners = [parameters for info, parameters in chosen if "budget" in parameters_in(info, chosen)]
    by_ratio = [parameters for parameters in owners if not {"budget", "ratio"} & set(parameters)]
    if not owners:
        raise Wrong(f"--ratio needs a method with a budget: {flags_of(chosen)}")
    if not by_ratio:
        raise Wrong(f"--ratio: the budget is already given in --method {args.method}")
    for parameters in by_ratio:
        parameters["ratio"] = args.ratio


def spec(chosen: list) -> str:
    """Write the methods as KVCache reads them, with the given parameters."""
    out = []
    for info, given in chosen:
        inside = ", ".join(f"{k}={literal(v)}" for k, v in given.items())
        name = info.source or info.name
        out.append(f"{name}({inside})" if inside else name)
    return "+".join(out)


def literal(value) -> str:
    """Write a value so that it can be read again: an infinite number has no literal but one that is too large."""
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def check_writable(path: str) -> None:
    """Raise Wrong unless a file can be at this path, and nothing else is there."""
    if not path or "\0" in path:
        raise Wrong("a file to save the cache in needs a name")
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise Wrong(f"cannot write {path}: it is a folder, or its folder does not exist")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise Wrong(f"cannot write {path}: there is something that is no file")


def someone_writes(stream, patience: float = 2.0) -> bool:
    """Say whether a pipe or file has something to read, or has ended, within `patience` seconds.

    Scripts and schedulers often leave standard input open and silent; waiting for it would be for ever.
    """
    try:
        if os.name == "nt" or select.select([stream], [], [], patience)[0]:
            return True
    except (OSError, ValueError, TypeError):  # no file of the system's: reading will tell
        return True
    note("nothing comes on standard input, so the built-in prompt is used; --prompt-file - would wait")
    return False


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt from --prompt, a file or a pipe, else the built-in one."""
    if args.prompt is not None:
        return args.prompt
    path = args.prompt_file
    waiting = threading.Timer(2, note, ["waiting for a prompt on standard input"])
    try:
        if path is None and (sys.stdin.isatty() or not someone_writes(sys.stdin)):
            return PROMPT
        if path in (None, "-"):
            waiting.start()
            data = sys.stdin.buffer.read(MAX_PROMPT + 1)
        else:
            with open(path, "rb") as f:
                data = f.read(MAX_PROMPT + 1)
    except (OSError, ValueError, AttributeError) as e:  # closed; a null byte in the path; no standard input
        if path is None:
            return PROMPT
        raise Wrong(f"cannot read the prompt from {path}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        waiting.cancel()
    if len(data) > MAX_PROMPT:
        raise Wrong(f"the prompt in {path or 'standard input'} is longer than {MAX_PROMPT >> 20} MiB")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise Wrong(f"the prompt in {path or 'standard input'} is not UTF-8 at byte {e.start}") from e
    return PROMPT if path is None and not data else text


def encode(job: Job, model, tokenizer, cache: KVCache | None = None) -> list[int]:
    """Return the prompt's token ids, in the chat template unless told otherwise; after `cache`, if that holds text."""
    if cache is not None and cache.B and not job.args.raw and tokenizer.template is not None:
        return Conversation(model, tokenizer, cache, job.args.system).ids(job.prompt)
    if job.args.raw or tokenizer.template is None:
        if job.args.system is not None:
            raise Wrong("this model has no chat template, which --system needs")
        if not job.args.raw:
            job.notes.append("this model has no chat template, so it continues the prompt, as with --raw")
        return tokenizer.encode(job.prompt, special=True)
    system = [] if job.args.system is None else [{"role": "system", "content": job.args.system}]
    with refusing(ValueError):
        return tokenizer.encode(tokenizer.chat([*system, {"role": "user", "content": job.prompt}]))


def open_cache(job: Job, model, n_prompt: int | None = None) -> KVCache:
    """Return the cache to begin with: a saved one, or an empty one of the chosen methods."""
    if job.args.load_cache:
        with refusing(ValueError, NotImplementedError, OSError, because=f" (--load-cache {job.args.load_cache})"):
            return KVCache.load(job.args.load_cache, model)
    because = f" (--ratio {job.args.ratio:g} of {n_prompt} prompt tokens)" if job.args.ratio else ""
    with refusing(ValueError, NotImplementedError, because=because):
        return KVCache(model, job.spec, n_prompt=n_prompt)


def run(job: Job, model, tokenizer) -> Result:
    """Generate, writing the text to standard output piece by piece."""
    args = job.args
    cache = open_cache(job, model) if args.load_cache else None
    ids = encode(job, model, tokenizer, cache)
    cache = cache or open_cache(job, model, len(ids))
    seed = None if args.temperature == 0 else secrets.randbits(32) if args.seed is None else args.seed
    begun = cache.next_position[0] if cache.B else 0
    beside = Beside(model, cache.ids[0] if begun else None) if args.compare else None
    result = Result(job, cache, len(ids), seed, begun, beside)
    reader = compiled(model, begun + len(ids) + args.max_new_tokens, result) if args.compile else model
    with reading_bar(len(ids)) as progress:
        tokens = engine.generate(
            reader, cache, ids, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=seed,
            stop=() if args.ignore_eos else tokenizer.eos, chunk=args.chunk, progress=progress, watch=result.beside,
        )  # fmt: skip
        try:
            for piece in engine.text(timed(tokens, result), tokenizer, args.stop):
                result.text += piece
                write("" if args.json else piece)
        except KeyboardInterrupt:
            if not result.tokens:
                raise
            result.interrupted = True
    if args.save_cache and not result.interrupted:
        read = cache.next_position[0] - result.begun - len(ids)
        for token in result.tokens[read:]:  # the last one was not needed until now
            model(torch.tensor([[token]]), cache, last=True)
        save(cache, args.save_cache)
    return result


def compiled(model, most: int, result: Result):
    """Return the model with compiled steps, for texts of up to `most` tokens; `result` is told how long it took."""
    from nanokv import fast_cpu

    with refusing(NotImplementedError):
        reader = fast_cpu.compiled(model, result.cache, most)
    reader.told = lambda seconds: setattr(result, "compiling", seconds)
    result.job.notes.append("--compile: the first step is being compiled, which takes about half a minute")
    return reader


def save(cache: KVCache, path: str) -> None:
    """Write a cache to a file, or say in one line why not."""
    check_writable(path)
    with refusing(OSError, SafetensorError, NotImplementedError, because=f" (--save-cache {path})"):
        cache.save(path)


def talk(job: Job, model, tokenizer) -> int:
    """Hold a conversation: a line of standard input is a message, the cache lives on across turns."""
    if tokenizer.template is None:
        raise Wrong("this model has no chat template, which --chat needs")
    chat = Conversation(model, tokenizer, open_cache(job, model), job.args.system)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 does not end the conversation
    while line := next_line(sys.stdin):
        try:
            answer(job, chat, line.strip())
        except Wrong as e:  # the conversation ends only if its user wants it to
            note(str(e))
    if job.args.save_cache:
        chat.settle()
        save(chat.cache, job.args.save_cache)
    return 0


def next_line(stdin) -> str:
    """Return the next line of a conversation, "" at its end; of one that is too long, nothing."""
    if stdin.isatty():
        print("\n> ", end="", file=sys.stderr, flush=True)
    line = stdin.readline(MAX_PROMPT)
    if len(line) < MAX_PROMPT:
        return line
    note(f"that line is longer than {MAX_PROMPT >> 20} MiB")
    while line and not line.endswith("\n"):
        line = stdin.readline(MAX_PROMPT)
    return "\n"


def answer(job: Job, chat: Conversation, message: str) -> None:
    """Obey a command, or write the reply to a message; raise Wrong where that cannot be done."""
    if message == "/reset":
        chat.reset()
    elif message == "/cache":
        note(held(chat.cache))
    elif message.startswith("/save "):
        chat.settle()
        save(chat.cache, message.removeprefix("/save ").strip())
    elif message.startswith("/"):
        note(f"{message.split()[0]} is no command; there are /reset, /cache and /save FILE")
    elif SURROGATES.search(message):
        note("that line is not valid UTF-8")
    elif message:
        reply(job, chat, message)


def reply(job: Job, chat: Conversation, message: str) -> None:
    """Write the reply to a message."""
    args, context = job.args, chat.cache.config.context
    options = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    tokens = chat.say(message, args.max_new_tokens, seed=args.seed, chunk=args.chunk,
                      stop=() if args.ignore_eos else chat.tokenizer.eos, **options)  # fmt: skip
    try:
        with refusing(ValueError, NotImplementedError, FloatingPointError, because="; /reset begins anew"):
            for piece in engine.text(patient(tokens), chat.tokenizer, args.stop):
                write(piece)
    finally:
        tokens.close()
        write("\n")
    if not chat.cache.renumbers and chat.cache.next_position[0] >= context:
        note(f"the reply ended because the model's context of {context} tokens is full; /reset begins anew")


def patient(tokens):
    """Pass tokens on; Ctrl-C ends the reply after the token under way, so that no layer of the cache is left behind."""
    stopped = []
    previous = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        for token in tokens:
            yield token
            if stopped:
                return
    finally:
        signal.signal(signal.SIGINT, previous)


def timed(tokens, result: Result):
    """Pass tokens on, noting each and how long it took to make; the time to print it does not count."""
    while True:
        start = time.perf_counter()
        checked = [] if result.tokens else [ValueError]  # the engine looks at the prompt first
        with refusing(NotImplementedError, FloatingPointError, *checked):
            token = next(tokens, None)
        took = time.perf_counter() - start
        if token is None:
            result.exhausted = True
            return
        if result.tokens:
            result.decoding += took
        else:
            result.first = took
            for message in result.job.notes:
                note(message)
        result.tokens.append(token)
        yield token


@contextmanager
def reading_bar(total: int):
    """Show how much of a long prompt has been read, if someone is looking; yield what advances it, or None."""
    if not sys.stderr.isatty() or total <= engine.CHUNK:
        yield None
        return
    columns = TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(n):
            bar.advance(task, n)
            if bar.finished:  # the text comes next, and needs the line
                bar.stop()

        yield advance


def command(argv) -> int:
    """Do what the command line says and return the exit code; raise Wrong for what the user can put right."""
    args = parse(argv)
    if args.list_methods or args.explain is not None:
        list_methods() if args.list_methods else explain(args.explain)
        return 0
    warnings.simplefilter("ignore", SyntaxWarning)  # Python's about `--bits 2or`, which gets its own line
    job = plan(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    with refusing(weights.LoadError):
        fast = args.backend != "torch"
        model, tokenizer = weights.load(args.model, job.dtype, job.device, args.revision, sys.stderr.isatty(), fast)
    if args.chat:
        return talk(job, model, tokenizer)
    result = run(job, model, tokenizer)
    report(result)
    return 130 if result.interrupted else 0


def attempt(argv) -> int:
    """Run the command; answer in one line what the user can put right, and running out of memory."""
    try:
        return command(argv)
    except Wrong as e:
        note(f"error: {e}")
    except (MemoryError, RuntimeError) as e:
        if "No working C++ compiler" in str(e):
            note("error: --compile needs a C++ compiler, such as g++ in the path or in the variable CXX")
            return 2
        words = r"out of memory|allocate memory|not enough memory"
        if not isinstance(e, MemoryError) and not re.search(words, str(e), re.I):
            raise
        note(f"error: out of memory: {(str(e) or 'no more to be had').splitlines()[0]}")
    return 2


def main(argv=None) -> int:
    """Run the command line and return its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        code = attempt(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        mute()
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except SystemExit as e:  # argparse after --help, rich after a broken pipe
        mute()
        return 0 if isinstance(e.__context__, BrokenPipeError) else e.code or 0
    finally:
        kernels.use("auto")  # for callers that go on in this process
