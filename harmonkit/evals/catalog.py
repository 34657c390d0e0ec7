"""The text of `python -m harmonkit.evals list`: each benchmark, its data, the time it takes, what to expect.

Times are estimates for one A100, at 512 pixels, 64 steps and guidance 3. The least is counted arithmetic
(docs/scaling.md) at 60% of the peak, many pictures or questions at once, without reading files. The most is
the paper's time a picture, one after the other.
"""
import textwrap

from harmonkit.evals.entries import ENTRIES, LARGE, SMALL

PICTURE_TFLOP = {SMALL: 91.9, LARGE: 360}       # a multiply-add is two
QUESTION_TFLOP = {SMALL: 1.7, LARGE: 4.7}       # a picture, a question of 32 tokens, one token of an answer
PEAK = 312                                      # TFLOP/s of an A100 in bfloat16, dense, from its data sheet
RATE = 0.6
PAPER_SECONDS = {SMALL: 10, LARGE: 30}          # a picture on an A100
SHAPES_TIME = "about 2 minutes on two CPU cores"


# ---- time ------------------------------------------------------------------------------------------------

def hours(entry, model) -> tuple:
    """(least, most) hours on one A100; most is None for questions, of which the paper gives no time."""
    runs = entry.number * max(1, entry.per_prompt) * entry.rotations
    tflop = (PICTURE_TFLOP if entry.draws else QUESTION_TFLOP)[model]
    least = runs * tflop / (RATE * PEAK) / 3600
    return least, runs * PAPER_SECONDS[model] / 3600 if entry.draws else None


def duration(hours) -> str:
    """"18 min", "1.2 h", "83 h"."""
    if hours < 0.95:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 9.95 else f"{hours:.0f} h"


def time_of(entry, model) -> str:
    """The estimate in words: "18 min to 6.1 h", "at least 4 min"."""
    if entry.name == "shapes":
        return SHAPES_TIME
    least, most = hours(entry, model)
    return f"at least {duration(least)}" if most is None else f"{duration(least)} to {duration(most)}"


# ---- numbers ---------------------------------------------------------------------------------------------

def number(value) -> str:
    """A score as its authors print it: shares with two places or three."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 1 and round(value, 2) == value else f"{value:g}"


def paper_line(entry, model) -> str:
    """All numbers of the paper: "overall 0.71, single_object 0.99, …"; empty if it has none."""
    numbers = {name: pair[model == LARGE] for name, pair in entry.paper.items()}
    return ", ".join(f"{name} {number(value)}" for name, value in numbers.items() if value is not None)


def others_lines(entry) -> list:
    """"RecA's authors: overall 0.676 (Harmon-0.5B), 0.729 (Harmon-1.5B)", …"""
    lines = []
    for who, name, *values in entry.others:
        of_models = [f"{number(value)} ({model})" for model, value in zip((SMALL, LARGE), values)
                     if value is not None]
        lines.append(f"{who}: {name} {', '.join(of_models)}")
    return lines


def amount(entry) -> str:
    """"553 prompts × 4 pictures", "9,000 questions"."""
    about = "" if entry.number_is_known else ", a number that is not verified"
    if entry.draws:
        pictures = f" × {entry.per_prompt} pictures" if entry.per_prompt > 1 else ""
        return f"{entry.number:,} prompts{pictures}{about}"
    forms = f", each in up to {entry.rotations} rotations" if entry.rotations > 1 else ""
    return f"{entry.number:,} questions{forms}{about}"


# ---- text ------------------------------------------------------------------------------------------------

def command(entry) -> str:
    model = "" if entry.name == "shapes" else "--model wusize/Harmon-1_5B --size 512"
    return " ".join(["python -m harmonkit.evals", entry.name, *filter(None, (model, entry.flags))])


def block(entry) -> str:
    rows = [("size", amount(entry)), ("needs", entry.needs),
            ("from", f"{entry.source}; licence: {entry.licence}")]
    if entry.name == "shapes":
        rows.append(("time", SHAPES_TIME))
    else:
        rows += [("time", f"{model} {time_of(entry, model)}") for model in (SMALL, LARGE)]
    rows += [("paper", f"{model}: {paper_line(entry, model)}") for model in (SMALL, LARGE)
             if paper_line(entry, model)]
    rows += [("others", line) for line in others_lines(entry)]
    rows += [("note", trap) for trap in entry.traps]
    rows.append(("run", command(entry)))
    lines = [f"{entry.name}: {entry.title}", *(f"  {line}" for line in entry.asks.splitlines())]
    for name, text in rows:
        # A command is one line, so that it can be copied.
        width = 10_000 if name == "run" else 100
        lines.append(textwrap.fill(text, width, initial_indent=f"    {name:8}", subsequent_indent=" " * 12))
    return "\n".join(lines)


def listing() -> str:
    return "\n\n".join([*map(block, ENTRIES), textwrap.fill(about_times(), 100)])


def about_times() -> str:
    return (f"Times are estimates for one A100, not measurements: counted arithmetic at {RATE:.0%} of "
            f"{PEAK} TFLOP/s, many at once, up to the paper's {PAPER_SECONDS[SMALL]} ({SMALL}) and "
            f"{PAPER_SECONDS[LARGE]} seconds ({LARGE}) a picture, at 512 pixels and 64 steps. Answers are "
            "taken to be one word long, and reading pictures from the disk is left out.")
