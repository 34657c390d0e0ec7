import copy
import json
import math

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from training_helpers import SHORT, equal, log, run, small_world, uninterrupted  # noqa: F401

from harmonkit.training import monitor
from harmonkit.training.monitor import Monitor
from harmonkit.training.optim import EMA


def test_a_line_is_the_mean_since_the_line_before(tmp_path, capsys):
    watch = Monitor(tmp_path / "test", "test", ["text", "text2image"], step=48, last_step=51)
    for step, losses in ((49, (1, 2)), (50, (3, 6)), (51, (7, 7))):
        watch.micro_batch("text", {"input_ids": torch.zeros(2, 5)}, torch.tensor(float(losses[0])))
        watch.micro_batch("text", {"input_ids": torch.zeros(2, 5)}, torch.tensor(float(losses[1])))
        watch.step(step, torch.tensor(0.5), 0.25, finite=step != 49, counts={"unusable": 3, "cut": step})
    watch.close()
    first, last = log(tmp_path)
    assert (first["step"], first["loss"], first["norm"], first["lr"]) == (50, {"text": 3.0}, 0.5, 0.25)
    assert (first["skipped"], first["unusable"], last["skipped"]) == (1, 3, 1)
    assert (first["cut"], last["cut"]) == (50, 51)
    assert (last["step"], last["loss"]) == (51, {"text": 7.0})
    assert first["tokens_per_s"] == pytest.approx(5 * first["samples_per_s"], rel=0.01)
    assert "step 49: the gradient is not finite, step skipped (1 in a row)" in capsys.readouterr().err


def test_a_micro_batch_without_a_label_is_no_loss_of_zero(tmp_path):
    """The labels of "mar" are classes, -1 = none: those count."""
    watch = Monitor(tmp_path / "test", "test", ["text", "image2text", "mar"], step=0, last_step=1)
    none, some = torch.full((2, 4), -100), torch.tensor([[-100, -100, 5, 6], [-100] * 4])
    first_only = torch.tensor([[5, -100, -100, -100]])                      # no position predicts it
    for labels, loss in ((none, 0.0), (some, 3.0), (first_only, 0.0)):
        watch.micro_batch("text", {"input_ids": labels, "labels": labels}, torch.tensor(loss))
    watch.micro_batch("image2text", {"input_ids": none, "labels": none}, torch.tensor(0.0))
    watch.micro_batch("mar", {"labels": torch.tensor([-1, -1])}, torch.tensor(4.0))
    watch.step(1, torch.tensor(0.5), 1, finite=True, counts={"unusable": 0, "cut": 0})
    watch.close()
    assert log(tmp_path)[0]["loss"] == {"text": 3.0, "mar": 4.0}


def add_on_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    watch = Monitor(folder / "test", "test", ["text", "image2text"], 0, 1, rank, world_size=2)
    for _ in range(1 + 2 * rank):
        watch.micro_batch("text", {"input_ids": torch.zeros(2, 5)}, torch.tensor(float(rank)))
    watch.step(1, torch.tensor(0.5), 1, finite=True, counts={"unusable": 3 + rank, "cut": 10 * rank})
    watch.close()
    dist.destroy_process_group()


def test_losses_and_counts_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(add_on_two, (tmp_path,), nprocs=2)
    line, = log(tmp_path)
    assert (line["loss"], line["unusable"], line["cut"]) == ({"text": 0.75}, 7, 10)


@pytest.mark.parametrize("rest", ['{"step": 2, "los', "{", '{"step": 2, "loss": {}}', "\0" * 50, "ä"])
def test_half_a_line_does_not_swallow_the_next(tmp_path, rest):
    folder = tmp_path / "test"
    folder.mkdir()
    first = {"step": 1, "loss": {"text": 2.0}}
    (folder / "log.jsonl").write_text(f"{json.dumps(first)}\n{rest}", encoding="utf-8")
    for step in (2, 3):
        watch = Monitor(folder, "test", ["text"], step=step - 1, last_step=step)
        watch.micro_batch("text", {"input_ids": torch.zeros(2, 5)}, torch.tensor(1.0))
        watch.step(step, torch.tensor(0.5), 1, finite=True, counts={"unusable": 0, "cut": 0})
        watch.close()
    assert [(line["step"], line["loss"]) for line in monitor.read_log(folder)] == [
        (1, {"text": 2.0}), (2, {"text": 1.0}), (3, {"text": 1.0})]
    assert (folder / "log.jsonl").read_text(errors="replace").count("\n") == 4


def test_samples_that_are_not_finite_end_no_run_and_change_no_weight(small, tmp_path, capsys):
    model = copy.deepcopy(small).train()
    trainable = dict(model.named_parameters())
    ema = EMA(trainable, 0.9)
    name = "vae.decoder.conv_out.bias"
    ema.weights[name] = ema.weights[name] * math.nan
    before = {key: p.detach().clone() for key, p in trainable.items()}
    Monitor(tmp_path, "test", ["text"], 0, 1).samples(7, model, ema, 32)
    assert equal(before, trainable) and ema.weights[name].isnan().all() and model.training
    assert "step 7: no samples of the ema weights (the pixels are not finite: " in capsys.readouterr().err
    line = json.loads((tmp_path / "samples" / "answers.jsonl").read_text())
    assert isinstance(line["raw"], str) and line["ema"] is None
    page = Image.open(tmp_path / "samples" / "000007.png")
    assert page.crop((0, 32, 128, 64)).getextrema() == ((0, 0),) * 3 and page.getextrema() != ((0, 0),) * 3


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
    cut_off = '[1]\n"a"\n{"step": 30}\n{"step": 1'
    lines = [json.dumps(row) for row in (*rows, newer)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n" + cut_off)
    assert monitor.read_log(tmp_path) == [rows[0], newer, rows[2]]
    assert Image.open(monitor.plot(tmp_path)).width > 600
    with pytest.raises(FileNotFoundError, match="has the run begun"):
        monitor.read_log(tmp_path / "elsewhere")
