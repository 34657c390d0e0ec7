"""What belongs to a model besides its weights: sizes and their config.json, its tokenizer, and where to find them all.

Names in config.json are those of the Hugging Face folders (wusize/Harmon-0_5B), so that those are read as they are.
"""
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llm import QwenConfig
from mar import MARConfig
from vae import VAEConfig

BUNDLED = Path(__file__).resolve().parent / "checkpoints"
END, PAD = "<|im_end|>", "<|endoftext|>"   # special tokens of the tokenizer


@dataclass(frozen=True)
class HarmonConfig:
    llm: QwenConfig
    mar: MARConfig
    vae: VAEConfig = VAEConfig()
    vae_scale: float = 0.2325    # latents are multiplied by it, to about unit variance

    @classmethod
    def from_name(cls, name):
        """"harmon-0.5b", "harmon-1.5b" or "harmon-tiny"."""
        known = {"harmon-0.5b": ("qwen2.5-0.5b", "mar-base"), "harmon-1.5b": ("qwen2.5-1.5b", "mar-huge")}
        if name == "harmon-tiny":
            return TINY
        if name not in known:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(known)}, harmon-tiny")
        llm, mar = known[name]
        return cls(QwenConfig.from_name(llm), MARConfig.from_name(mar))

    @classmethod
    def of(cls, model):
        """The configuration of a model, without its weights: of a name known to `from_name`, or of anything `locate` finds that has a config.json."""
        if model in ("harmon-0.5b", "harmon-1.5b"):
            return cls.from_name(model)
        file = locate(model) / "config.json"
        return cls.from_json(read_json(file), file)

    @classmethod
    def from_json(cls, content, source="config.json"):
        """The dictionary of a config.json: Hugging Face's for Harmon, or what `to_json` gives."""
        try:
            llm = QwenConfig(**{k: content["llm"][k] for k in QwenConfig.__dataclass_fields__ if k in content["llm"]})
            m = content["mar"]
            mar = MARConfig.from_name(m["type"]) if "type" in m else MARConfig()
            mar = replace(mar, **{ours: m[theirs] for theirs, ours in MAR_KEYS.items() if theirs in m})
            mar = replace(mar, diffusion_steps=int(mar.diffusion_steps))
            v = content.get("vae", {})
            vae = replace(VAEConfig(), **{k: tuple(x) if isinstance(x, list) else x for k, x in v.items()})
            return cls(llm, mar, vae, content.get("vae_scale", cls.vae_scale))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source}: not a Harmon configuration ({type(error).__name__}: {error})") from None

    def to_json(self):
        llm = {k: getattr(self.llm, k) for k in QwenConfig.__dataclass_fields__}
        mar = {theirs: getattr(self.mar, ours) for theirs, ours in MAR_KEYS.items()}
        vae = {k: getattr(self.vae, k) for k in VAEConfig.__dataclass_fields__}
        return {"model_type": "harmon", "llm": llm, "mar": mar, "vae": vae, "vae_scale": self.vae_scale}


MAR_KEYS = {  # the official config's names -> ours
    "img_size": "img_size", "vae_stride": "vae_stride", "encoder_embed_dim": "embed_dim", "encoder_depth": "encoder_depth",
    "decoder_depth": "decoder_depth", "encoder_num_heads": "num_heads", "mlp_ratio": "mlp_ratio", "buffer_size": "buffer_size",
    "vae_embed_dim": "token_dim", "class_num": "class_num", "attn_dropout": "dropout", "diffloss_d": "head_depth",
    "diffloss_w": "head_width", "num_sampling_steps": "diffusion_steps", "diffusion_batch_mul": "diffusion_batch_mul", "x0_clip": "x0_clip"}

TINY = HarmonConfig(
    llm=QwenConfig(vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2),
    mar=MARConfig(img_size=64, vae_stride=8, embed_dim=192, encoder_depth=4, decoder_depth=4, num_heads=6, buffer_size=8, token_dim=8, class_num=150,
                  dropout=0.0, head_depth=3, head_width=192, x0_clip=7.0),
    vae=VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), z_channels=8), vae_scale=1.0)


def infer_config(tensors, source):
    """The configuration of an official checkpoint, which carries none, from the widths of its LLM and MAR."""
    try:
        llm_width, mar_width = tensors["llm.model.embed_tokens.weight"].shape[1], tensors["mar.z_proj.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{source}: no {error} in it, so this is not a Harmon checkpoint; a Hugging Face folder is given as the folder, "
                         "a VAE as vae=") from None
    for name in ("harmon-0.5b", "harmon-1.5b"):
        config = HarmonConfig.from_name(name)
        if (llm_width, mar_width) == (config.llm.hidden_size, config.mar.embed_dim):
            return config
    raise ValueError(f"{source}: LLM width {llm_width} and MAR width {mar_width} belong to no official model; give config=, or the folder that train.py --export wrote")


def locate(path):
    """A model's name, path or hub id -> an existing file or folder."""
    if Path(path).exists():
        return Path(path)
    if (BUNDLED / str(path)).is_dir():
        return BUNDLED / str(path)
    if str(path).count("/") != 1 or Path(path).suffix or str(path).startswith((".", "/")):
        raise FileNotFoundError(f"{path}: no such file or folder, and not the name of a bundled model or a hub id like wusize/Harmon-0_5B")
    from huggingface_hub import snapshot_download  # comes with tokenizers; needed only here

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub raises many types
        raise FileNotFoundError(f"{path}: no such folder, and fetching it from the hub failed ({type(error).__name__}: {str(error).splitlines()[0]})") from None


def choose_device(name=None):
    """What `--device` says, default CUDA when there is one, as a torch.device; under torchrun each process has the GPU of its local rank. Raises ValueError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch finds no CUDA device here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def auto_dtype(path, device):
    """What `--dtype auto` is: bfloat16, but float32 on the CPU, unless the model is large and this processor is measured to multiply bfloat16 faster."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    path = locate(path)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    if sum(f.stat().st_size for f in files) < 10 ** 9:
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(1024, 1024, dtype=dtype), []
        for _ in range(4):                                           # the first to warm up
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times[1:])
    return torch.bfloat16 if seconds[torch.bfloat16] < seconds[torch.float32] / 1.3 else torch.float32


def load_tokenizer(path):
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a tokenizer.json is needed")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path}: not a tokenizer file ({error})") from None
    if tokenizer.token_to_id(END) is None or tokenizer.token_to_id(PAD) is None:
        raise ValueError(f"{path}: a Qwen2.5 tokenizer is expected, with {END} and {PAD} in it")
    return tokenizer


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
