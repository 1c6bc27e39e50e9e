"""Pictures of results, PNG and SVG, readable in black and white: shapes tell kinds apart, dashes tell methods apart."""

import math
from pathlib import Path

from nanokv.files import whole

MARKERS = {"token": "o", "head": "s", "layer": "D", "channel": "^", "bits": "v", "none": "*"}  # by what is shrunk
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (1, 3)), (0, (8, 2)), (0, (5, 1, 2, 1)))


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (x, y) that no other one beats in both, smaller being better, by x."""
    best, out = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            out.append((x, y))
    return out


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nanokv"  # the same results make the same file
    import matplotlib.pyplot as plt

    return plt


def _save(plt, figure, path: Path) -> list[Path]:
    out = []
    for kind in ("png", "svg"):
        out.append(path.with_name(f"{path.name}.{kind}"))
        date = {"metadata": {"Date": None}} if kind == "svg" else {}
        with whole(out[-1]) as part:
            figure.savefig(part, format=kind, dpi=110, bbox_inches="tight", **date)
    plt.close(figure)
    return out


def _axes() -> dict[str, str]:
    from nanokv.methods import available

    return {i.name: i.axis.split(",")[0] for i in available()}


def _style(i: int, shade: float) -> dict:
    return {"ls": DASHES[i % len(DASHES)], "lw": 1.0, "color": str(round(0.6 * shade, 2)), "ms": 6}


def pareto(rows: list[dict], x: str, y: str, labels: tuple[str, str], path: Path) -> list[Path]:
    """Draw quality against bytes held: a marker per family, a number per method, the frontier, the full cache's level.

    rows are those of summary.summarise; x and y name what to draw, labels are the axes', with units.
    """
    from matplotlib.ticker import PercentFormatter

    plt, axes = _pyplot(), _axes()
    figure, ax = plt.subplots(figsize=(9.5, 6.5))
    rows = [r for r in rows if x in r and y in r]
    names = [n for n in dict.fromkeys(r["method"] for r in rows) if n != "full"]
    for i, name in enumerate(sorted(names, key=lambda n: (list(MARKERS).index(axes.get(n, "none")), n))):
        mine = sorted((r[x], r[y]) for r in rows if r["method"] == name)
        look = _style(i, i / max(1, len(names))) | {
            "ms": 10,
            "mfc": "white",
            "mec": "black",
            "mew": 0.7,
            "zorder": 2 + i,
        }
        kind = axes.get(name, "none")
        ax.plot(*zip(*mine, strict=True), label=f"{i + 1} {name} ({kind})", marker=MARKERS[kind], **look)
        for at in mine:
            ax.annotate(str(i + 1), at, ha="center", va="center_baseline", fontsize=5.5, zorder=2 + i)
    edge = frontier([(r[x], r[y]) for r in rows if r["method"] != "full"])
    if edge:
        ax.plot(*zip(*edge, strict=True), color="black", lw=5, alpha=0.25, drawstyle="steps-post", label="frontier")
    for r in rows:
        if r["method"] == "full":
            ax.axhline(r[y], color="black", lw=0.8, ls=":")
            ax.plot([r[x]], [r[y]], "k*", ms=12, label="full cache")
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_xlim(left=0)
    ax.set_yscale("symlog", linthresh=0.01)
    values = [0, *(r[y] for r in rows)]
    ax.set_ylim(min(values), 1.4 * max(values) or 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, markerscale=0.7, handlelength=4)
    ax.grid(alpha=0.3)
    return _save(plt, figure, path)


def heat(records: list[dict], settings: list[str], mode: str, path: Path) -> list[Path]:
    """Draw the NLL of answers over depth and task with length, a panel for each setting. Black is lost."""
    plt = _pyplot()
    of = [r for r in records if r["setting"] in settings and r.get("mode") == mode and "error" not in r]
    names = sorted({(r["task"], r["context"]) for r in of})
    depths = sorted({round(r["depth"], 3) for r in of})
    columns = min(4, len(settings))
    shape = -(-len(settings) // columns), columns
    size = 1.6 + columns * max(1.6, 0.3 * len(depths)), 1 + shape[0] * (0.7 + 0.28 * len(names))
    figure, panels = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for i, ax in enumerate(panels.flat):
        ax.set_visible(i < len(settings))
        ax.tick_params(labelbottom=i + columns >= len(settings))  # the lowest panel of a column
    for ax, setting in zip(panels.flat, settings, strict=False):
        grid = [[math.nan] * len(depths) for _ in names]
        for r in (r for r in of if r["setting"] == setting):
            grid[names.index((r["task"], r["context"]))][depths.index(round(r["depth"], 3))] = r["nll"]
        image = ax.imshow(grid, aspect="auto", cmap="gray_r", vmin=0, vmax=3.5)
        ax.set_title(setting, fontsize=8)
        ax.set_xticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=6)
        ax.set_yticks(range(len(names)), [f"{t}, {n:,}" for t, n in names], fontsize=7)
    figure.supxlabel("depth of the answer, share of the filler", fontsize=9)
    figure.supylabel("task, tokens", fontsize=9)
    figure.colorbar(image, ax=panels, label="NLL of the answer, nats per token", shrink=0.8)
    figure.suptitle(f"question {'seen' if mode == 'aware' else 'unseen'} when the prompt was compressed", fontsize=9)
    return _save(plt, figure, path)


def curves(series: dict[str, list[tuple[float, float]]], labels: tuple[str, str], path: Path, dots=False) -> list[Path]:
    """Draw lines of (x, y) points, named, with axes from zero; dots marks what was measured."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(8, 4.5))
    for i, (name, points) in enumerate(series.items()):
        marks = {"marker": list(MARKERS.values())[i % 6], "mfc": "white" if i % 2 else "black"} if dots else {}
        ax.plot(*zip(*points, strict=True), label=name, **marks, **_style(i, i / max(1, len(series))))
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    ax.grid(alpha=0.3)
    return _save(plt, figure, path)
