"""The porting kit: an export, the NumPy port that recomputes it, and the comparison that names what a port does wrong."""
import json
import math
import re
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

sys.path.insert(0, str(ROOT / "porting"))

import compare  # noqa: E402
import export  # noqa: E402
import numpy_harmon as port  # noqa: E402
import replay  # noqa: E402
import shapes  # noqa: E402
from harmon import GENERATE, UNCONDITIONAL, Harmon, HarmonConfig, mask_schedule, pixels_to_images  # noqa: E402
from parameters import load, read_safetensors  # noqa: E402
from random_weights import random_weight, uniform  # noqa: E402

PORTING = (ROOT / "porting" / "PORTING.md").read_text()


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """An export of a very small model with name-seeded weights, all passes."""
    folder = tmp_path_factory.mktemp("vectors")
    export.export(export.random_model(SMALL), folder, origin="random", steps=3, max_new_tokens=3)
    return folder


@pytest.fixture(scope="module")
def content(vectors):
    index = json.loads((vectors / "index.json").read_text())
    return index, read_safetensors(vectors / "vectors.safetensors")


def results_of(content):
    """What compare.py says of the port as it is now, planted bugs included."""
    index, expected = content
    return compare.compare(index, expected, replay.recompute(replay.model_of(index), index, expected))


# ---- export ----------------------------------------------------------------------------------------------------------

def test_the_index_tells_shape_type_words_and_line(content):
    index, tensors = content
    entries = {e["name"]: e for e in index["tensors"]}
    assert len(entries) == len(index["tensors"]) == len(tensors) > 600
    for name, entry in entries.items():
        assert list(tensors[name].shape) == entry["shape"] and entry["operation"] and entry["kind"] in ("input", "computed", "gradient")
        if entry["kind"] != "input":
            file, line, function = re.fullmatch(r"(\w+\.py):(\d+) (\S+)", entry["source"]).groups()
            text = (ROOT / file).read_text().splitlines()
            assert int(line) <= len(text) and text[int(line) - 1].strip(), entry["source"]

    def source(name):
        file, line, _ = re.split("[: ]", entries[name]["source"])
        return (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert "F.pad(x, (0, 1, 0, 1))" in source("understand/vae.encoder.down.0.downsample.conv.in")
    assert "F.gelu" in source("understand/mar.encoder_blocks.0.mlp.fc2.in")
    assert "self.mlp(self.norm2(x))" in source("understand/mar.encoder_blocks.1.out")
    assert "x_enc + torch.cat" in source("generate/step2/back_to_mar")
    assert "scaled_dot_product_attention" in source("understand/mar.encoder_blocks.0.attn.weights")
    assert "uncond + cfg * (cond - uncond)" in source("generate/step1/t999/eps_guided")
    assert "real.cumsum(1) - 1" in source("generate/step2/llm.positions")
    assert "eps 1e-06" in entries["understand/mar.z_proj_ln.out"]["operation"]


def test_every_block_attention_cache_and_diffusion_step_is_there(content):
    index, _ = content
    names = {name for e in index["tensors"] for name in [e["name"], *e["also"]]}
    for place in ("understand/", "generate/step1/", "generate/step3/", "train/text2image/", "train/image2text/"):
        stacks = ["mar.encoder_blocks"] + ["mar.decoder_blocks"] * ("image2text" not in place and "understand" not in place)
        inside = place + "token0/" * ("understand" in place)
        wanted = [f"{place}{stack}.{i}.{end}" for stack in stacks for i in range(2) for end in ("in", "out")] + [f"{place}{stack}.0.attn.weights" for stack in stacks]
        wanted += [f"{inside}llm.model.layers.{i}.{end}" for i in range(2) for end in ("in", "out")]
        wanted += [f"{inside}llm.{what}" for what in ("positions", "model.layers.0.self_attn.weights", "model.norm.out")]
        assert set(wanted) <= names, sorted(set(wanted) - names)
    t = [round(i * 999 / 7) for i in range(8)]
    assert {f"generate/step1/t{step}/{what}" for step in t for what in ("x", "eps", "v")} <= names
    assert {f"generate/prompt/llm.cache.{i}.{what}" for i in range(2) for what in "kv"} | {"understand/token0/logits", "understand/answer"} <= names
    trained = {n for n in index["parameters"] if not n.startswith("vae.") and n != "mar.class_emb.weight"}
    assert {f"train/text2image/gradient/{n}" for n in trained} <= names


def test_losses_and_gradients_are_those_of_the_model(content):
    index, tensors = content
    model = export.random_model(SMALL)
    inputs = [e["name"] for e in index["tensors"] if e["kind"] == "input"]
    given = lambda task: {k.split("/")[2]: torch.from_numpy(tensors[k]) for k in inputs if k.startswith(f"train/{task}/")}  # noqa: E731
    loss = model.text2image_loss(None, **given("text2image"))
    loss.backward()
    assert loss.item() == pytest.approx(float(tensors["train/text2image/loss"]), rel=1e-6)
    for name in ("mar.z_proj.weight", "mar.diffloss.net.final_layer.linear.weight", "llm.model.layers.0.self_attn.k_proj.bias"):
        assert float(dict(model.named_parameters())[name].grad.norm()) == pytest.approx(float(tensors[f"train/text2image/gradient/{name}"]), rel=1e-5)
    loss = model.image2text_loss(None, **given("image2text"))
    assert loss.item() == pytest.approx(float(tensors["train/image2text/loss"]), rel=1e-6)


def test_exporting_leaves_no_trace_on_the_model(vectors):
    model = export.random_model(SMALL)
    before = set(vars(model)), set(vars(model.llm)), set(vars(model.mar.diffloss))
    export.export(model, vectors.parent / "again", origin="random", passes=("understand", "resize"), max_new_tokens=2)
    assert before == (set(vars(model)), set(vars(model.llm)), set(vars(model.mar.diffloss)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weights_from_names_are_splitmix64():
    def splitmix64(seed, n):
        z = (seed + (n + 1) * 0x9E3779B97F4A7C15) % 2 ** 64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
        return z ^ z >> 31
    assert [splitmix64(1234567, n) for n in range(2)] == [6457827717110365317, 3203168211198807973]         # the generator's published test
    name = "mar.z_proj.weight"
    assert uniform(name, 5).tolist() == [(splitmix64(zlib.crc32(name.encode()), n) >> 40) * 2 ** -23 - 1 for n in range(5)]
    assert random_weight(name, (64, 16)).std() == pytest.approx(0.25, rel=0.05)
    assert random_weight("llm.model.norm.weight", (512,)).mean() == pytest.approx(1, abs=0.02)
    head = random_weight("mar.diffloss.net.final_layer.linear.weight", (8, 64))[:4] @ random_weight("mar.diffloss.net.input_proj.weight", (64, 4))
    assert np.abs(head - np.eye(4)).max() < 0.7 and abs(np.trace(head) / 4 - 1) < 0.4                       # about the identity: ε of white noise


def test_the_command_line_exports_and_saves_the_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_json()))
    export.main(["--random", str(tmp_path), "--passes", "resize", "--save-weights", str(tmp_path / "weights"), "--out", str(tmp_path / "vectors")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'vectors'}: 3 tensors")
    saved = load(tmp_path / "weights").mar.z_proj.weight
    assert np.array_equal(saved, random_weight("mar.z_proj.weight", saved.shape)) and saved.shape == (32, 4)


# ---- the port --------------------------------------------------------------------------------------------------------

def test_the_port_agrees_on_every_tensor(vectors, tmp_path, capsys):
    replay.main([str(vectors), str(tmp_path)])
    assert compare.main([str(vectors), str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert " 0 differ, 0 of a wrong shape, 0 missing" in text
    assert float(re.search(r"largest relative error among the equal ones: (\S+)", text)[1]) < 1e-4


def test_only_what_is_sampled_is_ill_conditioned(content):
    index, _ = content
    moved = {e["name"]: e["rounding"] for e in index["tensors"] if "rounding" in e}
    assert len(moved) > 500 and moved["resize/mar.encoder_pos_embed_learned"] == 0
    assert 1e-8 < moved["understand/z_enc"] < 1e-5 and moved["generate/step1/t999/eps"] < 1e-5
    before = {name: far for name, far in moved.items() if not re.search(r"/t\d|^generate/(?!prompt|step1/)|/drawn$", name)}
    assert len(before) > 400 and max(before.values()) < 2e-5, "only what is sampled, and what is computed from that, is ill-conditioned"


def interleaved(x, cos, sin):
    turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    twice = lambda c: c[..., :c.shape[-1] // 2].repeat(2, axis=-1)  # noqa: E731
    return x * twice(cos) + turned * twice(sin)


def tiled_heads(p, q, k, v, mask=None):
    p.show("q", q), p.show("k", k), p.show("v", v)
    k, v = (np.tile(x, (1, q.shape[1] // x.shape[1], 1, 1)) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])
    return p.show("weights", port.softmax(scores if mask is None else np.where(mask, scores, np.float32(-np.inf)))) @ v


def shifted(p, name, grid, original=port.position_embedding):
    return np.roll(original(p, name, grid), 1, axis=1)


def corners(new, old):
    at = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32)


def evenly(steps, original=port.process):
    return np.arange(steps), original(steps)[1]


@port.shown
def default_layer_norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p.weight + p.bias


@port.shown
def sines_first(p, t):
    angle = t[:, None].astype(np.float32) * np.exp(np.arange(128, dtype=np.float32) * np.float32(-math.log(10000) / 128))
    return port.linear(p.mlp[2], port.silu(port.linear(p.mlp[0], np.concatenate([np.sin(angle), np.cos(angle)], axis=1))))


BUGS = {
    "rotary interleaved": ("rotate", interleaved, "understand/token0/llm.model.layers.0.self_attn.q", "half-split"),
    "buffers not moved behind": ("buffers_last", lambda p, x: x, "understand/z_enc", "moved from the front to behind"),
    "buffers not moved back": ("buffers_first", lambda p, x: x, "generate/step2/back_to_mar", "moved to the front again"),
    "shift and scale swapped": ("modulate", lambda x, shift, scale: (1 + shift) * x + scale,
                                "generate/step1/t999/mar.diffloss.net.res_blocks.0.mlp.0.in", "shift, scale, gate in that order"),
    "padding on the wrong side": ("pad_right_and_bottom", lambda x: np.pad(x, ((0, 0), (0, 0), (1, 0), (1, 0))),
                                  "understand/vae.encoder.down.0.downsample.conv.in", "at the right and at the bottom"),
    "tanh GELU": ("gelu", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
                  "understand/mar.encoder_blocks.0.mlp.fc2.in", "not the tanh approximation"),
    "position embedding off by one": ("position_embedding", shifted, "understand/mar.z_proj_ln.in", "take rows 0 … n-1"),
    "resized with aligned corners": ("bilinear", corners, "resize/mar.encoder_pos_embed_learned", "align_corners False"),
    "halves of guidance swapped": ("guide", lambda eps, cfg: np.split(eps, 2)[0] + cfg * (np.split(eps, 2)[1] - np.split(eps, 2)[0]),
                                   "generate/step1/t999/eps_guided", "first half of the rows is conditional"),
    "variance interpolated from 0 to 1": ("mix", lambda v, log_beta, log_variance: v * log_beta + (1 - v) * log_variance,
                                          "generate/step1/t999/logvar", "f = (v + 1)/2"),
    "torch's eps": ("layer_norm", default_layer_norm, "understand/mar.z_proj_ln.out", "eps 1e-6 and not torch's 1e-5"),
    "no vae_scale": ("encode", lambda p, x: p.show("latents", port.vae_encode(p.vae, x)[0].transpose(0, 2, 3, 1)), "understand/latents", "times vae_scale"),
    "log variance for mean": ("encode", lambda p, x: p.show("latents", port.vae_encode(p.vae, x)[1].transpose(0, 2, 3, 1) * p.config["vae_scale"]),
                              "understand/latents", "the first half of quant_conv's channels"),
    "key heads tiled, not repeated": ("attention", tiled_heads, "understand/token0/llm.model.layers.0.self_attn.weights", "consecutive query heads"),
    "sines first": ("time_embed", sines_first, "generate/step1/mar.diffloss.net.time_embed.mlp.0.in", "128 cosines first"),
    "steps not respaced": ("process", evenly, "generate/step1/mar.diffloss.net.time_embed.in", "round(i · 999 / (steps - 1))"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_named(bug, content, monkeypatch):
    name, wrong, where, cause = BUGS[bug]
    monkeypatch.setattr(port, name, wrong)
    results = results_of(content)
    lines = []
    assert compare.report(results, lines.append) == 1
    first = next(r for r in results if r.verdict in ("differs", "shape"))
    assert first.entry["name"] == where
    text = "\n".join(lines)
    assert where in text and cause in re.search(r"usual cause:  (.*)", text)[1]


def test_a_missing_clamp_is_found(content):
    index, expected = content
    unclamped = json.loads(json.dumps(index))
    unclamped["config"]["mar"]["x0_clip"] = None
    results = compare.compare(index, expected, replay.recompute(replay.model_of(unclamped), unclamped, expected))
    first = next(r for r in results if r.verdict == "differs")
    assert first.entry["name"] == "generate/step1/t999/mean" and "x0_clip" in compare.cause_of(first.entry["name"])


# ---- compare ---------------------------------------------------------------------------------------------------------

def entry(name, dtype="float32", **more):
    return dict(name=name, also=[], shape=[], dtype=dtype, kind="computed", operation="", source="", **more)


def test_what_counts_as_equal():
    a = np.array([[1.0, -4.0], [0.5, 2.0]], np.float32)
    one = lambda b, a=a, **about: compare.compare({"tensors": [entry("x", **about)]}, {"x": a}, {"x": b})[0]  # noqa: E731
    assert one(a + 3e-4).verdict == "equal" and one(a + 5e-4).verdict == "differs"         # 1e-4 of the largest, 4
    assert one(a + 3e-4).error == pytest.approx(7.5e-5, rel=1e-2)
    assert one(a + 5e-2, dtype="bfloat16").verdict == "equal" and one(a + 3e-4, dtype="int64").verdict == "differs"
    half = compare.compare({"tensors": [entry("x")], "dtype": "bfloat16"}, {"x": a}, {"x": a + 5e-2})[0]
    assert half.verdict == "equal" and half.tolerance == 5e-2                              # float32 tensors of a bfloat16 model
    assert one(a * 1e-9, a=a * 2e-9).verdict == "equal"                                    # below the floor
    assert one(np.where(a > 1, np.nan, a)).verdict == "differs" and one(a[:1]).verdict == "shape"


def test_padding_is_not_compared():
    a, real = np.ones((2, 3, 4), np.float32), np.array([[True, True, True], [True, True, False]])
    tensors = [entry("x", real=["mask", 1])]
    b = a.copy()
    b[1, 2] = 7
    assert compare.compare({"tensors": tensors}, {"x": a, "mask": real}, {"x": b})[0].verdict == "equal"
    b[1, 1] = 7
    assert compare.compare({"tensors": tensors}, {"x": a, "mask": real}, {"x": b})[0].verdict == "differs"


def test_missing_and_misshapen_tensors_are_named_and_the_status_tells(vectors, content, tmp_path, capsys):
    from safetensors.numpy import save_file
    index, expected = content
    mine = {name: x for name, x in expected.items() if "/gradient" not in name}
    lost = mine.pop("understand/z_enc")
    mine["understand/latents"] = mine["understand/latents"].transpose(0, 3, 1, 2)[:, :, 1:].copy()
    mine["generate/step1/z"] = mine["generate/step1/z"] + 1
    save_file(mine, tmp_path / "mine.safetensors")
    assert compare.main([str(vectors), str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "missing: understand/z_enc" in text and "wrong shape: understand/latents" in text and "1 later ones differ as well" in text
    gradients = sum(e["kind"] == "gradient" for e in index["tensors"])
    assert f"1 differ, 1 of a wrong shape, 1 missing; not compared: 0 inputs, {gradients} gradients" in text
    save_file({**mine, "understand/z_enc": lost, "understand/latents": expected["understand/latents"], "generate/step1/z": expected["generate/step1/z"]},
              tmp_path / "mine.safetensors")
    assert compare.main([str(vectors), str(tmp_path)]) == 0


def test_bad_input_is_said_in_one_line(vectors, tmp_path, capsys):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x.safetensors").write_bytes((vectors / "vectors.safetensors").read_bytes()[:1000])
    for a, b, words in ((tmp_path, vectors, "no index.json"), (vectors, tmp_path, "no .safetensors"), (vectors, tmp_path / "cut", "not a complete safetensors")):
        assert compare.main([str(a), str(b)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    for main, argv, words in ((port.main, ["--ask", "What?"], "--image"), (port.main, ["a star", "--model", str(tmp_path)], "no model.safetensors"),
                              (export.main, ["--random", "harmon-9b", "--out", str(tmp_path)], "harmon-9b"),
                              (export.main, ["--random", "harmon-tiny", "--passes", "dream", "--out", str(tmp_path)], "understand")):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1


# ---- PORTING.md ------------------------------------------------------------------------------------------------------

def rows_of(document, heading):
    """The cells of the first table after a heading."""
    table = re.search(rf"^#+ {heading}$(?:\n[^#|].*|\n)*\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", document, re.M)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("config", [SMALL, HarmonConfig.from_name("harmon-0.5b"), HarmonConfig.from_name("harmon-1.5b")], ids=["small", "0.5b", "1.5b"])
def test_the_parameter_tables_are_complete_and_right(config):
    with torch.device("meta"):
        shapes_of = {name: tuple(p.shape) for name, p in Harmon(config).state_dict().items()}
    l, m, v = config.llm, config.mar, config.vae
    sizes = dict(V=l.vocab_size, E=l.hidden_size, F=l.intermediate_size, Q=l.num_key_value_heads * l.hidden_size // l.num_attention_heads, D=m.embed_dim, n=m.buffer_size,
                 N=m.grid ** 2, C=m.token_dim, W=m.head_width, classes=m.class_num, ch=v.ch, m=v.ch * v.ch_mult[-1])
    width = lambda level: v.ch * v.ch_mult[min(level, len(v.ch_mult) - 1)] if level >= 0 else v.ch  # noqa: E731
    rows = [row for heading in ("LLM", "MAR", "Diffusion head", "VAE") for row in rows_of(PORTING, heading)]
    seen = set()
    for pattern, shape in rows:
        pattern = re.sub(r"\bI\b", r"\\d+", re.escape(pattern.strip("`")).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|"))
        found = [name for name in shapes_of if re.fullmatch(pattern, name)]
        assert (found or "nin_shortcut" in pattern) and not seen & set(found), pattern
        seen |= set(found)
        for name in found:
            place = re.search(r"\.(?:down|up)\.(\d+)(?:\.block\.(\d+))?", name)
            level, block = (int(i or 0) for i in place.groups()) if place else (0, 0)
            level_before = level + 1 if "decoder" in name else level - 1
            local = dict(sizes, b=width(level), a=width(level_before if block == 0 else level))
            told = tuple(eval(re.sub(r"(\d)([A-Z])", r"\1*\2", factor), {}, local) for factor in shape.split(" × "))
            assert told == shapes_of[name], name
    assert seen == set(shapes_of)


def test_every_tensor_that_the_document_names_is_exported(content):
    names = {name for e in content[0]["tensors"] for name in [e["name"], *e["also"]]}
    pitfalls = rows_of(PORTING, "Pitfalls")
    told = re.findall(r"`((?:understand|generate|train|resize)/[^`…]*[^`/…])`", PORTING)
    assert len(pitfalls) >= 20 and all(row[1].strip("`") in names for row in pitfalls)
    assert set(told) <= names, sorted(set(told) - names)


# ---- the bundled model -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    model = Harmon.from_pretrained("harmon-tiny")
    return model, load(port.BUNDLED / "harmon-tiny")


def test_the_port_draws_the_same_image(tiny):
    model, p = tiny
    g, C, S, K = model.config.mar.grid, model.config.mar.token_dim, model.config.mar.diffusion_steps, 6
    texts = [GENERATE.format(caption="three blue stars"), UNCONDITIONAL]
    ids, real = model.pad([model.prompt_ids(text) for text in texts])
    mine, padding = port.pad(model.tokenizer, [f"{port.USER}{text}{port.END}\n{port.ASSISTANT}" for text in texts])
    assert mine.tolist() == ids.tolist() and padding.tolist() == real.tolist()
    rng, masked = np.random.default_rng(0), mask_schedule(g * g, K)
    assert port.mask_schedule(g * g, K) == masked
    orders = rng.permutation(g * g)[None]
    noise = [rng.standard_normal((S, a - b, C), np.float32) for a, b in zip(masked, masked[1:])]
    draws = iter(torch.from_numpy(x) for step in noise for x in step)
    theirs = model.sample(ids, real, num_iter=K, orders=torch.from_numpy(orders), noise_fn=lambda shape: next(draws))
    pixels = port.generate(p, mine, padding, orders, lambda k, M: noise[k - 1], grid=(g, g), steps=K)
    a, b = (np.asarray(pixels_to_images(x)[0]).astype(int) for x in (theirs, torch.from_numpy(pixels)))
    assert a.std() > 5 and np.abs(a - b).max() <= 1


def test_the_port_gives_the_same_answer(tiny, tmp_path, capsys):
    model, p = tiny
    image = shapes.render(shapes.scene(0, 1)).crop((0, 4, 64, 60)).resize((80, 70))
    said = "".join(model.chat("Describe the image.", image, max_new_tokens=30))
    assert port.ask(p, model.tokenizer, image, "Describe the image.", most=30) == said and said


def test_the_command_line_draws_and_answers(tmp_path, capsys):
    file = tmp_path / "x.png"
    port.main(["three blue stars", "--out", str(file), "--seed", "0", "--steps", "2"])
    assert Image.open(file).size == (64, 64) and capsys.readouterr().out.strip() == str(file)
    port.main(["--image", str(file), "--ask", "What color is the star?"])
    assert capsys.readouterr().out.strip()
