"""Weights that are not finite: no way in loads them, draws with them or answers with them."""
import copy
import math

import pytest
import torch
from conftest import SMALL, shake
from PIL import Image
from test_sample import main, one_process  # noqa: F401

from harmon import Harmon
from harmonkit.checkpoints import load_strict, read, write
from harmonkit.fast import HAS_ONEDNN, accelerate
from harmonkit.mar_files import ClassConfig, ClassModel
from harmonkit.pipeline import generate_batch
from llm import Qwen2

VALUES = (math.nan, math.inf, -math.inf)


@pytest.fixture
def model(tokenizer):
    model = shake(Harmon(SMALL))
    model.tokenizer = tokenizer
    return model


def set_element(model, name, value, place=-1):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[place] = value


# ---- a model in memory -------------------------------------------------------------------------------------

PICTURE = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.linear_gradient("L").resize((32, 32)).point(lambda level: 255 * (level > 100))
IDS, REAL = torch.arange(5, 15)[None], torch.ones(1, 10, dtype=torch.bool)
FAST = dict(num_iter=2, num_sampling_steps=2)
WAYS = {
    "draw": lambda model: model.generate_image("a star", **FAST)[0].tobytes(),
    "ddim": lambda model: model.generate_image("a star", **FAST, solver="ddim")[0].tobytes(),
    "paint": lambda model: model.generate_image("a star", image=PICTURE, mask=MASK, **FAST)[0].tobytes(),
    "sample": lambda model: model.sample(IDS, REAL, cfg=1, generator=torch.Generator(), **FAST).tolist(),
    "ask": lambda model: "".join(model.chat("What is it?", PICTURE, max_new_tokens=6)),
    "ask without a picture": lambda model: "".join(model.chat("What?", max_new_tokens=6)),
}


def test_one_element_anywhere_is_named_or_has_no_part_in_the_result(model):
    """Clamps, exp and the attention of short sequences would turn some of them into finite numbers."""
    whole = {way: of(model) for way, of in WAYS.items()}
    names = [name for name, _ in model.named_parameters()]
    always = ["mar.encoder_blocks.0.attn.qkv.bias", "mar.encoder_blocks.1.attn.qkv.weight",
              "mar.decoder_blocks.1.attn.qkv.bias", "mar.diffloss.net.final_layer.linear.bias",
              "vae.decoder.mid.attn_1.q.bias", "llm.model.embed_tokens.weight"]
    refused = 0
    for number, name in enumerate([*always * 3, *names[::32]]):
        place = (37 * number) % model.get_parameter(name).numel()
        kept = model.get_parameter(name).view(-1)[place].item()
        set_element(model, name, VALUES[number // len(always) % 3], place)
        for way, of in WAYS.items():
            try:
                assert of(model) == whole[way], (name, way)
            except ValueError as error:
                refused += 1
                assert name in str(error) and "not finite" in str(error)
        set_element(model, name, kept, place)
    assert refused > 100 and all(of(model) == whole[way] for way, of in WAYS.items())


@pytest.mark.parametrize("x0_clip", [3.0, None])
@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpm++"])
@pytest.mark.parametrize("value", VALUES)
def test_the_head_alone(model, x0_clip, solver, value):
    head = model.mar.diffloss
    head.x0_clip = x0_clip
    z = torch.ones(3, 32)
    head.sample(z, solver=solver)
    set_element(head, "net.final_layer.linear.bias", value, 0)              # of ε
    with pytest.raises(ValueError, match="the drawn tokens are not finite: the weights hold NaN or infinity"):
        head.sample(z, solver=solver)


def test_conditions_from_a_mar_that_is_not_finite(model):
    set_element(model, "mar.z_proj.weight", math.inf)
    mask = torch.arange(16)[None] < 8
    tokens = torch.ones(1, 16, 4)
    z = model.mar.decode(model.mar.encode(tokens, mask, (4, 4)), mask, (4, 4))
    with pytest.raises(ValueError, match="not finite"):
        model.mar.diffloss.sample(z[0])


def test_pictures_by_class():
    drawing = shake(ClassModel(ClassConfig(SMALL.mar, SMALL.vae)))
    names = [name for name, _ in drawing.named_parameters()]
    whole, refused = drawing.generate_image([0, -1], cfg=3, **FAST)[0].tobytes(), 0
    always = ["mar.encoder_blocks.1.attn.qkv.bias", "vae.decoder.mid.attn_1.k.weight", "mar.class_emb.weight"]
    for number, name in enumerate([*always, *names[::16]]):
        kept = drawing.get_parameter(name).view(-1)[0].item()
        set_element(drawing, name, VALUES[number % 3], 0)
        try:
            assert drawing.generate_image([0, -1], cfg=3, **FAST)[0].tobytes() == whole, name
        except ValueError as error:
            refused += 1
            assert name in str(error) and "not finite" in str(error)
        set_element(drawing, name, kept, 0)
    assert refused > len(names) // 16 // 2 + 3
    assert drawing.generate_image([0, -1], cfg=3, **FAST)[0].tobytes() == whole


def test_decoding_alone(model):
    latents = torch.zeros(1, 4, 4, 4)
    model.decode(latents)
    with pytest.raises(ValueError, match="the pixels are not finite"):
        model.decode(latents + math.nan)
    set_element(model, "vae.decoder.conv_out.weight", math.inf)
    with pytest.raises(ValueError, match="here it is the weight vae.decoder.conv_out.weight"):
        model.decode(latents + 1)


@pytest.mark.parametrize("value", VALUES)
def test_a_row_of_the_vocabulary_that_is_not_finite_is_never_chosen_nor_left_out(model, value):
    """The hidden states are finite; NaN would be the largest for argmax, and -inf would never be chosen."""
    llm = model.llm
    llm.lm_head.weight = torch.nn.Parameter(llm.lm_head.weight.detach().clone())
    set_element(llm, "lm_head.weight", value)
    embeds = torch.ones(1, 3, 32)
    with pytest.raises(ValueError, match="the language model's output is not finite"):
        next(llm.generate(embeds, max_new_tokens=2))
    with pytest.raises(ValueError, match="here it is the weight lm_head.weight"):
        generate_batch(llm, embeds, torch.ones(1, 3, dtype=torch.bool), max_new_tokens=2, eos_token_id=0)


def test_logits_are_looked_at_in_every_step(model, monkeypatch):
    logits, calls = model.llm.logits, []

    def overflows_later(hidden_states):
        calls.append(0)
        return logits(hidden_states) * (math.inf if len(calls) == 3 else 1)
    monkeypatch.setattr(model.llm, "logits", overflows_later)
    answer = model.llm.generate(torch.ones(1, 3, 32), max_new_tokens=5)
    assert len([next(answer), next(answer)]) == 2
    with pytest.raises(ValueError, match="not finite: .* or the dtype overflows$"):
        next(answer)


@pytest.mark.skipif(not HAS_ONEDNN, reason="packing needs an x86 CPU")
def test_packed_weights_are_named_too(model):
    set_element(model, "llm.model.layers.1.mlp.up_proj.weight", math.nan)
    packed = accelerate(model, "packed")
    for way in ("draw", "ask"):
        with pytest.raises(ValueError, match="here it is the weight llm.model.layers.1.mlp.up_proj.weight"):
            WAYS[way](packed)


def test_finite_weights_that_overflow_blame_the_dtype(model):
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        half.vae.decoder.conv_in.weight.fill_(6e4)
    with pytest.raises(ValueError, match="not finite: .* or the dtype overflows$"):
        half.generate_image("a star", **FAST)


# ---- files -------------------------------------------------------------------------------------------------

@pytest.fixture
def broken(model, tmp_path):
    """A folder whose weight mar.mask_token holds NaN."""
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in read(tmp_path).items()}
    tensors["mar.mask_token"].view(-1)[-1] = math.nan
    write(tmp_path / "model.safetensors", tensors)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_not_loaded(broken, dtype):
    with pytest.raises(ValueError, match=f"^{broken}: the weight mar.mask_token holds NaN or infinity: the "):
        Harmon.from_pretrained(broken, dtype=dtype)


@pytest.mark.parametrize("flags", [("a star", "--num-iter", 1), ("--ask", "What?"),
                                   ("a star", "--image", "p.png", "--mask", "m.png")])
def test_the_command_line_says_so_in_one_line(broken, main, flags, monkeypatch):  # noqa: F811
    monkeypatch.chdir(broken)
    PICTURE.save("p.png")
    MASK.save("m.png")
    status, out, err = main(*flags, "--model", broken, "--out", broken / "out")
    lines = [line for line in err.splitlines() if not line.startswith("redrawing ")]
    assert (status, out, len(lines)) == (2, "", 1) and not (broken / "out").exists()
    assert lines[0].startswith(f"sample.py: {broken}: the weight mar.mask_token holds NaN or infinity")


def test_a_vae_and_parts_of_a_model_are_not_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    vae = {name: tensor.clone() for name, tensor in model.vae.state_dict().items()}
    vae["encoder.conv_in.bias"][0] = math.inf
    torch.save(vae, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match="the weight vae.encoder.conv_in.bias holds NaN or infinity"):
        Harmon.from_pretrained(tmp_path, vae=tmp_path / "kl16.ckpt")
    state = {name: tensor.clone() for name, tensor in model.llm.state_dict().items()}
    state["model.norm.weight"][0] = math.nan
    with pytest.raises(ValueError, match="^qwen: the weight model.norm.weight holds NaN"):
        load_strict(Qwen2(SMALL.llm), state, "qwen")


def test_weights_too_large_for_a_dtype_are_read_in_another(model, tmp_path):
    set_element(model, "proj_in.0.bias", 1e5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="proj_in.0.bias reaches 1e.05, too large for float16; take another"):
        Harmon.from_pretrained(tmp_path, dtype="float16")
    assert Harmon.from_pretrained(tmp_path, dtype="bfloat16").proj_in[0].bias[-1] == 99840
