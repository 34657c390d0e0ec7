"""The porting kit: the export, mistakes that compare.py has to name, and PORTING.md."""
import json
import re
import types
import zlib
from dataclasses import replace
from pathlib import Path

import compare
import export
import numpy as np
import numpy_harmon as port
import pytest
import torch
from conftest import ROOT, SMALL
from parameters import load, random_weight, read_safetensors, uniform

from harmon import Harmon, HarmonConfig
from harmonkit.shapes_world import world

PORTING = (ROOT / "porting" / "PORTING.md").read_text(encoding="utf-8")
IMAGE = world.render(world.scene(0, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A very small model with weights made from their names."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL.to_json()))
    return export.random_model(folder)


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    """The index and the tensors of its vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    export.export(model, folder, origin="random")
    return json.loads((folder / "index.json").read_text()), read_safetensors(folder / "vectors.safetensors")


# ---- export ------------------------------------------------------------------------------------------------

def test_the_index_describes_every_tensor(content):
    index, tensors = content
    entries = {about["name"]: about for about in index["tensors"]}
    assert len(entries) == len(index["tensors"]) and set(entries) == set(tensors)
    for name, about in entries.items():
        assert list(tensors[name].shape) == about["shape"]
        assert str(tensors[name].dtype) == about["dtype"]
        assert np.isfinite(tensors[name]).all()
        if about["kind"] == "computed":
            assert callable(getattr(port, about["source"].removeprefix("numpy_harmon.")))
    padded = entries["generate/step1/llm.model.layers.0.self_attn.q"]
    assert padded["attention_mask"] == ["generate/step1/llm.attention_mask", 2]


def test_the_index_tells_inputs_and_the_functions_that_compute(content):
    index, _ = content
    source = {about["name"]: about["source"].removeprefix("numpy_harmon.") for about in index["tensors"]}
    assert source["understand/vae.encoder.down.0.downsample.conv.in"] == "encode"
    assert source["understand/mar.encoder_blocks.0.mlp.fc2.in"] == "mar_block"
    assert source["understand/mar.encoder_blocks.0.norm1.out"] == "layer_norm"
    assert source["generate/step2/x_dec"] == "add_residual"
    assert source["generate/picture"] == "to_picture"
    inputs = {about["name"].split("/")[-1] for about in index["tensors"] if about["kind"] == "input"}
    assert inputs == {
        "input_ids", "pixels", "orders", "noise", "attention_mask", "latents", "mask", "t", "labels"}


def test_every_block_attention_cache_and_step_is_there(content):
    names = {about["name"] for about in content[0]["tensors"] if about["kind"] != "gradient"}
    places = ("understand/", "generate/step1/", "generate/step4/", "train/text2image/", "train/image2text/")
    for place in places:
        llm = place + "token0/" * place.startswith("understand")
        wanted = [f"{place}mar.encoder_blocks.{i}.out" for i in range(2)]
        wanted += [f"{llm}llm.model.layers.{i}.out" for i in range(2)]
        wanted += [f"{place}mar.encoder_blocks.0.attn.weights", f"{llm}llm.model.layers.0.self_attn.weights"]
        assert set(wanted) <= names, sorted(set(wanted) - names)
    for place in ("understand/token0", "generate/prompt"):
        layers = [f"{place}/llm.model.layers.{i}.self_attn" for i in range(2)]
        assert {f"{layer}.{what}" for layer in layers for what in "kv"} <= names
    steps = [f"generate/step1/t{round(i * 999 / 7)}" for i in range(8)]
    assert {f"{step}/mar.diffloss.{what}" for step in steps for what in ("x", "mean")} <= names
    assert not [name for name in names if "blocks.1.attn" in name or re.search(r"step2.*diffloss\.net", name)]


def test_gradients_and_checksums_are_those_of_the_model(model, content):
    index, tensors = content
    names = ("input_ids", "attention_mask", "latents", "mask", "t", "noise")
    batch = {name: torch.from_numpy(tensors[f"train/text2image/{name}"]) for name in names}
    model.zero_grad()
    model.text2image_loss(None, **batch).backward()
    for name, x in model.named_parameters():
        about = {"shape": list(x.shape), "crc32": zlib.crc32(x.detach().numpy().tobytes())}
        assert index["parameters"][name] == about
        norm = tensors.get(f"train/text2image/gradient/{name}")
        assert (norm is None) == (x.grad is None)
        assert norm is None or x.grad.norm().item() == pytest.approx(norm.item())
    model.zero_grad()


def test_weights_from_names_are_splitmix64():
    def splitmix64(seed, n):
        z = (seed + (n + 1) * 0x9E3779B97F4A7C15) % 2 ** 64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
        return z ^ z >> 31
    # The generator's published test.
    assert [splitmix64(1234567, n) for n in range(2)] == [6457827717110365317, 3203168211198807973]
    name = "mar.z_proj.weight"
    seed = zlib.crc32(name.encode())
    assert uniform(name, 5).tolist() == [(splitmix64(seed, n) >> 40) * 2 ** -23 - 1 for n in range(5)]
    assert random_weight(name, (64, 16)).std() == pytest.approx(0.25, rel=0.05)
    assert random_weight("llm.model.norm.weight", (512,)).mean() == pytest.approx(1, abs=0.02)

    # Of white noise the head predicts about the noise itself.
    final = random_weight("mar.diffloss.net.final_layer.linear.weight", (8, 64))[:4]
    head = final @ random_weight("mar.diffloss.net.input_proj.weight", (64, 4))
    assert np.abs(head - np.eye(4)).max() < 0.7 and abs(np.trace(head) / 4 - 1) < 0.4


def test_the_command_line_exports_and_saves_the_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_json()))
    weights, out = str(tmp_path / "weights"), str(tmp_path / "vectors")
    export.main(["--random", str(tmp_path), "--passes", "resize", "--save-weights", weights, "--out", out])
    assert capsys.readouterr().out == f"{out}: 3 tensors\n"
    saved = load(weights)[0].mar.z_proj.weight
    assert saved.shape == (32, 4) and np.array_equal(saved, random_weight("mar.z_proj.weight", (32, 4)))


def test_bad_input_is_said_in_one_line(tmp_path, capsys):
    for argv, words in (["--random", "harmon-9b"], "harmon-9b"), (["--passes", "dream"], "understand"):
        with pytest.raises(SystemExit) as stop:
            export.main([*argv, "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_only_what_is_sampled_is_ill_conditioned(content):
    moved = {about["name"]: about["rounding"] for about in content[0]["tensors"] if "rounding" in about}
    assert moved["resize/mar.encoder_pos_embed_learned"] == 0
    assert 1e-8 < moved["understand/z_enc"] < 1e-4
    sampled = re.compile(r"/t\d|^generate/(?!prompt|step1/)|^class/(?!step1/)|/drawn$|/tokens$")
    others = {name: far for name, far in moved.items() if not sampled.search(name)}
    assert len(others) > 350 and max(others.values()) < 1e-4


# ---- planted mistakes --------------------------------------------------------------------------------------

# A mistake, the text of the NumPy port, its replacement, the first tensor that differs, words of its cause.
LAYER_NORM = "return normalize(x) * p.weight + p.bias"
EPS_1E5 = LAYER_NORM.replace("x)", "x) * np.sqrt(x.var(-1) / (x.var(-1) + 1e-5))[..., None]")
TABLE = 'x + position_embedding(p, "encoder_pos_embed_learned", grid)'
TABLE_BY_ONE = 'x + np.roll(position_embedding(p, "encoder_pos_embed_learned", grid), 1, axis=1)'
POSITIONS = 'np.cumsum(p.show("attention_mask", attention_mask), axis=1) - 1'
PADDING_COUNTS = 'np.arange(S)[None].repeat(len(p.show("attention_mask", attention_mask)), 0)'
KL = "gaussian_kl(true_mean, diffusion.posterior_log_variance[t], mean, logvar)"
KL_TURNED = "gaussian_kl(mean, logvar, true_mean, diffusion.posterior_log_variance[t])"
BUGS = [
    ("padding on the wrong side", "(0, 1), (0, 1)", "(1, 0), (1, 0)",
     "understand/vae.encoder.down.0.downsample.conv.in", "at the bottom only"),
    ("upsampling by tiles", "x.repeat(2, axis=2)", "np.tile(x, (1, 1, 2, 1))",
     "generate/vae.decoder.up.3.upsample.conv.in", "nearest"),
    ("levels of the decoder upside down", "reversed(list(decoder.up))", "decoder.up",
     "generate/vae.decoder.up.3.block.0.out", "run deepest first"),
    ("log variance for mean", "mean, logvar = np.split", "logvar, mean = np.split",
     "understand/latents", "first half of quant_conv's channels"),
    ("no vae_scale", '(0, 2, 3, 1) * p.config["vae_scale"]', "(0, 2, 3, 1)",
     "understand/latents", "times vae_scale"),
    ("picture off by four", "+ 128, 0, 255", "+ 132, 0, 255",
     "generate/picture", "cut, not rounded"),
    ("position embedding off by one", TABLE, TABLE_BY_ONE,
     "understand/mar.z_proj_ln.in", "take rows 0 … n-1"),
    ("torch's eps", LAYER_NORM, EPS_1E5,
     "understand/mar.z_proj_ln.out", "eps 1e-6, not 1e-5"),
    ("queries and keys swapped", "q, k, v = (split_heads(part, heads)", "k, q, v = (split_heads(part, heads)",
     "understand/mar.encoder_blocks.0.attn.q", "q of all heads, then k, then v"),
    ("tanh GELU", "erf(x / math.sqrt(2))", "np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))",
     "understand/mar.encoder_blocks.0.mlp.fc2.in", "not the tanh approximation"),
    ("buffers not moved behind", "np.concatenate([z_enc[:, n:], z_enc[:, :n]], axis=1)", "z_enc",
     "understand/z_enc", "behind the image tokens"),
    ("buffers not moved back", "np.concatenate([residual[:, -n:], residual[:, :-n]], axis=1)", "residual",
     "generate/step2/x_dec", "move to the front again"),
    ("mask_token through decoder_embed",
     "np.tile(p.mask_token,", "np.tile(p.mask_token @ p.decoder_embed.weight.T,",
     "generate/step1/mar.decoder_blocks.0.in", "mask_token to all others"),
    ("aligned corners",
     "np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)", "np.linspace(0, old - 1, new)",
     "resize/mar.encoder_pos_embed_learned", "no aligned corners"),
    ("rotary pairs neighbours", "a, b = np.split(x, 2, axis=-1)", "b, a = x[..., 1::2], x[..., ::2]",
     "understand/token0/llm.model.layers.0.self_attn.q", "half-split"),
    ("key heads tiled", "k.repeat(groups, axis=1)", "np.tile(k, (1, groups, 1, 1))",
     "understand/token0/llm.model.layers.0.self_attn.weights", "repeat, do not tile"),
    ("padding counts", POSITIONS, PADDING_COUNTS,
     "generate/step1/llm.positions", "does not count"),
    ("schedule rounded", "math.floor(num_tokens", "round(num_tokens",
     "generate/masked", "⌊N · cos"),
    ("order turned around", "rank < masked[k - 1]", "rank >= N - masked[k - 1]",
     "generate/step2/mask", "first m_(k-1) entries"),
    ("steps not respaced", "p.net.time_embed, diffusion.timesteps", "p.net.time_embed, np.arange(num_steps)",
     "generate/step1/mar.diffloss.net.time_embed.in", "the step of the 1000"),
    ("sines first", "[np.cos(angles), np.sin(angles)], axis=1", "[np.sin(angles), np.cos(angles)], axis=1",
     "generate/step1/mar.diffloss.net.time_embed.mlp.0.in", "128 cosines, then 128 sines"),
    ("shift and scale swapped", "shift, scale, gate =", "scale, shift, gate =",
     "generate/step1/t999/mar.diffloss.net.res_blocks.0.mlp.0.in", "shift, scale, gate in that order"),
    ("halves of guidance swapped", "cond_eps, uncond_eps =", "uncond_eps, cond_eps =",
     "generate/step1/t999/mar.diffloss.eps_guided", "first half of the rows is conditional"),
    ("no clamp of x_0", "-x0_clip, x0_clip)", "-math.inf, math.inf)",
     "generate/step1/t999/mar.diffloss.mean", "x0_clip"),
    ("variance interpolated from 0 to 1", "(v + 1) / 2", "v",
     "generate/step1/t999/mar.diffloss.logvar", "f = (v + 1)/2"),
    ("variance of unconditional rows", "v[:M]", "v[M:]",
     "generate/step1/t999/mar.diffloss.logvar", "conditional rows'"),
    ("no temperature", " * temperature", "",
     "generate/step1/t856/mar.diffloss.x", "temperature"),
    ("noise in another order", "noise[:, num_steps - i]", "noise[:, i]",
     "generate/step1/t856/mar.diffloss.x", "in this order"),
    ("the class in the first buffer only", "buffers[labels >= 0] =", "buffers[labels >= 0, :1] =",
     "class/step1/mar.z_proj_ln.in", "all n buffers"),
    ("both halves with the class", "np.concatenate([labels, np.full_like(labels, -1)])",
     "np.concatenate([labels, labels])", "class/step1/mar.z_proj_ln.in", "encode both halves"),
    ("the mask before the step weighs", "(N - max(1, masked[k])) / N", "(N - masked[k - 1]) / N",
     "class/step1/weight", "after the step"),
    ("the last step reaches w", "(N - max(1, masked[k])) / N", "(N - masked[k]) / N",
     "class/step4/weight", "never w"),
    ("bound in nats", " / math.log(2)\n", "\n",
     "train/text2image/loss", "bound / ln 2"),
    ("KL turned around", KL, KL_TURNED,
     "train/text2image/mar.diffloss.kl", "true posterior's first"),
    ("labels not shifted", "targets = labels[:, 1:]", "targets = labels[:, :-1]",
     "train/image2text/logits", "those of the last position"),
]


@pytest.mark.parametrize("bug", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_mistake_is_found_and_named(bug, model, content, monkeypatch):
    _, right, wrong, where, cause = bug
    text = Path(port.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1
    somebodys_port = types.ModuleType("somebodys_port")
    exec(text.replace(right, wrong), vars(somebodys_port))
    monkeypatch.setattr(export, "port", somebodys_port)

    index, expected = content
    recorder = export.Recorder()
    batches = export.training_batches(model, IMAGE, index["settings"])
    p = replace(export.part_of(model), trace=recorder)
    export.run(p, model.tokenizer, batches, IMAGE, index["settings"])
    results = compare.compare(index, expected, recorder.tensors)
    lines = []
    assert compare.report(results, lines.append) == 1
    report = "\n".join(lines)
    assert re.search(r"the first tensor that differs, .*\n  (\S+)", report)[1] == where
    assert cause in re.search("usual cause:  (.*)", report)[1]


def test_a_missing_gradient_scale_is_named(model, content, monkeypatch):
    index, expected = content
    monkeypatch.setattr(model, "grad_scale", 1.0)
    norms = export.gradients(model, export.training_batches(model, IMAGE, index["settings"]))
    results = compare.compare(index, expected, {**expected, **norms})
    first = next(r.about["name"] for r in results if r.verdict == "differs")
    assert first.startswith("train/image2text/gradient/proj_in.2")
    assert "A tenth of the gradient" in compare.cause_of(first)


# ---- the document ------------------------------------------------------------------------------------------

def test_every_tensor_that_the_document_names_is_exported(content):
    told = re.findall(r"`((?:understand|generate|train|resize|class)/[^`…{[]*[^`/…{[])[`[]", PORTING)
    assert len(told) > 15 and set(told) <= set(content[1]), sorted(set(told) - set(content[1]))


@pytest.mark.parametrize("size", ["small", "harmon-tiny", "harmon-0.5b", "harmon-1.5b"])
def test_the_parameter_table_is_complete_and_right(size):
    config = SMALL if size == "small" else HarmonConfig.from_name(size)
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in Harmon(config).state_dict().items()}
    llm, mar, vae = config.llm, config.mar, config.vae
    widths = [vae.ch * factor for factor in vae.ch_mult]
    sizes = dict(
        V=llm.vocab_size, H=llm.hidden_size, F=llm.intermediate_size, D=mar.embed_dim, n=mar.buffer_size,
        Q=llm.num_key_value_heads * llm.hidden_size // llm.num_attention_heads, N=mar.grid ** 2,
        C=mar.token_dim, W=mar.head_width, classes=mar.class_num, ch=vae.ch, m=widths[-1], ch0=widths[0])
    table = re.search(r"\| name \| shape \|\n\|---\|---\|\n((?:\|.*\n)+)", PORTING)[1]
    seen = set()
    for pattern, shape in re.findall(r"\| `(.*)` \| (.*) \|", table):
        regex = re.escape(pattern).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
        regex = re.sub(r"\bI\b", r"\\d+", regex)
        found = {name for name in shapes if re.fullmatch(regex, name)}
        assert (found or "nin_shortcut" in pattern) and not seen & found, pattern
        seen |= found
        factors = re.sub(r"(\d)([A-Z])", r"\1*\2", shape.replace("ch₀", "ch0")).split(" × ")
        for name in found:
            local = dict(sizes, **level_widths(name, vae.ch, widths))
            assert tuple(eval(factor, {}, local) for factor in factors) == shapes[name], name

    biased = {name.removesuffix(".bias") for name in shapes if name.endswith(".bias")}
    assert all(shapes[f"{name}.bias"] == shapes[f"{name}.weight"][:1] for name in biased)
    assert seen | {f"{name}.bias" for name in biased} == set(shapes)
    unbiased = {name.removesuffix(".weight") for name in seen if name.endswith(".weight")} - biased
    told = re.compile(r"llm\..*norm|llm\..*(o|gate|up|down)_proj|llm\.lm_head|embed_tokens|class_emb")
    assert all(map(told.search, unbiased)) and not any(map(told.search, biased))


def level_widths(name, ch, widths):
    """a and b of the document for a parameter of the VAE, {} for others."""
    place = re.search(r"\.(down|up)\.(\d+)(?:\.block\.(\d+))?", name)
    if place is None:
        return {}
    before = [ch] + widths if place[1] == "down" else widths[1:] + widths[-1:]
    level = int(place[2])
    return dict(a=before[level] if place[3] == "0" else widths[level], b=widths[level])
