import json
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

import data
import train
from harmon import Harmon
from pretrained import HarmonConfig

TINY_RUN = train.Recipe(sources={"text2image": 4, "image2text": 2, "text": 2}, steps=6, trains=("mar.", "proj_in.", "proj_out.", "llm."), scenes=20,
                        save_every=3, warmup=2)


@pytest.fixture
def small_world(monkeypatch):
    """harmon-tiny shrunk, at 64 pixels as the shapes world is."""
    config = replace(SMALL, mar=replace(SMALL.mar, img_size=64, dropout=0.1))
    monkeypatch.setattr(HarmonConfig, "from_name", classmethod(lambda cls, name: config))


def run(recipe, folder, **kwargs):
    path = train.train("test", recipe, folder, torch.device("cpu"), **kwargs)
    return torch.load(path, weights_only=True)


def equal(a, b):
    return all(torch.equal(x, b[k]) for k, x in a.items())


def test_resume_is_exact(small_world, tmp_path):
    whole = run(TINY_RUN, tmp_path / "a")
    run(TINY_RUN, tmp_path / "b", stop_at=3)
    halves = run(TINY_RUN, tmp_path / "b")
    assert whole["step"] == halves["step"] == 6
    assert equal(whole["model"], halves["model"]) and equal(whole["model_ema"], halves["model_ema"])
    assert not equal(whole["model"], run(replace(TINY_RUN, seed=1), tmp_path / "c")["model"])


def test_only_what_is_named_is_trained(small_world, tmp_path):
    recipe = replace(TINY_RUN, sources={"text2image": 4, "image2text": 2}, trains=("mar.", "proj_in.", "proj_out."), steps=2)
    after = run(recipe, tmp_path)["model"]
    torch.manual_seed(recipe.seed)
    before = Harmon(HarmonConfig.from_name("harmon-tiny")).state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"mar", "proj_in", "proj_out"}
    assert not torch.equal(before["mar.diffloss.net.final_layer.linear.weight"], after["mar.diffloss.net.final_layer.linear.weight"])


def test_weight_decay_spares_vectors_and_the_head(small_world):
    model = Harmon(HarmonConfig.from_name("harmon-tiny"))
    decayed, plain = train.parameter_groups(model, TINY_RUN)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert "mar.encoder_blocks.0.attn.qkv.weight" in decayed and "llm.model.embed_tokens.weight" in decayed
    assert "mar.diffloss.net.input_proj.weight" in plain and "mar.encoder_norm.weight" in plain
    assert not any(n.startswith("vae.") for n in decayed | plain)


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [train.learning_rate(replace(TINY_RUN, steps=100, warmup=10, lr=1.0), s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], abs=0.03) and rates[-1] < 1e-3


@pytest.mark.parametrize("task", ["reconstruct", "text", "mar", "text2image", "image2text"])
def test_every_task_learns(small_world, tmp_path, task):
    part = {"reconstruct": ("vae.",), "text": ("llm.",), "mar": ("mar.",)}.get(task, TINY_RUN.trains)
    recipe = replace(TINY_RUN, sources={task: 4}, steps=50, trains=part, lr=3e-3, save_every=100)
    run(recipe, tmp_path)
    log = [json.loads(line)["loss"][task] for line in open(tmp_path / "test" / "log.jsonl")]
    assert log[-1] < log[0]


def test_batches_are_a_function_of_the_step(small):
    latents = torch.randn(20, 8, 8, 4)
    one, two = (data.ShapesWorld(small, "train-0", latents) for _ in range(2))
    for task in ("text", "text2image", "image2text", "mar", "reconstruct"):
        a, b, c = one.batch(task, 5, 4), two.batch(task, 5, 4), one.batch(task, 6, 4)
        assert all(torch.equal(v, b[k]) for k, v in a.items() if k != "task")
        assert any(v.shape != c[k].shape or not torch.equal(v, c[k]) for k, v in a.items() if k != "task")


def test_a_tenth_of_the_captions_is_dropped(small):
    world = data.ShapesWorld(small, "train-0", torch.randn(20, 8, 8, 4))
    unconditional = small.prompt_ids(data.UNCONDITIONAL)
    batch = world.batch("text2image", 0, 600)
    rows = [ids[real].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"])]
    assert 0.06 < sum(row == unconditional for row in rows) / 600 < 0.14


def test_the_stage_before_must_exist(small_world, tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-mar.*must run first"):
        train.train("tiny-align", train.RECIPES["tiny-align"], tmp_path, torch.device("cpu"))


def test_a_run_can_start_from_a_finished_model(small_world, small, tmp_path):
    shaken = Harmon(HarmonConfig.from_name("harmon-tiny"))
    shaken.save_pretrained(tmp_path / "model")
    after = run(replace(TINY_RUN, steps=1, lr=0.0), tmp_path / "runs", init=tmp_path / "model")["model"]
    assert equal(shaken.state_dict(), after)


def test_latent_scale_is_measured(small_world, tmp_path):
    recipe = replace(TINY_RUN, sources={"reconstruct": 4}, trains=("vae.",), steps=3)
    content = run(recipe, tmp_path)
    model, _ = train.load_run(train.checkpoints(tmp_path / "test")[-1])
    assert model.config.vae_scale == content["config"]["vae_scale"] != SMALL.vae_scale
    assert data.encode_scenes(model, "scale", 20).float().std().item() == pytest.approx(1, abs=1e-3)
