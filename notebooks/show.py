"""What the notebooks share: rows of pictures and maps, key numbers, one look that reads well on the web and without telling red from green.

A picture is a tensor (3, H, W) in [-1, 1], or a PIL image; a map is a tensor (H, W) of numbers, drawn in colors.
"""
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#444444")   # Okabe and Ito: distinct for all color vision
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGING, SEQUENTIAL = "PuOr", "viridis"
WIDTH = 9                          # of a figure, inches; 90 pixels each
CHARACTER = 0.075                  # width of a letter of a title, inches

plt.rcParams.update({
    "figure.dpi": 90, "savefig.dpi": 90, "figure.facecolor": "white", "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "axes.axisbelow": True, "legend.frameon": False, "axes.prop_cycle": plt.cycler(color=COLORS), "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.05})


def key(name, value, tolerance=0.02):
    """Print a number that `run.py` compares with the committed one; tolerance: relative."""
    print(f"key: {name} = {float(value):.5g}" + ("" if tolerance == 0.02 else f" ± {tolerance:.0%}"))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pixels (…, 3, H, W) in [-1, 1]: one number a picture."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(-3, -2, -1)))


def panels(*widths, height=2.8):
    """Axes side by side, of relative widths."""
    return plt.subplots(1, len(widths), figsize=(WIDTH, height), width_ratios=widths, squeeze=False)[1][0]


def rgb(picture):
    """Anything that is a picture -> an array (H, W, 3) in [0, 1]."""
    if torch.is_tensor(picture):
        return ((picture.detach().float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    return np.asarray(picture.convert("RGB")) / 255


def covered(picture, hidden, grid):
    """The picture (3, H, W) with its hidden patches hatched in grey. hidden (h·w,) bool, True = hidden; grid (h, w)."""
    H, W = picture.shape[-2:]
    hidden = hidden.view(grid).repeat_interleave(H // grid[0], 0).repeat_interleave(W // grid[1], 1)
    stripes = 0.05 + 0.12 * ((torch.arange(H)[:, None] + torch.arange(W)) % 4 == 0).float()
    return torch.where(hidden, stripes, picture)


def grid(rows, *, titles=None, labels=None, size=1.5, cmap=SEQUENTIAL, limits=None, bar=None):
    """Rows of pictures and maps -> the axes, (rows, columns), to draw more on.

    titles: one a column, or a list for each row. labels: one a row. cmap and limits (low, high) are for maps; bar: the label of their color bar, which
    makes all maps share one scale, as `limits` does; else each has its own.
    """
    rows = [list(row) for row in rows]
    columns = max(map(len, rows))
    size = min(size, (WIDTH - 0.8 * bool(bar) - 1.0 * bool(labels)) / columns)
    titles = [] if titles is None else titles if isinstance(titles[0], (list, tuple)) else [titles]
    titles = [["\n".join(textwrap.fill(line, max(4, int(size / CHARACTER))) for line in str(t).split("\n")) for t in row] for row in titles]
    lines = sum(max(t.count("\n") + 1 for t in row) for row in titles)
    maps = [x for row in rows for x in row if torch.is_tensor(x) and x.ndim == 2]
    if bar and limits is None:
        limits = min(x.min().item() for x in maps), max(x.max().item() for x in maps)
    low, high = limits or (None, None)
    fig, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=(columns * size + 0.8 * bool(bar) + 1.0 * bool(labels), len(rows) * (size + 0.06) + 0.19 * lines))
    for r, row in enumerate(rows):
        for c in range(columns):
            ax, x = axes[r, c], row[c] if c < len(row) else None
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if torch.is_tensor(x) and x.ndim == 2:
                ax.imshow(x.detach(), cmap=cmap, vmin=low, vmax=high)
            elif x is not None:
                ax.imshow(rgb(x), interpolation="nearest")
            if r < len(titles) and c < len(titles[r]):
                ax.set_title(titles[r][c], fontsize=9, pad=3)
        if labels:
            axes[r, 0].set_ylabel("\n".join(textwrap.fill(line, 13) for line in labels[r].split("\n")), rotation=0, ha="right", va="center", fontsize=9)
    if bar:
        fig.colorbar(ScalarMappable(Normalize(low, high), cmap), ax=axes, label=bar, shrink=0.9, pad=0.01)
    return axes


def images(rows, **look):
    """`grid`, for a cell's last line."""
    grid(rows, **look)
