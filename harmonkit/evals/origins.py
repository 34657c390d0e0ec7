"""Where results come from: files and their digests, versions, the commit, the device, the flags."""
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from harmonkit.outputs import version
from harmonkit.weight_files import BUNDLED, WEIGHT_SUFFIXES, find_model

SCORING_PACKAGES = ("transformers", "clean-fid", "scipy", "pyarrow")


def weight_files(model, vae=None, tokenizer=None) -> dict:
    """{file name: sha256} of the files that a model is read from. Raises FileNotFoundError."""
    files = []
    for path in map(Path, filter(None, (find_model(model), vae, tokenizer))):
        inside = sorted(path.iterdir()) if path.is_dir() else ()
        files += [file for file in inside if is_model_file(file)] if path.is_dir() else [path]
    return {file.name: digest(file) for file in files}


def is_model_file(file) -> bool:
    names = ("config.json", "tokenizer.json", "vocab.json", "merges.txt")
    return file.is_file() and (file.suffix in WEIGHT_SUFFIXES or file.name in names)


def weights(loaded) -> dict:
    """{"fingerprint": outputs.fingerprint, "files": {name: sha256}} of a benchmark.Loaded."""
    return {"fingerprint": loaded.about["weights"], "files": loaded.files}


def digest(path) -> str:
    """The sha256 of a file; of a folder, that of its files' names and digests."""
    path, whole = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            whole.update(f"{file.relative_to(path)} {digest(file)}\n".encode())
        return whole.hexdigest()
    try:
        with open(path, "rb") as file:
            while part := file.read(2 ** 20):
                whole.update(part)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    return whole.hexdigest()


def flags(args) -> dict:
    """All arguments of a command, without a password that a URL may hold."""
    shown = {}
    for name, value in vars(args).items():
        if value is None or isinstance(value, (bool, int, float)):
            shown[name] = value
        elif name not in ("loaded", "others"):
            shown[name] = re.sub(r"://[^/@\s]*@", "://", str(value))
            if name.endswith("_url"):                           # a query may hold a key
                shown[name] = shown[name].partition("?")[0]
    return shown


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict:
    """{package: version} of what computes and scores; packages that are not installed are left out."""
    found = {"harmon": version(), "python": platform.python_version()}
    for name in ("torch", "numpy", "pillow", *SCORING_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})"


@cache
def git_commit():
    """The commit of a checkout, with "-dirty" for changed files; None for an installed package."""
    root = BUNDLED.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
