"""A mixture before a run: counts, token lengths and broken samples of each source, and a contact sheet."""
import random

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from harmonkit.chat_template import IGNORE_INDEX, training_ids
from harmonkit.checkpoints import atomic_write
from harmonkit.data.mixture import MixtureDataset, permutation, prepare
from harmonkit.data.sources import SkipSample
from harmonkit.images import pixels_to_images

SIDE = 224                                  # of an image on the contact sheet, pixels
WIDTH, HEIGHT = SIDE + 16, SIDE + 150       # of a sample, pixels


def inspect(sources, tokenizer, size, out, check=2000):
    """Print a report on each source, from at most `check` of its samples, and draw 16 samples to `out`."""
    ratio = {source.task: 0 for source in sources}
    for s, source in enumerate(sources):
        ratio[source.task] += source.weight
        lengths, bad, rejected = [], [], []
        order = permutation(len(source.samples), 0, s, 0)[:check].tolist()
        for index in tqdm(order, desc=source.path, disable=None, leave=False):
            try:
                cached = source.latents.get(index) if source.latents else None
                row = prepare(source.samples[index], source.task, size, random.Random(index), cached)
                lengths.append(len(training_ids(tokenizer, row.get("turns", []))[0]))
            except SkipSample as error:
                (bad if error.bad else rejected).append(error)
        print(f"{source.path}: {source.task}, weight {source.weight:g}, {len(source.samples)} samples; "
              f"{len(order)} checked: {len(bad)} bad, {len(rejected)} outside the rules")
        if lengths:
            shares = [f"{p}% ≤ {np.percentile(lengths, p):.0f}" for p in (5, 50, 95, 99, 100)]
            print(f"    text tokens: {', '.join(shares)}")
        for error in (bad + rejected)[:10]:
            print(f"    {error}")
    with atomic_write(out) as temporary:
        contact_sheet(MixtureDataset(sources, ratio, 1, size), tokenizer).save(temporary)
    print(out)


def contact_sheet(dataset, tokenizer, count=16):
    """The first samples of a dataset as the model gets them, four in a row."""
    sheet = Image.new("RGB", (4 * WIDTH, -(-count // 4) * HEIGHT), "white")
    for i in range(count):
        draw_sample(sheet, i % 4 * WIDTH + 8, i // 4 * HEIGHT + 8, dataset[i], tokenizer)
    return sheet


def draw_sample(sheet, left, top, batch, tokenizer):
    """Draw the image and the text of a batch of one; what the loss is on is red."""
    draw = ImageDraw.Draw(sheet)
    if "pixels" in batch:
        image = pixels_to_images(batch["pixels"])[0]
        sheet.paste(image.resize((SIDE, SIDE), Image.BICUBIC), (left, top))
    else:
        draw.rectangle((left, top, left + SIDE, top + SIDE), outline="grey")
        draw.text((left + 8, top + 8), "cached latents" if "latents" in batch else "no image", fill="grey")
    if batch["task"] in ("image2text", "text"):
        draw.text((left, top + SIDE + 2), batch["task"], fill="grey")
    else:
        draw.text((left, top + SIDE + 2), f"{batch['task']}: the loss is on hidden image tokens", fill="red")

    x, y = left, top + SIDE + 16
    for token, label in zip(*training_ids(tokenizer, batch.get("turns", [[]])[0]), strict=True):
        for part in tokenizer.decode([token], skip_special_tokens=False).splitlines(keepends=True):
            text = part.rstrip("\n")
            if x + draw.textlength(text) > left + SIDE:
                x, y = left, y + 12
            draw.text((x, y), text, fill="black" if label == IGNORE_INDEX else "red")
            x += draw.textlength(text)
            if part != text:
                x, y = left, y + 12
