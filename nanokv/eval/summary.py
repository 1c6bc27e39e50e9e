"""From results to a table and pictures: means over windows and questions, with their errors."""

import math
import statistics
from pathlib import Path

from rich import box
from rich.table import Table

FAMILY = {"token": "o", "head": "s", "layer": "D", "channel": "^", "bits": "v", "none": "*"}  # marker by axis


def mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its 95 % interval's half width (normal approximation; nan for fewer than two values)."""
    n = len(values)
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def wilson(k: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share k / n (Wilson)."""
    z2, p = 1.96**2, k / n
    mid, half = p + z2 / (2 * n), 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (mid - half) / (1 + z2 / n), (mid + half) / (1 + z2 / n)


def summarise(records: list[dict]) -> list[dict]:
    """Return one row per setting, by bytes held: shares of the full cache's bytes, text and retrieval scores."""
    rows = []
    for setting in dict.fromkeys(r["setting"] for r in records):
        mine = [r for r in records if r["setting"] == setting]
        prose, asked = [r for r in mine if r["task"] == "text"], [r for r in mine if r["task"] != "text"]
        row = {"setting": setting, "method": setting.split()[0]}
        if prose:
            row["held"] = statistics.fmean(r["held"] / r["full"] for r in prose)
            row["overhead"] = statistics.fmean(r["overhead"] / r["held"] for r in prose)
            for name in ("rise", "kl", "same"):
                row[name], row[name + "_ci"] = mean([r[name] for r in prose])
        for mode in ("agnostic", "aware"):
            if of := [r for r in asked if r["mode"] == mode]:
                row[mode], row[mode + "_n"] = sum(r["exact"] for r in of), len(of)
                row[mode + "_nll"] = statistics.fmean(r["nll"] for r in of)
                row.setdefault("held", statistics.fmean(r["held"] / r["full"] for r in of))
        rows.append(row)
    return sorted(rows, key=lambda r: (-r["held"], r["setting"]))


COLUMNS = {
    "setting": "setting", "held": "bytes held", "overhead": "of these not payload", "rise": "NLL rise, nats",
    "kl": "KL, nats", "same": "same top token", "agnostic": "found, question unseen", "agnostic_nll": "NLL",
    "aware": "found, question seen", "aware_nll": "NLL",
}  # fmt: skip


def cells(row: dict) -> list[str]:
    """Return a row's cells as text, "-" for what was not measured."""

    def with_error(name, digits):
        return f"{row[name]:.{digits}f} ± {row[name + '_ci']:.{digits}f}" if name in row else "-"

    def share(name):
        return f"{row[name]}/{row[name + '_n']}" if name in row else "-"

    def number(name):
        return f"{row[name]:.2f}" if name in row else "-"

    return [row["setting"], f"{row['held']:.1%}", f"{row['overhead']:.1%}" if "overhead" in row else "-",
            with_error("rise", 3), with_error("kl", 4), f"{row['same']:.1%}" if "same" in row else "-",
            share("agnostic"), number("agnostic_nll"), share("aware"), number("aware_nll")]  # fmt: skip


def table(rows: list[dict], title: str) -> Table:
    """Return rows for a terminal."""
    out = Table(title=title, box=box.SIMPLE)
    for name in COLUMNS.values():
        out.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        out.add_row(*cells(row))
    return out


def markdown(rows: list[dict]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]) + "\n"


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (x, y) that no other one beats in both, smaller being better, by x."""
    best, out = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            out.append((x, y))
    return out


def _figure():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt, figure, path: Path) -> list[Path]:
    out = []
    for kind in ("png", "svg"):
        part = path.with_name(f".{path.name}.{kind}.part")
        figure.savefig(part, format=kind, dpi=110, bbox_inches="tight")
        out.append(part.replace(path.with_name(f"{path.name}.{kind}")))
    plt.close(figure)
    return out


def pareto(rows: list[dict], y: str, label: str, path: Path) -> list[Path]:
    """Draw quality against bytes held: a marker per family, a line per method, the frontier, the full cache's level."""
    from nanokv.methods import available

    plt, axes = _figure(), {i.name: i.axis.split(",")[0] for i in available()}
    figure, ax = plt.subplots(figsize=(9, 5.5))
    rows = [r for r in rows if y in r]
    for i, name in enumerate(dict.fromkeys(r["method"] for r in rows)):
        mine = sorted((r["held"], r[y]) for r in rows if r["method"] == name)
        if name == "full":
            ax.axhline(mine[0][1], color="black", lw=0.8, ls=":", label="full cache")
            continue
        style = ("-", "--", "-.", ":")[i % 4]
        ax.plot(*zip(*mine, strict=True), marker=FAMILY.get(axes.get(name), "x"), ls=style, lw=0.9, ms=6,
                color=plt.cm.viridis(i / max(1, len(axes))), label=f"{name} ({axes.get(name, '?')})")  # fmt: skip
    edge = frontier([(r["held"], r[y]) for r in rows if r["method"] != "full"])
    if edge:
        ax.plot(*zip(*edge, strict=True), color="black", lw=2, alpha=0.35, drawstyle="steps-post", label="frontier")
    ax.set(xlabel="bytes held, share of the full cache", ylabel=label)
    ax.set_xlim(left=0)
    ax.set_yscale("symlog", linthresh=0.01)
    ax.xaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1.0)) if hasattr(plt, "matplotlib") else None
    ax.legend(fontsize=7, ncol=2)
    ax.grid(alpha=0.3)
    return _save(plt, figure, path)


def heat(records: list[dict], setting: str, mode: str, path: Path) -> list[Path]:
    """Draw the NLL of answers over task (with length) and depth for one setting."""
    plt = _figure()
    of = [r for r in records if r["setting"] == setting and r.get("mode") == mode]
    names = sorted({(r["task"], r["context"]) for r in of})
    depths = sorted({round(r["depth"], 3) for r in of})
    grid = [[math.nan] * len(depths) for _ in names]
    for r in of:
        grid[names.index((r["task"], r["context"]))][depths.index(round(r["depth"], 3))] = r["nll"]
    figure, ax = plt.subplots(figsize=(1.5 + 0.6 * len(depths), 1.2 + 0.5 * len(names)))
    image = ax.imshow(grid, aspect="auto", cmap="gray_r", vmin=0, vmax=3.5)
    ax.set_xticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
    ax.set_yticks(range(len(names)), [f"{t}, {n:,} tokens" for t, n in names], fontsize=7)
    ax.set(
        xlabel="depth of the answer, share of the filler",
        title=f"{setting}, question {'seen' if mode == 'aware' else 'unseen'}",
    )
    figure.colorbar(image, label="NLL of the answer, nats per token")
    return _save(plt, figure, path)
