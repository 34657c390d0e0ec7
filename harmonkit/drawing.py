"""Draw pictures to files: what is missing, in batches, shared by the processes of torchrun."""
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache

import torch
from tqdm import tqdm

from harmonkit import outputs
from harmonkit.devices import barrier, from_first_process, rank_and_world_size
from harmonkit.images import save_png
from harmonkit.outputs import Sheet
from harmonkit.pipeline import PROMPT_BLOCK, generation_prompts
from mar import Sampling

MAX_SIDE = 8192                                     # pixels; attention takes memory for every pair of tokens
MAX_SEED = 2 ** 62


# ---- settings ------------------------------------------------------------------------------------

def parse_size(text):
    """HxW or a side -> (H, W); None -> None. Raises ValueError."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text):
        raise ValueError(f"--size is {text[:40]!r}; give pixels as 512 or, height first, 512x768")
    sides = [int(side) for side in text.split("x")]
    if max(sides) > MAX_SIDE:
        raise ValueError(f"--size is {text}; a side has at most {MAX_SIDE} pixels")
    return sides[0], sides[-1]


def check_seed(seed):
    """Raise ValueError for a --seed that leaves no room for the pictures' own seeds."""
    if abs(seed) > MAX_SEED:
        raise ValueError(f"--seed is {seed}; it must be a number from -{MAX_SEED} to {MAX_SEED}")


def sampling_settings(args, **defaults) -> Sampling:
    """The Sampling of the flags. defaults: for flags that are not given, instead of Sampling's own. Raises
    ValueError that names the flag.
    """
    given = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return Sampling(**defaults | given)
    except ValueError as error:
        field, message = str(error).split(" ", 1)
        raise ValueError(f"--{field.replace('_', '-')} {message}") from None


def default_num_iter(grid) -> int:
    """Steps K for a grid (h, w) of tokens: 64, at most a quarter of the tokens."""
    return min(Sampling.num_iter, -(-grid[0] * grid[1] // 4))


def about_model(model, name, mode) -> dict:
    """The part of `about` that is the same for all settings. To be taken before `fast.accelerate`."""
    return {"model": str(name), "weights": outputs.fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."), "mode": mode, "version": outputs.version(),
            "torch": torch.__version__}


def about(model, sampling, size, args) -> dict:
    """What a picture depends on besides its prompt and seed, as its PNG says it. size: [H, W] pixels."""
    return asdict(sampling) | {"size": list(size)} | about_model(model, args.model, args.mode)


# ---- draw ----------------------------------------------------------------------------------------

def show(path):
    """Print a line in one piece: print writes its end apart, and torchrun's processes share a stdout."""
    print(f"{path}\n", end="", flush=True)


def draw_prompts(model, sheets, size, settings, args, *, draw=None, **inputs):
    """Draw pictures from text. size: (H, W) or None. settings: of `about`. draw: draw_sheets (default) or
    draw_in_fixed_batches. inputs: further arguments of `model.generate_image`.
    """
    sampling = {field.name: settings[field.name] for field in fields(Sampling)}

    @cache
    def padded_length(prompt):
        return generation_prompts(model, [prompt], settings["cfg"], PROMPT_BLOCK)[0].shape[1]

    def draw_batch(pictures):
        prompts = [picture.prompt for picture in pictures]
        seeds = [picture.seed for picture in pictures]
        return model.generate_image(prompts, size=size, seed=seeds, **sampling, **inputs)
    (draw or draw_sheets)(sheets, draw_batch, settings, args, padded_length=padded_length)


def draw_sheets(sheets, draw_batch, settings, args, *, padded_length, called="prompts"):
    """Draw what is not there yet, and print the path of each sheet.

    draw_batch: Pictures -> PIL images. padded_length: see `outputs.batches`. called: what sheets are of, for
    messages. Raises ValueError if another picture is in the way, or for too little memory.
    """
    overwrite = args.overwrite
    rank, world_size = rank_and_world_size()
    done, left, num_left = outputs.divide(sheets, rank, world_size, overwrite)
    outputs.remove_leftovers(left)
    jobs = [(sheet, picture) for sheet in left for picture in sheet.pictures
            if overwrite or outputs.state(picture) != "done"]
    say_what_is_there(len(sheets) - num_left, len(sheets), called)
    for sheet in done:
        show(sheet.path)

    waiting = Counter(sheet.path for sheet, _ in jobs)              # pictures to be drawn, by sheet
    for sheet in left:
        if not waiting[sheet.path]:                                 # only the grid is missing
            show(sheet.finish())

    cut = outputs.batches(jobs, args.batch_size, padded_length)
    for batch in tqdm(cut, desc="batches", disable=None if len(cut) > 1 else True):
        with advice_on_memory(len(batch), settings):
            images = draw_batch([picture for _, picture in batch])
        for (sheet, picture), image in zip(batch, images):
            save_png(picture.path, image, **picture.texts)
            waiting[sheet.path] -= 1
            if not waiting[sheet.path]:
                show(sheet.finish())


def draw_in_fixed_batches(sheets, draw_batch, settings, args, *, padded_length):
    """`draw_sheets`, without its printing, in the batches of a single process that begins with nothing.

    The rounding of GPUs depends on the batch. Here no batch depends on how many processes there are, nor on
    what a killed run has drawn: a batch that lacks a picture is drawn whole, and what it lacks is saved.
    """
    overwrite = args.overwrite
    rank, world_size = rank_and_world_size()
    jobs = [(sheet, picture) for sheet in sheets for picture in sheet.pictures]
    cut = outputs.batches(jobs, args.batch_size, padded_length)
    units = [Sheet(tuple(picture for _, picture in batch), None) for batch in cut]
    grids = [sheet for sheet in sheets if sheet.grid is not None]
    if not overwrite:                               # raises ValueError if another picture is in the way
        from_first_process(lambda: outputs.left_to_draw([Sheet((sheet.grid,), None) for sheet in grids]))
    _, mine, num_left = outputs.divide(units, rank, world_size, overwrite)
    outputs.remove_leftovers([*mine, *(Sheet((sheet.grid,), None) for sheet in grids[rank::world_size])])
    say_what_is_there(len(units) - num_left, len(units), "batches")
    for unit in tqdm(mine, desc="batches", disable=None if rank == 0 else True):
        lacking = [overwrite or outputs.state(picture) != "done" for picture in unit.pictures]
        with advice_on_memory(len(unit.pictures), settings):
            images = draw_batch(unit.pictures)
        for picture, image, is_lacking in zip(unit.pictures, images, lacking):
            if is_lacking:
                save_png(picture.path, image, **picture.texts)
    barrier()                                       # a grid's pictures may be of several processes
    for sheet in grids[rank::world_size]:
        are_drawn = all(outputs.state(picture) == "done" for picture in sheet.pictures)
        if are_drawn and (overwrite or outputs.state(sheet.grid) != "done"):
            sheet.finish()


def say_what_is_there(num_done, count, called):
    if num_done and rank_and_world_size()[0] == 0:
        print(f"{num_done} of {count} {called} are drawn already; --overwrite draws them anew",
              file=sys.stderr)


@contextmanager
def advice_on_memory(count, settings):
    """Turn the block's error of too little memory for `count` pictures into a ValueError that says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        height, width = settings["size"]
        raise ValueError(f"not enough memory for {count} images of {height}x{width} pixels at once; "
                         "lower --batch-size or --size") from None
