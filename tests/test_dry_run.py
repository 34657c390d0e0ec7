"""What `train.py --dry-run` prints, against numbers counted by hand."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

from harmon import Harmon, HarmonConfig
from harmonkit.training.dry_run import activation_bytes, dry_run
from harmonkit.training.recipes import RECIPES


def output(capsys, name, world_size=1, config=None, init=None, mixture=None, **changes):
    recipe = replace(RECIPES[name], **changes)
    args = SimpleNamespace(config=config, init=init, mixture=mixture, world_size=world_size)
    dry_run(name, recipe, args)
    return capsys.readouterr().out


def test_stage3_of_the_1_5b(capsys):
    """The sizes are those of the published models: Qwen2.5-1.5B has 1.54 B parameters, MAR-H 0.95 B."""
    lines = output(capsys, "stage3", world_size=8).splitlines()
    assert lines[0] == "stage3: 50000 steps of 1024 samples, 512 px, text 1 : image2text 3 : text2image 16"
    assert lines[1:5] == [
        "  mar-decoder      551.5 M parameters   learning rate 2e-05",
        "  mar-encoder      399.6 M parameters   learning rate 2e-06",
        "  llm             1543.7 M parameters   learning rate 2e-06",
        "  vae               66.5 M parameters   frozen"]
    # 28 layers of 7 matrices, and the embedding.
    assert "    llm, weight decay 0.02: 1543.6 M in 197 tensors" in lines
    assert lines[-3] == "  batch 1024 = 8 processes × micro-batch 4 × accumulation 32"
    assert lines[-2] == "  warm-up 500 steps, then cosine to 0; 51.2 M samples in all"
    assert "weights (float32) 10.2, gradients 10.0, AdamW 20.0, averaged weights 10.0," in lines[-1]


def test_frozen_parts_need_no_optimizer(capsys):
    out = output(capsys, "stage1")
    assert "llm             1543.7 M parameters   frozen" in out
    assert "weights (float32) 10.2, gradients 3.8, AdamW 7.6, averaged weights 3.8," in out


def test_sizes_come_from_the_flag_or_the_recipe(capsys):
    assert "llm              494.0 M" in output(capsys, "stage3", config="harmon-0.5b")
    assert "llm                1.7 M" in output(capsys, "tiny-joint")


def test_a_batch_that_cannot_be_shared_is_named(capsys):
    with pytest.raises(ValueError, match="a batch of 1024 is no multiple of 3 processes"):
        output(capsys, "stage3", world_size=3)


def test_the_model_of_init_is_a_folder_a_file_or_a_run(capsys, small, tmp_path):
    small.save_pretrained(tmp_path / "folder")
    (tmp_path / "run").mkdir()
    torch.save({"config": SMALL.to_json()}, tmp_path / "run" / "step-000010.pt")
    millions = sum(p.numel() for p in small.llm.parameters()) / 1e6
    for init in ("folder", "run"):
        out = output(capsys, "finetune", init=str(tmp_path / init))
        assert f"llm          {millions:9.1f} M parameters" in out
    with torch.device("meta"):
        model = Harmon(HarmonConfig.from_name("harmon-0.5b"))
    # These two tell the size. As expanded views they take no room in the file.
    names = ("llm.model.embed_tokens.weight", "mar.z_proj.weight")
    shapes = [model.get_parameter(name).shape for name in names]
    state = {name: torch.zeros(1).expand(shape) for name, shape in zip(names, shapes)}
    torch.save(state, tmp_path / "harmon.pth")
    assert "llm              494.0 M" in output(capsys, "finetune", init=str(tmp_path / "harmon.pth"))


@pytest.mark.parametrize("options, message", [
    ({"size": 60}, "--size is 60; expected a multiple of 16, the VAE's stride"),
    ({"init": "nowhere.pth"}, "nowhere.pth: no such file or folder"),
    ({"mixture": "nowhere.json"}, "nowhere.json: no such file"),
    ({"mixture": "texts.json"}, "text2image"),
])
def test_what_the_run_would_refuse_is_refused(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.json").write_text('[{"path": "shapes-text", "task": "text"}]')
    with pytest.raises((ValueError, OSError), match=message):
        output(capsys, "finetune", **options)
    assert capsys.readouterr().out == ""


def test_activations_by_hand():
    recipe = replace(RECIPES["stage3"], size=32, micro_batch=2, max_length=10)
    tokens = 2 * (4 * 4 + 4)                            # two images, a grid of 4 × 4, 4 buffers
    head = 4 * 2 * 8 * 32                               # draws, depth, numbers a channel, width
    scores = 10 * 512 * 2 * 10                          # vocabulary, two texts of 10 tokens
    channels = 4 * 32 + 2 * 32                          # MAR's blocks, the LLM's
    checkpointed = 2 * tokens * (channels + 34 * 32 + head) + scores
    assert activation_bytes(SMALL, replace(recipe, checkpointing=True)) == checkpointed
    assert activation_bytes(SMALL, replace(recipe, checkpointing=False)) == (
        2 * tokens * (34 * channels + head) + scores)
    longer = replace(recipe, max_length=10_000)
    assert activation_bytes(SMALL, longer) == checkpointed + 10 * 512 * (1024 - 20)
