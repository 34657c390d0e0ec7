"""GenEval: 553 prompts, four pictures each, scored by an object detector and a color classifier.

    python -m harmonkit.evals geneval --model … --out OUT                   # draws for GenEval's scorer
    python -m harmonkit.evals geneval --model … --out OUT --scorer ours     # draws and scores
    python -m harmonkit.evals score geneval results.jsonl                   # the official scorer's file
    python -m harmonkit.evals score geneval OUT --scorer ours               # pictures that are there already

OUT/00000/metadata.jsonl holds the prompt's line as one JSON object, OUT/00000/samples/0000.png to 0003.png
its pictures (djghosh13/geneval:evaluation/evaluate_images.py @af4902f).
Stricter than the official tool: missing pictures and results are refused, not overlooked. The detector of
--scorer ours is in detector.py.
"""
import json
from collections import Counter
from pathlib import Path

from harmonkit.checkpoints import write_text
from harmonkit.evals import detector
from harmonkit.evals.benchmark import Item, Result
from harmonkit.evals.detector import NAMES
from harmonkit.evals.json_files import read_objects, several
from harmonkit.evals.rules import geneval as rules
from harmonkit.prompts import parse_json, read_text
from harmonkit.terminal import file_path

PER_PROMPT = 4
SEED_STRIDE = 100_000
PROMPTS = Path(__file__).parent / "data" / "geneval_metadata.jsonl"
RESULTS = "results-ours.jsonl"              # what --scorer ours writes beside the pictures
OFFICIAL, OURS = "official", "ours"
NOT_OFFICIAL = ("scored by transformers' Mask2Former, another training of GenEval's detector; agreement with "
                "the official scorer: not verified")


def add_arguments(parser):
    add = parser.add_argument
    add("--data", type=file_path, default=PROMPTS, help="prompt file; default: the 553 official prompts")
    add("--scorer", choices=(OFFICIAL, OURS), default=OFFICIAL,
        help='ours: transformers\' Mask2Former and CLIP, pip install "harmon[evals]"; official (default): '
             "runs elsewhere and writes the file for `score geneval`")
    add("--detector", default="facebook/mask2former-swin-small-coco-instance", help="of --scorer ours")
    add("--clip", default="openai/clip-vit-large-patch14", help="of --scorer ours")


def check(args):
    """Raise ValueError if the scorer's packages are not there."""
    if args.scorer == OURS:
        detector.check(args.detector, args.clip)


def scorer(args):
    return {"detector": args.detector, "clip": args.clip} if args.scorer == OURS else None


# ---- prompts and pictures --------------------------------------------------------------------------------

def read(args) -> list:
    """The Items of the prompt file, named 00000, 00001, … Raises ValueError or FileNotFoundError."""
    items = []
    for place, line in read_objects(args.data):
        fault = fault_of(line)
        if fault:
            raise ValueError(f"{args.data}, {place}: {fault}")
        items.append(Item(f"{len(items):05}", line["prompt"], line))
    return items


def fault_of(line):
    """What is wrong with a line of a prompt file, or None."""
    prompt, include = line.get("prompt"), line.get("include")
    if not isinstance(prompt, str) or not prompt.strip():
        return "no prompt"
    if line.get("tag") not in rules.TAGS:
        return f"tag is {line.get('tag')!r}; known: {', '.join(rules.TAGS)}"
    if not isinstance(include, list) or not isinstance(line.get("exclude", []), list):
        return "include and exclude must be lists"
    for clause in [*include, *line.get("exclude", [])]:
        if not isinstance(clause, dict) or clause.get("class") not in NAMES:
            return f"{json.dumps(clause)[:80]}: class must be one of the 80 in geneval_object_names.txt"
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            return f"{json.dumps(clause)[:80]}: count must be a number from 1 up"
        if clause.get("color", "red") not in rules.COLORS:
            return f"{json.dumps(clause)[:80]}: known colors: {', '.join(rules.COLORS)}"
    for number, clause in enumerate(include):
        if "position" in clause and not is_position(clause["position"], number):
            return f"{json.dumps(clause)[:80]}: position must be [a relation, the index of an earlier clause]"
    return None


def is_position(position, number) -> bool:
    """Whether it is [a relation, the index of a clause before clause `number`]."""
    match position:
        case [("left of" | "right of" | "above" | "below"), int(target)]:
            return 0 <= target < number
    return False


def picture(number, item, sample) -> str:
    return f"{item.name}/samples/{sample:04}.png"


def prepare(out, number, item):
    """Write OUT/00000/metadata.jsonl: exactly one JSON object, and no line break after it."""
    write_text(Path(out) / item.name / "metadata.jsonl", json.dumps(item.fields))


# ---- scores ----------------------------------------------------------------------------------------------

def score(out, items, args):
    """Score the pictures in a folder with our detector and write RESULTS there -> Result.

    None for the official scorer, which runs elsewhere. Raises ValueError for missing pictures.
    """
    if args.scorer != OURS:
        print(f"{out}: score it by evaluation/evaluate_images.py of djghosh13/geneval and give its file to "
              "`score geneval`, or add --scorer ours")
        return None
    pictures = [(path, item) for item in items for path in pictures_of(Path(out), item)]
    lines = detector.score_pictures(pictures, args.detector, args.clip, getattr(args, "device", None))
    write_text(Path(out) / RESULTS, "".join(map(result_line, lines)))
    return result(lines, items, OURS, (f"detector {args.detector}, colors {args.clip}",))


def pictures_of(out, item) -> list:
    """The paths of an item's pictures, all digits and .png. Raises ValueError for fewer than PER_PROMPT, and
    if its metadata.jsonl is another prompt's.
    """
    metadata = out / item.name / "metadata.jsonl"
    if parse_json(metadata, read_text(metadata)) != item.fields:
        raise ValueError(f"{metadata}: its prompt is not number {int(item.name)} of --data, {item.prompt!r}")
    samples = out / item.name / "samples"
    paths = [path for path in samples.glob("*.png") if path.stem.isdigit()]
    if len(paths) < PER_PROMPT:
        raise ValueError(f"{samples}: {len(paths)} of {PER_PROMPT} pictures are there")
    return sorted(paths, key=lambda path: int(path.stem))


def result_line(line) -> str:
    """A line of a result file as the official tool writes it, which escapes slashes."""
    return json.dumps(line, separators=(",", ":")).replace("/", "\\/") + "\n"


def read_scores(file, args) -> Result:
    """The scores of a result file, or of a folder of pictures with --scorer ours.

    Raises ValueError for lines that are no results, and if a prompt of --data lacks some.
    """
    items = read(args)[:getattr(args, "limit", None)]
    if Path(file).is_dir():
        if args.scorer != OURS:
            raise ValueError(f"{file}: a folder; a result file is expected, or --scorer ours")
        return score(file, items, args)
    lines, seen = [], {}
    for place, line in read_objects(file):
        fault = fault_of_result(line)
        if fault:
            raise ValueError(f"{file}, {place}: {fault}")
        if line["filename"] in seen:
            raise ValueError(f"{file}, {place}: {line['filename']} stands on {seen[line['filename']]} too")
        seen[line["filename"]] = place
        lines.append(line)
    check_prompts(file, lines, items)
    return result(lines, items, OURS if Path(file).name == RESULTS else args.scorer)


def fault_of_result(line):
    """What is wrong with a line of a result file, or None."""
    for name in ("filename", "tag", "prompt", "metadata"):
        if not isinstance(line.get(name), str):
            return f"no {name}; a line of GenEval's result file is expected"
    if not isinstance(line.get("correct"), bool):
        return f"correct is {line.get('correct')!r}; true or false is expected"
    try:
        metadata = json.loads(line["metadata"])
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        return "metadata is not JSON"
    if (metadata.get("tag"), metadata.get("prompt")) != (line["tag"], line["prompt"]):
        return "tag and prompt differ from those in metadata"
    return None


def check_prompts(file, lines, items):
    """Raise ValueError unless the lines are results of all items, of equally many pictures each."""
    wanted = Counter(text_of(item.fields) for item in items)
    found = Counter(text_of(json.loads(line["metadata"])) for line in lines)
    prompts = {text_of(item.fields): item.prompt for item in items}
    for text in found:
        if text not in wanted:
            raise ValueError(f"{file}: {json.loads(text)['prompt']!r} is no prompt of --data; give the file "
                             "of the prompts that were drawn")
    missing = [prompts[text] for text in wanted if not found[text]]
    if missing:
        raise ValueError(f"{file}: {len(missing)} of {len(items)} prompts have no result: "
                         f"{several(missing, 3)}")
    most = max(found[text] // wanted[text] for text in wanted)
    fewer = [prompts[text] for text in wanted if found[text] != most * wanted[text]]
    if fewer:
        raise ValueError(f"{file}: {len(fewer)} of {len(items)} prompts have fewer than {most} results: "
                         f"{several(fewer, 3)}")


def text_of(metadata) -> str:
    return json.dumps(metadata, sort_keys=True)


def result(lines, items, scorer, notes=()) -> Result:
    """The Result of result lines. scorer: official or ours, the protocol's name."""
    summary = rules.aggregate(lines)
    scores = {"overall": summary["overall"]}
    scores |= {tag: task["percent"] / 100 for tag, task in summary["tasks"].items()}
    scores |= {"images": summary["correct_images_percent"] / 100,
               "prompts": summary["correct_prompts_percent"] / 100}
    empty = sum(line.get("details") == "{}" for line in lines)
    counts = {"prompts": len(items), "images": len(lines), "nothing found": empty}
    notes = [NOT_OFFICIAL, *notes] if scorer == OURS else []
    if len(lines) != PER_PROMPT * len(items):
        notes.append(f"{len(lines) // len(items)} images a prompt; GenEval has {PER_PROMPT}")
    if set(summary["tasks"]) != set(rules.TAGS):
        notes.append(f"overall is the mean of {len(summary['tasks'])} of {len(rules.TAGS)} tasks")
    if 2 * empty > len(lines):
        notes.append(f"the detector found nothing in {empty} of {len(lines)} images, as happens with an mmcv "
                     "that was built for another GPU")
    return Result({scorer: scores}, counts, tuple(notes))
