"""What a run is: run.json in its folder, which changes.py compares with a resumed command.

The file holds the command and its flags, the recipe's settings, what the run started from, its data with
counts and fingerprints, and for each start the time, the step, the machine, versions and the state of git.
"""
import importlib.metadata
import itertools
import json
import platform
import socket
import subprocess
import zlib
from datetime import datetime
from pathlib import Path

import torch

from harmonkit.checkpoints import write_text
from harmonkit.data.mixture import read_mixture
from harmonkit.training import checkpoint_files
from harmonkit.training.recipes import (
    CHAINS,
    FIELDS,
    RECIPES,
    as_text,
    change,
    flag_of,
    override,
    settings,
)
from harmonkit.weight_files import WEIGHT_SUFFIXES, find_model

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pillow", "tqdm")
PATHS = ("mixture", "init", "init_llm", "init_mar", "vae", "tokenizer", "config", "export")
START = ("init", "init_llm", "init_mar", "vae", "config")       # flags of the weights that a run starts from
FLAGS = (*PATHS, "only", "device", "workers")


# ---- make a record -----------------------------------------------------------------------------------------

def describe(name, recipe, args, sources) -> dict:
    """The record of a run that a command asks for. args: of train.py. sources: opened; None for no data."""
    return {
        "name": name, "recipe": args.recipe, "flags": flags_of(args), "settings": settings(recipe),
        "start": start_of(recipe, args), "data": sources and [describe_source(source) for source in sources],
    }


def flags_of(args) -> list:
    """The flags of a command as `arguments` of train.py parses them, with absolute paths."""
    flags = []
    for key in (*FLAGS, *(field.name for field in FIELDS)):
        value = getattr(args, key) if key in START else args.given[key]
        if value is not None:
            flags += [flag_of(key), as_text(absolute(value) if key in PATHS else value)]
    return flags


def absolute(path):
    """A path made absolute. A text may be a hub id or the name of a model, unless it exists."""
    return Path(path).absolute() if isinstance(path, Path) or Path(path).exists() else path


def start_of(recipe, args) -> dict:
    """{flag: {path, fingerprint}} of the files a run starts from, or {"after": …} with the run before."""
    given = {key: getattr(args, key) for key in START if getattr(args, key)}
    start = {key: {"path": str(absolute(path)), "fingerprint": files_fingerprint(path)}
             for key, path in given.items()}
    if recipe.after and not start:
        before = checkpoint_files.checkpoints_of(args.runs / recipe.after)[-1:]
        fingerprint = checkpoint_files.fingerprint_of(before[0]) if before else None
        start["after"] = {"path": recipe.after, "fingerprint": fingerprint}
    return start


def files_fingerprint(path):
    """8 hexadecimal digits of a model's files: sizes, and the bytes at their start, middle and end.

    None if there are no such files.
    """
    try:
        path = find_model(path)
    except FileNotFoundError:
        return None
    files = [path]
    saved = checkpoint_files.checkpoints_of(path)
    if saved:
        return checkpoint_files.fingerprint_of(saved[-1])
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES | {".json"}]
    crc = 0
    for file in files:
        size = file.stat().st_size
        crc = zlib.crc32(f"{file.name if path.is_dir() else ''} {size}".encode(), crc)
        with open(file, "rb") as content:
            for place in (0, size // 2, size - 2 ** 20):
                content.seek(max(0, place))
                crc = zlib.crc32(content.read(2 ** 20), crc)
    return f"{crc:08x}"


def forget_start(args):
    """Take the flags of the start away: the next recipe of a chain starts from the one before."""
    for key in START:
        setattr(args, key, None)


def describe_source(source) -> dict:
    return {"path": source.path, "task": source.task, "weight": source.weight, "format": source.samples.kind,
            "samples": len(source.samples), "fingerprint": source.samples.fingerprint(),
            "latents": str(source.latents.folder) if source.latents else None}


def describe_start(step, args) -> dict:
    """The time, the place and the software of one start of a run."""
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "time": f"{datetime.now().astimezone():%F %T%z}", "step": step, "command": args.command,
        "folder": str(Path.cwd()), "host": socket.gethostname(),
        "device": device_name(args.device), "processes": args.world_size,
        "versions": {"python": platform.python_version()} | packages, "git": git_state(),
    }


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_state():
    """The commit of this code and the files that differ from it, or None outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True,
                           timeout=10).stdout
            for command in (["rev-parse", "HEAD"], ["diff", "--name-only", "HEAD"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": changed.split("\n")[:-1]}


# ---- on disk -----------------------------------------------------------------------------------------------

def read(folder):
    """The record in a run's folder, None if there is none. Raises ValueError for a damaged one."""
    file = Path(folder) / "run.json"
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        return record if {"name", "recipe", "settings", "starts"} <= set(record) else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the record of a run ({error}); without it the same command goes "
                         "on, but its start and its data cannot be compared") from None


def write(folder, record, mixture=None):
    """Write run.json, and mixture.json, the mixture file with absolute paths."""
    if mixture:
        write_text(folder / "mixture.json", json.dumps(read_mixture(mixture), indent=1) + "\n")
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def command_of(resumed) -> list:
    """The arguments of train.py that go on with a run. resumed: [its folder]. Raises ValueError, OSError."""
    if not resumed:
        raise ValueError("resume RUN: the folder of a run is expected, such as runs/finetune")
    folder = Path(*resumed).absolute()
    record = read(folder)
    if record is None:
        raise FileNotFoundError(f"{folder}: no run.json; `train.py resume RUN` takes the folder of a run, "
                                "such as runs/finetune")
    depth = len(Path(record["name"]).parts)
    flags = dict(zip(record["flags"][::2], record["flags"][1::2], strict=True))
    flags["--runs"] = str(folder.parents[depth - 1])
    if "--mixture" in flags:
        flags["--mixture"] = str(folder / "mixture.json")
    return [record["recipe"], *itertools.chain(*flags.items())]


def runs_of(args) -> dict:
    """{name: recipe} of the runs that a command asks for, in their order. Raises ValueError for its flags."""
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: a number of processes is expected, 0 or more")
    if args.export and args.export.is_file():
        raise ValueError(f"--export {args.export}: a file; the folder of a model is expected")
    names = CHAINS.get(args.recipe, [args.recipe])
    recipes = {}
    if args.resume:
        # Its settings may be others than the table's; a folder that was renamed is its own name.
        record = read(args.resume)
        name = record["name"]
        home = args.resume.absolute().parents[len(Path(name).parts) - 1]
        if args.runs != home:
            raise ValueError(f"--runs {args.runs}: `resume` goes on in {args.resume}; leave the flag out")
        is_there = (args.runs / name).absolute() == args.resume.absolute()
        recipe = change(RECIPES[names[0]], **record["settings"])
        recipes[name if is_there else str(args.resume.absolute())] = override(name, recipe, args)
        names = names[names.index(name) + 1:] if name in names else []
    return recipes | {name: override(name, RECIPES[name], args) for name in names}
