"""Compare methods on this machine: python -m nanokv.eval quick

quick               every method at two strengths, some minutes
full                a grid of methods, strengths, text windows and retrieval tasks; goes on where it was interrupted
compare SPEC ...    what specs hold and how far they are from the full cache
speed SPEC ...      time to first token and tokens per second, side by side
plot                tables and pictures from what quick or full found
"""

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from nanokv.eval import run, summary


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["compare"], ["speed"]):
        from nanokv.eval import compare, speed

        return (compare if argv[0] == "compare" else speed).main(argv[1:])
    wide = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n", 1)[1], formatter_class=wide)  # fmt: skip
    parser.add_argument("command", choices=("quick", "full", "plot", "compare", "speed"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 prose instead of the standard library's documentation")
    parser.add_argument("--out", metavar="FILE", help="results, one JSON line each (default: eval-COMMAND.jsonl)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, and full")
    args = parser.parse_args(argv)
    path = Path(args.out or f"eval-{'full' if args.command == 'plot' else args.command}.jsonl")
    if args.command == "plot":
        return plot(path)
    from weights import LoadError, load

    start = time.monotonic()
    try:
        if args.jobs < 1:
            raise ValueError("--jobs must be at least 1")
        if args.text and not os.path.isfile(args.text):
            raise ValueError(f"cannot read {args.text}")
        model, _ = load(args.model, args.dtype)
        chosen, units = plan(args.command, model.config)
        if args.methods:
            known = {s.method for s in chosen}
            if bad := [m for m in args.methods if m not in known]:
                raise ValueError(f"no method {bad[0]!r} here; there are {', '.join(sorted(known))}")
            chosen = [s for s in chosen if s.method in (*args.methods, "full")]
        chosen = run.check(model, chosen, min(u.context for u in units))
        del model
        records = run.run(units, chosen, path, args.model, args.dtype, args.text, args.jobs)
    except (LoadError, ValueError, NotImplementedError, OSError) as error:
        print(f"eval: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\neval: interrupted; what was measured is in {path}, and the same command goes on there", file=sys.stderr
        )
        return 130
    show(records, path, f"{args.model}, {args.dtype}, {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def plan(command: str, config) -> tuple[list[run.Setting], list[run.Unit]]:
    """Return the settings and units of a command."""
    if command == "quick":
        chosen = run.settings(config, budgets=[0.5, 0.25], bits=[4, 2], ranks=[0.75, 0.5])
        return chosen, [run.Unit("text", 512, i, 2, 32) for i in range(2)] + [
            run.Unit("passkey", 512, i, 2) for i in range(2)
        ]
    chosen = run.settings(config, budgets=[0.75, 0.5, 0.25, 0.1], bits=[8, 4, 2], ranks=[0.75, 0.5, 0.25])
    units = [run.Unit("text", 2048, i, 8, 256) for i in range(8)]
    return chosen, units + [run.Unit(t, 1024, i, 6) for t in ("passkey", "needle", "tracking") for i in range(6)]


def show(records: list[dict], path: Path, title: str) -> None:
    """Print the table and write it as Markdown beside the results."""
    rows = summary.summarise(records)
    Console(width=max(150, Console().width)).print(summary.table(rows, title))
    part = path.with_suffix(".md.part")
    part.write_text(summary.markdown(rows), encoding="utf-8")
    part.replace(path.with_suffix(".md"))


def plot(path: Path) -> int:
    """Draw what is in a results file."""
    records = run.read(path)
    if not records:
        print(f"eval: error: {path} holds no results; run quick or full first, or give --out", file=sys.stderr)
        return 2
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("eval: error: plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    rows, stem = summary.summarise(records), path.with_suffix("")
    show(records, path, str(path))
    made = summary.pareto(rows, "kl", "KL from the full cache, nats per token", stem.with_name(stem.name + "-quality"))
    made += summary.pareto(rows, "agnostic_nll", "NLL of hidden facts, question unseen, nats per token",
                           stem.with_name(stem.name + "-retrieval"))  # fmt: skip
    for setting in [
        r["setting"] for r in rows if "agnostic" in r and (r["setting"] == "full" or "50%" in r["setting"])
    ]:
        name = "".join(c if c.isalnum() else "-" for c in setting).strip("-")
        made += summary.heat(records, setting, "agnostic", stem.with_name(f"{stem.name}-depth-{name}"))
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
