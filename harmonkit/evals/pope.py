"""POPE: does the model see objects that are not there? Yes/no questions about COCO pictures, in three parts.

    python -m harmonkit.evals pope --model … --data POPE/ --images coco/val2014
    python -m harmonkit.evals score pope answers.jsonl --data POPE/

--data is a folder with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, or one
such file: JSON lines of question_id, image, text, label (RUCAIBox/POPE:output/coco). A part has 3,000
questions, an older random part 2,910. OUT/coco_pope_random_answers.jsonl … are for POPE's evaluate.py.
Stricter than the official tool: it cuts at the shorter list if answers are missing, and matches by place
alone.
"""
from pathlib import Path

from harmonkit.evals import answer_files
from harmonkit.evals.answer_files import by_field, filled_field, text_field
from harmonkit.evals.benchmark import Question, Result
from harmonkit.evals.json_files import read_objects, write_objects
from harmonkit.evals.rules import pope as rules
from harmonkit.evals.templates import JANUS, PLAIN, add_template, word
from harmonkit.terminal import file_path

PARTS = ("random", "popular", "adversarial")
FILE = "coco_pope_{part}.json"
NUM_QUESTIONS = 3000            # of a part
HEADLINES = {"official": {"accuracy": "acc", "F1": "f1", "yes ratio": "yes_ratio"},
             "vlmevalkit": {"F1": "f1", "accuracy": "acc", "yes ratio": "yes_ratio"}}
TEMPLATES = {JANUS: "the question, a line break, a request for one word", PLAIN: "the question alone"}


def add_arguments(parser):
    parser.add_argument("--data", type=file_path, required=True,
                        help="folder of coco_pope_*.json, or one of the files")
    parser.add_argument("--images", type=file_path, help="COCO's val2014 folder")
    add_template(parser, list(TEMPLATES))


def files(args) -> list:
    """The data's files. Raises FileNotFoundError that names a part which is not there."""
    if not args.data.is_dir():
        return [args.data]
    paths = [args.data / FILE.format(part=part) for part in PARTS]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a part's file as --data to use it alone")
    return paths


def read(args) -> list:
    """The Questions of all parts; keys are random/1, … Raises ValueError or FileNotFoundError."""
    questions = []
    for path in files(args):
        part = path.stem.split("_")[-1]
        of_part, places = [], []
        for place, line in read_objects(path):
            key = f"{part}/{answer_files.field(path, place, line, 'question_id')}"
            text = filled_field(path, place, line, "text")
            name = filled_field(path, place, line, "image")
            label = text_field(path, place, line, "label")
            if label not in ("yes", "no"):
                raise ValueError(f"{path}, {place}: label is {label!r}; yes or no is expected")
            asked = word(text) if args.template == JANUS else text
            fields = {"part": part, "text": text, "label": label, "file": path.stem}
            of_part.append(Question(key, asked, (args.images or Path()) / name, fields))
            places.append((key, place))
        answer_files.check_unique(path, places)
        questions += of_part
    return questions


def write(folder, questions, answers):
    """The official answer file of each part: lines {question, answer} in the questions' order."""
    for file, of_part in by_field(questions, "file").items():
        write_objects(folder / f"{file}_answers.jsonl",
                      [{"question": q.fields["text"], "answer": answers[q.key]} for q in of_part])


def read_answers(file, questions, args) -> dict:
    """Answers by place, {question, answer} a line, all parts in one file; or answers.jsonl, or a folder with
    the official files of all parts. The answer may be called text too. Raises ValueError.
    """
    if file.is_dir():
        answers = {}
        for name, of_part in by_field(questions, "file").items():
            answers |= read_answers(file / f"{name}_answers.jsonl", of_part, args)
        return answers
    rows = answer_files.answer_rows(file)
    if answer_files.is_own(rows):
        return answer_files.own_answers(file, rows, questions)
    answer_files.check_count(file, len(rows), len(questions),
                             ", or is it of one part alone, whose file --data must name")
    answers = {}
    for question, (place, row) in zip(questions, rows):
        check_question(file, place, row, question)
        answers[question.key] = text_field(file, place, row, "answer", "text")
    return answers


def check_question(file, place, row, question):
    """Raise ValueError if an answer's line names another question than the one at its place."""
    text = question.fields["text"]
    asked, number = row.get("question", row.get("prompt")), row.get("question_id")
    if isinstance(asked, str) and asked.split("\n")[0].strip() != text.strip():
        raise ValueError(f"{file}, {place}: an answer to {asked!r}, where the data asks {text!r}; the "
                         "answers are in another order")
    if number is not None and f"{question.fields['part']}/{number}" != question.key:
        raise ValueError(f"{file}, {place}: an answer to question {number}, where the data has "
                         f"{question.key}; the answers are in another order")


# ---- score -----------------------------------------------------------------------------------------------

def score(questions, answers) -> Result:
    """Accuracy, F1, … as shares: the means of the parts, then each part's own."""
    counts = answer_files.count(questions, answers)
    notes = answer_files.notes(counts)
    parts = by_field(answer_files.answered(questions, answers), "part")
    scores = {}
    for protocol, rule in (("official", rules.score), ("vlmevalkit", rules.score_vlmevalkit)):
        by_part = {part: rule([answers[question.key] for question in of_part],
                              [question.fields["label"] for question in of_part])
                   for part, of_part in parts.items()}
        scores[protocol] = table(by_part, HEADLINES[protocol])
    for part, of_part in by_field(questions, "part").items():
        counts[part] = len(of_part)
        if len(of_part) != NUM_QUESTIONS:
            older = ", an older one 2,910" if part == "random" else ""
            notes.append(f"the {part} part has {len(of_part)} questions here; it has 3,000{older}")
    if set(parts) != set(PARTS):
        notes.append(f"accuracy, F1 and yes ratio are of the part {' and '.join(parts)} alone")
    return Result(scores, counts, tuple(notes))


def table(by_part, names) -> dict:
    """{part: numbers of a rule} -> {name: share}, in the order of names {name: key}. What a part has no
    denominator for is left out.
    """
    shares = {}
    for name, key in names.items():
        values = [numbers[key] for numbers in by_part.values()]
        shares[name] = None if None in values else sum(values) / len(values)
    for part, numbers in by_part.items():
        for name, key in (names | {"precision": "precision", "recall": "recall"}).items():
            shares[f"{part} {name}"] = numbers[key]
        shares[f"{part} unknown"] = numbers.get("unknown")
    return answer_files.known(shares)
