"""Weights on disk: any file format users have -> {name: tensor}, and a strict, memory-mapped way into a model.

Reads safetensors (one file, or shards with an index) and torch pickles (`.pth`, `.ckpt`, `.pt`; only ever with weights_only=True).
Nothing is copied here: tensors are views of the mapped file until someone converts or moves them.
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


def read(path):
    """{name: tensor} of a file, or of a folder that holds model.safetensors or model.safetensors.index.json with its shards.

    A pickle may be wrapped: of {"model": …, "model_ema": …} the averaged weights are taken.
    Raises FileNotFoundError or ValueError, naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.is_file():
            return read_sharded(index)
        if not single.is_file() and any(path.glob("step-*.pt")):
            raise FileNotFoundError(f"{path}: a run of train.py, no model; the same train.py command with --export FOLDER makes one of it")
        if not single.is_file():
            raise FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json is in this folder")
        path = single
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_safetensors(path):
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); download or write it again") from None


def read_sharded(index):
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r})") from None
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: no such file, but {index.name} names it; download the missing shard")
        tensors.update(read_safetensors(index.parent / shard))
    lost = sorted(set(shard_of) - set(tensors))
    if lost:
        raise ValueError(f"{index}: the shards lack {some(lost)}")
    return tensors


def read_pickle(path):
    try:
        # mmap needs the zip format, which torch has written since 1.6; older files are read whole
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types for a broken file
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path}: not a torch checkpoint of plain tensors ({type(error).__name__}: {reason})") from None
    for wrapper in ("model_ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, possibly under 'model' or 'model_ema'")
    return content


def some(names, most=4):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def assign(module, tensors, source, *, device=None, dtype=None):
    """Make `tensors` the parameters of `module` (usually built on the meta device), strictly: same names, same shapes.

    Names tied to the same parameter may be absent but for one. `tensors` is emptied on the way, so that each source tensor can be
    freed once it is converted. Raises ValueError naming `source` and the keys.
    """
    groups = {}                                     # parameter -> its names; more than one where weights are tied
    for name, p in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(p), (p, []))[1].append(name)
    names = {name for _, group in groups.values() for name in group}
    missing = [group[0] for _, group in groups.values() if not any(name in tensors for name in group)]
    unexpected = sorted(set(tensors) - names)
    wrong = [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(p.shape)}" for p, group in groups.values() for name in group
             if name in tensors and tensors[name].shape != p.shape]
    problems = [f"{what}: {some(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)) if keys]
    if problems:
        raise ValueError(f"{source}: these weights do not fit this model; {'; '.join(problems)}")
    state = {}
    for p, group in tqdm(groups.values(), desc=f"loading {source}", disable=None, leave=False, delay=2):
        found = [tensors.pop(name) for name in group if name in tensors]
        state.update(dict.fromkeys(group, found[0].to(device=device, dtype=dtype)))
    module.load_state_dict(state, strict=True, assign=True)


@contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed to it when the block ends well and deleted when not: no half-written files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)                  # mkstemp and safetensors make files that nobody else may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write(path, tensors):
    """Save {name: tensor} as one safetensors file, atomically. Raises OSError when the disk is full."""
    with replacing(path) as temporary:
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None
