"""A mixture before a run: a report on each source, from its format to its broken samples, and a sheet."""
import random
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from harmonkit.chat_template import IGNORE_INDEX, IMAGE_TOKEN_ID, training_ids
from harmonkit.checkpoints import atomic_write
from harmonkit.data.mixture import MixtureDataset, prepare
from harmonkit.data.order import permutation
from harmonkit.data.records import SkipSample
from harmonkit.images import pixels_to_images

SIDE = 224                                  # of an image on the contact sheet, pixels
WIDTH, HEIGHT = SIDE + 16, SIDE + 150       # of a sample, pixels
MAX_REASONS = 100                           # that are counted apart
CAPTION_LENGTH = 200                        # characters of a caption in the printed report


# ---- reports -------------------------------------------------------------------------------------------

@dataclass
class Report:
    """What a look at a source found."""
    source: object
    looked_at: int = 0
    bad: int = 0
    outside: int = 0                                            # the rules of sizes
    cut: int = 0                                                # of the usable ones, to the longest text
    reasons: Counter = field(default_factory=Counter)           # {why samples are skipped: how many}
    examples: dict = field(default_factory=dict)                # {reason: the first sample's name}
    captions: list = field(default_factory=list)                # of all usable samples
    rows: list = field(default_factory=list)                    # their turns
    dropped_system: int = 0                                     # system turns

    @property
    def usable(self):
        return self.looked_at - self.bad - self.outside

    def skip(self, error):
        """Count a SkipSample."""
        self.bad += error.bad
        self.outside += not error.bad
        reason = common(error.reason)
        if reason not in self.reasons and len(self.reasons) >= MAX_REASONS:
            reason = "other reasons"
        self.reasons[reason] += 1
        self.examples.setdefault(reason, error.name)

    def three_captions(self) -> list:
        """The first, the middle and the last caption, as far as there are so many."""
        count = len(self.captions)
        places = sorted({0, count // 2, count - 1}) if count else []
        return [self.captions[place] for place in places]

    def to_json(self) -> dict:
        """The keys of `inspect --json`."""
        source = self.source
        return {"path": source.path, "format": source.samples.kind, "task": source.task,
                "samples": len(source.samples), "looked_at": self.looked_at, "usable": self.usable,
                "bad": self.bad, "outside": self.outside, "cut": self.cut,
                "reasons": dict(self.reasons.most_common()), "captions": self.three_captions()}


def look_at(source, number, size, fit, check=2000) -> Report:
    """Prepare up to `check` samples of a source as training does.

    number: the source's, it chooses them. fit: mixture.Fit.
    """
    report = Report(source)
    chosen = permutation(len(source.samples), 0, number, 0)[:check]
    for index in tqdm(np.sort(chosen).tolist(), desc=source.path, disable=None, leave=False):
        report.looked_at += 1
        try:
            sample = source.samples[index]
            report.dropped_system += sample.dropped_system
            cached = source.latents.get(index, sample) if source.latents else None
            row = prepare(sample, source.task, size, random.Random(index), cached)
            if "turns" in row:
                report.cut += fit.tokens(sample.name, source.task, row["turns"])[2]
        except SkipSample as error:
            report.skip(error)
            continue
        report.rows.append(row.get("turns", []))
        caption = caption_of(sample, source.task, random.Random(index))
        if caption is not None:
            report.captions.append(caption)
    return report


def caption_of(sample, task, rng):
    """The caption or the first answer, whichever the task learns from; None if the sample has no words."""
    has_answer = sample.turns is not None
    if has_answer and (task in ("image2text", "text") or sample.caption is None):
        return sample.turns(rng)[0][1]
    return sample.caption(rng) if sample.caption else None


def common(reason) -> str:
    """A reason without the size of its image, so that equal reasons count together."""
    reason = re.sub(r"\d+×\d+ pixels, ", "", reason)
    return re.sub(r"\s+", " ", reason).strip()


# ---- output --------------------------------------------------------------------------------------------

def inspect(sources, fit, size, out, check=2000):
    """Print a report on each source, from at most `check` of its samples, and draw 16 samples to `out`."""
    ratio = {source.task: 0 for source in sources}
    for number, source in enumerate(sources):
        ratio[source.task] += source.weight
        print_report(look_at(source, number, size, fit, check), fit)
    with atomic_write(out) as temporary:
        contact_sheet(MixtureDataset(sources, ratio, 1, size, fit=fit)).save(temporary)
    print(out)


def print_report(report, fit):
    source = report.source
    print(f"{source.path}: {source.task}, weight {source.weight:g}")
    print(f"    {source.samples.kind}, {len(source.samples)} samples; {report.looked_at} looked at: "
          f"{report.usable} usable, {report.bad} bad, {report.outside} outside the rules")
    for reason, count in report.reasons.most_common(10):
        print(f"    {count} × {reason} ({report.examples[reason]})")
    if len(report.reasons) > 10:
        print(f"    {len(report.reasons) - 10} more reasons; --json has all")
    if report.dropped_system:
        print(f"    {report.dropped_system} system turns dropped")
    if report.cut:
        print(f"    {report.cut} of the usable are cut to {fit.max_length} text tokens (--max-length)")
    if report.rows:
        lengths = [len(training_ids(fit.tokenizer, turns)[0]) for turns in report.rows]
        shares = [f"{p}% ≤ {np.percentile(lengths, p):.0f}" for p in (5, 50, 95, 99, 100)]
        print(f"    text tokens: {', '.join(shares)}")
    for caption in report.three_captions():
        short = caption if len(caption) <= CAPTION_LENGTH else caption[:CAPTION_LENGTH] + "…"
        print(f"    {short!r}")


def contact_sheet(dataset, count=16):
    """The first samples of a dataset as the model gets them, four in a row."""
    sheet = Image.new("RGB", (4 * WIDTH, -(-count // 4) * HEIGHT), "white")
    for i in range(count):
        draw_sample(sheet, i % 4 * WIDTH + 8, i // 4 * HEIGHT + 8, dataset[i], dataset.fit.tokenizer)
    return sheet


def draw_sample(sheet, left, top, batch, tokenizer):
    """Draw the image and the text of a batch of one, as the model gets them; what the loss is on is red."""
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
    ids, labels = batch["ids"][0] if "ids" in batch else ([], [])
    for token, label in zip(ids, labels, strict=True):
        if token == IMAGE_TOKEN_ID:
            continue
        for part in tokenizer.decode([token], skip_special_tokens=False).splitlines(keepends=True):
            text = part.rstrip("\n")
            if x + draw.textlength(text) > left + SIDE:
                x, y = left, y + 12
            draw.text((x, y), text, fill="black" if label == IGNORE_INDEX else "red")
            x += draw.textlength(text)
            if part != text:
                x, y = left, y + 12
