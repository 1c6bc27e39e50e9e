"""Prefill and decode speed of methods, side by side in one run: python -m nanokv.eval.speed --help

Contestants take turns, a few steps each, over and over, so that whatever else the machine does hits all of them;
medians are reported. transformers runs on the same weights where it is installed. The bound is what reading the weights
and the cache once per step would take at the read bandwidth measured in the same run.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanokv import KVCache
from nanokv.engine import prefill


class Ours:
    """A method of this project."""

    def __init__(self, model, spec: str):
        self.name, self.model, self.spec = spec, model, spec

    def prefill(self, ids) -> None:
        self.cache = KVCache(self.model, self.spec)
        prefill(self.model, self.cache, ids)

    def step(self, ids) -> None:
        self.model(ids, self.cache, last=True)

    def nbytes(self) -> int:
        return self.cache.nbytes


class Peer:
    """transformers with its default cache."""

    def __init__(self, model, attention: str):
        self.name, self.hf = f"transformers ({attention})", importlib.import_module("transformers")
        c, kind = (
            model.config,
            {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}.get(model.config.name, "Llama"),
        )
        config = getattr(self.hf, kind + "Config")(
            vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.eps,
            max_position_embeddings=c.context, tie_word_embeddings=c.tied, attn_implementation=attention,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )  # fmt: skip
        with torch.device("meta"):
            self.model = getattr(self.hf, kind + "ForCausalLM")(config)
        state = dict(model.slots())
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        self.model.load_state_dict(state, assign=True, strict=True)  # the same memory, not a copy
        rotary = type(self.model.model.rotary_emb)(config)  # its frequencies are no parameters
        self.model.model.rotary_emb = rotary
        self.model.eval()

    def prefill(self, ids) -> None:
        self.cache = self.hf.DynamicCache()
        self._run(ids)

    def step(self, ids) -> None:
        self._run(ids)

    def _run(self, ids) -> None:
        with torch.no_grad():
            self.model(ids, past_key_values=self.cache, logits_to_keep=1)

    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))


def bandwidth(device="cpu", mib: int = 512, tries: int = 7) -> float:
    """Return the read bandwidth in bytes per second: the median time to sum a tensor too large for most caches."""
    x, times = torch.ones(mib << 18, device=device), []
    for _ in range(tries):
        start = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times)


def contestants(model, specs: list[str], peers: list[str]) -> list:
    """Return the things to be compared; peers are attention implementations of transformers."""
    return [*(Ours(model, s) for s in specs), *(Peer(model, p) for p in peers)]


def measure(
    field: list, contexts: list[int], rounds: int, repeats: int, advance=lambda: None, vocab=1000
) -> list[dict]:
    """Time every contestant at every context; return one record each, times in seconds."""
    out = []
    for n in contexts:
        ids = torch.randint(0, vocab, (1, n), generator=torch.Generator().manual_seed(n))
        prefills, steps = {c.name: [] for c in field}, {c.name: [] for c in field}
        for _ in range(repeats):
            for c in field:
                c.cache = None
                gc.collect()
                start = time.perf_counter()
                c.prefill(ids)
                prefills[c.name].append(time.perf_counter() - start)
                advance()
        for c in field:
            c.step(ids[:, :1])  # warm up
        for _ in range(rounds):
            for c in field:
                for _ in range(3):
                    start = time.perf_counter()
                    c.step(ids[:, :1])
                    steps[c.name].append(time.perf_counter() - start)
            advance()
        for c in field:
            out.append({"context": n, "name": c.name, "prefill_s": statistics.median(prefills[c.name]),
                        "step_s": statistics.median(steps[c.name]), "best_step_s": min(steps[c.name]),
                        "cache_bytes": c.nbytes()})  # fmt: skip
            c.cache = None
    return out


def table(records: list[dict], weights: int, speed: float, base: str, title: str) -> Table:
    """Return what was measured: tokens/s, ratio to `base` at the same context, share of the bandwidth bound."""
    out = Table(title=title)
    for column in (
        "context",
        "contestant",
        "prefill tok/s",
        "ratio",
        "decode tok/s",
        "ratio",
        "of the bound",
        "cache MiB",
    ):
        out.add_column(column, justify="left" if column == "contestant" else "right")
    for r in records:
        other = next(x for x in records if x["context"] == r["context"] and x["name"] == base)
        bound = (weights + r["cache_bytes"]) / speed
        out.add_row(
            str(r["context"]), r["name"],
            f"{r['context'] / r['prefill_s']:.0f}", f"{other['prefill_s'] / r['prefill_s']:.2f}",
            f"{1 / r['step_s']:.1f}", f"{other['step_s'] / r['step_s']:.2f}",
            f"{bound / r['step_s']:.0%}", f"{r['cache_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    return out


def machine() -> dict:
    """Return what a speed depends on besides the code."""
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "load": os.getloadavg()[0],
            "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    from weights import LoadError, load

    parser = argparse.ArgumentParser(prog="python -m nanokv.eval.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", default=["full"], help="specs such as full 'kivi(bits=2)'")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], help="fp32, bf16, fp16")
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 1024, 4096])
    parser.add_argument("--peer", nargs="*", default=None, help="attention of transformers: sdpa, eager; default: sdpa")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=10, help="turns of three decode steps")
    parser.add_argument("--repeats", type=int, default=1, help="prefills of each contestant")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = args.peer
    if peers is None:
        peers = ["sdpa"] if importlib.util.find_spec("transformers") else []
    console, result = Console(width=max(100, Console().width)), []
    for dtype in args.dtype:
        try:
            model, _ = load(args.model, dtype)
            for spec in args.methods:
                KVCache(model, spec)  # what is wrong is said before anything is measured
            field = contestants(model, args.methods, peers)
        except (LoadError, ValueError, NotImplementedError, ImportError) as error:
            print(f"speed: error: {error}", file=sys.stderr)
            return 2
        total = len(args.contexts) * (len(field) * args.repeats + args.rounds)
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(dtype, total=total)
            speed = bandwidth()
            records = measure(field, args.contexts, args.rounds, args.repeats, lambda: progress.advance(task))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        about = machine() | {"dtype": dtype, "bandwidth": speed, "weights": weights, "batch": 1}
        base = field[-1].name if peers else field[0].name
        title = (f"{args.model}, {dtype}, batch 1, {about['threads']} threads, {speed / 1e9:.0f} GB/s read; "
                 f"ratios to {base}, above 1 is faster")  # fmt: skip
        console.print(table(records, weights, speed, base, title))
        result.append({"about": about, "records": records})
    if args.json:
        temporary = Path(args.json + ".part")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
