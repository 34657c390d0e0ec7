"""WISE: 1,000 prompts that need knowledge of the world, a picture each, scored by a judge.

    python -m harmonkit.evals wise --model … --data WISE/ --out OUT          # draws OUT/<prompt_id>.png
    python -m harmonkit.evals wise … --judge-url URL --judge-model NAME      # and has them judged
    python -m harmonkit.evals score wise SCORES                              # files of WISE's own judge
    python -m harmonkit.evals score wise OUT --data WISE/ --judge-url URL --judge-model NAME

--data: the JSON arrays of PKU-YuanGroup/WISE @eb51174, which carry no licence. Pictures are drawn from the
prompts alone. SCORES: see wise_files.py. The two editions are never mixed: in "original" GPT-4o-2024-05-13
gives consistency, realism and aesthetic quality, in "verified" (2026) Qwen3.5-35B-A3B gives 0 or 1.

Stricter than the official tool: it refuses ids that are missing, stand twice or are none, and values that are
no scores. The requests to the judge are worded here: scores with them are not those of WISE's own requests.
"""
from pathlib import Path

from tqdm import tqdm

from harmonkit.evals import judge
from harmonkit.evals.benchmark import Item, Result
from harmonkit.evals.json_files import several, write_objects
from harmonkit.evals.rules import wise as rules
from harmonkit.evals.wise_files import edition_of, read_data, read_lines
from harmonkit.terminal import file_path

PER_PROMPT = 1
SEED_STRIDE = 100_000
SCORES = "wise_scores.jsonl"
OFFICIAL_JUDGE = {"original": "GPT-4o-2024-05-13", "verified": "Qwen3.5-35B-A3B"}
NAMES = {"CULTURE": "cultural"} | {name: name.lower() for name in rules.CATEGORIES[1:]}
BATCH = 64                                  # pictures between two steps of the progress bar

TASK = """This picture was drawn from the prompt below. Judge it strictly.

Prompt: {Prompt}
What a right picture shows: {Explanation}
"""
REQUESTS = {"original": TASK + """
Give three scores, each 0 (no), 1 (partly) or 2 (fully):
Consistency: does the picture show what the prompt means, including what the explanation says?
Realism: is it physically plausible, with right materials, proportions and light?
Aesthetic Quality: is it well composed, in harmonious colors, free of flaws?

Answer with exactly three lines:
Consistency: N
Realism: N
Aesthetic Quality: N""", "verified": TASK + """
Does the picture show all of that? Answer with exactly one line, "Score: 1" for yes or "Score: 0" for no."""}


def add_arguments(parser):
    add = parser.add_argument
    add("--data", type=file_path, help="WISE's JSON array, or a folder with its three")
    add("--edition", choices=tuple(rules.WEIGHTS), help="default: what the data's categories say")
    judge.add_arguments(parser)


def check(args):
    """Raise ValueError for a judge that cannot be used."""
    judge.from_args(args, None)


# ---- prompts and pictures --------------------------------------------------------------------------------

def read(args) -> list:
    """The Items in the order of their prompt_id, which is their name. Raises ValueError or OSError.

    Their fields are those of the data, and "edition".
    """
    if args.data is None:
        raise ValueError("--data is missing: the JSON files of WISE, from github.com/PKU-YuanGroup/WISE")
    entries = read_data(args.data)
    edition = edition_of(args.data, entries.values(), args.edition)
    return [Item(str(number), entries[number]["Prompt"], entries[number] | {"edition": edition})
            for number in sorted(entries)]


def picture(number, item, sample) -> str:
    return f"{item.name}.png"


def scorer(args):
    return {"judge": args.judge_model} if args.judge_url else None


# ---- the judge -------------------------------------------------------------------------------------------

def score(out, items, args):
    """Have the pictures in a folder judged, write SCORES there -> Result. None without a judge.

    Raises ValueError for missing pictures, and if an id is left without scores.
    """
    asked = judge.from_args(args, out)
    if asked is None:
        print(f"{out}: score it by WISE's own scripts and give their files to `score wise`, or give "
              "--judge-url and --judge-model")
        return None
    edition = items[0].fields["edition"]
    paths = [Path(out) / picture(0, item, 0) for item in items]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{out}: {len(missing)} of {len(items)} pictures are missing: {several(missing)}")
    requests = [(REQUESTS[edition].format(**item.fields), path) for item, path in zip(items, paths)]
    answers = []
    for start in tqdm(range(0, len(requests), BATCH), "judging", disable=None, leave=False):
        batch = requests[start:start + BATCH]
        answers += judge.ask_until_read(asked, batch, lambda reply: complete_scores(reply, edition))
    lines = [{"prompt_id": int(item.name), "Subcategory": item.fields["Subcategory"], **scores}
             for item, scores in zip(items, answers) if scores is not None]
    write_objects(Path(out) / SCORES, lines)
    unread = [item.name for item, scores in zip(items, answers) if scores is None]
    if unread:
        raise ValueError(f"{out}: {len(unread)} of {len(items)} pictures have no scores from the judge "
                         f"(prompt_id {several(unread)}), so there is no WISE score; what it said is in "
                         f"{Path(out) / 'judge'}")
    note = f"judged by {asked.model} with our request, not by {OFFICIAL_JUDGE[edition]} with WISE's"
    return result(lines, edition, (note,))


def complete_scores(reply, edition):
    """The scores in a judge's reply, None if some are missing."""
    read = rules.judge_scores(reply, edition)
    return read["scores"] if read["complete"] else None


# ---- scores ----------------------------------------------------------------------------------------------

def read_scores(file, args) -> Result:
    """The scores of a score file, of a folder of them, or of a folder of pictures with --judge-url.

    Raises ValueError for anything but one valid line for each of the 1,000 ids.
    """
    file = Path(file)
    if args.judge_url:
        return score(file, read(args)[:getattr(args, "limit", None)], args)
    lines, edition = read_lines(file)
    limit = getattr(args, "limit", None)
    if limit and len(lines) != min(limit, rules.NUM_PROMPTS):
        raise ValueError(f"{file}: {len(lines)} scores; --limit {limit} says otherwise")
    wanted = read(args)[0].fields["edition"] if args.data is not None else args.edition
    if wanted not in (None, edition):
        raise ValueError(f"{file}: scores of the edition {edition}, not of {wanted}")
    return result(lines, edition)


def result(lines, edition, notes=()) -> Result:
    """The Result of valid lines of one edition; of a part of the 1,000 ids without an overall score."""
    counts = {"prompts": len(lines), "of": rules.NUM_PROMPTS}
    whole = rules.aggregate(lines, edition)
    if whole["overall"] is None:
        scores = rules.score_lines(lines, edition)["scores"]
        values = [value for column in scores.values() for value in column]
        means = {"mean": sum(values) / len(values)}
        means |= {NAMES[name]: sum(column) / len(column) for name, column in scores.items()}
        note = f"{len(lines)} of {rules.NUM_PROMPTS} prompts: no WISE score, which weights the categories"
        return Result({f"{edition}, a part": means}, counts, (*notes, note))
    means = {NAMES[name]: mean for name, mean in whole["categories"].items()}
    scores = {edition: {"overall": whole["overall"], **means}}
    if edition == "original":
        scores["plain mean, as RecA and BAGEL"] = {"overall": whole["plain_mean"]}
    return Result(scores, counts, tuple(notes))
