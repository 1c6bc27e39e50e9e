"""Prefill and decode speed of methods, side by side in one run: python -m nanokv.eval speed --help

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
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanokv import KVCache, kernels
from nanokv.engine import prefill
from nanokv.eval import plots
from nanokv.eval.compare import fits
from nanokv.files import write_json


class Ours:
    """A method of this project, on one backend."""

    def __init__(self, model, spec: str, backend: str = "auto"):
        self.name, self.model, self.spec, self.backend = spec, model, spec, backend
        self.device, self.used = model.embed_tokens.weight.device, ""

    def prefill(self, ids) -> None:
        with kernels.use(self.backend):
            self.cache = KVCache(self.model, self.spec)
            prefill(self.model, self.cache, ids)

    def step(self, ids) -> None:
        with kernels.use(self.backend):
            self.model(ids, self.cache, last=True)
            self.used = kernels.used() or "torch"

    def nbytes(self) -> int:
        return self.cache.nbytes


class Peer:
    """transformers with its default cache."""

    backend = used = "transformers"

    def __init__(self, model, attention: str):
        from weights import checkpoint_name

        self.device = model.embed_tokens.weight.device
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
        # as it would load them itself
        state = {checkpoint_name(name): t.contiguous() for name, t in model.state_dict().items()}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        self.model.load_state_dict(state, assign=True, strict=True)
        rotary = type(self.model.model.rotary_emb)(config).to(self.device)  # its frequencies are no parameters
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
    for _ in range(tries + 1):  # the first one warms up
        start = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times[1:])


def contestants(model, specs: list[str], peers: list[str], backends=("auto",), lesson=None) -> list:
    """Return the things to be compared; peers are attention implementations of transformers.

    `lesson` is the same model as nanokv/model.py has it, which the backend "torch" runs; None: it runs `model`.
    """
    models = {"torch": lesson or model}
    ours = [Ours(models.get(b, model), spec, b) for spec in specs for b in dict.fromkeys(backends)]
    if len(set(backends)) > 1:
        for c in ours:
            c.name = f"{c.spec} [{c.backend}]"
    return [*ours, *(Peer(model, p) for p in peers)]


def _seconds(f: Callable, ids, device) -> float:
    """Return how long f(ids) takes, what it leaves running on a GPU included."""
    start = time.perf_counter()
    f(ids)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    field: list, contexts: list[int], rounds: int, repeats: int, advance=lambda: None, vocab=1000
) -> list[dict]:
    """Time every contestant at every context; return one record each, times in seconds.

    prefill_s is the time to first token, from the prompt to the logits behind it.
    """
    out = []
    for n in contexts:
        ids = torch.randint(0, vocab, (1, n), generator=torch.Generator().manual_seed(n)).to(field[0].device)
        prefills, steps = {c.name: [] for c in field}, {c.name: [] for c in field}
        for _ in range(repeats):
            for c in field:
                c.cache = None
                gc.collect()
                prefills[c.name].append(_seconds(c.prefill, ids, c.device))
                advance()
        for c in field:
            _seconds(c.step, ids[:, :1], c.device)  # warm up
        for _ in range(rounds):
            for c in field:
                for _ in range(3):
                    steps[c.name].append(_seconds(c.step, ids[:, :1], c.device))
            advance()
        for c in field:
            out.append({"context": n, "name": c.name, "backend": c.backend, "used": c.used,
                        "prefill_s": statistics.median(prefills[c.name]),
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
        "decode on",
        "first token, s",
        "prefill tok/s",
        "ratio",
        "decode tok/s",
        "ratio",
        "of the bound",
        "cache MiB",
    ):
        out.add_column(column, justify="left" if column in ("contestant", "decode on") else "right")
    for r in records:
        other = next(x for x in records if x["context"] == r["context"] and x["name"] == base)
        bound = (weights + r["cache_bytes"]) / speed
        out.add_row(
            str(r["context"]), escape(r["name"]), r["used"], f"{r['prefill_s']:.2f}",
            f"{r['context'] / r['prefill_s']:.0f}", f"{other['prefill_s'] / r['prefill_s']:.2f}",
            f"{1 / r['step_s']:.1f}", f"{other['step_s'] / r['step_s']:.2f}",
            f"{bound / r['step_s']:.0%}", f"{r['cache_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    return out


def machine(device) -> dict:
    """Return what a speed depends on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "load": os.getloadavg()[0],
            "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def draw(result: list[dict], stem: Path) -> list[Path]:
    """Draw decode speed and time to first token against context, from what --json writes."""
    many = len({run["about"]["dtype"] for run in result}) > 1
    steps, firsts = {}, {}
    for run in result:
        for r in sorted(run["records"], key=lambda r: r["context"]):
            name = f"{r['name']}, {run['about']['dtype']}" if many else r["name"]
            steps.setdefault(name, []).append((r["context"], 1 / r["step_s"]))
            firsts.setdefault(name, []).append((r["context"], r["prefill_s"]))
    what = f"batch 1, {result[0]['about']['threads']} threads of {result[0]['about']['machine']}"
    made = plots.curves(steps, ("context, tokens", f"decode, tokens per second ({what})"), stem, dots=True)
    first = stem.with_name(stem.name + "-first")
    return made + plots.curves(firsts, ("prompt, tokens", f"time to first token, s ({what})"), first, dots=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", default=["full"], help="specs such as 'kivi(bits=2)', beside full")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], help="fp32, bf16, fp16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--backend", nargs="+", default=["auto"], choices=("auto", "torch", "triton"),
                        help="each method on each; torch is the readable text, triton needs a GPU")  # fmt: skip
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 1024, 4096])
    parser.add_argument("--peer", nargs="*", default=None, help="attention of transformers: sdpa, eager; default: sdpa")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=10, help="turns of three decode steps")
    parser.add_argument("--repeats", type=int, default=1, help="prefills of each contestant")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.add_argument("--plot", metavar="STEM", help="draw STEM.png, STEM.svg and STEM-first.png, STEM-first.svg")
    parser.add_argument("--read", metavar="FILE", help="measure nothing, draw what --json wrote earlier")
    return parser


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    from weights import LoadError

    args = _parser().parse_args(argv)
    try:
        if args.read and not args.plot:
            raise ValueError("--read draws what was measured; say where with --plot STEM")
        result = json.loads(Path(args.read).read_text()) if args.read else run(args)
        if args.json:
            write_json(args.json, result)
        if args.plot:
            print("\n".join(map(str, draw(result, Path(args.plot)))))
    except (LoadError, ValueError, NotImplementedError, ImportError, OSError) as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError):
        print(f"speed: error: {args.read} is not what --json writes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(args) -> list[dict]:
    """Measure what the command line asks for, print a table per dtype, and return what --json writes."""
    from weights import load

    if min(args.contexts) < 1 or args.rounds < 1 or args.repeats < 1 or (args.threads or 1) < 1:
        raise ValueError("--contexts, --rounds, --repeats and --threads must be at least 1")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("plots need matplotlib: pip install matplotlib")
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = args.peer
    if peers is None:
        peers = ["sdpa"] if importlib.util.find_spec("transformers") else []
    specs = args.methods if "full" in args.methods else ["full", *args.methods]
    console, result = Console(width=max(110, Console().width)), []
    for dtype in args.dtype:
        model, _ = load(args.model, dtype, args.device)
        device = model.embed_tokens.weight.device
        if "triton" in args.backend and (why := kernels.missing(device)):
            raise ValueError(f"--backend triton: {why}; here only torch can be measured")
        for cache in [KVCache(model, spec) for spec in specs]:  # what is wrong is said before anything is measured
            fits(cache, max(args.contexts) + 3 * args.rounds + 1)
        two = "torch" in args.backend and device.type == "cpu"
        lesson = load(args.model, dtype, args.device, fast=False)[0] if two else None
        field = contestants(model, specs, peers, args.backend, lesson)
        total = len(args.contexts) * (len(field) * args.repeats + args.rounds)
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(dtype, total=total)
            speed = bandwidth(device)
            vocab = min(1000, model.config.vocab)
            records = measure(field, args.contexts, args.rounds, args.repeats, lambda: progress.advance(task), vocab)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        about = machine(device) | {"dtype": dtype, "bandwidth": speed, "weights": weights, "batch": 1}
        base = field[-1].name if peers else next(c.name for c in field if c.spec == "full")
        title = (f"{args.model}, {dtype}, {about['device']}, batch 1, {about['threads']} threads, "
                 f"{speed / 1e9:.0f} GB/s read; ratios to {base}, above 1 is faster")  # fmt: skip
        console.print(table(records, weights, speed, base, title))
        result.append({"about": about, "records": records})
    return result


if __name__ == "__main__":
    sys.exit(main())
