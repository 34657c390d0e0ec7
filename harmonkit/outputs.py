"""Pictures on disk: their files' names, what their PNGs say, and which of them are still to be drawn.

A picture's PNG holds its prompt, its seed and all settings. So a second run of the same command knows which
pictures are there, and never replaces a picture of other settings unasked.
"""
import hashlib
import importlib.metadata
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from harmonkit.devices import from_first_process
from harmonkit.images import image_grid, open_image, png_texts, save_png
from harmonkit.prompts import Prompt, slug
from harmonkit.reconstruction import beside

# Settings that do not change a picture, or that digests stand for.
NOT_COMPARED = ("model", "version", "torch", "image", "mask")


@dataclass(frozen=True)
class Picture:
    """A file, and the texts that its PNG holds: prompt, seed, settings (JSON)."""
    path: Path
    prompt: str
    seed: int
    settings: str

    @property
    def texts(self) -> dict:
        return {"prompt": self.prompt, "seed": str(self.seed), "settings": self.settings}


@dataclass(frozen=True)
class Sheet:
    """The pictures of one prompt, and their grid if there are several."""
    pictures: tuple
    grid: Picture | None
    original: Image.Image | None = None     # stands in the grid beside the pictures that are drawn like it

    @property
    def path(self) -> Path:
        return self.pictures[0].path if self.grid is None else self.grid.path

    @property
    def files(self) -> tuple:
        return self.pictures if self.grid is None else (*self.pictures, self.grid)

    def finish(self) -> Path:
        """Write the grid from the pictures' files. Returns the path to show."""
        if self.grid is not None:
            images = [open_image(picture.path) for picture in self.pictures]
            grid = image_grid(images)
            if self.original is not None:
                grid = beside(self.original, grid, images[0].size[::-1])
            save_png(self.grid.path, grid, **self.grid.texts)
        return self.path


# ---- plan ----------------------------------------------------------------------------------------

def image_seed(seed, prompt_index, sample_index):
    """Every image has a seed of its own, which depends on no other image and no number of processes."""
    return seed + 100_000 * prompt_index + sample_index


def plan(prompts, per_prompt, seed, settings, folder, original=None) -> list:
    """A Sheet for each Prompt. settings: a dictionary for JSON. original: a picture that is drawn anew.

    Raises ValueError if two files are one.
    """
    about = json.dumps(settings)
    about_grid = json.dumps(settings | {"pictures": per_prompt})
    sheets = []
    for p, prompt in enumerate(prompts):
        pictures = []
        for s in range(per_prompt):
            name = f"{prompt.name}.png" if per_prompt == 1 else f"{prompt.name}-{s}.png"
            pictures.append(Picture(folder / name, prompt.text, image_seed(seed, p, s), about))
        grid = None
        if per_prompt > 1:
            grid = Picture(folder / f"{prompt.name}.png", prompt.text, pictures[0].seed, about_grid)
        sheets.append(Sheet(tuple(pictures), grid, original))
    paths = set()
    for sheet in sheets:
        for file in sheet.files:
            if file.path in paths:
                raise ValueError(f"two prompts give the file {file.path.name}; change an id, or --num-images")
            paths.add(file.path)
    return sheets


def plan_single(text, *arguments, overwrite, words=None) -> list:
    """`plan` for one prompt, under its own words or the given ones, or under words_2, words_3, … if other
    pictures have the name.
    """
    name, number = slug(words or text), 1
    while True:
        sheets = plan([Prompt(text, name if number == 1 else f"{name}_{number}")], *arguments)
        if overwrite or not any(state(file) == "other" for file in sheets[0].files):
            return sheets
        number += 1


# ---- what is there -------------------------------------------------------------------------------

def state(picture) -> str:
    """Of the file at a picture's path: "missing", "done", or "other", which must not be lost.

    A grid of fewer or more pictures of the same settings counts as missing, since it is made of files.
    """
    path = picture.path
    if not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0):
        return "missing"
    texts = png_texts(path)
    if texts is None or not texts.keys() >= picture.texts.keys():
        return "other"
    if compared(texts) != compared(picture.texts):
        return "other"
    pictures, wanted = (json.loads(some["settings"]).get("pictures") for some in (texts, picture.texts))
    if (pictures is None) != (wanted is None):
        return "other"
    return "done" if pictures == wanted and is_complete(path) else "missing"


def compared(texts) -> tuple:
    """What two PNGs' texts must have in common to be the same picture."""
    try:
        settings = json.loads(texts["settings"])
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        return ()
    settings = {key: value for key, value in settings.items() if key not in (*NOT_COMPARED, "pictures")}
    return texts["prompt"], texts["seed"], settings


def is_complete(path) -> bool:
    """Whether a PNG has its end, which a copy that broke off lacks."""
    with open(path, "rb") as file:
        file.seek(-12, os.SEEK_END)
        return file.read()[4:8] == b"IEND"


def left_to_draw(sheets) -> list:
    """The numbers of the sheets that lack a file. Raises ValueError if another picture is in the way."""
    left, others = [], []
    for number, sheet in enumerate(sheets):
        states = [state(file) for file in sheet.files]
        others += [file.path for file, it_is in zip(sheet.files, states) if it_is == "other"]
        if set(states) != {"done"}:
            left.append(number)
    if others:
        is_picture = png_texts(others[0]) is not None
        what = "drawn from another prompt, seed, settings or weights" if is_picture else "no PNG, or damaged"
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(f"{others[0]}{more}: there already, {what}; give another --out, or --overwrite to "
                         "replace")
    return left


def divide(sheets, rank, world_size, overwrite=False) -> tuple:
    """(done, left, num_left): this process's part of the sheets that are there, and of those that are to be
    drawn; how many are to be drawn by all processes.

    Under torchrun process 0 looks once for all, so that the processes share what is left evenly. Processes
    that cannot talk to each other take each their own part of the whole list.
    """
    def look():
        return list(range(len(sheets))) if overwrite else left_to_draw(sheets)
    left = from_first_process(look)
    if left is None:
        left = look()
        mine = [number for number in left if number % world_size == rank]
    else:
        mine = left[rank::world_size]
    done = sorted(set(range(rank, len(sheets), world_size)) - set(left))
    return [sheets[number] for number in done], [sheets[number] for number in mine], len(left)


def batches(jobs, batch_size, padded_length) -> list:
    """Cut the jobs into lists of those that are drawn at once.

    padded_length: prompt -> tokens. Only prompts of one padded length share a batch, so that no picture
    depends on the others.
    """
    by_length = {}
    for job in jobs:
        by_length.setdefault(padded_length(job[1].prompt), []).append(job)
    return [group[start:start + batch_size] for group in by_length.values()
            for start in range(0, len(group), batch_size)]


def remove_leftovers(sheets):
    """Delete the temporary files with which a killed process was writing one of these files."""
    paths = {file.path for sheet in sheets for file in sheet.files}
    for folder in {path.parent for path in paths}:
        for leftover in folder.glob(".*.png"):
            match = re.fullmatch(r"\.(.+\.png)\.\w{8}\.png", leftover.name)
            if match and folder / match[1] in paths:
                leftover.unlink(missing_ok=True)


def check_folder(path):
    """Raise ValueError unless a folder can be made or written to at `path`. Makes nothing."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ValueError(f"--out {path}: {folder} cannot be written to")
            return
        if os.path.lexists(folder):
            raise ValueError(f"--out {path}: {folder} is a file; a folder is expected")


# ---- what the PNG says ---------------------------------------------------------------------------

def version() -> str:
    try:
        return importlib.metadata.version("harmon")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def file_digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@torch.no_grad()
def fingerprint(model) -> str:
    """16 hexadecimal digits that tell models apart, the same in every process and from every file format.

    They cover the configuration, the tokenizer, and of each parameter its name, type, shape, 1000 evenly
    spaced elements and the sum of all elements' bits. To be taken before `fast.accelerate` packs weights.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_json(), sort_keys=True).encode())
    if model.tokenizer is not None:
        digest.update(model.tokenizer.to_str().encode())
    for name, parameter in sorted(model.named_parameters()):
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        bits = parameter.detach().contiguous().flatten().view(integer)
        # In parts, because torch copies its argument to 64 bits.
        total = sum(part.sum(dtype=torch.int64) for part in bits.split(2 ** 20))
        some = bits[::max(1, len(bits) // 1000)].tolist()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {int(total)} {some}".encode())
    return digest.hexdigest()[:16]
