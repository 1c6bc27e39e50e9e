"""What the command line shows: the closing table, JSON, the list of methods, notes and errors."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nanokv import kernels
from nanokv.cache import KVCache
from nanokv.chat import Beside
from nanokv.methods import available, find

try:
    import resource
except ImportError:  # Windows
    resource = None


class Wrong(Exception):
    """Something the user can put right; the message is for them."""


def flag(parameter: str) -> str:
    """Return the command-line flag of a method's parameter."""
    return "--" + parameter.replace("_", "-")


@dataclass
class Result:
    """What was made and how long it took, in seconds; `first` includes reading the prompt."""

    job: object  # nanokv.cli.Job
    cache: KVCache
    n_prompt: int
    seed: int | None
    begun: int = 0  # tokens that a loaded cache held already
    beside: Beside | None = None  # the full cache, with --compare
    text: str = ""
    tokens: list = field(default_factory=list)
    first: float = 0.0
    decoding: float = 0.0  # of all tokens but the first
    compiling: float | None = None  # the part of it that compiled the step, with --compile
    exhausted: bool = False  # the engine had nothing more to give
    interrupted: bool = False

    @property
    def speed(self) -> float | None:
        """Return tokens per second, of all but the first, and but the one whose step was being compiled."""
        n = len(self.tokens) - 1 - (self.compiling is not None)
        return n / (self.decoding - (self.compiling or 0)) if n > 0 else None

    @property
    def ended(self) -> str:
        """Say why there is no more text."""
        if self.interrupted or not self.exhausted:
            return "Ctrl-C" if self.interrupted else "a stop string"
        if len(self.tokens) == self.job.args.max_new_tokens:
            return "--max-new-tokens"
        # Before the end of a text was chosen the last token had been read; a full context leaves it unread.
        read = (self.cache.next_position[0] if self.cache.B else 0) - self.begun - self.n_prompt
        return "the end of the text" if read == len(self.tokens) else "a full context"


def report(result: Result) -> None:
    """Show what the run cost, on standard error, or with --json all there is to say, on standard output."""
    if result.job.args.json:
        write(json.dumps(as_json(result)) + "\n")
        return
    if sys.stdout.isatty():
        write("\n")
    table = Table(show_header=False, box=box.ROUNDED)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in measure(result).items():
        table.add_row(*row)
    with suppress(OSError):  # nobody reads it
        console(sys.stderr).print("", table, sep="\n")
    if result.ended == "a full context":
        context = result.cache.config.context
        note(f"the text ended because the model's context of {context} tokens is full; methods that renumber positions,"
             " such as streamingllm, have no such limit")  # fmt: skip
    if why := idle(result.cache):
        note(why)


def idle(cache: KVCache) -> str:
    """Say which policy had nothing to forget, or return an empty string."""
    budgets = [p for p in cache.policies if hasattr(p, "budget")]
    read = sum(cache.next_position) * cache.config.n_kv_heads
    if not read or len(budgets) != 1 or any(sum(c.counts) < read for c in cache.layers if c.slots is not None):
        return ""
    name, most, n = budgets[0].name, budgets[0].budget, max(cache.next_position)
    return f"{name}(budget={most}) forgot nothing: {n} tokens; try --ratio 0.25"


def measure(result: Result) -> dict[str, str]:
    """Return the rows of the closing table."""
    job, args, n = result.job, result.job.args, len(result.tokens)
    total, peak = result.cache.ledger()["total"], peak_memory(job.device)
    sampling = "greedy" if result.seed is None else f"temperature {args.temperature:g}, seed {result.seed}"
    rows = {
        "method": result.cache.spec,
        "model": args.model,
        "prompt tokens": f"{result.n_prompt:,}",
        "new tokens": f"{n:,}, {sampling}, ended by {result.ended}",
        "time to first token": f"{result.first:.2f} s" if n else "-",
        "decode": f"{result.speed:.1f} tokens/s" if result.speed else "-",
        "cache held": size(total["held"]),
        "full cache": size(total["full"]),
        "ratio": compare(total["full"], total["held"]),
        "peak memory": f"{size(peak)} ({'GPU tensors' if job.device.type == 'cuda' else 'process'})" if peak else "-",
        "backend": f"{kernels.used() or 'torch'}, as {args.backend} chose",
        "dtype, device": f"{str(job.dtype).removeprefix('torch.')}, {job.device}, {torch.get_num_threads()} threads",
    }
    if result.beside and result.beside.kl:
        kl, same, parted = result.beside.kl, result.beside.same, result.beside.parted
        where = "greedy text is the same" if parted is None else f"greedy text parts at new token {parted + 1}"
        rows["against full"] = (
            f"KL {sum(kl) / len(kl):.4f} nats, top token the same {sum(same) / len(same):.1%}, {where}"
        )
    if result.compiling is not None:
        rows["compiled"] = f"in {result.compiling:.1f} s, which are not in the tokens/s"
    if args.backend == "both":
        parts = [f"{c.difference:.1e}" for c in result.cache.layers]
        rows["backends differ"] = f"by at most {max(parts, key=float)} (per layer: {' '.join(parts)})"
    if total["constants"]:
        rows["constants"] = f"{size(total['constants'])} derived from the model, not part of the cache"
    return rows


def as_json(result: Result) -> dict:
    """Return everything about a run; times in seconds, memory in bytes."""
    job, n = result.job, len(result.tokens)
    differ = [c.difference for c in result.cache.layers] if job.args.backend == "both" else None
    out = {
        "text": result.text, "tokens": result.tokens, "method": result.cache.spec, "model": job.args.model,
        "prompt_tokens": result.n_prompt, "new_tokens": n, "ended_by": result.ended, "seed": result.seed,
        "time_to_first_token": result.first if n else None,
        "tokens_per_second": result.speed, "seconds_compiling": result.compiling,
        "ledger": result.cache.ledger()["total"], "peak_memory": peak_memory(job.device),
        "dtype": str(job.dtype).removeprefix("torch."), "device": str(job.device), "threads": torch.get_num_threads(),
        "backend": kernels.used() or "torch", "backends_differ": differ,
    }  # fmt: skip
    if result.beside:
        out["compare"] = {"kl": result.beside.kl, "same_top_token": result.beside.same, "parted": result.beside.parted}
    return out


def held(cache: KVCache) -> str:
    """Say in one line what a cache has read and holds."""
    total = cache.ledger()["total"]
    read = cache.next_position[0] if cache.B else 0
    return f"{read:,} tokens read, {size(total['held'])} held, {compare(total['full'], total['held'])}"


def size(n: int) -> str:
    """Write bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 1 << power:
            return f"{n / (1 << power):.2f} {unit}"
    return f"{n} bytes"


def compare(full: int, held: int) -> str:
    """Say how much smaller than an uncompressed cache this one is, or how much larger."""
    if not full or not held:
        return "-"
    return f"{full / held:.1f}x smaller" if full >= held else f"{held / full:.2f}x larger"


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes in use so far: on a GPU by tensors, else by this process; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def list_methods() -> None:
    """Show every method in a table on standard output."""
    table = Table("name", "kind", "axis", "parameters", "paper", box=box.ROUNDED)
    for info in available():
        table.add_row(info.name, info.kind, info.axis, "\n".join(parameters_of(info)), info.paper)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    target = console(sys.stdout)
    with target.capture() as text:
        target.print(table)
    write(text.get())


def explain(name: str) -> None:
    """Print a method's header and its parameters on standard output."""
    try:
        info = find(name)
    except ValueError as e:
        raise Wrong(str(e)) from e
    lines = [info.header, "", "Parameters:", *(parameters_of(info) or ["none"])]
    write(f"{info.name} ({info.kind})\n\n" + "\n".join(lines) + "\n")


def parameters_of(info) -> list[str]:
    """Return a method's flags with their defaults."""
    return [f"{flag(k)} {v!r}" for k, v in info.parameters.items()]


def console(stream) -> Console:
    """Return a console that prints text as it is, and tables 120 wide where there is no window."""
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 120)


def note(message: str) -> None:
    """Tell the user something, in one line on standard error, of 500 characters at most and all of them visible."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    with suppress(OSError):  # nobody reads it
        print("generate.py:", line if len(line) <= 480 else line[:477] + "...", file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write to standard output at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:  # the disk is full
        mute()
        raise Wrong(f"cannot write to standard output: {e.strerror}") from e


def mute() -> None:
    """Let what is buffered for a reader that has gone vanish, so that Python does not complain when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
