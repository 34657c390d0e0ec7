import json
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from harmonkit.config import (
    HARMON_SIZES,
    LLM_SIZES,
    MAR_SIZES,
    HarmonConfig,
    infer_config,
    named_size,
    qwen_config,
    read_json,
)
from llm import QwenConfig


@pytest.mark.parametrize("name, H, layers, heads, kv_heads, mlp, vocab, tied", [
    ("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151936, True),
    ("qwen2.5-1.5b", 1536, 28, 12, 2, 8960, 151936, True),
    ("qwen2.5-3b", 2048, 36, 16, 2, 11008, 151936, True),
    ("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152064, False),
])
def test_sizes_of_qwen(name, H, layers, heads, kv_heads, mlp, vocab, tied):
    c = LLM_SIZES[name]
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == (H, layers, heads)
    assert (c.num_key_value_heads, c.intermediate_size, c.vocab_size) == (kv_heads, mlp, vocab)
    assert (c.tie_word_embeddings, c.rope_theta, c.rms_norm_eps) == (tied, 1e6, 1e-6)


@pytest.mark.parametrize("name, D, blocks, heads, head_depth, head_width", [
    ("mar_base", 768, 12, 12, 6, 1024),
    ("mar_large", 1024, 16, 16, 8, 1280),
    ("mar_huge", 1280, 20, 16, 12, 1536),
])
def test_sizes_of_mar(name, D, blocks, heads, head_depth, head_width):
    c = MAR_SIZES[name]
    assert (c.embed_dim, c.encoder_depth, c.decoder_depth, c.num_heads) == (D, blocks, blocks, heads)
    assert (c.head_depth, c.head_width, c.diffusion_steps) == (head_depth, head_width, 100)
    assert (c.grid, c.buffer_size, c.token_dim, c.mlp_ratio) == (16, 64, 16, 4)
    assert (c.class_num, c.dropout, c.diffusion_batch_mul, c.x0_clip) == (1000, 0.1, 4, None)


def test_the_official_models():
    small, large = HarmonConfig.from_name("harmon-0.5b"), HarmonConfig.from_name("harmon-1.5b")
    assert small.llm == LLM_SIZES["qwen2.5-0.5b"] and small.mar == MAR_SIZES["mar_base"]
    assert large.llm == LLM_SIZES["qwen2.5-1.5b"] and large.mar == MAR_SIZES["mar_huge"]
    for config in (small, large):
        assert config.vae_scale == 0.2325
        assert (config.vae.ch, config.vae.ch_mult, config.vae.z_channels) == (128, (1, 1, 2, 2, 4), 16)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown model 'harmon-9b'; known: harmon-0.5b, .*harmon-tiny"):
        HarmonConfig.from_name("harmon-9b")
    with pytest.raises(ValueError, match="unknown size 'qwen9'; known: qwen2.5-0.5b"):
        named_size(LLM_SIZES, "qwen9")
    assert named_size(MAR_SIZES, "mar-base") == MAR_SIZES["mar_base"]


def test_a_config_json_of_hugging_face():
    """A named MAR, a number as a string, keys of other libraries, and no VAE."""
    llm = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}
    mar = {"type": "mar_huge", "img_size": 256, "buffer_size": 64, "diffloss_d": 12, "diffloss_w": 1536,
           "num_sampling_steps": "100", "grad_checkpointing": False}
    content = {"model_type": "harmon", "llm": llm, "mar": mar}
    assert HarmonConfig.from_json(content) == HarmonConfig.from_name("harmon-1.5b")
    mar |= {"type": "mar-large", "diffloss_d": 3, "num_sampling_steps": "25", "attn_dropout": 0.2}
    changed = replace(MAR_SIZES["mar_large"], head_depth=3, head_width=1536, diffusion_steps=25, dropout=0.2)
    assert HarmonConfig.from_json(content).mar == changed


@pytest.mark.parametrize("config", [*HARMON_SIZES.values(), SMALL], ids=[*HARMON_SIZES, "small"])
def test_a_config_json_of_ours_keeps_everything(config):
    assert HarmonConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("content", [
    {},
    [],
    {"llm": {}},
    {"llm": [], "mar": {}},
    {"llm": {}, "mar": {"type": "mar_giant"}},
    {"llm": {}, "mar": {"type": 3}},
    {"llm": {}, "mar": {"num_sampling_steps": "many"}},
    {"llm": {}, "mar": {}, "vae": {"chh": 3}},
])
def test_other_contents_are_refused(content):
    with pytest.raises(ValueError, match="^some.json: not a Harmon configuration"):
        HarmonConfig.from_json(content, "some.json")


# ---- numbers ---------------------------------------------------------------------------------------------

QWEN = {  # config.json of Qwen2.5-0.5B-Instruct
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936}
MAR = {  # as in official files
    "type": "mar_base", "img_size": 256, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 16,
    "mask_ratio_min": 0.7, "label_drop_prob": 0.1, "class_num": 1000, "attn_dropout": 0.1,
    "proj_dropout": 0.1, "buffer_size": 64, "diffloss_d": 6, "diffloss_w": 1024, "num_sampling_steps": "100",
    "diffusion_batch_mul": 4, "grad_checkpointing": True}
OURS = HARMON_SIZES["harmon-tiny"].to_json()


def read_with(part, **changes):
    content = {"model_type": "harmon", "llm": QWEN, "mar": MAR, "vae": OURS["vae"]}
    return HarmonConfig.from_json(content | {part: content[part] | changes}, "some.json")


def test_official_files_are_read():
    assert HarmonConfig.from_json({"llm": QWEN, "mar": MAR}) == HarmonConfig.from_name("harmon-0.5b")
    assert qwen_config(QWEN, "config.json") == LLM_SIZES["qwen2.5-0.5b"]


@pytest.mark.parametrize("part, key, field", [
    ("llm", "hidden_size", "hidden_size"), ("llm", "num_hidden_layers", "num_hidden_layers"),
    ("mar", "diffloss_d", "head_depth"), ("mar", "num_sampling_steps", "diffusion_steps"),
    ("vae", "ch", "ch")])
@pytest.mark.parametrize("value", ["448", "448.0", 448.0, 448])
def test_whole_numbers_as_texts_are_read(part, key, field, value):
    number = getattr(getattr(read_with(part, **{key: value}), part), field)
    assert number == 448 and type(number) is int


def test_other_numbers_as_texts_are_read():
    config = read_with("llm", rms_norm_eps="1e-05", rope_theta="500000").llm
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 5e5)
    assert read_with("mar", mlp_ratio="3.5", attn_dropout="0", proj_dropout=0).mar.mlp_ratio == 3.5


WRONG = [[24], [], {"a": 1}, True, False, -24, 0, 2.5, "many", "", "nan", float("nan"), float("inf"),
         10 ** 400, 10 ** 12, [1] * 10000]
SIZES = [("llm", key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads", "num_key_value_heads")]
SIZES += [("mar", key) for key in ("img_size", "vae_stride", "encoder_embed_dim", "encoder_depth",
                                   "decoder_depth", "encoder_num_heads", "buffer_size", "vae_embed_dim",
                                   "class_num", "diffloss_d", "diffloss_w", "num_sampling_steps",
                                   "diffusion_batch_mul")]
SIZES += [("vae", "ch"), ("vae", "z_channels")]


@pytest.mark.parametrize("part, key", SIZES)
def test_what_is_no_size_is_refused_in_one_line(part, key):
    for value in WRONG:
        message = f"^some.json: .* configuration .{part}.{key} is .*; expected a whole number from 1"
        with pytest.raises(ValueError, match=message) as error:
            read_with(part, **{key: value})
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("part, key", [("llm", "rope_theta"), ("llm", "rms_norm_eps"), ("mar", "mlp_ratio"),
                                       ("mar", "attn_dropout"), ("mar", "x0_clip")])
def test_what_is_no_number_is_refused_in_one_line(part, key):
    for value in ([1.0], {"a": 1}, True, -1, "many", float("nan"), float("inf"), ""):
        with pytest.raises(ValueError, match=f"^some.json: .*{part}.{key} is .*; expected a number"):
            read_with(part, **{key: value})


@pytest.mark.parametrize("part, changes, message", [
    ("llm", {"tie_word_embeddings": "false"}, 'llm.tie_word_embeddings is "false"; expected true or false'),
    ("llm", {"tie_word_embeddings": 0}, "llm.tie_word_embeddings is 0; expected true or false"),
    ("vae", {"ch_mult": 4}, "vae.ch_mult is 4; expected a list of whole numbers"),
    ("vae", {"ch_mult": []}, r"vae.ch_mult is \[\]; expected a list of whole numbers"),
    ("vae", {"ch_mult": [1, "two"]}, 'vae.ch_mult is "two"; expected a whole number'),
    ("vae", {"chh": 3}, "vae holds the unknown chh; known: ch, ch_mult, z_channels"),
    ("vae", {"ch": 48}, "vae.ch is 48; expected a multiple of 32"),
    ("llm", {"num_attention_heads": 13}, "a width of 896 does not divide into 13 heads of even width"),
    ("llm", {"num_attention_heads": 128}, "does not divide into 128 heads of even width"),  # 7 channels each
    ("llm", {"num_key_value_heads": 3}, "14 heads of even width, 3 of them for keys and values"),
    ("mar", {"encoder_num_heads": 7}, "mar: a width of 768 does not divide into 7 heads"),
    ("mar", {"img_size": 250}, "mar.img_size is 250, no multiple of vae_stride 16"),
    ("mar", {"num_sampling_steps": 1001}, "mar.num_sampling_steps is 1001; expected 1 to 1000"),
    ("mar", {"attn_dropout": 1}, "mar.attn_dropout is 1; expected a number from 0 to below 1"),
])
def test_impossible_sizes_are_refused(part, changes, message):
    with pytest.raises(ValueError, match=message):
        read_with(part, **changes)


@pytest.mark.parametrize("scale", [0, "much", [1], True, None, float("nan")])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match="vae_scale is .*; expected a number above 0"):
        HarmonConfig.from_json(OURS | {"vae_scale": scale})


@pytest.mark.parametrize("part", ["llm", "mar", "vae"])
@pytest.mark.parametrize("value", [[], "qwen2.5-0.5b", 3, None])
def test_parts_that_are_no_objects_are_refused(part, value):
    with pytest.raises(ValueError, match=f"^c.json: .*configuration .{part} is .*; expected an object"):
        HarmonConfig.from_json(OURS | {part: value}, "c.json")


# ---- fields that change numbers --------------------------------------------------------------------------

@pytest.mark.parametrize("changes, theta", [
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
    ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "type": "default"}}, 5e5),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5),
    ({"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}, 5e5),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
    ({"rope_scaling": {}}, 1e6),
])
def test_the_rotary_base_is_found(changes, theta):
    """Beside the sizes, or in newer files in rope_parameters."""
    llm = {key: value for key, value in QWEN.items() if key != "rope_theta"}
    config = qwen_config(llm | changes, "config.json")
    assert config == QwenConfig(**{field: getattr(LLM_SIZES["qwen2.5-0.5b"], field)
                                   for field in QwenConfig.__dataclass_fields__} | {"rope_theta": theta})


def test_what_transformers_writes_now_is_read():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    expected = QwenConfig(100, 64, 96, 2, 4, 2, rope_theta=5e5)
    for content in (theirs.to_dict(), json.loads(theirs.to_json_string())):
        assert qwen_config(content, "config.json") == expected


@pytest.mark.parametrize("changes, message", [
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 'llm.rope_scaling.type is "yarn"; only default'),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, 'llm.rope_scaling.rope_type is "linear"'),
    ({"rope_parameters": {"rope_type": "dynamic"}}, 'llm.rope_parameters.rope_type is "dynamic"'),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "llm.rope_parameters.partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_theta": [1e6]}}, "llm.rope_parameters.rope_theta is .*; expected a number"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "llm.rope_theta is given twice, as 10000.0 and 1000000.0"),
    ({"rope_scaling": "yarn"}, 'llm.rope_scaling is "yarn"; expected an object'),
    ({"hidden_act": "gelu"}, 'llm.hidden_act is "gelu"; only silu or swish is computed'),
    ({"attention_bias": False}, "llm.attention_bias is false; only True is computed"),
    ({"attention_dropout": 0.1}, "llm.attention_dropout is 0.1; only 0 is computed"),
    ({"use_sliding_window": True}, "llm.use_sliding_window is true"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "llm.layer_types is .*; only full_attention"),
    ({"layer_types": [[]]}, "llm.layer_types is"),
    ({"layer_types": 3}, "llm.layer_types is 3"),
    ({"head_dim": 128}, "llm.head_dim is 128; only 64 is computed"),
    ({"head_dim": [64]}, "llm.head_dim is"),
    ({"model_type": "llama"}, 'llm.model_type is "llama"; only qwen2 is computed'),
    ({"model_type": "qwen3"}, 'llm.model_type is "qwen3"'),
    ({"partial_rotary_factor": 0.25}, "llm.partial_rotary_factor is 0.25"),
    ({"quantization_config": {"bits": 4}}, "llm.quantization_config is"),
])
def test_what_llm_does_not_compute_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^c.json: not a configuration of Qwen2 .{message}"):
        qwen_config(QWEN | changes, "c.json")
    with pytest.raises(ValueError, match=message):
        read_with("llm", **changes)


@pytest.mark.parametrize("changes", [
    {"hidden_act": "swish"}, {"head_dim": 64}, {"head_dim": None}, {"attention_bias": True},
    {"use_mrope": False},
    {"layer_types": ["full_attention"] * 24}, {"layer_types": None}, {"sliding_window": None},
    {"max_window_layers": 28}, {"attention_dropout": 0}, {"partial_rotary_factor": 1.0}, {"unknown": [1]},
    {"quantization_config": None}, {"model_type": None}])
def test_what_changes_nothing_is_accepted(changes):
    assert qwen_config(QWEN | changes, "c.json") == LLM_SIZES["qwen2.5-0.5b"]


def test_sizes_are_given_together():
    """A part of them would be filled up with those of another model."""
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        with pytest.raises(ValueError, match=f"llm: there is no {key} in it"):
            qwen_config({name: value for name, value in QWEN.items() if name != key}, "c.json")
    without = {name: value for name, value in QWEN.items() if name != "num_key_value_heads"}
    assert qwen_config(without, "c.json").num_key_value_heads == 14, "as in transformers"


@pytest.mark.parametrize("changes, message", [
    ({"patch_size": 2}, "mar.patch_size is 2; only 1 is computed"),
    ({"decoder_embed_dim": 512}, "mar.decoder_embed_dim is 512; only 768 is computed"),
    ({"decoder_num_heads": 16}, "mar.decoder_num_heads is 16; only 12 is computed"),
    ({"proj_dropout": 0.3}, "mar.proj_dropout is 0.3; only 0.1 is computed"),
    ({"qkv_bias": False}, "mar.qkv_bias is false; only True is computed"),
])
def test_what_mar_does_not_compute_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        read_with("mar", **changes)
    same = dict(decoder_embed_dim=768, decoder_num_heads=12, qkv_bias=True, unknown=3)
    assert read_with("mar", **same) == read_with("mar")


# ---- official weights ------------------------------------------------------------------------------------

def widths(H, D):
    return {"llm.model.embed_tokens.weight": torch.empty(9, H), "mar.z_proj.weight": torch.empty(D, 16)}


def test_official_checkpoints_are_told_by_their_widths():
    assert infer_config(widths(896, 768), "x.pth") == HarmonConfig.from_name("harmon-0.5b")
    assert infer_config(widths(1536, 1280), "x.pth") == HarmonConfig.from_name("harmon-1.5b")
    with pytest.raises(ValueError, match="^x.pth: LLM width 896 and MAR width 1280 are of no official model"):
        infer_config(widths(896, 1280), "x.pth")
    with pytest.raises(ValueError, match="^x.pth: no 'llm.model.embed_tokens.weight' in it"):
        infer_config({"encoder.conv_in.weight": torch.empty(1)}, "x.pth")


def test_files_that_are_no_json_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        read_json(tmp_path / "config.json")
    for content in (b"{", b"", b"\xff\xfe{}", b'{"a":' * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="config.json: not JSON"):
            read_json(tmp_path / "config.json")


def test_json_after_a_byte_order_mark_and_in_the_home_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json("~/config.json") == {"a": "é"}
