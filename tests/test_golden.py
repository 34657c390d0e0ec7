"""Recorded outputs of the original implementation, one component a line: `pytest tests/test_golden.py`.

golden/tiny.safetensors holds inputs and outputs of every component. golden/sampling_tiny.safetensors holds
whole generations, step by step, in which no two draws of noise are alike and x_0 is clamped. Weights follow
from their names (golden/reference_weights.py). An error is ||out - original|| / ||original||, in float32.
"""
import itertools
import json
from dataclasses import fields
from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden.reference_weights import golden_noise, reference_weight
from safetensors import safe_open

from harmon import Harmon, HarmonConfig
from harmonkit.config import MAR_KEYS
from llm import KVCache, QwenConfig
from mar import MARConfig
from vae import VAEConfig

GOLDEN = ROOT / "tests" / "golden"

# Bounds on the errors, about five times the largest of SSE, AVX2 and AVX-512. For comparison: a LayerNorm
# with eps 1e-5 instead of 1e-6 is an error of 3e-6.
BOUNDS = {                                  # measured:
    "vae.mean": 1e-5,                       # 2.0e-6
    "vae.logvar": 1e-5,                     # 1.8e-6
    "vae.decoded": 7e-6,                    # 1.4e-6
    "vae.mean_nonsquare": 1e-5,             # 1.7e-6
    "llm.logits": 2e-6,                     # 4.1e-7
    "llm.cont_hidden": 2e-6,                # 3.4e-7
    "mar.native.encoded": 1.5e-6,           # 2.7e-7
    "mar.native.decoded": 1.5e-6,           # 2.8e-7
    "mar.wide.encoded": 1.5e-6,             # 2.9e-7
    "mar.wide.decoded": 1.5e-6,             # 3.1e-7
    "harmon.visual.x_enc": 1.5e-6,          # 2.9e-7
    "harmon.visual.z_enc": 2e-6,            # 3.9e-7
    "harmon.masked.x_enc": 2e-6,            # 4.6e-7
    "head.timesteps": 0,                    # 0
    "head.betas": 1.5e-7,                   # 2.5e-8
    "head.posterior_log_variance": 1.5e-7,  # 0
    "head.out": 4e-7,                       # 7.2e-8
    "head.loss.rows": 1e-6,                 # 1.8e-7
    "head.loss.value": 5e-7,                # 1.0e-7
    "head.sample.plain": 1e-6,              # 2.1e-7
    "head.sample.cfg3": 2e-6,               # 4.9e-7
    "sample.constant.latents": 4e-6,        # 8.7e-7
    "sample.constant.pixels": 1e-5,         # 2.0e-6
    "sample.linear.latents": 2.5e-6,        # 5.2e-7
    "sample.linear.pixels": 8e-6,           # 1.7e-6
    "sample.nocfg.latents": 1.5e-6,         # 2.9e-7
    "sample.nocfg.pixels": 8e-6,            # 1.7e-6
    "chat.generated": 0,                    # 0
    "train.text2image.loss": 1e-6,          # 1.9e-7
    "train.text2image.gradients": 2e-5,     # 3.3e-6, of norms
    "train.image2text.loss": 5e-7,          # 0
    "train.image2text.gradients": 5e-6,     # 6.4e-7, of norms
}
STEP_BOUND, PIXEL_BOUND = 6e-6, 1.8e-5      # 1.3e-6, 3.7e-6: of generations with numbered noise


def read(name):
    """The tensors and the metadata of a file."""
    with safe_open(GOLDEN / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


GOLD, ABOUT = read("tiny.safetensors")
SAMPLING, SAMPLING_ABOUT = read("sampling_tiny.safetensors")
CASES = json.loads(SAMPLING_ABOUT["sample"])
HEAD_CASES = json.loads(SAMPLING_ABOUT["head"])


@lru_cache
def golden_model(x0_clip=None):
    """Harmon of the golden files' sizes with the reference weights."""
    content = json.loads(ABOUT["config"])
    known = {field.name for field in fields(QwenConfig)}
    llm = QwenConfig(**{key: value for key, value in content["llm"].items() if key in known})
    sizes = {MAR_KEYS[key]: value for key, value in content["mar"].items() if key in MAR_KEYS}
    sizes["diffusion_steps"] = int(sizes["diffusion_steps"])
    mar = MARConfig(**sizes, x0_clip=x0_clip)
    vae = VAEConfig(content["vae"]["ch"], tuple(content["vae"]["ch_mult"]), content["vae"]["embed_dim"])
    model = Harmon(HarmonConfig(llm, mar, vae, vae_scale=0.2325))
    weights = {}
    for name, parameter in model.state_dict().items():
        source = "llm.model.embed_tokens.weight" if name == "llm.lm_head.weight" else name
        weights[name] = torch.from_numpy(reference_weight(source, tuple(parameter.shape)))
    model.load_state_dict(weights)
    return model.eval()


def same_noise(shape):
    return torch.from_numpy(golden_noise(tuple(shape)))


def error_of(out, expected):
    assert out.shape == expected.shape
    difference = (out.detach().double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-12)).item()


# ---- every component -------------------------------------------------------------------------------------

@torch.no_grad()
def vae_outputs(model):
    posterior = model.vae.encode(GOLD["vae.pixels"])
    return {
        "vae.mean": posterior.mean,
        "vae.logvar": posterior.logvar,
        "vae.decoded": model.vae.decode(GOLD["vae.z"]),
        "vae.mean_nonsquare": model.vae.encode(GOLD["vae.pixels_nonsquare"]).mean,
    }


@torch.no_grad()
def llm_outputs(model):
    ids, real = GOLD["llm.input_ids"], GOLD["llm.attention_mask"]
    cache, embeds = KVCache(), GOLD["llm.cont_embeds"]
    hidden_states = model.llm(ids, attention_mask=real, cache=cache)
    longer = torch.cat([real, real.new_ones(embeds.shape[:2])], dim=1)
    for _ in range(2):                      # the second pass needs the cache as `truncate` leaves it
        continued = model.llm(inputs_embeds=embeds, attention_mask=longer, cache=cache)
        cache.truncate(ids.shape[1])
    return {
        "llm.logits": model.llm.logits(hidden_states) * real[..., None],
        "llm.cont_hidden": continued,
    }


@torch.no_grad()
def mar_outputs(model):
    outputs = {}
    for name, grid in (("native", (4, 4)), ("wide", (5, 7))):
        mask = GOLD[f"mar.{name}.mask"]
        encoded = model.mar.encode(GOLD[f"mar.{name}.tokens"], mask, grid)
        outputs[f"mar.{name}.encoded"] = encoded
        outputs[f"mar.{name}.decoded"] = model.mar.decode(encoded, mask, grid)
    return outputs


@torch.no_grad()
def harmon_outputs(model):
    latents = GOLD["mar.native.tokens"].view(2, 4, 4, -1)
    x_enc, z_enc = model.visual_features(latents)
    prompt = GOLD["llm.input_ids"], GOLD["llm.attention_mask"]
    masked = model.masked_features(latents, GOLD["mar.native.mask"], *prompt)
    return {"harmon.visual.x_enc": x_enc, "harmon.visual.z_enc": z_enc, "harmon.masked.x_enc": masked}


@torch.no_grad()
def head_outputs(model):
    head, diffusion = model.mar.diffloss, model.mar.diffloss.sampling_diffusion
    z, target, mask = GOLD["head.z"], GOLD["head.loss.target"], GOLD["head.loss.mask"]
    draws = {"t": GOLD["head.t"], "noise": GOLD["head.loss.noise"]}
    rows = [head.loss(z, target, torch.arange(len(z)) == i, **draws) for i in range(len(z))]
    sampled = GOLD["head.sample.z"]
    return {
        "head.timesteps": diffusion.timesteps,
        "head.betas": diffusion.log_betas.exp(),
        "head.posterior_log_variance": diffusion.posterior_log_variance,
        "head.out": head.net(GOLD["head.x"], GOLD["head.t"], z),
        "head.loss.rows": torch.stack(rows),
        "head.loss.value": head.loss(z, target, mask, **draws),
        "head.sample.plain": head.sample(sampled, noise_fn=same_noise),
        "head.sample.cfg3": head.sample(sampled, temperature=0.9, cfg=3.0, noise_fn=same_noise),
    }


def sample_outputs(model):
    outputs = {}
    for name, rows, grid in (("constant", 4, (4, 4)), ("linear", 4, (6, 5)), ("nocfg", 2, (4, 4))):
        cfg, temperature, num_iter = GOLD[f"sample.{name}.settings"].tolist()
        prompt = GOLD["sample.input_ids"][:rows], GOLD["sample.attention_mask"][:rows]
        pixels, steps = sample(
            model, *prompt, num_iter=int(num_iter), cfg=cfg, temperature=temperature, grid=grid,
            cfg_schedule="linear" if name == "linear" else "constant",
            orders=GOLD[f"sample.{name}.orders"], noise_fn=same_noise)
        outputs[f"sample.{name}.pixels"] = pixels
        outputs[f"sample.{name}.latents"] = steps[-1][1]
    return outputs


def sample(model, *prompt, **settings):
    """Pixels, and (k, tokens, mask) of each step."""
    steps = []
    pixels = model.sample(*prompt, on_step=lambda *step: steps.append(step), **settings)
    return pixels, steps


@torch.no_grad()
def chat_outputs(model):
    _, z_enc = model.visual_features(model.encode(GOLD["train.pixels"][:1]))
    embeds = model.embed(GOLD["chat.input_ids"], z_enc)
    answer = model.llm.generate(embeds, max_new_tokens=GOLD["chat.generated"].shape[1])
    return {"chat.generated": torch.tensor([list(answer)])}


def train_outputs(model):
    prompt = GOLD["llm.input_ids"], GOLD["llm.attention_mask"]
    draws = {name: GOLD[f"train.{name}"] for name in ("mask", "t", "noise")}
    dialog = [GOLD[f"train.image2text.{name}"] for name in ("input_ids", "attention_mask", "labels")]
    losses = {
        "text2image": model.text2image_loss(GOLD["train.pixels"], *prompt, **draws),
        "image2text": model.image2text_loss(GOLD["train.pixels"], *dialog),
    }
    outputs = {}
    for task, loss in losses.items():
        loss.backward()
        outputs[f"train.{task}.loss"] = loss
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outputs[f"train.{task}.gradients"] = {name: g.double().norm().item() for name, g in gradients.items()}
        model.zero_grad()
    return outputs


@lru_cache
def outputs_of(group):
    """Every output of a group of components, computed once: {name: tensor, or norms of gradients}."""
    return globals()[f"{group}_outputs"](golden_model())


def expected_of(name):
    if name.endswith(".gradients"):
        return json.loads(ABOUT[f"grads.{name.split('.')[1]}"])
    if name == "llm.logits":
        return GOLD[name] * GOLD["llm.attention_mask"][..., None]           # those of padding mean nothing
    if name == "head.loss.rows":
        return GOLD["head.loss.mse"] + GOLD["head.loss.vb"]
    return GOLD[name]


@pytest.mark.parametrize("name", BOUNDS)
def test_equals_the_original(name):
    out, expected = outputs_of(name.split(".")[0])[name], expected_of(name)
    if name.endswith(".gradients"):
        trained = {parameter: norm for parameter, norm in expected.items() if norm and norm > 1e-7}
        errors = {parameter: abs(out[parameter] - norm) / norm for parameter, norm in trained.items()}
        worst = max(errors, key=errors.get)
        assert len(trained) > 30 and errors[worst] <= BOUNDS[name], worst
    else:
        assert error_of(out, expected) <= BOUNDS[name]


# ---- sampling, every draw of noise told apart ------------------------------------------------------------

class NumberedNoise:
    """The n-th draw, from 0, is √2 · cos(1 + (i² + 29 n) mod 97) at flat index i."""

    def __init__(self):
        self.number = itertools.count()
        self.shapes = []

    def __call__(self, shape):
        self.shapes.append(tuple(shape))
        i = np.arange(np.prod(shape), dtype=np.int64)
        noise = np.sqrt(2) * np.cos(1 + (i * i + 29 * next(self.number)) % 97)
        return torch.from_numpy(noise.reshape(shape).astype(np.float32))


@pytest.mark.parametrize("case", HEAD_CASES)
def test_the_head_samples_as_the_original(case):
    expected, settings, noise = SAMPLING[f"head.{case}"], HEAD_CASES[case], NumberedNoise()
    M, C = expected.shape
    z = SAMPLING["head.z"] if settings["cfg"] != 1 else SAMPLING["head.z"][:M]
    out = golden_model(x0_clip=3.0).mar.diffloss.sample(z, noise_fn=noise, **settings)
    assert error_of(out, expected) <= STEP_BOUND
    assert noise.shapes == [(M, C)] * 20


@pytest.mark.parametrize("case", CASES)
def test_every_step_of_sampling_equals_the_original(case):
    expected, masked, _ = recorded(case)
    pixels, steps, _ = generation(case, len(masked))
    assert [k for k, _, _ in steps] == list(range(1, len(masked) + 1))
    orders = SAMPLING[f"sample.{case}.orders"]
    for (k, tokens, mask), reference, m in zip(steps, expected, masked, strict=True):
        assert error_of(tokens, reference) <= STEP_BOUND, k
        hidden = [row.nonzero().flatten().tolist() for row in mask]
        assert hidden == orders[:len(tokens), :m].sort().values.tolist(), k
    assert error_of(pixels.flatten()[::7], SAMPLING[f"sample.{case}.pixels"]) <= PIXEL_BOUND


@pytest.mark.parametrize("case", CASES)
def test_noise_is_drawn_as_in_the_original(case):
    """In every step the start and one draw for each diffusion step but the last: 20 of one shape."""
    expected, masked, N = recorded(case)
    B, C = expected.shape[1], expected.shape[-1]
    _, _, shapes = generation(case, len(masked))
    new = [before - after for before, after in zip([N, *masked], masked)]
    assert shapes == [(B * count, C) for count in new for _ in range(20)]


@pytest.mark.parametrize("case", ["every", "every_few"])
def test_surplus_steps_draw_nothing(case):
    """With K = N every step draws one token; seven steps more have nothing left to do."""
    _, _, N = recorded(case)
    pixels, _, shapes = generation(case, N)
    same_pixels, steps, same_shapes = generation(case, N + 7)
    assert torch.equal(pixels, same_pixels) and shapes == same_shapes and len(steps) == N + 7


def recorded(case):
    """The original's tokens (K, B, h, w, C), the counts (K,) of masked tokens after each step, and N."""
    expected = SAMPLING[f"sample.{case}.steps"]
    return expected, CASES[case]["masked"], expected.shape[2] * expected.shape[3]


@lru_cache
def generation(case, num_iter):
    """Pixels, (k, tokens, mask) of each step, and the shapes of all draws. The arguments stay as they are."""
    about, noise = CASES[case], NumberedNoise()
    given = [SAMPLING[f"sample.{case}.{name}"] for name in ("input_ids", "attention_mask", "orders")]
    ids, real, orders = (tensor.clone() for tensor in given)
    settings = {name: about[name] for name in ("cfg", "cfg_schedule", "temperature")}
    settings["grid"] = None if about["native"] else tuple(about["grid"])
    pixels, steps = sample(golden_model(x0_clip=3.0), ids, real, num_iter=num_iter, orders=orders,
                           noise_fn=noise, **settings)
    assert all(torch.equal(*pair) for pair in zip((ids, real, orders), given))
    return pixels, steps, noise.shapes


# ---- names -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["harmon-0.5b", "harmon-1.5b"])
def test_parameter_names_and_shapes_are_the_official_ones(name):
    with torch.device("meta"):
        model = Harmon(HarmonConfig.from_name(name))
    official = json.loads((GOLDEN / f"keys-{name}.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == official
