"""Checkpoints: whole, checked, in numeric order; a damaged one never takes the place of a good one."""
import re
import zipfile
from pathlib import Path

import pytest
import torch
from training_helpers import SHORT, equal, options, run, small_world, uninterrupted  # noqa: F401

import train
from harmonkit.training.checkpoint_files import (
    FORMAT,
    checkpoints_of,
    fingerprint_of,
    last_checkpoint,
    model_from_checkpoint,
)
from harmonkit.training.recipes import change
from harmonkit.training.runs import first_model

pytestmark = pytest.mark.usefixtures("small_world")
TEXT = change(SHORT, ratio={"text": 1}, lr={"llm": 1e-3}, batch=2, steps=4)        # the quickest


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def hole(path):
    """Zeros in the middle of the largest tensor, as after a crash of a machine."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    middle = largest.header_offset + 200 + largest.file_size // 2
    content[middle:middle + 64] = bytes(64)
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, hole, empty])
def test_a_damaged_checkpoint_falls_back(uninterrupted, tmp_path, capsys, damage):  # noqa: F811
    run(SHORT, tmp_path)
    last = checkpoints_of(tmp_path / "test")[-1]
    damage(last)
    again = run(SHORT, tmp_path)
    assert "step-000006.pt cannot be read, going back to step-000003.pt" in capsys.readouterr().err
    assert equal(uninterrupted["model"], again["model"])
    assert Path(f"{last}.damaged").exists() and last.exists()


def test_where_all_checkpoints_are_damaged_nothing_is_trained_or_deleted(tmp_path):
    run(SHORT, tmp_path)
    for path in checkpoints_of(tmp_path / "test"):
        hole(path)
    message = "none of 2 checkpoints can be read; step-000006.pt: .*another --runs"
    with pytest.raises(ValueError, match=message):
        run(SHORT, tmp_path)
    assert [path.name for path in checkpoints_of(tmp_path / "test")] == ["step-000003.pt", "step-000006.pt"]


def test_after_a_fall_back_new_checkpoints_stay(tmp_path):
    run(TEXT, tmp_path, save_every=2)
    hole(tmp_path / "test" / "step-000004.pt")
    run(TEXT, tmp_path, save_every=1, stop_at=3)
    assert [path.name for path in checkpoints_of(tmp_path / "test")] == ["step-000002.pt", "step-000003.pt"]


def test_a_million_steps_come_after_fewer(tmp_path):
    for step in (998000, 1000000, 5, 10200000):
        (tmp_path / f"step-{step:06d}.pt").touch()
    (tmp_path / "step-best.pt").touch()
    names = [path.name for path in checkpoints_of(tmp_path)]
    assert names == ["step-000005.pt", "step-998000.pt", "step-1000000.pt", "step-10200000.pt"]


def test_the_newest_two_are_kept(tmp_path):
    run(TEXT, tmp_path, save_every=1)
    assert [path.name for path in checkpoints_of(tmp_path / "test")] == ["step-000003.pt", "step-000004.pt"]


def test_a_full_disk_ends_the_run_and_loses_nothing_saved(uninterrupted, tmp_path, monkeypatch):  # noqa: F811
    write, written = torch.save, []

    def nearly_full(content, path):
        write(content, path)
        written.append(path)
        if len(written) > 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 712960 vs 712848")
    monkeypatch.setattr(torch, "save", nearly_full)                         # torch's message of a full disk
    message = "step 4 could not be written .*is the disk full.* the last checkpoint is .*step-000002"
    with pytest.raises(OSError, match=message):
        run(SHORT, tmp_path, save_every=2)
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "test").iterdir() if "step" in path.name]
    assert left == ["step-000002.pt"], "nothing half-written"
    assert equal(uninterrupted["model"], run(SHORT, tmp_path, save_every=2)["model"])


@pytest.mark.parametrize("part", ["model", "ema"])
def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, part):
    run(TEXT, tmp_path, stop_at=2)
    step = train.Monitor.step

    def spoil(self, number, *args):
        step(self, number, *args)
        run_ = spoiled[0]
        weights = run_.ema.trainable if part == "model" else run_.ema.weights
        name = "llm.model.layers.0.mlp.up_proj.weight"
        with torch.no_grad():
            weights[name][0, 0] = float("inf")
    spoiled, start = [], train.runs.Run.start

    def remember(self):
        spoiled.append(self)
        return start(self)
    monkeypatch.setattr(train.runs.Run, "start", remember)
    monkeypatch.setattr(train.Monitor, "step", spoil)
    kind = {"model": "model", "ema": "model_ema"}[part]
    with pytest.raises(ValueError, match=rf"step 3: llm\S+ is not finite in {kind}, .* is .*step-000002.pt"):
        run(TEXT, tmp_path)
    assert [path.name for path in checkpoints_of(tmp_path / "test")] == ["step-000002.pt"]


@pytest.mark.parametrize("content", [{"step": 3}, {"step": 3, "format": FORMAT + 1}])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "test").mkdir()
    torch.save(content, tmp_path / "test" / "step-000003.pt")
    message = "step-000003.pt: its format is (None|2), this train.py reads 1.* head .*--export .*--init "
    with pytest.raises(ValueError, match=message):
        run(SHORT, tmp_path)
    with pytest.raises(ValueError, match=message):
        train.train("next", change(SHORT, after="test"), options(tmp_path))


def test_a_resumed_run_holds_no_old_file(tmp_path):
    """Else the disk needs room for one checkpoint more, since a mapped file stays until it is closed."""
    run(TEXT, tmp_path, stop_at=2)
    args = options(tmp_path)
    resumed = train.runs.Run("test", TEXT, args)
    resumed.start()
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    assert not re.findall(r".*step-\d+.pt.*", Path("/proc/self/maps").read_text())


def test_the_averaged_weights_are_handed_on(tmp_path):
    content = run(TEXT, tmp_path)
    name = "llm.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(content["model"][name], content["model_ema"][name])
    args = options(tmp_path)
    for model in (model_from_checkpoint(content), first_model("next", change(SHORT, after="test"), args)):
        assert equal(model.state_dict(), content["model_ema"])
    assert equal(model_from_checkpoint(content, "model").state_dict(), content["model"])


def test_fingerprints_tell_weights_apart(tmp_path):
    for name in ("a", "b", "c"):
        torch.save({"weight": torch.full((3,), float(name == "c"))}, tmp_path / name)
    a, b, c = (fingerprint_of(tmp_path / name) for name in ("a", "b", "c"))
    assert a == b != c


def test_nothing_is_written_beside_a_checkpoint_that_can_be_read(tmp_path):
    run(TEXT, tmp_path)
    assert last_checkpoint(tmp_path / "test")[1]["step"] == 4
    assert not list((tmp_path / "test").glob("*.damaged"))
