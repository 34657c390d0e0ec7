"""Weights on disk: find them, read any format that users have, load them strictly, save them.

Read are safetensors (one file, or shards with an index) and torch pickles (`.pth`, `.ckpt`, `.pt`; always
with weights_only=True). Tensors are views of the memory-mapped file until they are converted or moved.
"""
import json
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from harmonkit.chat_template import load_tokenizer
from harmonkit.config import HARMON_SIZES, HarmonConfig, infer_config, read_json

PACKAGE = Path(__file__).resolve().parent
BUNDLED = PACKAGE / "bundled"                       # of an installed package
if not BUNDLED.is_dir():
    BUNDLED = PACKAGE.parent / "checkpoints"        # of a checkout


# ---- find ----------------------------------------------------------------------------------------

def find_model(path) -> Path:
    """A bundled model's name, a path or a hub id -> an existing file or folder. Raises FileNotFoundError."""
    if Path(path).exists():
        return Path(path)
    if (BUNDLED / str(path)).is_dir():
        return BUNDLED / str(path)
    is_hub_id = str(path).count("/") == 1 and not Path(path).suffix and not str(path).startswith((".", "/"))
    if not is_hub_id:
        raise FileNotFoundError(f"{path}: no such file or folder, and not the name of a bundled model or a "
                                "hub id like wusize/Harmon-0_5B")
    from huggingface_hub import snapshot_download  # tokenizers depends on it; needed only here

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub raises many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise FileNotFoundError(f"{path}: no such folder, and the hub did not give it ({reason})") from None


def find_config(model) -> HarmonConfig:
    """The configuration of an official name, or of a model folder. Raises FileNotFoundError, ValueError."""
    if model in HARMON_SIZES and not (BUNDLED / model).is_dir():
        return HarmonConfig.from_name(model)
    file = find_model(model) / "config.json"
    return HarmonConfig.from_json(read_json(file), file)


# ---- read ----------------------------------------------------------------------------------------

def read(path) -> dict:
    """{name: tensor} of a file, or of a folder with model.safetensors or model.safetensors.index.json and its
    shards.

    A pickle may be wrapped: of {"model": …, "model_ema": …} the averaged weights are taken.
    Raises FileNotFoundError or ValueError that name the file and its fault.
    """
    path = Path(path)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if index.is_file():
            return read_sharded(index)
        if not single.is_file() and any(path.glob("step-*.pt")):
            raise FileNotFoundError(f"{path}: a run of train.py, no model; the same train.py command with "
                                    "--export FOLDER makes one of it")
        if not single.is_file():
            raise FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json "
                                    "is in this folder")
        path = single
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_safetensors(path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); "
                         "download or write it again") from None


def read_sharded(index) -> dict:
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r})") from None
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: no such file, but {index.name} names it; "
                                    "download the missing shard")
        tensors.update(read_safetensors(index.parent / shard))
    lost = sorted(set(shard_of) - set(tensors))
    if lost:
        raise ValueError(f"{index}: the shards lack {shorten(lost)}")
    return tensors


def read_pickle(path) -> dict:
    try:
        # Only the zip format can be mapped; files from before torch 1.6 are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types for a broken file
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        raise ValueError(f"{path}: not a torch checkpoint of plain tensors ({reason})") from None
    for wrapper in ("model_ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path}: expected a dictionary of tensors, possibly under 'model' or 'model_ema'")
    return content


def shorten(names, most=4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- load ----------------------------------------------------------------------------------------

def load_strict(module, tensors, source, *, device=None, dtype=None):
    """Make `tensors` the parameters of `module` (usually on the meta device): the same names, the same
    shapes.

    Of names tied to one parameter, one is enough. `tensors` is emptied on the way, so that each source tensor
    is freed once it is converted. Raises ValueError that names `source` and the keys.
    """
    names_of = {}                                   # parameter -> its names, several where weights are tied
    for name, parameter in module.state_dict(keep_vars=True).items():
        names_of.setdefault(id(parameter), (parameter, []))[1].append(name)

    missing, wrong_shape, expected = [], [], set()
    for parameter, names in names_of.values():
        expected.update(names)
        found = [name for name in names if name in tensors]
        if not found:
            missing.append(names[0])
        for name in found:
            if tensors[name].shape != parameter.shape:
                shape, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                wrong_shape.append(f"{name} is {shape}, expected {wanted}")
    unexpected = sorted(set(tensors) - expected)
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong_shape}
    problems = [f"{kind}: {shorten(keys)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise ValueError(f"{source}: these weights do not fit this model; {'; '.join(problems)}")

    state = {}
    for _, names in tqdm(names_of.values(), desc=f"loading {source}", disable=None, leave=False, delay=2):
        found = [tensors.pop(name) for name in names if name in tensors]
        state.update(dict.fromkeys(names, found[0].to(device=device, dtype=dtype)))
    module.load_state_dict(state, strict=True, assign=True)


def from_pretrained(model_class, path, *, config=None, vae=None, tokenizer=None, device=None, dtype=None):
    """A model with its weights, in eval mode. model_class: Harmon.

    path: "harmon-tiny", which is bundled; a folder of ours or of Hugging Face; an official `.pth` with vae=
    (kl16.ckpt) and tokenizer= (a tokenizer.json or its folder) beside it; or a hub id: wusize/Harmon-0_5B.
    config: a HarmonConfig, needed only for sizes that are not official. device: default CUDA if there is one.
    dtype: default float32 on the CPU, bfloat16 elsewhere.
    Raises FileNotFoundError or ValueError that name the file and the keys.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    path = find_model(path)
    tensors = read(path)
    if path.is_dir():
        if tokenizer is None and (path / "tokenizer.json").is_file():
            tokenizer = path
        config = config or HarmonConfig.from_json(read_json(path / "config.json"), path / "config.json")
    config = config or infer_config(tensors, path)
    if vae is not None:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("vae.")}
        tensors |= {f"vae.{name.removeprefix('vae.')}": t for name, t in read(vae).items()}
    elif not any(name.startswith("vae.") for name in tensors):
        raise ValueError(f"{path}: there is no VAE in it; give the VAE's file as vae= (--vae), kl16.ckpt for "
                         "official weights")
    with torch.device("meta"):
        model = model_class(config)
    load_strict(model, tensors, path, device=device, dtype=dtype)
    model.llm.tie_weights()
    if tokenizer is not None:
        model.tokenizer = load_tokenizer(tokenizer)
    return model.eval()


# ---- save ----------------------------------------------------------------------------------------

def save_pretrained(model, folder, dtype=None):
    """Write a folder that from_pretrained reads. dtype: of the file; default the model's."""
    folder = Path(folder)
    state = model.state_dict()
    if model.config.llm.tie_word_embeddings:
        del state["llm.lm_head.weight"]
    write(folder / "model.safetensors", {name: t.to(dtype=dtype) for name, t in state.items()})
    write_text(folder / "config.json", json.dumps(model.config.to_json(), indent=2) + "\n")
    if model.tokenizer is not None:
        with atomic_write(folder / "tokenizer.json") as temporary:
            model.tokenizer.save(temporary)


@contextmanager
def atomic_write(path):
    """A temporary path. It replaces `path` when the block ends well and is deleted otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)                  # mkstemp and safetensors let only the owner read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write(path, tensors):
    """Save {name: tensor} as one safetensors file, atomically. Raises OSError when the disk is full."""
    with atomic_write(path) as temporary:
        try:
            contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text)
