"""Writing weights as a folder, and the mean of several models."""
import copy
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from harmon import Harmon
from harmonkit import checkpoints
from harmonkit.checkpoints import read
from harmonkit.scripts import convert


@pytest.fixture
def official(small, tmp_path, monkeypatch):
    """A .pth in bfloat16 without a VAE, a kl16.ckpt in float32 and a tokenizer.json, like the published."""
    state = small.state_dict()
    rest = {name: tensor.bfloat16() for name, tensor in state.items() if not name.startswith("vae.")}
    vae = {name.removeprefix("vae."): tensor for name, tensor in state.items() if name.startswith("vae.")}
    torch.save(rest, tmp_path / "harmon.pth")
    torch.save({"model": vae}, tmp_path / "kl16.ckpt")
    small.tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(checkpoints, "infer_config", lambda tensors, source: SMALL)
    return [str(tmp_path / "harmon.pth"), "--vae", str(tmp_path / "kl16.ckpt")]


def test_a_folder_holds_the_weights_and_the_tokenizer(official, small, tmp_path, capsys):
    out = tmp_path / "folder"
    convert.main([*official, "--tokenizer", str(tmp_path), "--out", str(out), "--dtype", "float32"])
    assert capsys.readouterr().out == f"{out}\n"
    model = Harmon.from_pretrained(out)
    assert model.config == SMALL and model.tokenizer.to_str() == small.tokenizer.to_str()
    for name, tensor in small.state_dict().items():
        expected = tensor if name.startswith("vae.") else tensor.bfloat16().float()
        assert torch.equal(model.state_dict()[name], expected), name


def test_the_dtype_is_that_of_the_file(official, tmp_path):
    convert.main([*official, "--tokenizer", str(tmp_path), "--out", str(tmp_path / "folder")])
    assert {tensor.dtype for tensor in read(tmp_path / "folder").values()} == {torch.bfloat16}


def test_a_tokenizer_is_needed(official, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        convert.main([*official, "--out", str(tmp_path / "folder")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no tokenizer" in error and "--tokenizer" in error
    assert not (tmp_path / "folder").exists()


def shifted_models(small, folder, dtype=None):
    """Three folders: the weights plus 0, plus 0.5 and plus 2."""
    for i, shift in enumerate((0, 0.5, 2)):
        model = copy.deepcopy(small)
        with torch.no_grad():
            for p in model.parameters():
                p += shift
        model.save_pretrained(folder / str(i), dtype=dtype)
    return [str(folder / str(i)) for i in range(3)]


def test_several_models_give_their_mean(small, tmp_path):
    models = shifted_models(small, tmp_path)
    convert.main([*models, "--out", str(tmp_path / "mean")])
    mean = Harmon.from_pretrained(tmp_path / "mean")
    for p, q in zip(mean.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q + 2.5 / 3)
    assert torch.equal(read(models[0])["mar.z_proj.weight"], small.mar.z_proj.weight), "a source has changed"


def test_a_mean_is_rounded_once(small, tmp_path):
    """bfloat16 models are averaged in float32; a running mean in bfloat16 differs from the rounded mean."""
    models = shifted_models(small, tmp_path, torch.bfloat16)
    convert.main([*models, "--out", str(tmp_path / "mean")])
    exact = sum(read(model)["mar.z_proj.weight"].float() for model in models) / 3
    mean = read(tmp_path / "mean")["mar.z_proj.weight"]
    assert mean.dtype == torch.bfloat16
    assert (mean == exact.bfloat16()).float().mean() > 0.99


def test_models_of_different_sizes_have_no_mean(small, tmp_path, capsys):
    small.save_pretrained(tmp_path / "a")
    other = Harmon(replace(SMALL, mar=replace(SMALL.mar, buffer_size=5)))
    other.tokenizer = small.tokenizer
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(SystemExit, match="2"):
        convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "mean")])
    assert "differ in size or configuration" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()
