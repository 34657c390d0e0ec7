import json

import pytest
import torch
from PIL import Image
from training_helpers import SHORT, equal, log, run, small_world, uninterrupted  # noqa: F401

from harmonkit.training import monitor
from harmonkit.training.monitor import Monitor


def test_a_line_is_the_mean_since_the_line_before(tmp_path, capsys):
    watch = Monitor(tmp_path / "test", "test", ["text", "text2image"], step=48, last_step=51)
    for step, losses in ((49, (1, 2)), (50, (3, 6)), (51, (7, 7))):
        watch.micro_batch("text", {"input_ids": torch.zeros(2, 5)}, torch.tensor(float(losses[0])))
        watch.micro_batch("text", {"input_ids": torch.zeros(2, 5)}, torch.tensor(float(losses[1])))
        watch.step(step, torch.tensor(0.5), 0.25, finite=step != 49, unusable=3)
    watch.close()
    first, last = log(tmp_path)
    assert (first["step"], first["loss"], first["norm"], first["lr"]) == (50, {"text": 3.0}, 0.5, 0.25)
    assert (first["skipped"], first["unusable"], last["skipped"]) == (1, 3, 1)
    assert (last["step"], last["loss"]) == (51, {"text": 7.0})
    assert first["tokens_per_s"] == pytest.approx(5 * first["samples_per_s"], rel=0.01)
    assert "step 49: the gradient is not finite, step skipped (1 in a row)" in capsys.readouterr().err


def test_samples_are_drawn_and_change_nothing(uninterrupted, tmp_path):  # noqa: F811
    watched = run(SHORT, tmp_path, sample_every=3)
    assert equal(uninterrupted["model"], watched["model"]), "random draws of the run"
    assert equal(uninterrupted["model_ema"], watched["model_ema"])
    samples = tmp_path / "test" / "samples"
    assert sorted(path.name for path in samples.glob("*.png")) == ["000003.png", "000006.png"]
    page = Image.open(samples / "000006.png")
    assert page.size == (4 * 64, 2 * 64)
    raw, ema = (page.crop((0, top, 256, top + 64)).tobytes() for top in (0, 64))
    assert raw != ema
    answers = [json.loads(line) for line in open(samples / "answers.jsonl")]
    assert [line["step"] for line in answers] == [3, 6]
    assert all(isinstance(line[kind], str) for line in answers for kind in ("raw", "ema"))


def test_the_log_and_its_plot(tmp_path):
    rows = [{"step": step, "loss": {"text": 2 / step, "text2image": 1 / step}} for step in (25, 50, 75)]
    newer = {"step": 50, "loss": {"text": 9.0}}
    cut_off = '{"step": 1'
    lines = [json.dumps(row) for row in (*rows, newer)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n" + cut_off)
    assert monitor.read_log(tmp_path) == [rows[0], newer, rows[2]]
    assert Image.open(monitor.plot(tmp_path)).width > 600
    with pytest.raises(FileNotFoundError, match="has the run begun"):
        monitor.read_log(tmp_path / "elsewhere")
