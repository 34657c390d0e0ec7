"""Sizes of the published models, and config.json.

A config.json of ours uses the names of Hugging Face's folders (wusize/Harmon-0_5B), so both are read by the
same code.
"""
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

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
        try:
            known = {field.name for field in fields(QwenConfig)}
            llm = QwenConfig(**{key: value for key, value in content["llm"].items() if key in known})
            given = content["mar"]
            mar = named_size(MAR_SIZES, given["type"]) if "type" in given else MARConfig()
            mar = replace(mar, **{field: given[key] for key, field in MAR_KEYS.items() if key in given})
            mar = replace(mar, diffusion_steps=int(mar.diffusion_steps))    # a string in official files
            vae = dict(content.get("vae", {}))
            if "ch_mult" in vae:
                vae["ch_mult"] = tuple(vae["ch_mult"])
            return cls(llm, mar, VAEConfig(**vae), content.get("vae_scale", cls.vae_scale))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
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


def infer_config(tensors: dict, source) -> HarmonConfig:
    """The configuration of an official checkpoint, which carries none, from the widths of its LLM and MAR."""
    try:
        llm_width = tensors["llm.model.embed_tokens.weight"].shape[1]
        mar_width = tensors["mar.z_proj.weight"].shape[0]
    except KeyError as error:
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
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
