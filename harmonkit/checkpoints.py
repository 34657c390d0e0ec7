"""A model from its files and back: configuration, strict loading, saving. weight_files.py reads the files."""
import json
import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from harmonkit.config import HARMON_SIZES, HarmonConfig, infer_config, read_json
from harmonkit.devices import as_device, as_dtype
from harmonkit.tokenizer import has_tokenizer, load_tokenizer
from harmonkit.weight_files import BUNDLED, WEIGHTS, find_model, plain_names, read, shards_of, shorten

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = ("vae.", "llm.", "mar.", "proj_in.", "proj_out.")           # how Harmon's names begin
FILES = ("model.safetensors", "tokenizer.json", "config.json")      # of save_pretrained
OTHER_TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt")
STAGING = ".new-"


# ---- configuration -------------------------------------------------------------------------------

def find_config(model) -> HarmonConfig:
    """The configuration of an official name, or of a model folder. Raises FileNotFoundError, ValueError."""
    if model in HARMON_SIZES and not (BUNDLED / model).is_dir():
        return HarmonConfig.from_name(model)
    file = find_model(model) / "config.json"
    return HarmonConfig.from_json(read_json(file), file)


def decide_tying(config, tensors, source, prefix=""):
    """The QwenConfig for these weights: a head of its own unties it from the embedding, whatever it says.

    prefix: of the LLM's names in `tensors`. Configurations often lack tie_word_embeddings.
    """
    embedding, head = tensors.get(prefix + EMBEDDING), tensors.get(prefix + LM_HEAD)
    if not config.tie_word_embeddings or embedding is None or head is None:
        return config
    if embedding.shape != head.shape or torch.equal(embedding, head):
        return config
    print(f"note: {source}: {prefix}{LM_HEAD} differs from the embedding, so both are used; config.json "
          'should say "tie_word_embeddings": false', file=sys.stderr)
    return replace(config, tie_word_embeddings=False)


# ---- load ----------------------------------------------------------------------------------------

def load_strict(module, tensors, source, *, device=None, dtype=None):
    """Make `tensors` the parameters of `module` (usually on the meta device): the same names, the same
    shapes.

    Of names tied to one parameter, one is enough. Prefixes that all names carry are dropped. `tensors` is
    emptied on the way, so that each source tensor is freed once it is converted. Raises ValueError that names
    `source` and the keys, or the first weight that is not finite.
    """
    plain_names(tensors, module.state_dict().keys().__contains__, source)
    names_of = {}                                   # parameter -> its names, several where weights are tied
    for name, parameter in module.state_dict(keep_vars=True).items():
        names_of.setdefault(id(parameter), (parameter, []))[1].append(name)

    missing, wrong_shape, wrong_kind, differing, expected = [], [], [], [], set()
    for parameter, names in names_of.values():
        expected.update(names)
        found = [name for name in names if name in tensors]
        if not found:
            missing.append(names[0])
        for name in found:
            if tensors[name].shape != parameter.shape:
                shape, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                wrong_shape.append(f"{name} is {shape}, expected {wanted}")
            elif not tensors[name].is_floating_point():
                wrong_kind.append(f"{name} is {tensors[name].dtype}")
            elif name != found[0] and not torch.equal(tensors[name], tensors[found[0]]):
                differing.append(f"{name} from {found[0]}, which tie_word_embeddings makes one")
    unexpected = sorted(set(tensors) - expected)
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong_shape,
             "not floating-point": wrong_kind, "different": differing}
    problems = [f"{kind}: {shorten(keys)}" for kind, keys in kinds.items() if keys]
    if any(name.endswith(LM_HEAD) for name in missing):
        problems.append('"tie_word_embeddings": true in config.json shares the embedding as the head')
    if problems:
        raise ValueError(f"{source}: these weights do not fit this model; {'; '.join(problems)}")

    state = {}
    for _, names in tqdm(names_of.values(), desc=f"loading {source}", disable=None, leave=False, delay=2):
        found = [tensors.pop(name) for name in names if name in tensors]
        tensor = found[0].to(device=device, dtype=dtype)
        if not is_finite(tensor):
            raise ValueError(f"{source}: {why_not_finite(names[0], found[0], tensor.dtype)}")
        state.update(dict.fromkeys(names, tensor))
    module.load_state_dict(state, strict=True, assign=True)


def from_pretrained(model_class, path, *, config=None, vae=None, tokenizer=None, device=None, dtype=None):
    """A model with its weights, in eval mode. model_class: Harmon.

    path: "harmon-tiny", which is bundled; a folder of ours or of Hugging Face; an official `.pth` with vae=
    (kl16.ckpt) and tokenizer= (a tokenizer.json or its folder) beside it; or a hub id: wusize/Harmon-0_5B.
    config: a HarmonConfig, needed only for sizes that are not official. device: default CUDA if there is one.
    dtype: default float32 on the CPU, bfloat16 elsewhere.
    Raises FileNotFoundError or ValueError that name the file and the keys.
    """
    device = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = as_dtype(dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    path = find_model(path)
    tensors = read(path)
    plain_names(tensors, lambda name: name.startswith(PARTS), path)
    if path.is_dir():
        if tokenizer is None and has_tokenizer(path):
            tokenizer = path
        config = config or find_config(path)
    config = config or infer_config(tensors, path)
    if vae is not None:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("vae.")}
        tensors |= {f"vae.{name}": t for name, t in read_vae(vae).items()}
    elif not any(name.startswith("vae.") for name in tensors):
        raise ValueError(f"{path}: there is no VAE in it; give the VAE's file as vae= (--vae), kl16.ckpt for "
                         "official weights")
    config = replace(config, llm=decide_tying(config.llm, tensors, path, "llm."))
    with torch.device("meta"):
        model = model_class(config)
    load_strict(model, tensors, path, device=device, dtype=dtype)
    model.llm.tie_weights()
    if tokenizer is not None:
        model.tokenizer = load_tokenizer(tokenizer, config.llm.vocab_size)
    return model.eval()


def read_vae(path) -> dict:
    """The tensors of a VAE's file by their names in kl16.ckpt, with or without "vae." before them."""
    tensors = read(path)
    plain_names(tensors, lambda name: name.startswith(("vae.", "encoder.", "decoder.")), path)
    return {name.removeprefix("vae."): tensor for name, tensor in tensors.items()}


# ---- weights that are not finite -----------------------------------------------------------------

def first_not_finite(state):
    """The first name in {name: tensor} whose tensor holds NaN or infinity, or None. Reads each once."""
    return next((name for name, tensor in state.items() if not is_finite(tensor)), None)


def is_finite(tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:                  # float8 has no extremes
        tensor = tensor.float()
    # NaN and infinity show in the extremes. isfinite().all() would write a tensor of its answers first.
    return all(map(math.isfinite, tensor.detach().aminmax()))


def why_not_finite(name, tensor, dtype) -> str:
    """What is wrong with a weight that is not finite in `dtype`. tensor: the weight before its conversion."""
    if not is_finite(tensor):
        return (f"the weight {name} holds NaN or infinity: the training that wrote it has diverged, or the "
                "file is damaged; take an earlier checkpoint")
    dtype = str(dtype).removeprefix("torch.")
    largest = tensor.abs().max().item()
    return f"the weight {name} reaches {largest:.3g}, too large for {dtype}; take another dtype"


# ---- save ----------------------------------------------------------------------------------------

def save_pretrained(model, folder, dtype=None):
    """Write a folder that from_pretrained reads. dtype: of the file; default the model's.

    Other weights that the folder holds, and the tokenizer if the model has none, are renamed to NAME.old.
    All files are written before the first one is replaced, so an error leaves the model before. A kill while
    they are replaced leaves a folder without config.json, which from_pretrained refuses, never a mixture.
    Raises ValueError for weights that are not finite, or not in dtype, and OSError when the disk is full.
    """
    folder = Path(os.path.expanduser(folder))
    dtype = None if dtype is None else as_dtype(dtype)
    config = model.config.to_json()
    HarmonConfig.from_json(config, "model.config")  # or it could not be read back
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.to(dtype=dtype)
        if not is_finite(state[name]):
            raise ValueError(f"{folder}: not saved, {why_not_finite(name, tensor, state[name].dtype)}")
    if model.config.llm.tie_word_embeddings:
        del state[f"llm.{LM_HEAD}"]

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{STAGING}*"):     # of a kill
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=STAGING))
    try:
        write(staging / "model.safetensors", state)
        if model.tokenizer is not None:
            write_tokenizer(staging / "tokenizer.json", model.tokenizer)
        write_text(staging / "config.json", json.dumps(config, indent=2) + "\n")
        # Without config.json the folder is no model. So that goes first and comes last.
        (folder / "config.json").unlink(missing_ok=True)
        set_aside(folder, [*other_weights(folder), *(OTHER_TOKENIZERS if model.tokenizer is None else ())])
        for name in FILES:
            if (staging / name).exists():
                replace_file(staging / name, folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def other_weights(folder) -> list:
    """The names of the files of weights, beside model.safetensors, that a folder may hold."""
    names = [*WEIGHTS[1:], "adapter_config.json", "adapter_model.safetensors"]
    for index in folder.glob("*.index.json"):
        with suppress(ValueError):                  # of another kind, or broken
            names += [shard for shard in sorted(set(shards_of(index).values())) if shard not in FILES]
    return [name for name in names if Path(name).name == name]


def set_aside(folder, names):
    """Rename those of the files that are there to NAME.old, with a note on stderr."""
    names = [name for name in names if (folder / name).is_file()]
    for name in names:
        os.replace(folder / name, folder / f"{name}.old")
    if names:
        print(f"note: {folder}: {shorten(names)} of the model before got the suffix .old", file=sys.stderr)


@contextmanager
def atomic_write(path):
    """A temporary path. It replaces `path` when the block ends well and is deleted otherwise."""
    path = Path(os.path.expanduser(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)                  # mkstemp and safetensors let only the owner read
        replace_file(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)     # a signal may come after the renaming
        raise


def replace_file(source, target):
    """Rename a file; after a power cut `target` is the old file or the new one, whole."""
    sync(source)
    os.replace(source, target)
    with suppress(OSError):                         # some network disks cannot sync a folder
        sync(Path(target).parent)


def sync(path):
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path, tensors):
    """Save {name: tensor} as one safetensors file, atomically. Raises OSError when the disk is full."""
    with atomic_write(path) as temporary:
        try:
            contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None


def write_text(path, text):
    """Write a text file atomically. Raises OSError when the disk is full."""
    with atomic_write(path) as temporary:
        try:
            Path(temporary).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"{path}: could not be written ({error.strerror})") from None


def write_tokenizer(path, tokenizer):
    """Write a tokenizer.json atomically. Raises OSError when the disk is full."""
    # Not tokenizer.save, which raises plain Exceptions.
    write_text(path, tokenizer.to_str(pretty=True))
