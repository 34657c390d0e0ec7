"""Sizes of the published models, and config.json.

A config.json of ours uses the names of Hugging Face's folders (wusize/Harmon-0_5B), so both are read by the
same code.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from diffusion_head import T
from llm import QwenConfig
from mar import MARConfig
from vae import VAEConfig

LLM_SIZES = {
    "qwen2.5-0.5b": QwenConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                               num_attention_heads=14, num_key_value_heads=2),
    "qwen2.5-1.5b": QwenConfig(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                               num_attention_heads=12, num_key_value_heads=2),
    "qwen2.5-3b": QwenConfig(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                             num_attention_heads=16, num_key_value_heads=2),
    "qwen2.5-7b": QwenConfig(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                             num_attention_heads=28, num_key_value_heads=4,
                             vocab_size=152064, tie_word_embeddings=False),
    "tiny": QwenConfig(hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                       num_attention_heads=6, num_key_value_heads=2, vocab_size=512),
}
MAR_SIZES = {
    "mar_base": MARConfig(embed_dim=768, encoder_depth=12, decoder_depth=12, num_heads=12,
                          head_depth=6, head_width=1024),
    "mar_large": MARConfig(embed_dim=1024, encoder_depth=16, decoder_depth=16, num_heads=16,
                           head_depth=8, head_width=1280),
    "mar_huge": MARConfig(embed_dim=1280, encoder_depth=20, decoder_depth=20, num_heads=16,
                          head_depth=12, head_width=1536),
    "tiny": MARConfig(embed_dim=192, encoder_depth=4, decoder_depth=4, num_heads=6,
                      head_depth=3, head_width=192, img_size=64, vae_stride=8, token_dim=8,
                      buffer_size=8, class_num=150, dropout=0.0, x0_clip=7.0),
}
MAR_KEYS = {  # name in config.json -> field of MARConfig
    "img_size": "img_size", "vae_stride": "vae_stride", "encoder_embed_dim": "embed_dim",
    "encoder_depth": "encoder_depth", "decoder_depth": "decoder_depth", "encoder_num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio", "buffer_size": "buffer_size", "vae_embed_dim": "token_dim",
    "class_num": "class_num", "attn_dropout": "dropout",
    "diffloss_d": "head_depth", "diffloss_w": "head_width",
    "num_sampling_steps": "diffusion_steps", "diffusion_batch_mul": "diffusion_batch_mul",
    "x0_clip": "x0_clip",
}

# Fields of config.json that change numbers, and the values that the model files compute.
LLM_FIXED = {
    "model_type": ("qwen2",), "hidden_act": ("silu", "swish"), "attention_bias": (True,), "qkv_bias": (True,),
    "mlp_bias": (False,), "attention_dropout": (0,), "use_sliding_window": (False,), "use_mrope": (False,),
    "partial_rotary_factor": (1,), "quantization_config": (None,),
}
LLM_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MAR_FIXED = {"patch_size": (1,), "qkv_bias": (True,)}
MOST = 10 ** 7                          # of any size
IS_MAR = ("a MAR checkpoint, no Harmon model: sample.py --classes draws from it, and train.py --init-mar "
          "starts a Harmon from it")


def named_size(table: dict, name: str):
    """The entry of LLM_SIZES or MAR_SIZES; "mar-base" is also accepted for "mar_base". Raises ValueError."""
    key = name.lower().replace("-", "_") if "mar" in name else name
    if key not in table:
        raise ValueError(f"unknown size {name!r}; known: {', '.join(table)}")
    return table[key]


@dataclass(frozen=True)
class HarmonConfig:
    """The sizes of all components. vae_scale: the factor that brings latents to unit variance."""
    llm: QwenConfig
    mar: MARConfig
    vae: VAEConfig = VAEConfig()
    vae_scale: float = 0.2325

    @classmethod
    def from_name(cls, name: str) -> "HarmonConfig":
        """The configuration of "harmon-0.5b", "harmon-1.5b" or "harmon-tiny". Raises ValueError for another
        name.
        """
        if name not in HARMON_SIZES:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(HARMON_SIZES)}")
        return HARMON_SIZES[name]

    @classmethod
    def from_json(cls, content: dict, source="config.json") -> "HarmonConfig":
        """The content of a config.json, ours or Hugging Face's. Raises ValueError that names `source`."""
        if isinstance(content, dict) and "mar" in content and "llm" not in content:
            raise ValueError(f"{source}: {IS_MAR}")
        try:
            llm, mar = read_llm(content["llm"]), read_mar(content["mar"])
            scale = read_number("vae_scale", content.get("vae_scale", cls.vae_scale), float)
            return cls(llm, mar, read_vae(content.get("vae", {})), scale)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"{source}: not a Harmon configuration ({reason})") from None

    def to_json(self) -> dict:
        """The content of config.json."""
        mar = {key: getattr(self.mar, field) for key, field in MAR_KEYS.items()}
        return {"model_type": "harmon", "llm": asdict(self.llm), "mar": mar, "vae": asdict(self.vae),
                "vae_scale": self.vae_scale}


HARMON_SIZES = {
    "harmon-0.5b": HarmonConfig(LLM_SIZES["qwen2.5-0.5b"], MAR_SIZES["mar_base"]),
    "harmon-1.5b": HarmonConfig(LLM_SIZES["qwen2.5-1.5b"], MAR_SIZES["mar_huge"]),
    "harmon-tiny": HarmonConfig(LLM_SIZES["tiny"], MAR_SIZES["tiny"],
                                VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), z_channels=8), vae_scale=1.0),
}


# ---- the parts of config.json --------------------------------------------------------------------

def qwen_config(content, source) -> QwenConfig:
    """The content of a Qwen2 model's own config.json. Raises ValueError that names `source`."""
    try:
        return read_llm(content)
    except ValueError as error:
        raise ValueError(f"{source}: not a configuration of Qwen2 ({error})") from None


def read_llm(content) -> QwenConfig:
    check_fixed("llm", content, LLM_FIXED)
    given = {key: value for key, value in content.items() if value is not None}
    given["rope_theta"] = read_rope_theta(given)
    missing = [key for key in LLM_WIDTHS if key not in given]
    if len(missing) < len(LLM_WIDTHS) and missing:
        raise ValueError(f"llm: there is no {' and no '.join(missing)} in it")
    given.setdefault("num_key_value_heads", given.get("num_attention_heads", QwenConfig.num_key_value_heads))
    config = read_fields("llm", given, QwenConfig())
    H, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if H % (2 * heads) or heads % kv_heads:
        raise ValueError(f"llm: a width of {H} does not divide into {heads} heads of even width, "
                         f"{kv_heads} of them for keys and values")
    check_fixed("llm", given, {"head_dim": (H // heads,)})
    layer_types = given.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"llm.layer_types is {brief(layer_types)}; only full_attention is computed")
    return config


def read_rope_theta(llm) -> float:
    """The base of the rotary embedding, beside the sizes or, in newer files, in rope_parameters."""
    given = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = llm.get(key, {})
        check_fixed(f"llm.{key}", rope, {"rope_type": ("default",), "type": ("default",),
                                         "partial_rotary_factor": (1,)})
        if "rope_theta" in rope:
            given.append(read_number(f"llm.{key}.rope_theta", rope["rope_theta"], float))
    if "rope_theta" in llm:
        given.append(read_number("llm.rope_theta", llm["rope_theta"], float))
    if len(set(given)) > 1:
        raise ValueError(f"llm.rope_theta is given twice, as {' and '.join(map(str, given))}")
    return given[0] if given else QwenConfig.rope_theta


def read_mar(content) -> MARConfig:
    check_fixed("mar", content, MAR_FIXED)
    size = named_size(MAR_SIZES, content["type"]) if "type" in content else MARConfig()
    config = read_fields("mar", content, size, MAR_KEYS)
    check_fixed("mar", content, {
        "decoder_embed_dim": (config.embed_dim,), "decoder_num_heads": (config.num_heads,),
        "proj_dropout": (config.dropout,)})
    if config.embed_dim % config.num_heads:
        raise ValueError(f"mar: a width of {config.embed_dim} does not divide into {config.num_heads} heads")
    if config.img_size % config.vae_stride:
        raise ValueError(f"mar.img_size is {config.img_size}, no multiple of vae_stride {config.vae_stride}")
    if config.diffusion_steps > T:
        raise ValueError(f"mar.num_sampling_steps is {config.diffusion_steps}; expected 1 to {T}")
    return config


def read_vae(content) -> VAEConfig:
    check_fixed("vae", content, {})
    known = [field.name for field in fields(VAEConfig)]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ValueError(f"vae holds the unknown {', '.join(unknown)}; known: {', '.join(known)}")
    config = read_fields("vae", content, VAEConfig())
    if config.ch % 32:
        raise ValueError(f"vae.ch is {config.ch}; expected a multiple of 32")
    return config


def check_fixed(part, content, fixed):
    """Raise ValueError for a field of one part of config.json with another value than the computed ones."""
    if not isinstance(content, dict):
        raise ValueError(f"{part} is {brief(content)}; expected an object with fields")
    for key, computed in fixed.items():
        value = content.get(key)
        if value is not None and value not in computed:
            known = " or ".join(map(str, computed))
            raise ValueError(f"{part}.{key} is {brief(value)}; only {known} is computed")


def read_fields(part, content, config, keys=None):
    """`config` with the fields that `content` gives, as the types that its class declares.

    keys: {name in content: field}; default the fields' own names.
    """
    keys = keys or {field.name: field.name for field in fields(config)}
    declared = {field.name: field for field in fields(config)}
    changes = {}
    for key, name in keys.items():
        if key in content:
            changes[name] = read_field(f"{part}.{key}", content[key], declared[name])
    return replace(config, **changes)


def read_field(name, value, field):
    if field.type is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{name} is {brief(value)}; expected true or false")
    if field.type is tuple:
        if isinstance(value, (list, tuple)) and value:
            return tuple(read_number(name, number, int) for number in value)
        raise ValueError(f"{name} is {brief(value)}; expected a list of whole numbers")
    if value is None and field.default is None:
        return None
    return read_number(name, value, field.type)


def read_number(name, value, kind):
    """A number of config.json: whole and from 1 up for kind int, else above 0. Dropout may be 0.

    Texts like "100" are read too, because official files hold one. Raises ValueError.
    """
    is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if kind is int:
        if 1 <= number <= MOST and number == int(number):
            return int(number)
        raise ValueError(f"{name} is {brief(value)}; expected a whole number from 1 to {MOST:,}")
    if name.endswith("dropout"):
        if 0 <= number < 1:
            return number if isinstance(value, str) else value
        raise ValueError(f"{name} is {brief(value)}; expected a number from 0 to below 1")
    if 0 < number < math.inf:
        return number if isinstance(value, str) else value
    raise ValueError(f"{name} is {brief(value)}; expected a number above 0")


def brief(value) -> str:
    """A value as it is quoted in a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def infer_config(tensors: dict, source) -> HarmonConfig:
    """The configuration of an official checkpoint, which carries none, from the widths of its LLM and MAR."""
    try:
        llm_width = tensors["llm.model.embed_tokens.weight"].shape[1]
        mar_width = tensors["mar.z_proj.weight"].shape[0]
    except KeyError as error:
        has_llm = any("llm." in name for name in tensors)
        if not has_llm and any(name.endswith("z_proj.weight") for name in tensors):
            raise ValueError(f"{source}: {IS_MAR}") from None
        raise ValueError(f"{source}: no {error} in it, so this is not a Harmon checkpoint; a Hugging Face "
                         "folder is given as the folder, a VAE as vae=") from None
    for name in ("harmon-0.5b", "harmon-1.5b"):
        config = HarmonConfig.from_name(name)
        if (llm_width, mar_width) == (config.llm.hidden_size, config.mar.embed_dim):
            return config
    raise ValueError(f"{source}: LLM width {llm_width} and MAR width {mar_width} are of no official model; "
                     "give config=, or the folder that train.py --export wrote")


def read_json(path):
    """The content of a JSON file. Raises FileNotFoundError or ValueError that name the file."""
    try:
        return json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
