"""notebooks/show.py: the marked figure, printed sources, targets, pictures and charts."""

import matplotlib
import pytest
import torch
from conftest import ROOT

matplotlib.use("agg")
import show

BOXES = ("VAE encoder", "MAR encoder", "Qwen2.5 LLM", "MAR decoder", "diffusion head", "VAE decoder")


@pytest.mark.parametrize("box", BOXES)
def test_path_marks_one_box(monkeypatch, box):
    shown = []
    monkeypatch.setattr(show, "display", lambda svg: shown.append(svg.data))
    show.path(box)
    before, after = shown[0].split("stroke-width: 6")
    assert before.rstrip().endswith(f"stroke: {show.COLORS[4]};")
    words = after[:after.index("<text class=\"file\"")]
    assert all(word in words for word in box.split()), "another box is marked"


def test_path_names_the_boxes_that_exist():
    with pytest.raises(ValueError, match="the figure has .*'MAR encoder'"):
        show.path("MAR encoder", "tokenizer")


def test_source_prints_place_and_code(capsys):
    show.source(show.psnr)
    first, head, *_ = capsys.readouterr().out.splitlines()
    file, line = first.split(":")
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert file == "notebooks/show.py" and lines[int(line) - 1] == head == "def psnr(a, b):"


def test_source_unwraps_decorated_methods(capsys):
    from harmon import Harmon
    show.source(Harmon.sample_steps)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("harmon.py:") and out[2].startswith("def sample_steps(")


@pytest.mark.parametrize("value, low, high, reached", [
    (1, 0, 2, True), (3, 0, 2, False), (torch.tensor(3.0), 2, float("inf"), True),
    (float("nan"), 0, 1, False)])
def test_target(capsys, value, low, high, reached):
    assert show.target("x", value, low, high) is reached
    assert capsys.readouterr().out.rstrip().endswith("reached" if reached else "not yet")


def test_key_line(capsys):
    show.key("a number", 1 / 3)
    show.key("another", 2, tolerance=0.25)
    assert capsys.readouterr().out == "key: a number = 0.33333\nkey: another = 2 ± 25%\n"


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.02), torch.full((3, 4, 4), 0.2)])
    assert torch.allclose(show.psnr(a, b), torch.tensor([40.0, 20.0]), atol=1e-4)


def test_covered_hides_the_masked_patches_only():
    picture = torch.ones(3, 8, 8)
    result = show.covered(picture, torch.tensor([False, True, False, False]), (2, 2))
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[:4, 4:] = True
    assert ((result != 1).all(0) == hidden).all()


def test_grid_shares_one_scale_with_a_bar():
    maps = [torch.zeros(2, 2), torch.full((2, 2), 5.0)]
    axes = show.grid([[torch.zeros(3, 2, 2), *maps]], titles=["a", "b", "c"], labels=["row"], bar="value")
    assert axes.shape == (1, 3) and [ax.get_title() for ax in axes[0]] == ["a", "b", "c"]
    assert [axes[0, i].images[0].get_clim() for i in (1, 2)] == [(0, 5), (0, 5)]
    assert axes[0, 0].get_ylabel() == "row"
    own = show.grid([maps])
    assert own[0, 1].images[0].get_clim() == (5, 5)


def test_charts_draw_what_they_get():
    chart = dict(lines={"line": ([0, 1], [1, 2])}, dots={"dots": ([0], [1])}, levels={"level": 1.5},
                 xlabel="x")
    left, right = show.charts(chart, dict(bars={"one": (["a", "b"], [1, 2]), "two": (["a", "b"], [3, 4])}))
    assert left.get_xlabel() == "x" and left.get_legend_handles_labels()[1] == ["line", "dots", "level"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["a", "b"]
    assert sorted(bar.get_height() for bar in right.patches) == [1, 2, 3, 4]
