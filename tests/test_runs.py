"""What a run starts from, and what it leaves at its end."""
import pytest
import torch
from conftest import SMALL, shake
from training_helpers import SHORT, SMALL_64, options, run, small_world  # noqa: F401

import train
from harmon import Harmon
from harmonkit import checkpoints, mar_files
from harmonkit.shapes_world.tokenizer import train_tokenizer
from harmonkit.shapes_world.world import class_names
from harmonkit.tokenizer import load_tokenizer
from harmonkit.training.checkpoint_files import checkpoints_of, last_checkpoint, model_from_checkpoint
from harmonkit.training.recipes import RECIPES, change
from harmonkit.training.runs import Run, export, first_model, shapes_source, with_latents

pytestmark = pytest.mark.usefixtures("small_world")
TEXT = change(SHORT, ratio={"text": 1}, lr={"llm": 1e-3}, batch=2, steps=4)        # the quickest


# ---- the start of a new run --------------------------------------------------------------------------------

def test_the_recipe_before_must_have_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-mar: no checkpoint; tiny-align starts .*must run"):
        train.train("tiny-align", RECIPES["tiny-align"], options(tmp_path))


def test_stage_1_starts_from_three_files(small, tmp_path):
    """A Qwen2.5 folder; MAR's checkpoint with raw and averaged weights; a VAE."""
    small.save_pretrained(tmp_path / "model")
    llm = {key: tensor for key, tensor in small.llm.state_dict().items() if key != "lm_head.weight"}
    checkpoints.write(tmp_path / "qwen" / "model.safetensors", llm)
    average = small.mar.state_dict()
    raw = {key: 0 * tensor for key, tensor in average.items()}
    torch.save({"model_ema": average, "model": raw, "epoch": 799}, tmp_path / "mar.pth")
    torch.save({"model": small.vae.state_dict()}, tmp_path / "kl16.ckpt")
    args = options(tmp_path, "--config", tmp_path / "model", "--init-llm", tmp_path / "qwen",
                   "--init-mar", tmp_path / "mar.pth", "--vae", tmp_path / "kl16.ckpt")
    model = first_model("stage1", RECIPES["stage1"], args)
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    state = model.state_dict()
    for key, tensor in small.state_dict().items():
        assert key.startswith("proj") or torch.equal(tensor, state[key]), key
    torch.save(small.state_dict(), tmp_path / "mar.pth")
    with pytest.raises(ValueError, match="mar.pth: a Harmon model"):
        first_model("stage1", RECIPES["stage1"], args)
    with pytest.raises(ValueError, match="stage1 starts from trained weights"):
        first_model("stage1", RECIPES["stage1"], options(tmp_path))


def test_a_run_by_class_exports_its_mar_for_drawing_by_class(tmp_path):
    run(SHORT, tmp_path, name="mar", ratio={"mar": 1}, lr={"mar-decoder": 1e-3}, steps=2, batch=2)
    export(tmp_path / "mar", tmp_path / "model")
    drawing = mar_files.load(tmp_path / "model", dtype="float16")
    harmon = Harmon.from_pretrained(tmp_path / "model", dtype="float16")
    for part in ("mar", "vae"):
        expected = getattr(harmon, part).state_dict()
        for name, tensor in getattr(drawing, part).state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert drawing.config.class_names == tuple(class_names())
    run(TEXT, tmp_path, name="text", steps=1)
    export(tmp_path / "text", tmp_path / "other")
    assert not (tmp_path / "other" / "mar").exists()


def test_a_run_keeps_its_own_tokenizer(tmp_path, tokenizer):
    other = shake(Harmon(SMALL_64))
    other.tokenizer = train_tokenizer(300)
    other.save_pretrained(tmp_path / "other")
    run(TEXT, tmp_path, name="first", steps=1)
    run(TEXT, tmp_path, "--init", tmp_path / "other", name="second", steps=1)
    run(TEXT, tmp_path, name="third", steps=1, after="second")
    given = tmp_path / "first" / "tokenizer.json"
    run(TEXT, tmp_path, "--tokenizer", given, name="fourth", steps=1, after="second")
    kept = {name: load_tokenizer(tmp_path / name).to_str() for name in ("first", "second", "third", "fourth")}
    assert kept["first"] == kept["fourth"] == tokenizer.to_str()
    assert kept["second"] == kept["third"] == other.tokenizer.to_str()


def test_latents_of_another_vae_are_refused(tmp_path):
    drawing = change(SHORT, ratio={"text2image": 1}, batch=2, steps=1)
    run(drawing, tmp_path)
    other = shake(Harmon(SMALL_64))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="these latents come from another VAE"):
        run(drawing, tmp_path, "--init", tmp_path / "other", name="second")


def test_the_latent_scale_is_measured_after_the_vaes_training(tmp_path):
    recipe = change(SHORT, ratio={"reconstruct": 1}, lr={"vae": 1e-3}, steps=2, batch=1, micro_batch=1)
    content = run(recipe, tmp_path)
    assert content["config"]["vae_scale"] != SMALL.vae_scale
    model = model_from_checkpoint(content)
    source, = with_latents(model, [shapes_source("mar", SHORT)], SHORT, options(tmp_path))
    latents = torch.stack([source.latents.get(i, source.samples[i]) for i in range(20)])
    assert latents.float().std().item() == pytest.approx(1, abs=0.1)


def test_a_run_stopped_while_it_measures_the_scale_measures_it_again(tmp_path, monkeypatch):
    """The last checkpoint is written after the measurement, so no finished run lacks it."""
    recipe = change(SHORT, ratio={"reconstruct": 1}, lr={"vae": 1e-3}, steps=2, batch=1, micro_batch=1,
                    save_every=1)
    whole = run(recipe, tmp_path / "a")

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("harmonkit.training.runs.latent_scale", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "b")
    assert [path.name for path in checkpoints_of(tmp_path / "b" / "test")] == ["step-000001.pt"]
    monkeypatch.undo()
    assert run(recipe, tmp_path / "b")["config"] == whole["config"]


def test_a_lost_or_changed_tokenizer_is_refused(tmp_path):
    run(TEXT, tmp_path, stop_at=2)
    file = tmp_path / "test" / "tokenizer.json"
    content = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match="tokenizer.json: no such file, but this run has trained with it"):
        run(TEXT, tmp_path)
    train_tokenizer(300).save(str(file))
    with pytest.raises(ValueError, match="tokenizer.json: not the tokenizer that this run has trained with"):
        run(TEXT, tmp_path)
    file.write_text(content)
    other = tmp_path / "other.json"
    train_tokenizer(300).save(str(other))
    with pytest.raises(ValueError, match="--tokenizer .*other.json: .*has another; leave the flag out"):
        run(TEXT, tmp_path, "--tokenizer", other)
    assert run(TEXT, tmp_path, "--tokenizer", file)["step"] == 4


def test_data_are_opened_before_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonkit.training.runs.first_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        run(TEXT, tmp_path, "--mixture", tmp_path / "nowhere.json")


def test_a_run_that_was_refused_leaves_its_record(tmp_path):
    run(TEXT, tmp_path, stop_at=2)
    before = (tmp_path / "test" / "run.json").read_text()
    with pytest.raises(ValueError):
        run(TEXT, tmp_path, muon=True)
    assert (tmp_path / "test" / "run.json").read_text() == before
    assert Run("test", TEXT, options(tmp_path)).step == last_checkpoint(tmp_path / "test")[1]["step"] == 2
