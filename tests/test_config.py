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
    read_json,
)


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
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        read_json(tmp_path / "config.json")
