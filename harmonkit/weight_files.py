"""Weights on disk: find them, and read any format that users have.

Read are safetensors and torch pickles (`.pth`, `.ckpt`, `.pt`, `.bin`), told by their content, whole or in
shards with an index. Of a pickle only plain tensors are read (weights_only=True), so that no file runs code.
Tensors are views of the memory-mapped file until they are converted or moved.

Damage: torch.save stores a checksum of each tensor, and it is compared. Safetensors has none: a cut file is
refused, but weights that changed on the disk, or a hole of zeros, cannot be seen.
"""
import argparse
import io
import os
import pickletools
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from harmonkit.config import read_json

PACKAGE = Path(__file__).resolve().parent
BUNDLED = PACKAGE / "bundled"                       # of an installed package
if not BUNDLED.is_dir():
    BUNDLED = PACKAGE.parent / "checkpoints"        # of a checkout

# What a folder of weights holds, the first that is there. The order is that of Hugging Face's transformers.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")
NEEDED = re.compile(r"torch\.((_utils|_tensor|storage|serialization)\.)?\w+|"      # in a pickle of tensors
                    r"collections\.OrderedDict|argparse\.Namespace")
WRAPPERS = ("model_ema", "model", "state_dict", "model_state_dict", "module")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".safetensors"}
FILE_SUFFIXES = WEIGHT_SUFFIXES | {".json", ".gguf", ".zip"}
HUB_FILES = ["*.json", "*.safetensors", "merges.txt"]


# ---- find ----------------------------------------------------------------------------------------

def find_model(path) -> Path:
    """A bundled model's name, a path or a hub id -> an existing file or folder. Raises FileNotFoundError."""
    name = str(path).rstrip("/")
    local = Path(os.path.expanduser(path))
    if str(path) and local.exists():
        return local
    if name and (BUNDLED / name).is_dir():
        return BUNDLED / name
    if not HUB_ID.fullmatch(name) or Path(name).suffix in FILE_SUFFIXES:
        raise FileNotFoundError(f"{path}: no such file or folder, and not the name of a bundled model or a "
                                "hub id like wusize/Harmon-0_5B")
    from huggingface_hub import snapshot_download  # tokenizers depends on it; needed only here

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub raises many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise FileNotFoundError(f"{path}: no such folder, and the hub did not give it ({reason})") from None


# ---- read ----------------------------------------------------------------------------------------

def read(path) -> dict:
    """{name: tensor} of a file, or of a folder with model.safetensors or pytorch_model.bin, maybe in shards.

    A pickle may be wrapped: of {"model": …, "model_ema": …} the averaged weights are taken. Raises
    FileNotFoundError or ValueError that name the file and its fault.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return read_file(path)
    for file in (path / name for name in WEIGHTS):
        if file.exists():
            return read_sharded(file) if file.suffix == ".json" else read_file(file)
    if any(path.glob("step-*.pt")):
        raise FileNotFoundError(f"{path}: a run of train.py, no model; the same train.py command with "
                                "--export FOLDER makes one of it")
    others = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    hint = f"; of {shorten(others)}, give the file itself" if others else ""
    raise FileNotFoundError(f"{path}: neither {WEIGHTS[0]} nor {WEIGHTS[1]} is in this folder{hint}")


def read_file(path) -> dict:
    """{name: tensor} of one file, whatever its suffix."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder; a file of weights is expected here")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(1024)
    other = other_content(head)
    if other:
        raise ValueError(f"{path}: {other}")
    # A safetensors file begins with the length of its JSON header, in 8 bytes.
    is_pickle = head.startswith((b"PK", b"\x80"))
    is_safetensors = head[8:9] == b"{" or (path.suffix == ".safetensors" and not is_pickle)
    return read_safetensors(path) if is_safetensors else read_pickle(path)


def failed_download(head) -> str | None:
    """What a file that begins with these bytes is, and what to do, if it is none that anybody wanted."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        size = f" of {int(size[1]):,} bytes" if size else ""
        return f"a Git-LFS pointer, not the file{size} that it stands for; fetch that with: git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error", b"<!--")):
        return "a web page; download the file itself (on the hub: /resolve/, not /blob/)"
    return None


def other_content(head) -> str | None:
    """What a file that begins with these bytes is, and what to do, if it cannot be weights."""
    failed = failed_download(head)
    if failed:
        return failed
    packers = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
    if head.startswith(packers) or head[257:262] == b"ustar":
        return "a compressed archive; unpack it and give the file inside"
    if head.startswith((b"GGUF", b"\x89HDF")):
        return "weights of another library (GGUF or HDF5); safetensors or a torch checkpoint is expected"
    # Both formats hold bytes below 32 at their start; a text does not.
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        text = " ".join(head[:60].decode("utf-8", "replace").split())
        return f"a text, not weights; it begins {ascii(text)}; download the file again"
    return None


def read_safetensors(path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); "
                         "download or write it again") from None


def read_sharded(index) -> dict:
    shard_of = shards_of(index)
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: no such file, but {index.name} names it; "
                                    "download the missing shard")
        content = read_file(index.parent / shard)
        # A tensor that lies in two shards is read from that of the index.
        tensors |= {name: tensor for name, tensor in content.items() if shard_of.get(name, shard) == shard}
    lost = sorted(set(shard_of) - set(tensors))
    if lost:
        raise ValueError(f"{index}: the shards lack {shorten(lost)}")
    return tensors


def shards_of(index) -> dict:
    """{tensor: the shard that holds it} of an index. Raises ValueError for another file."""
    try:
        return {name: str(shard) for name, shard in dict(read_json(index)["weight_map"]).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r})") from None


def read_pickle(path) -> dict:
    content = load_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    is_state = isinstance(content, dict) and content and all(isinstance(name, str) for name in content)
    if not is_state or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path}: expected a dictionary of tensors, possibly under 'model' or 'model_ema'")
    return {name: tensor.detach() for name, tensor in content.items()}      # averages may be nn.Parameters


def load_pickle(path):
    """The content of a torch checkpoint. Raises ValueError for one that holds more than plain values."""
    # By its name alone, torch takes a .safetensors for one; without a name it cannot map.
    has_wrong_name = path.suffix == ".safetensors"
    flags = dict(map_location="cpu", weights_only=True, mmap=check_zip(path) and not has_wrong_name)
    try:
        # Training scripts save their arguments too; a Namespace is as harmless as a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                             # of protocols, in several lines
                return torch.load(file if has_wrong_name else path, **flags)
    except Exception as error:  # torch raises many types for a broken file
        text = str(error)
    # Not torch's own words: they advise to load without weights_only.
    wanted = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text)
    wanted = wanted[1] if wanted else refused_class(path)
    if wanted:
        reason = (f"it asks for {wanted[:80]}; only tensors, numbers, texts, lists and dictionaries are "
                  "read, because anything else can run code; save the state_dict alone")
    elif "Weights only" in text:
        reason = "a pickle of another kind, or damaged; save the state_dict with torch.save"
    else:
        reason = "cut off or damaged; download or write it again"
    raise ValueError(f"{path}: not a torch checkpoint of plain tensors ({reason})")


def refused_class(path) -> str | None:
    """The first class or function that a pickle asks for and a checkpoint has no need of, as module.name.

    Runs nothing of the pickle. torch names none in pickles of protocol 4, which it does not read.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(path):
                return first_refused(file)
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                return first_refused(io.BytesIO(archive.read(name)))
    except (ValueError, OSError, StopIteration, zipfile.BadZipFile):
        return None


def first_refused(file) -> str | None:
    """`refused_class` of an open file of pickles."""
    try:
        while True:                                     # old files are several pickles, one after the other
            texts, memo = [], []
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
                    texts.append(memo[argument])
                elif opcode.name == "GLOBAL":
                    texts += argument.split(" ", 1)
                elif isinstance(argument, str):
                    texts.append(argument)
                elif opcode.name == "MEMOIZE":
                    memo.append(texts[-1] if texts else "")
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    wanted = ".".join(texts[-2:])
                    if not NEEDED.fullmatch(wanted):
                        return " ".join(re.sub(r"[^\w.]", " ", wanted).split())
    except ValueError:                                                      # at its end, or cut off
        return None


def check_zip(path) -> bool:
    """Whether the tensors lie in the file as they are. Raises ValueError for zip files of other things, or
    with other checksums.

    Files from before torch 1.6 are no zip. Compressed entries, mapped, would be read as if they were tensors.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # zipfile raises many types for damaged headers
        raise ValueError(f"{path}: not a torch checkpoint of plain tensors (cut off or damaged; download or "
                         "write it again)") from None
    names = [entry.filename for entry in entries]
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path}: a zip archive, but not one of torch.save; unpack it: it holds "
                         f"{shorten(names)}")
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path}: a TorchScript program, not weights; save its state_dict with torch.save")
    folders = sorted({name.split("/")[0] for name in names})
    if len(folders) > 1:
        raise ValueError(f"{path}: a zip archive of several folders ({shorten(folders)}); torch.save writes "
                         "one; zip that folder alone")
    methods = {entry.compress_type for entry in entries}
    if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError(f"{path}: compressed in a way that torch does not read; unzip it and zip it again "
                         "with: zip -0 -r")
    check_crc(path)
    return methods == {zipfile.ZIP_STORED}


def check_crc(path):
    """Raise ValueError unless each entry of torch.save's zip file has the checksum that the file says.

    torch.load compares none.
    """
    entry = None
    with open(path, "rb") as opened:
        try:
            archive = zipfile.ZipFile(opened)
            entries = archive.infolist()
            if not any(entry.CRC for entry in entries):     # saved under set_crc32_options(False)
                return
            for entry in tqdm(entries, desc=f"checking {path}", disable=None, leave=False, delay=2):
                with archive.open(entry) as file:
                    while file.read(2 ** 20):               # zipfile compares the checksum at the end
                        pass
        except Exception as error:  # zipfile raises many types for damaged headers
            place = "its list of entries" if entry is None else f"its entry {ascii(entry.filename)}"
            raise ValueError(f"{path}: {place} is damaged ({error}); write or download it again") from None


def shorten(names, most=4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- names ---------------------------------------------------------------------------------------

# torch.compile and the wrappers of distributed training put these anywhere into a name.
MARKS = re.compile(r"(?<![\w])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "model.")                    # of DataParallel, and of a model inside another


def plain_names(tensors, is_known, source):
    """Take MARKS from the names of {name: tensor}, and PREFIXES that all carry. A note on stderr says so.

    is_known(name): whether a name belongs to the model as it is; a Qwen's own names begin with "model.".
    """
    names = [MARKS.sub("", name) for name in tensors]
    shorter = names
    while shorter and not any(map(is_known, shorter)):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in shorter)), None)
        shorter = prefix and [name.removeprefix(prefix) for name in shorter]
    names = shorter or names                        # names of another model stay as they are
    changed = [f"{old} is read as {new}" for old, new in zip(tensors, names) if old != new]
    if not changed:
        return
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: two names become one without the marks of their wrappers; {changed[0]}")
    print(f"note: {source}: {shorten(changed, most=1)}", file=sys.stderr)
    renamed = dict(zip(names, tensors.values()))
    tensors.clear()
    tensors.update(renamed)
