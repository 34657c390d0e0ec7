"""DPG-Bench: 1,065 long prompts, four pictures each in a 2×2 grid, about which a judge answers questions.

    python -m harmonkit.evals dpg --model … --out OUT                       # draws OUT/<item_id>.png
    python -m harmonkit.evals dpg … --questions dpg_bench.csv --judge-url URL --judge-model NAME
    python -m harmonkit.evals score dpg ANSWERS --questions dpg_bench.csv
    python -m harmonkit.evals score dpg OUT --questions dpg_bench.csv --judge-url URL --judge-model NAME

Without a judge the grids are for compute_dpg_bench.py of TencentQQGYLab/ELLA @3c228f1, with --pic-num 4 and
--resolution, the side of one picture. ANSWERS: see dpg_files.py.

Two scores: "all questions", and "official", which skips the table's first question, so that its prompt falls
out. Stricter than the official tool: missing pictures, rows and answers are refused. Categories count only
the last picture of a grid, as there. The official judge is mPLUG-large; any other is named beside the score.
"""
import io
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from harmonkit.evals import judge
from harmonkit.evals.benchmark import Item, Result
from harmonkit.evals.dpg_files import PER_PROMPT, read_answers, read_questions, rows_of
from harmonkit.evals.json_files import several, write_objects
from harmonkit.evals.origins import digest
from harmonkit.evals.rules import dpg as rules
from harmonkit.images import open_image
from harmonkit.prompts import read_prompts
from harmonkit.terminal import file_path

SEED_STRIDE = 100_000
PROMPTS = Path(__file__).parent / "data" / "dpg_prompts.jsonl"
ANSWERS = "dpg_answers.jsonl"
REQUEST = "{question}\nLook at the picture and answer with a single word: yes or no."


def add_arguments(parser):
    add = parser.add_argument
    add("--data", type=file_path, default=PROMPTS,
        help="prompts: JSON lines of item_id and text, or a folder of .txt; default: the official ones")
    add("--questions", type=file_path, help="dpg_bench.csv, which scoring needs")
    judge.add_arguments(parser)


def check(args):
    """Raise ValueError for questions or a judge that cannot be used."""
    judge.from_args(args, None)
    if args.judge_url and args.questions is None:
        raise ValueError("--judge-url: --questions is missing, DPG-Bench's dpg_bench.csv")
    if args.questions is not None:
        rows_of(read_questions(args.questions), read(args)[:getattr(args, "limit", None)], args.questions)


def scorer(args):
    return {"judge": args.judge_model, "questions": digest(args.questions)} if args.judge_url else None


# ---- prompts and pictures --------------------------------------------------------------------------------

def read(args) -> list:
    """The Items of the prompt file, named by item_id. Raises ValueError or FileNotFoundError."""
    return [Item(prompt.name, prompt.text) for prompt in read_prompts(args.data)]


def picture(number, item, sample) -> str:
    return f"samples/{item.name}-{sample}.png"


def grid(number, item) -> str:
    return f"{item.name}.png"


# ---- scores ----------------------------------------------------------------------------------------------

def score(out, items, args):
    """Ask the judge about the grids in a folder, write ANSWERS there -> Result.

    None without a judge. Raises ValueError for missing pictures.
    """
    asked = judge.from_args(args, out)
    if asked is None:
        print(f"{out}: score it by dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA with --pic-num "
              f"{PER_PROMPT}, or give --questions dpg_bench.csv --judge-url URL --judge-model NAME")
        return None
    check(args)
    rows = rows_of(read_questions(args.questions), items, args.questions)
    missing = [item.name for item in items if not (Path(out) / grid(0, item)).is_file()]
    if missing:
        raise ValueError(f"{out}: {len(missing)} of {len(items)} pictures are missing: {several(missing)}")
    by_item = {}
    for row in rows:
        by_item.setdefault(row["item_id"], []).append(row)
    for name, of_item in tqdm(by_item.items(), "judging", disable=None, leave=False):
        pictures = crops(Path(out) / f"{name}.png")
        requests = [(REQUEST.format(question=row["question"]), crop) for row in of_item for crop in pictures]
        answers = judge.ask_until_read(asked, requests, yes_or_no)
        for number, row in enumerate(of_item):
            row["answers"] = answers[PER_PROMPT * number:PER_PROMPT * (number + 1)]
    write_objects(Path(out) / ANSWERS, [
        {name: row[name] for name in ("item_id", "proposition_id", "answers")} for row in rows])
    note = f"judged by {asked.model}, not by mPLUG-large: not comparable with other judges' scores"
    return result(rows, items, (note,))


def crops(path) -> list:
    """The four pictures of a 2×2 grid, row by row, as the bytes of PNGs. Raises ValueError for odd sides."""
    image = open_image(path)
    width, height = image.width // 2, image.height // 2
    if image.size != (2 * width, 2 * height):
        raise ValueError(f"{path}: {image.width} × {image.height} pixels are no grid of 2 × 2 pictures")
    places = [(x, y) for y in (0, height) for x in (0, width)]
    return [png(image.crop((x, y, x + width, y + height))) for x, y in places]


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def yes_or_no(reply):
    """The judge's reply as "yes" or "no", None for any other. Case and marks around the word do not count."""
    word = reply.strip().strip(".,!\"'`*").lower()
    return word if word in ("yes", "no") else None


def read_scores(file, args) -> Result:
    """The scores of an answers file, or of a folder of grids with --judge-url.

    Raises ValueError unless the file has the rows of --questions in their order, for the prompts of --data.
    """
    items = read(args)[:getattr(args, "limit", None)]
    if Path(file).is_dir():
        found = score(file, items, args)
        if found is None:
            raise ValueError(f"{file}: a folder; give --judge-url and --judge-model to have it judged")
        return found
    if args.questions is None:
        raise ValueError("--questions is missing, DPG-Bench's dpg_bench.csv")
    rows = rows_of(read_questions(args.questions), items, args.questions)
    read_answers(file, rows)
    return result(rows, items)


def result(rows, items, notes=()) -> Result:
    """The Result of rows with answers. Left out and counted are prompts with an answer that is None, and
    those of which a question depends on one that is not in the table.
    """
    by_item = {}
    for row in rows:
        by_item.setdefault(row["item_id"], []).append(row)
    answers = [answer for row in rows for answer in row["answers"]]
    unread = {name for name, of_item in by_item.items() if any(None in row["answers"] for row in of_item)}
    pictures = [{"item_id": name, "questions": of_item, "image": name not in unread}
                for name, of_item in by_item.items()]
    counts = {"prompts": len(items), "questions": len(rows), "scored prompts": len(items) - len(unread),
              "no answer": answers.count(None),
              "neither yes nor no": sum(answer not in ("yes", "no", None) for answer in answers)}
    notes = [*notes]
    if unread:
        notes.append(f"{len(unread)} of {len(items)} prompts are left out: not every question about them was "
                     "answered")
    if counts["neither yes nor no"]:
        notes.append(f"answers that are neither yes nor no, and count as no: {counts['neither yes nor no']}")
    if len(unread) == len(items):
        raise ValueError(f"DPG-Bench: {counts['no answer']} of {len(answers)} answers are missing or cannot "
                         "be read, so no prompt has a score; a judge's replies lie in the folder judge")
    whole = rules.aggregate(pictures)
    if whole["failed"]:
        counts["scored prompts"] -= len(whole["failed"])
        notes.append(f"{len(whole['failed'])} of {len(items)} prompts are left out: the table has a question "
                     f"that depends on one which is not there: {several(whole['failed'])}")
    scores = {"all questions": levels(whole)}
    skipped = rules.without_first_question(pictures) if rows[0]["is_first"] else pictures
    try:
        official = rules.aggregate(skipped)
    except ValueError:
        notes.append("the official tool scores none of these prompts")
    else:
        scores["official"] = levels(official)
        counts["failed officially"] = len(official["failed"])
    return Result(scores, counts, tuple(notes))


def levels(scores) -> dict:
    """overall, the categories of level 1, and those of level 2."""
    details = {name: value for name, value in scores["level2"].items() if name not in scores["level1"]}
    return {"overall": scores["score"], **scores["level1"], **details}
