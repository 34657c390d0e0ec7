"""Shared by the notebooks: the data path, source code, key numbers, targets, pictures and charts.

A picture is a tensor (3, H, W) in [-1, 1] or a PIL image. A map is a tensor (H, W), shown in colors.
"""
import inspect
import re
from pathlib import Path
from textwrap import dedent, fill

import matplotlib.pyplot as plt
import torch
from IPython.display import SVG, display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

ROOT = Path(__file__).resolve().parent.parent
BOX = re.compile(r'(<rect class="box[^>]*?)/>((?:\s*<text class="name"[^>]*>[^<]*</text>)+)')
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#444444")     # Okabe and Ito
STYLES, MARKERS = ("-", "--", "-.", ":"), "os^DvPX"
WIDTH = 9                                                                   # of a figure, inches


def path(*boxes):
    """Show docs/harmon.svg with the named boxes marked. Raises ValueError for a name that is not in it."""
    names = []

    def mark(box):
        names.append(" ".join(re.findall(r">([^<]+)</text>", box[2])))
        style = f'style="stroke: {COLORS[4]}; stroke-width: 6"' if names[-1] in boxes else ""
        return f"{box[1]} {style}/>{box[2]}"
    svg = BOX.sub(mark, (ROOT / "docs" / "harmon.svg").read_text(encoding="utf-8"))
    if not set(boxes) <= set(names):
        raise ValueError(f"boxes are {boxes}; the figure has {names}")
    display(SVG(svg.replace("<svg ", '<svg width="900" ', 1)))


def source(f):
    """Print the file, the line and the code of a function, method or class."""
    lines, first = inspect.getsourcelines(inspect.unwrap(f))
    print(f"{Path(inspect.getsourcefile(inspect.unwrap(f))).relative_to(ROOT)}:{first}")
    print(dedent("".join(lines)), end="")


def key(name, value, tolerance=0.02):
    """Print a number that run.py compares with the committed one. tolerance: relative."""
    print(f"key: {name} = {float(value):.5g}" + ("" if tolerance == 0.02 else f" ± {tolerance:.0%}"))


def target(name, value, low, high=float("inf")):
    """Print an exercise's number beside the range that it should reach; returns whether it does."""
    reached = bool(low <= value <= high)
    wanted = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
    print(f"{name}: {float(value):.4g}   target: {wanted}   {'reached' if reached else 'not yet'}")
    return reached


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pixels (…, 3, H, W) in [-1, 1]: one number a picture."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(-3, -2, -1)))


def covered(picture, mask, grid):
    """A picture (3, H, W) with its hidden patches hatched in grey. mask (h·w,) True = hidden, grid (h, w)."""
    H, W = picture.shape[-2:]
    hidden = mask.view(grid).repeat_interleave(H // grid[0], 0).repeat_interleave(W // grid[1], 1)
    stripes = 0.05 + 0.12 * ((torch.arange(H)[:, None] + torch.arange(W)) % 4 == 0)
    return torch.where(hidden, stripes, picture)


def frame(ax, row, column, side=1, color=COLORS[4]):
    """Frame a patch of `side` pixels, or a cell of a map."""
    corner = column * side - 0.5, row * side - 0.5
    ax.add_patch(plt.Rectangle(corner, side, side, fill=False, color=color, lw=1.5))


def grid(rows, *, titles=(), labels=(), size=1.5, cmap="viridis", limits=None, bar=None):
    """Rows of pictures and maps -> the axes (rows, columns).

    titles: one a column, or a list for each row. labels: one a row. limits: the ends of the color map.
    bar: the label of a color bar; all maps then share one scale, else each has its own.
    """
    columns, margin = max(map(len, rows)), 0.8 * bool(bar) + bool(labels)
    size = min(size, (WIDTH - margin) / columns)
    if titles and isinstance(titles[0], str):
        titles = [titles] + [[]] * (len(rows) - 1)
    titles = [[fill(title, int(13 * size)) for title in row] for row in titles]
    title_lines = sum(max((title.count("\n") + 1 for title in row), default=0) for row in titles)
    figsize = columns * size + margin, len(rows) * (size + 0.06) + 0.19 * title_lines
    fig, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=figsize)
    plt.setp(list(axes.flat), xticks=[], yticks=[], frame_on=False)
    if bar and limits is None:
        maps = torch.cat([x.flatten() for row in rows for x in row if torch.is_tensor(x) and x.ndim == 2])
        limits = maps.min().item(), maps.max().item()
    scale = Normalize(*limits) if limits else None
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            if torch.is_tensor(x) and x.ndim == 3:
                x = ((x + 1) / 2).clamp(0, 1).permute(1, 2, 0)
            axes[r, c].imshow(x, cmap=cmap, norm=scale)
        for c, title in enumerate(titles[r] if titles else ()):
            axes[r, c].set_title(title, pad=3)
        axes[r, 0].set_ylabel(fill(labels[r], 13) if labels else "", rotation=0, ha="right", va="center")
    if bar:
        fig.colorbar(ScalarMappable(scale, cmap), ax=axes, label=bar, shrink=0.9, pad=0.01)
    return axes


def charts(*charts, height=2.6):
    """Charts side by side -> their axes.

    A chart is a dict: {label: (x, y)} for lines, dots, and bars with names as x; {label: y} for levels. The
    rest is for `Axes.set`.
    """
    axes = plt.subplots(1, len(charts), squeeze=False, figsize=(WIDTH, height))[1][0]
    for ax, chart in zip(axes, map(dict, charts), strict=True):
        bars = chart.pop("bars", {})
        for i, (label, (names, y)) in enumerate(bars.items()):
            places = torch.arange(len(y)) + 0.8 * ((i + 0.5) / len(bars) - 0.5)
            ax.bar(places, y, 0.72 / len(bars), color=COLORS[i], label=label)
            ax.set_xticks(range(len(y)), names)
        for i, (label, (x, y)) in enumerate(chart.pop("lines", {}).items()):
            marker = MARKERS[i] if len(y) < 20 else None
            ax.plot(x, y, STYLES[i % 4], color=COLORS[i], marker=marker, ms=4, label=label)
        for i, (label, (x, y)) in enumerate(chart.pop("dots", {}).items()):
            ax.plot(x, y, MARKERS[i], color=COLORS[i], ms=5, alpha=0.8, label=label)
        for label, y in chart.pop("levels", {}).items():
            ax.axhline(y, color="black", lw=1, ls="--", label=label)
        ax.set(**chart)
        if ax.get_legend_handles_labels()[1]:
            ax.legend()
    return axes
