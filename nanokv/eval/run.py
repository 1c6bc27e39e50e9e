"""The grid: which settings are compared, one process per core, and results that survive an interruption.

A result is one JSON line with a key; what is there already is not computed again. Lines are written by one process,
each whole and flushed, so a run that was killed leaves at most one broken line, which the next run cuts off. What
fails is written down as a line with an `error`, ends nothing, and is tried again by the next run.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanokv import KVCache
from nanokv.eval import score, tasks
from nanokv.methods import available

MODES = ("agnostic", "aware")
PARTS = 8  # settings that one process measures at a time


@dataclass(frozen=True)
class Setting:
    """One method at one strength: `share` of the entries kept, or `bits`, or `rank` of head_dim, by its parameters."""

    method: str
    knob: str = ""  # budget (a share of the prompt), bits, rank, or nothing
    value: float = 0
    more: str = ""  # further parameters as in a spec; {past_sinks} stands for the budget less four
    name: str = ""  # another name in tables than the method's
    modes: tuple = MODES  # of retrieval questions that it is asked

    @property
    def label(self) -> str:
        """Return a name such as "snapkv 50%", the same for every context length."""
        name = self.name or self.method
        if not self.knob:
            return name
        return f"{name} " + (f"{100 * self.value:.6g}%" if self.knob == "budget" else f"{self.knob}={self.value:g}")

    def spec(self, prompt: int) -> str:
        """Return the spec for a prompt of so many tokens."""
        value = int(self.value)
        if self.knob == "budget":
            value = max(1, int(self.value * prompt + 1e-9))  # rounded down, but 0.29 * 100 is 29
        first = [f"{self.knob}={value}"] if self.knob else []
        inner = ",".join(first + ([self.more.format(past_sinks=value - 4)] if self.more else []))
        return f"{self.method}({inner})" if inner else self.method


def settings(config, budgets: list[float], bits: list[int], ranks: list[float]) -> list[Setting]:
    """Return the full cache and every method at every strength that its parameters offer and the model allows."""
    out = [Setting("full")]
    for info in available():
        p = info.parameters
        if "budget" in p:
            out += [Setting(info.name, "budget", b) for b in budgets]
        elif "bits" in p:
            out += [Setting(info.name, "bits", b) for b in bits]
        elif "rank" in p:
            out += [Setting(info.name, "rank", int(r * config.head_dim)) for r in ranks]
    return out


@dataclass(frozen=True)
class Unit:
    """What is read as one batch: windows of text, or retrieval questions, `index` of `count` evenly spread ones."""

    task: str  # "text" or a name of tasks.TASKS
    context: int  # tokens of a window's prompt, or of a whole question with its answer
    index: tuple
    count: int
    tokens: int = 0  # that follow a window's prompt
    seed: int | None = None  # of questions; default: the context

    def key(self, index: int, setting: str, mode: str = "") -> str:
        """Return what names one result."""
        parts = self.task, self.context, index, self.count, self.tokens, self.seed, setting, mode
        return "|".join(map(str, parts))

    def keys(self, setting: Setting) -> list[str]:
        """Return what names the results of one setting."""
        modes = [""] if self.task == "text" else setting.modes
        return [self.key(i, setting.label, m) for i in self.index for m in modes]


def units(task: str, context: int, count: int, tokens: int = 0, seed: int | None = None, batch: int = 6) -> list[Unit]:
    """Return windows or questions in batches."""
    return [Unit(task, context, tuple(range(count))[i : i + batch], count, tokens, seed)
            for i in range(0, count, batch)]  # fmt: skip


_worker = {}


def _start(model: str, dtype: str, path) -> None:
    from weights import load

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker["model"], tokenizer = load(model, dtype, progress=False)
    _worker["tokenizer"], _worker["corpus"] = tokenizer, tasks.corpus(tokenizer, path)


def _leave_with_parent() -> None:
    """End this process when the one that started it was killed, which would else leave it waiting for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(unit: Unit, todo: list[Setting], model=None, tokenizer=None, corpus=None) -> list[dict]:
    """Return the results of one unit, or for a setting that fails a record with its error in one line."""
    if model:
        _worker.update(model=model, tokenizer=tokenizer, corpus=corpus, unit=None)
    if _worker.get("unit") != unit:  # the prompts that were read stay for the next settings
        _worker["scores"] = None  # give memory back before more is taken
        _worker["scores"] = _begin(unit, _worker["model"], _worker["tokenizer"], _worker["corpus"])
        _worker["unit"] = unit
    out = []
    for indices, depths, length, ask in _worker["scores"]:
        for setting in todo:
            for mode in [""] if unit.task == "text" else setting.modes:
                spec = setting.spec(length(mode))
                try:
                    found = ask(spec, mode)
                except Exception as error:  # whatever it is, the others are measured
                    found = [{"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}] * len(indices)
                head = {"setting": setting.label, "spec": spec, "task": unit.task, "context": unit.context}
                for i, depth, r in zip(indices, depths, found, strict=True):
                    more = {"mode": mode, "depth": depth, "seed": unit.seed or unit.context} if mode else {}
                    out.append({"key": unit.key(i, setting.label, mode), **head, "index": i, **more, **r,
                                "peak": peak()})  # fmt: skip
    return out


def _begin(unit: Unit, model, tokenizer, corpus) -> list[tuple]:
    """Return (indices, depths, length of the prompt by mode, what scores a spec in a mode) for equally long prompts."""
    if unit.task == "text":
        starts = tasks.windows(len(corpus), unit.context, unit.tokens, unit.count)
        ids = [corpus[starts[i] : starts[i] + unit.context + unit.tokens] for i in unit.index]
        text = score.Text(model, torch.tensor(ids), unit.context)
        return [(unit.index, [None] * len(unit.index), lambda _: unit.context, lambda spec, _: text(spec))]
    asked = tasks.samples(unit.task, tokenizer, corpus, unit.context, unit.count, unit.seed)
    shape = {i: (len(asked[i].context), len(asked[i].question), len(asked[i].answer)) for i in unit.index}
    out = []
    for _, same in groupby(sorted(unit.index, key=shape.get), shape.get):
        same = list(same)
        q = score.Question(model, [asked[i] for i in same])
        out.append((same, [asked[i].depth for i in same], q.length, q))
    return out


def peak() -> int | None:
    """Return the most bytes that this process has held in memory so far, weights and all; None where unknown."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def code() -> str:
    """Return a hash of the source of this package: results of different code are not mixed."""
    root, h = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        h.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:12]


def about(model: str, dtype: str, text) -> dict:
    """Return what a result depends on. OSError if the text cannot be read, ValueError if it is no UTF-8."""
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
        ).stdout
    except OSError:
        commit = ""
    sha = hashlib.sha256(tasks.prose(text).encode()).hexdigest()[:12]
    return {"about": {"model": model, "dtype": dtype, "text": text or "pydoc_data.topics", "text_sha256": sha,
                      "code": code(), "torch": torch.__version__, "python": platform.python_version(),
                      "machine": platform.machine(), "cpus": os.cpu_count(), "commit": commit.strip()}}  # fmt: skip


def read(path: Path) -> list[dict]:
    """Return the results in a file, whole lines only; of two with the same key the later."""
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "key" in record:
            out[record["key"]] = record
    return list(out.values())


WHAT = {"model": "model", "dtype": "dtype", "text": "text", "text_sha256": "other contents of the text",
        "code": "other code", "torch": "torch"}  # fmt: skip


def _open(path: Path, head: dict):
    """Open a results file for appending; a broken last line is cut off. ValueError if it is of another experiment."""
    old = path.read_bytes() if path.exists() else b""
    whole = old[: old.rfind(b"\n") + 1]
    if whole:
        try:
            was = json.loads(whole.split(b"\n", 1)[0])["about"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a results file; give another --out") from None
        for key, what in WHAT.items():
            if was.get(key) != head["about"][key]:
                raise ValueError(
                    f"{path} was measured with {what}: {was.get(key)}, not {head['about'][key]}; give another --out"
                )
    elif old:
        raise ValueError(f"{path} is not a results file; give another --out")
    f = path.open("r+b" if path.exists() else "w+b")
    f.truncate(len(whole))
    f.seek(len(whole))
    if not whole:
        f.write((json.dumps(head) + "\n").encode())
        f.flush()
    return f


def run(plan: dict[Unit, list[Setting]], path: Path, model: str, dtype: str, text, jobs: int) -> list[dict]:
    """Compute what of the plan is missing in `path` and return everything that it asks for, in a fixed order."""
    with _open(path, about(model, dtype, text)) as f:
        have = {r["key"] for r in read(path) if "error" not in r}
        missing = {u: [s for s in chosen if not have.issuperset(u.keys(s))] for u, chosen in plan.items()}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            total = bar.add_task("measuring", total=sum(map(len, missing.values())))
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (model, dtype, text))
            try:
                waiting = {pool.submit(work, u, part): part for u, todo in missing.items() for part in _parts(todo)}
                for done in as_completed(waiting):
                    lines = [json.dumps(r) + "\n" for r in done.result() if r["key"] not in have]
                    f.write("".join(lines).encode())
                    f.flush()
                    bar.advance(total, len(waiting[done]))
            except BaseException:
                for p in list((pool._processes or {}).values()):
                    p.terminate()  # what they were at is lost, what is written stays
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    found = {r["key"]: r for r in read(path)}
    return [found[k] for k in sorted(k for u, chosen in plan.items() for s in chosen for k in u.keys(s))]


def _parts(todo: list[Setting]) -> list[list[Setting]]:
    """Cut a unit's settings into a few parts, so that an interruption loses minutes and not an hour."""
    return [todo[i : i + PARTS] for i in range(0, len(todo), PARTS)]


def check(model, tokenizer, plan: dict[Unit, list[Setting]], corpus: list[int], text=None) -> dict[Unit, list[Setting]]:
    """Return the plan with what this model allows; say on standard error which settings are left out, and why.

    ValueError if the model's context or the text is too short for a unit, or if two settings have one name.
    """
    config, bad = model.config, {}
    for u in plan:
        if (most := u.context + u.tokens) > config.context:
            raise ValueError(f"{u.task} needs {most} tokens, this model's context is {config.context}")
        try:
            if u.task == "text":
                tasks.windows(len(corpus), u.context, u.tokens, u.count)
            elif len(corpus) <= u.context:
                raise ValueError(f"the text has {len(corpus)} tokens, questions need more than {u.context}")
        except ValueError as error:
            raise ValueError(f"{text or 'pydoc_data.topics'} is too short: {error}") from None
        if u.task != "text":
            tasks.samples(u.task, tokenizer, corpus, u.context, u.count, u.seed)
    for length in sorted({u.context for u in plan}):
        for s in dict.fromkeys(s for u, chosen in plan.items() if u.context == length for s in chosen):
            try:
                KVCache(model, s.spec(length))
            except (ValueError, NotImplementedError) as error:
                bad.setdefault(s, f"left out: {s.label} at {length} tokens: {error}")
    print("".join(f"{line}\n" for line in bad.values()), end="", file=sys.stderr)
    for chosen in plan.values():
        labels = [s.label for s in chosen]
        if twice := [name for name in labels if labels.count(name) > 1]:
            raise ValueError(f"two settings are called {twice[0]!r}")
    return {u: [s for s in chosen if s not in bad] for u, chosen in plan.items()}
