"""MAR alone, with the VAE that decodes its latents: checkpoints that people have, and pictures by class.

Read are checkpoint-last.pth as MAR's authors distribute it and as their training writes it, safetensors with
the same names, and a folder with a config.json whose model_type is "mar". A Harmon folder may hold such a
folder, called mar: its MAR as it was before training with prompts.
"""
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from harmonkit.checkpoints import load_strict, read_vae, write, write_text
from harmonkit.config import MAR_KEYS, MAR_SIZES, read_json, read_mar, read_number
from harmonkit.config import read_vae as read_vae_config
from harmonkit.devices import as_device, as_dtype
from harmonkit.images import pixels_to_images
from harmonkit.pipeline import check_attention, decode_each, naming_the_weight, seeds_of
from harmonkit.weight_files import find_model, plain_names, read
from mar import MAR, MARConfig
from vae import AutoencoderKL, VAEConfig

CHECKPOINT = "checkpoint-last.pth"                  # in the authors' folders
SUBFOLDER = "mar"                                   # of a Harmon folder
NAMES = ("class_emb.", "fake_latent", "mask_token", "z_proj", "encoder_blocks.", "encoder_pos_embed_learned",
         "encoder_norm.", "decoder_", "diffusion_pos_embed_learned", "diffloss.")
HEADS = {size.embed_dim: size.num_heads for size in MAR_SIZES.values()}
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}         # width: linear, of the authors' best FID
IS_HARMON = ("a Harmon model, whose MAR has forgotten its classes while it was trained with prompts; a MAR "
             "checkpoint is expected here. A Harmon model draws from prompts")


@dataclass(frozen=True)
class ClassConfig:
    """Sizes of a MAR and of its VAE. class_names: in the order of the labels, () = unknown."""
    mar: MARConfig
    vae: VAEConfig = VAEConfig()
    vae_scale: float = 0.2325
    class_names: tuple = ()

    @classmethod
    def from_json(cls, content, source) -> "ClassConfig":
        """The content of a config.json. Raises ValueError that names `source`."""
        try:
            scale = read_number("vae_scale", content.get("vae_scale", cls.vae_scale), float)
            names = content.get("class_names", ())
            mar, vae = read_mar(content["mar"]), read_vae_config(content.get("vae", {}))
            are_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
            if not are_names or len(names) not in (0, mar.class_num):
                raise ValueError(f"class_names: a list of {mar.class_num} names is expected")
            return cls(mar, vae, scale, tuple(names))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"{source}: not a configuration of a MAR ({reason})") from None

    def to_json(self) -> dict:
        mar = {key: getattr(self.mar, field) for key, field in MAR_KEYS.items()}
        return {"model_type": "mar", "mar": mar, "vae": asdict(self.vae), "vae_scale": self.vae_scale,
                "class_names": list(self.class_names)}


class ClassModel(nn.Module):
    """A MAR and its VAE."""
    tokenizer = None

    def __init__(self, config: ClassConfig):
        super().__init__()
        self.config = config
        self.mar = MAR(config.mar)
        self.vae = AutoencoderKL(config.vae)

    @property
    def device(self):
        return self.mar.mask_token.device

    @property
    def dtype(self):
        return self.mar.mask_token.dtype

    @torch.no_grad()
    def decode(self, latents):
        """latents (B, h, w, C) -> pixels (B, 3, s·h, s·w), about in [-1, 1]. Raises ValueError for NaN and
        infinity.
        """
        z = (latents / self.config.vae_scale).permute(0, 3, 1, 2).to(self.dtype)
        return decode_each(self, z)

    def generate_image(self, labels, *, seed=0, progress=False, num_iter=64, **sampling) -> list:
        """Draw one PIL image for each label, -1 = no class. An image depends on its label and seed, not on
        its batch.

        seed: a whole number, image i then uses seed + i, or one for each image. sampling: cfg, cfg_schedule,
        temperature, … of `MAR.sample`. Raises ValueError as that does, and for weights that are not finite.
        """
        check_attention(self, "mar")
        generators = [torch.Generator().manual_seed(s) for s in seeds_of(seed, len(labels))]
        no_bar = None if progress else True                                 # None: only off a terminal
        bar = tqdm(total=num_iter, desc="steps", disable=no_bar, leave=False)
        with bar, naming_the_weight(self):
            latents = self.mar.sample(labels, num_iter=num_iter, generator=generators,
                                      on_step=lambda *_: bar.update(), **sampling)
        return pixels_to_images(self.decode(latents))

    def save_pretrained(self, folder, *, dtype=None, with_vae=True):
        """Write a folder that `load` reads. with_vae=False: for the subfolder of a Harmon folder, whose VAE
        it then uses.
        """
        state = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()
                 if with_vae or not name.startswith("vae.")}
        write(Path(folder) / "model.safetensors", state)
        write_text(Path(folder) / "config.json", json.dumps(self.config.to_json(), indent=1) + "\n")


def defaults(config) -> dict:
    """The settings with which MAR's authors measure a model of this size; one token a step."""
    return {"num_iter": min(256, config.mar.grid ** 2), "cfg_schedule": "linear",
            "cfg": GUIDANCE.get(config.mar.embed_dim, 3.0)}


# ---- read ----------------------------------------------------------------------------------------

def load(path, *, vae=None, device=None, dtype=None) -> ClassModel:
    """A MAR with its VAE, in eval mode.

    path: checkpoint-last.pth or its folder, with vae= (kl16.ckpt); a folder of ours; or harmon-tiny, which
    holds one. device: default CUDA if there is one. dtype: default float32 on the CPU, bfloat16 elsewhere.
    Raises FileNotFoundError or ValueError that name the file and its fault.
    """
    device = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = as_dtype(dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    return build(*read_files(path, vae), device=device, dtype=dtype)


def build(source, config, tensors, *, device, dtype) -> ClassModel:
    """A ClassModel from what `read_files` gives. Empties `tensors`."""
    with torch.device("meta"):
        model = ClassModel(config)
    load_strict(model, tensors, source, device=device, dtype=dtype)
    return model.eval()


def read_files(path, vae=None) -> tuple:
    """(source, config, tensors) of a MAR with its VAE: the file or folder; a ClassConfig; {name: tensor}.

    The tensors are mapped, not read yet. Raises FileNotFoundError or ValueError as `load` does.
    """
    source, config = find_files(path)
    tensors, vae_tensors = read_tensors(source)
    if vae is not None:
        vae_tensors = read_vae(vae)
    elif not vae_tensors and source.name == SUBFOLDER:
        vae_tensors = {name[4:]: t for name, t in read(source.parent).items() if name.startswith("vae.")}
    if not vae_tensors:
        raise ValueError(f"{source}: there is no VAE in it; give the VAE's file as vae= (--vae), kl16.ckpt "
                         "for official weights")
    if config is None:
        config = infer_config(tensors, infer_vae(vae_tensors, vae or source), source)
    named = {f"mar.{name}": tensor for name, tensor in tensors.items()}
    return source, config, named | {f"vae.{name}": tensor for name, tensor in vae_tensors.items()}


def find_files(path) -> tuple:
    """The file or folder of a MAR's weights, and its ClassConfig if a config.json beside them has it.

    Raises FileNotFoundError, and ValueError for a Harmon folder without a MAR of its own.
    """
    path = find_model(path)
    if not path.is_dir():
        return path, None
    if (path / CHECKPOINT).is_file():
        return path / CHECKPOINT, None
    if (path / SUBFOLDER / "config.json").is_file():
        path = path / SUBFOLDER
    about = path / "config.json"
    content = read_json(about) if about.is_file() else {}
    if isinstance(content, dict) and "llm" in content:
        raise ValueError(f"{path}: {IS_HARMON}")
    is_ours = isinstance(content, dict) and "mar" in content
    return path, ClassConfig.from_json(content, about) if is_ours else None


def read_tensors(source) -> tuple:
    """The tensors of a MAR by the authors' names, and those of its VAE, {} if the file has none.

    Of "model" and "model_ema" the averages are taken. Raises ValueError that says what another file is.
    """
    tensors = read(source)
    plain_names(tensors, lambda name: name.startswith(("mar.", "vae.", "llm.", *NAMES)), source)
    if any(name.startswith("llm.") for name in tensors):
        raise ValueError(f"{source}: {IS_HARMON}")
    vae = {name.removeprefix("vae."): t for name, t in tensors.items() if name.startswith("vae.")}
    mar = {name.removeprefix("mar."): t for name, t in tensors.items() if not name.startswith("vae.")}
    if not any(name.startswith(NAMES) for name in mar):
        is_vae = any(name.startswith(("encoder.", "decoder.")) for name in mar) or vae
        what = f"no MAR; its tensors begin with {next(iter(mar), 'none')}"
        raise ValueError(f"{source}: {'a VAE, which is given as vae= (--vae)' if is_vae else what}")
    return mar, vae


def infer_config(tensors, vae, source) -> ClassConfig:
    """The sizes of a MAR, read off its tensors. vae: a VAEConfig. Raises ValueError that names `source`."""
    try:
        D, C = tensors["z_proj.weight"].shape
        N = tensors["diffusion_pos_embed_learned"].shape[1]
        buffers = tensors["encoder_pos_embed_learned"].shape[1] - N
        mlp_dim = tensors["encoder_blocks.0.mlp.fc1.weight"].shape[0]
        class_num = tensors["class_emb.weight"].shape[0]
        head_width = tensors["diffloss.net.input_proj.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{source}: not a complete MAR checkpoint (no {error} of the expected shape); "
                         "download it again") from None
    if D not in HEADS:
        known = ", ".join(map(str, sorted(HEADS)))
        raise ValueError(f"{source}: a MAR of width {D}, whose number of attention heads is not known; "
                         f"that of {known} is. A config.json beside model.safetensors gives it")
    if C != vae.z_channels:
        raise ValueError(f"{source}: tokens of {C} channels, but the VAE has {vae.z_channels}: another VAE, "
                         "or patches of several latent pixels, which are not computed")
    mar = MARConfig(
        img_size=round(N ** 0.5) * vae.stride, vae_stride=vae.stride, embed_dim=D, num_heads=HEADS[D],
        encoder_depth=count(tensors, "encoder_blocks."), decoder_depth=count(tensors, "decoder_blocks."),
        mlp_ratio=mlp_dim / D, buffer_size=buffers, token_dim=C, class_num=class_num,
        head_depth=count(tensors, "diffloss.net.res_blocks."), head_width=head_width)
    return ClassConfig(mar, vae)


def infer_vae(tensors, source) -> VAEConfig:
    """The sizes of a VAE, read off its tensors."""
    try:
        ch = tensors["encoder.conv_in.weight"].shape[0]
        levels = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch
                  for i in range(count(tensors, "encoder.down."))]
        return VAEConfig(ch=ch, ch_mult=tuple(levels), z_channels=tensors["post_quant_conv.weight"].shape[0])
    except (KeyError, IndexError) as error:
        raise ValueError(f"{source}: not a complete VAE (no {error}); kl16.ckpt is expected") from None


def count(tensors, prefix) -> int:
    """How many numbered modules stand under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, tensors) if match})
