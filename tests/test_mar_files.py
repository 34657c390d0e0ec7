"""MAR checkpoints as authors distribute them and as training writes them; what is said of other files."""
import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, shake
from safetensors.torch import save_file

from harmon import Harmon
from harmonkit.config import MAR_SIZES
from harmonkit.mar_files import ClassConfig, ClassModel, load
from mar import MAR, MARConfig
from vae import AutoencoderKL, VAEConfig

# Width 192 is one whose number of heads is known. All other sizes are unlike any default.
SIZES = MARConfig(img_size=32, vae_stride=8, embed_dim=192, encoder_depth=2, decoder_depth=1, num_heads=6,
                  mlp_ratio=2, buffer_size=5, token_dim=4, class_num=1000, head_depth=3, head_width=48)
VAE = VAEConfig(ch=32, ch_mult=(1, 2, 1, 1), z_channels=4)


@pytest.fixture(scope="module")
def model():
    return shake(ClassModel(ClassConfig(SIZES, VAE)))


@pytest.fixture
def kl16(model, tmp_path):
    torch.save({"model": model.vae.state_dict()}, tmp_path / "kl16.ckpt")
    return tmp_path / "kl16.ckpt"


def raw(model):
    """The weights that are not averaged."""
    return {name: tensor + 1 for name, tensor in model.mar.state_dict().items()}


def contents(model):
    """What a checkpoint-last.pth may hold, by kind."""
    ema = model.mar.state_dict()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in ema.items()}
    args = argparse.Namespace(model="mar_base", diffloss_d=6, resume="", device="cuda", betas=(0.9, 0.95))
    state = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {
        "distributed": {"model": raw(model), "model_ema": ema},
        "trained": {"model": raw(model), "model_ema": parameters, "optimizer": state, "epoch": 799,
                    "scaler": {"scale": 65536.0, "growth_factor": 2.0}, "args": args},
        "bare": ema,
        "of a Harmon": {f"mar.{name}": tensor for name, tensor in ema.items()},
        "in a wrapper": {"model": {f"module.{name}": tensor for name, tensor in ema.items()}},
    }


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["distributed", "trained", "bare", "of a Harmon", "in a wrapper"])
def test_checkpoints(model, kl16, tmp_path, kind):
    """All sizes are read off the tensors, and of two sets of weights the averages are taken."""
    folder = tmp_path / "mar_base"
    folder.mkdir()
    torch.save(contents(model)[kind], folder / "checkpoint-last.pth")
    for path in (folder, folder / "checkpoint-last.pth"):
        loaded = load(path, vae=kl16)
        assert loaded.config == model.config and same(loaded, model) and not loaded.training
    half = load(folder, vae=kl16, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(p.is_leaf for p in half.parameters())
    assert half.generate_image([207], num_iter=2, num_sampling_steps=2)[0].size == (32, 32)


def test_safetensors_and_folders(model, kl16, tmp_path):
    save_file(model.mar.state_dict(), tmp_path / "mar-base.safetensors")
    assert same(load(tmp_path / "mar-base.safetensors", vae=kl16), model)
    config = replace(model.config, class_names=tuple(str(i) for i in range(1000)), vae_scale=0.7)
    own = ClassModel(replace(config, mar=replace(SIZES, x0_clip=5.0)))
    own.load_state_dict(model.state_dict())
    own.save_pretrained(tmp_path / "own", dtype=torch.float16)
    loaded = load(tmp_path / "own", dtype="float16")
    assert loaded.config == own.config and same(loaded, own.half())


def test_a_harmon_folder_may_hold_its_mar_by_class(small, tmp_path):
    """With the Harmon's VAE. Without such a folder it is refused."""
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a Harmon model, whose MAR has forgotten its classes"):
        load(tmp_path)
    by_class = shake(ClassModel(ClassConfig(SMALL.mar, SMALL.vae, SMALL.vae_scale, ("a", "b"))))
    by_class.save_pretrained(tmp_path / "mar", with_vae=False)
    loaded = load(tmp_path)
    assert same(loaded.mar, by_class.mar) and same(loaded.vae, small.vae)
    assert loaded.config == by_class.config
    assert same(Harmon.from_pretrained(tmp_path).mar, small.mar), "the Harmon is as before"


@pytest.mark.parametrize("change, message", [
    (lambda m: {"llm.model.norm.weight": torch.ones(2)} | m, "a Harmon model, whose MAR has forgotten"),
    (lambda m: {"encoder.conv_in.weight": torch.ones(2)}, "a VAE, which is given as vae="),
    (lambda m: {"x": torch.ones(2)}, "no MAR; its tensors begin with x"),
    (lambda m: {n: t for n, t in m.items() if n != "class_emb.weight"}, "not a complete MAR checkpoint"),
    (lambda m: {n: t for n, t in m.items() if n != "decoder_norm.bias"}, "missing: mar.decoder_norm.bias"),
    (lambda m: m | {"extra": torch.ones(1)}, "unexpected: mar.extra"),
    (lambda m: m | {"z_proj.weight": torch.ones(100, 4)}, "a MAR of width 100, whose number of att"),
    (lambda m: m | {"z_proj.weight": torch.ones(192, 16)}, "tokens of 16 channels, but the VAE has 4"),
])
def test_other_files_are_named(model, kl16, tmp_path, change, message):
    torch.save(change(dict(model.mar.state_dict())), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: .*{message}") as error:
        load(tmp_path / "x.pth", vae=kl16)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_mar_is_no_harmon(model, kl16, tmp_path):
    for name, content in contents(model).items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match="a MAR checkpoint, no Harmon model: sample.py --classes"):
            Harmon.from_pretrained(tmp_path / f"{name}.pth", vae=kl16)
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="own/config.json: a MAR checkpoint, no Harmon model"):
        Harmon.from_pretrained(tmp_path / "own")


def test_a_vae_is_asked_for(model, tmp_path):
    torch.save(contents(model)["bare"], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: there is no VAE in it; give the VAE's file as vae="):
        load(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: not a complete VAE"):
        load(tmp_path / "x.pth", vae=tmp_path / "x.pth")


@pytest.mark.parametrize("change, message", [
    ({"mar": 3}, "mar is 3"), ({"class_names": ["a"]}, "class_names: a list of 2 names"),
    ({"class_names": 5}, "class_names: a list of 2 names"), ({"vae_scale": -1}, "vae_scale is -1"),
])
def test_broken_configurations_are_named(tmp_path, change, message):
    own = ClassModel(ClassConfig(SMALL.mar, SMALL.vae))
    own.save_pretrained(tmp_path)
    about = tmp_path / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(ValueError, match=f"config.json: not a configuration of a MAR .*{message}"):
        load(tmp_path)


def test_pictures_by_class_depend_on_label_and_seed_alone(model):
    settings = dict(num_iter=3, num_sampling_steps=3, cfg=2.0)
    together = model.generate_image([3, -1, 3], seed=[5, 6, 7], **settings)
    pixels = [image.tobytes() for image in together]
    assert len(set(pixels)) == 3 and {image.size for image in together} == {(32, 32)}
    alone = model.generate_image([-1], seed=6, **settings)
    difference = torch.tensor(list(pixels[1])).float() - torch.tensor(list(alone[0].tobytes())).float()
    assert difference.abs().max() <= 1


def test_averages_that_are_not_read_take_no_memory(tmp_path):
    """A checkpoint with two sets of weights and an optimizer is mapped, and only the averages are read."""
    size = replace(MAR_SIZES["mar_base"], encoder_depth=2, decoder_depth=2, head_depth=1)
    torch.manual_seed(0)
    ema = {name: torch.nn.Parameter(tensor) for name, tensor in MAR(size).state_dict().items()}
    others = {name: tensor.detach() + 1 for name, tensor in ema.items()}
    torch.save({"model": others, "model_ema": ema, "optimizer": others, "args": argparse.Namespace(a=1)},
               tmp_path / "checkpoint-last.pth")
    torch.save(AutoencoderKL(VAEConfig(ch=32)).state_dict(), tmp_path / "kl16.ckpt")
    code = f"""
import resource, sys
from harmonkit import mar_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = mar_files.load({str(tmp_path)!r}, vae={str(tmp_path / 'kl16.ckpt')!r}, device="cpu")
sum(p.detach().sum() for p in model.parameters())
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.3
