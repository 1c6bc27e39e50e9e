"""The grid: which settings are compared, one process per core, and results that survive an interruption.

A result is one JSON line with a key; what is there already is not computed again. Lines are written by one process,
each whole and flushed, so a run that was killed leaves at most one broken line, which the next run cuts off.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanokv import KVCache
from nanokv.eval import score, tasks
from nanokv.methods import available


@dataclass(frozen=True)
class Setting:
    """One method at one strength: `share` of the entries kept, or `bits`, or `rank` of head_dim, by its parameters."""

    method: str
    knob: str = ""  # budget, bits, rank, or nothing
    value: float = 0

    @property
    def label(self) -> str:
        """Return a name such as "snapkv 50%", the same for every context length."""
        if not self.knob:
            return self.method
        return f"{self.method} " + (f"{self.value:.0%}" if self.knob == "budget" else f"{self.knob}={self.value:g}")

    def spec(self, context: int) -> str:
        """Return the spec for a prompt of so many tokens."""
        if not self.knob:
            return self.method
        value = max(1, round(self.value * context)) if self.knob == "budget" else int(self.value)
        return f"{self.method}({self.knob}={value})"


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
    """What one process does at a time, for all settings: a window of text, or a retrieval question."""

    task: str  # "text" or a name of tasks.TASKS
    context: int
    index: int
    count: int  # windows, or questions at evenly spread depths
    tokens: int = 0  # that follow a window

    def key(self, setting: str, mode: str = "") -> str:
        """Return what names one result."""
        return "|".join(map(str, (self.task, self.context, self.index, self.count, self.tokens, setting, mode)))


_worker = {}


def _start(model: str, dtype: str, path) -> None:
    from weights import load

    torch.set_num_threads(1)
    _worker["model"], _worker["tokenizer"] = load(model, dtype)
    _worker["text"] = tasks.corpus(_worker["tokenizer"], path)


def work(unit: Unit, todo: list[Setting], model=None, tokenizer=None, corpus=None) -> list[dict]:
    """Return the results of one unit."""
    model, tokenizer = model or _worker["model"], tokenizer or _worker["tokenizer"]
    ids = corpus if corpus is not None else _worker["text"]
    by_spec = {s.spec(unit.context): s for s in todo}
    head = {"task": unit.task, "context": unit.context, "index": unit.index}
    out = []
    if unit.task == "text":
        start = tasks.windows(len(ids), unit.context, unit.tokens, unit.count)[unit.index]
        window = torch.tensor([ids[start : start + unit.context + unit.tokens]])
        for spec, r in score.text(model, list(by_spec), window, unit.context):
            out.append(
                {"key": unit.key(by_spec[spec].label), "setting": by_spec[spec].label, "spec": spec, **head, **r}
            )
        return out
    item = tasks.samples(unit.task, tokenizer, ids, unit.context, unit.count)[unit.index]
    for spec, mode, r in score.question(model, list(by_spec), item):
        label = by_spec[spec].label
        out.append({"key": unit.key(label, mode), "setting": label, "spec": spec, "mode": mode, "depth": item.depth,
                    **head, **r})  # fmt: skip
    return out


def about(model: str, dtype: str, text) -> dict:
    """Return what a result depends on besides the code."""
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
        ).stdout
    except OSError:
        commit = ""
    return {"about": {"model": model, "dtype": dtype, "text": text or "pydoc_data.topics", "torch": torch.__version__,
                      "python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(),
                      "commit": commit.strip()}}  # fmt: skip


def read(path: Path) -> list[dict]:
    """Return the results in a file, whole lines only."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        out.append(record)
    return [r for r in out if "key" in r]


def _open(path: Path, head: dict):
    """Open a results file for appending; a broken last line is cut off. ValueError if it is of another experiment."""
    old = path.read_bytes() if path.exists() else b""
    whole = old[: old.rfind(b"\n") + 1]
    if whole:
        try:
            was = json.loads(whole.split(b"\n", 1)[0])["about"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a results file; give another --out") from None
        for what in ("model", "dtype", "text"):
            if was.get(what) != head["about"][what]:
                raise ValueError(
                    f"{path} is about {what} {was.get(what)}, not {head['about'][what]}; give another --out"
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


def run(units: list[Unit], chosen: list[Setting], path: Path, model: str, dtype: str, text, jobs: int) -> list[dict]:
    """Compute what is missing in `path` and return everything in it that was asked for, in a fixed order."""
    with _open(path, about(model, dtype, text)) as f:
        have = {r["key"] for r in read(path)}
        modes = {"text": [""]}
        missing = {
            u: [
                s
                for s in chosen
                if any(u.key(s.label, m) not in have for m in modes.get(u.task, ["agnostic", "aware"]))
            ]
            for u in units
        }
        missing = {u: todo for u, todo in missing.items() if todo}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            total = bar.add_task("measuring", total=sum(map(len, missing.values())))
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (model, dtype, text))
            try:
                waiting = {pool.submit(work, u, part): part for u, todo in missing.items() for part in _parts(todo)}
                for done in as_completed(waiting):
                    for record in done.result():
                        if record["key"] not in have:
                            f.write((json.dumps(record) + "\n").encode())
                    f.flush()
                    bar.advance(total, len(waiting[done]))
            except BaseException:
                for p in list(pool._processes.values()):
                    p.terminate()  # what they were at is lost, what is written stays
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    wanted = {u.key(s.label, m) for u in units for s in chosen for m in modes.get(u.task, ["agnostic", "aware"])}
    found = {r["key"]: r for r in read(path) if r["key"] in wanted}
    return [found[k] for k in sorted(found)]


def _parts(todo: list[Setting], most: int = 24) -> list[list[Setting]]:
    """Cut a unit's settings into a few parts, so that an interruption loses minutes and not an hour."""
    return [todo[i : i + most] for i in range(0, len(todo), most)]


def check(model, chosen: list[Setting], context: int) -> list[Setting]:
    """Return the settings that this model allows, and say on standard error which are left out, and why."""
    out = []
    for s in chosen:
        try:
            KVCache(model, s.spec(context))
            out.append(s)
        except (ValueError, NotImplementedError) as error:
            print(f"left out: {s.label}: {error}", file=sys.stderr)
    return out
