"""Draw pictures to files: what is missing, in batches, shared by the processes of torchrun."""
import sys
from collections import Counter
from dataclasses import asdict

import torch
from tqdm import tqdm

from harmonkit import outputs
from harmonkit.devices import rank_and_world_size
from harmonkit.images import save_png


def about(model, sampling, size, args) -> dict:
    """What a picture depends on besides its prompt and seed, as its PNG says it. size: [H, W] pixels."""
    return asdict(sampling) | {
        "size": list(size), "model": str(args.model), "weights": outputs.fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."), "mode": args.mode, "version": outputs.version(),
        "torch": torch.__version__}


def show(path):
    """Print a line in one piece: print writes its end apart, and torchrun's processes share a stdout."""
    print(f"{path}\n", end="", flush=True)


def draw_sheets(sheets, draw_batch, settings, args, *, padded_length, called="prompts"):
    """Draw what is not there yet, and print the path of each sheet.

    draw_batch: [Picture, …] -> PIL images. padded_length: see `outputs.batches`. called: what sheets are of,
    for messages. Raises ValueError if another picture is in the way, or for too little memory.
    """
    overwrite = args.overwrite
    rank, world_size = rank_and_world_size()
    done, left, num_left = outputs.divide(sheets, rank, world_size, overwrite)
    outputs.remove_leftovers(left)
    jobs = [(sheet, picture) for sheet in left for picture in sheet.pictures
            if overwrite or outputs.state(picture) != "done"]
    if num_left < len(sheets) and rank == 0:
        print(f"{len(sheets) - num_left} of {len(sheets)} {called} are drawn already; --overwrite draws them "
              "anew", file=sys.stderr)
    for sheet in done:
        show(sheet.path)

    waiting = Counter(sheet.path for sheet, _ in jobs)              # pictures to be drawn, by sheet
    for sheet in left:
        if not waiting[sheet.path]:                                 # only the grid is missing
            show(sheet.finish())

    cut = outputs.batches(jobs, args.batch_size, padded_length)
    for batch in tqdm(cut, desc="batches", disable=None if len(cut) > 1 else True):
        try:
            images = draw_batch([picture for _, picture in batch])
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            height, width = settings["size"]
            raise ValueError(f"not enough memory for {len(batch)} images of {height}x{width} pixels at once; "
                             "lower --batch-size or --size") from None
        for (sheet, picture), image in zip(batch, images):
            save_png(picture.path, image, **picture.texts)
            waiting[sheet.path] -= 1
            if not waiting[sheet.path]:
                show(sheet.finish())
