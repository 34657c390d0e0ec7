"""MME: 14 subtasks of yes/no questions, two about each picture.

    python -m harmonkit.evals mme --model … --data MME/
    python -m harmonkit.evals score mme results/ --data MME/

--data is either the folder of the subtasks' lists, SUBTASK.txt: picture, question, Yes or No, by tabs (a
fourth column is ignored), or the folder of the pictures itself, where each picture has a text file:
SUBTASK/NAME.txt beside SUBTASK/NAME.jpg, or SUBTASK/questions_answers_YN/NAME.txt with
SUBTASK/images/NAME.jpg. --images is the folder of the pictures if it is another one. Both layouts of the
distribution: not verified. OUT/SUBTASK.txt has four columns, as the official calculation.py reads them; a tab
or line break in an answer becomes a space. Stricter than the official tool, which pairs lines by place: two
lines of a pair must name one picture.
"""
import re
from pathlib import Path

from harmonkit.checkpoints import write_text
from harmonkit.evals import answer_files
from harmonkit.evals.benchmark import Question, Result
from harmonkit.evals.rules import mme as rules
from harmonkit.evals.templates import JANUS, OFFICIAL, add_template, word
from harmonkit.prompts import read_text
from harmonkit.terminal import file_path

NUM_QUESTIONS = 2374
TEMPLATES = {JANUS: "the question, a line break, a request for one word", OFFICIAL: "the question alone"}
SUFFIXES = (".jpg", ".png", ".jpeg")


def add_arguments(parser):
    add = parser.add_argument
    add("--data", type=file_path, required=True, help="folder of SUBTASK.txt, or of the pictures")
    add("--images", dest="pictures", type=file_path, help="folder of the pictures; default: --data")
    add_template(parser, list(TEMPLATES))


# ---- data ------------------------------------------------------------------------------------------------

def files(args) -> list:
    """The lists of the subtasks; the whole folder if the pictures have text files of their own."""
    found = [subtask_files(args.data, name) for name in rules.SUBTASKS]
    return sum(found, []) if all(paths[0].parent == args.data for paths in found) else [args.data]


def subtask_files(data, name) -> list:
    """SUBTASK.txt, or the text files of the subtask's pictures. Raises FileNotFoundError for none."""
    if (data / f"{name}.txt").is_file():
        return [data / f"{name}.txt"]
    folders = (data / name / "questions_answers_YN", data / name)
    found = next(filter(None, (sorted(folder.glob("*.txt")) for folder in folders)), None)
    if found is None:
        raise FileNotFoundError(f"{data}: the subtask {name} is missing: there is neither {name}.txt nor a "
                                f"folder {name} with text files")
    return found


def read(args) -> list:
    """The Questions of the 14 subtasks; keys are existence/1, … Raises ValueError or FileNotFoundError."""
    questions = []
    for name in rules.SUBTASKS:
        rows = []
        for path in subtask_files(args.data, name):
            of_file = file_rows(path, path.name != f"{name}.txt" or path.parent != args.data)
            check_pairs(path, of_file)
            rows += of_file
        for number, (_, picture, question, label) in enumerate(rows, start=1):
            fields = {"subtask": name, "picture": picture, "text": question, "label": label}
            asked = word(question) if args.template == JANUS else question
            path = picture_path(args.pictures or args.data, name, picture)
            questions.append(Question(f"{name}/{number}", asked, path, fields))
    return questions


def file_rows(path, is_of_one_picture) -> list:
    """[(place, picture, question, Yes or No), …] of a text file. is_of_one_picture: named as the picture,
    and without its column.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if is_of_one_picture:
            cells = [path.stem, *cells]
        if len(cells) not in ((3,) if is_of_one_picture else (3, 4)):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns; picture, question and Yes or No "
                             "are expected, by tabs")
        picture, question, label = (cell.strip() for cell in cells[:3])
        if label.lower() not in ("yes", "no") or not question or not picture:
            raise ValueError(f"{path}, line {number}: a question and Yes or No are expected; there is "
                             f"{line!r}")
        rows.append((f"line {number}", picture, question, label))
    return rows


def check_pairs(path, rows):
    """Raise ValueError unless two lines in a row are one picture."""
    if not rows or len(rows) % 2:
        raise ValueError(f"{path}: {len(rows)} questions; each picture has two, so is the file cut short?")
    for (_, first, *_), (place, second, *_) in zip(rows[::2], rows[1::2]):
        if first != second:
            raise ValueError(f"{path}, {place}: the second question of a pair is about {second}, the first "
                             f"one about {first}; two lines in a row must be one picture")


def picture_path(folder, subtask, picture) -> Path:
    """Where a picture lies: in SUBTASK/images, SUBTASK or the folder itself, with or without its suffix."""
    names = [picture, *(f"{picture}{suffix}" for suffix in SUFFIXES)]
    places = [folder / subtask / "images", folder / subtask, folder]
    paths = [place / name for place in places for name in names]
    return next((path for path in paths if path.is_file()), places[1] / picture)


# ---- answers ---------------------------------------------------------------------------------------------

def one_line(answer) -> str:
    """An answer that fits in a column: tabs and line breaks become spaces."""
    return re.sub(r"[\t\n\r]+", " ", answer)


def row_of(question, answer) -> tuple:
    fields = question.fields
    return fields["picture"], fields["text"], fields["label"].capitalize(), one_line(answer)


def write(folder, questions, answers):
    """SUBTASK.txt: picture, question, Yes or No, answer, by tabs."""
    for name, of_task in answer_files.by_field(questions, "subtask").items():
        lines = ["\t".join(row_of(question, answers[question.key])) + "\n" for question in of_task]
        write_text(folder / f"{name}.txt", "".join(lines))


def read_answers(file, questions, args) -> dict:
    """The folder of four-column SUBTASK.txt, with pairs in any order; or answers.jsonl. Raises ValueError."""
    if not file.is_dir():
        rows = answer_files.answer_rows(file)
        if not answer_files.is_own(rows):
            raise ValueError(f"{file}: the folder of MME's SUBTASK.txt is expected, or answers.jsonl")
        return answer_files.own_answers(file, rows, questions)
    answers = {}
    for name, of_task in answer_files.by_field(questions, "subtask").items():
        path = file / f"{name}.txt"
        rows = answer_lines(path)
        check_pairs(path, rows)
        waiting, found = {}, []
        for question in of_task:
            key = (Path(question.fields["picture"]).stem, question.fields["text"])
            waiting.setdefault(key, []).append(question)
        for place, picture, text, label, answer in rows:
            same = waiting.get((Path(picture).stem, text.strip()))
            if not same:
                raise ValueError(f"{path}, {place}: no question of the data, or a second answer to "
                                 f"it: {picture}, {text}")
            question = same.pop(0)
            if label.lower() != question.fields["label"].lower():
                raise ValueError(f"{path}, {place}: the right answer is {question.fields['label']} in the "
                                 f"data and {label} here")
            found.append((place, question.key, answer))
        answers |= answer_files.by_key(path, found, [question.key for question in of_task])
    return answers


def answer_lines(path) -> list:
    """[(place, picture, question, Yes or No, answer), …] of a four-column file."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line:
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 4:
            raise ValueError(f"{path}, line {number}: {len(cells)} columns; picture, question, Yes or No and "
                             "answer are expected, by tabs, without a tab or line break in the answer")
        rows.append((f"line {number}", *cells))
    return rows


# ---- score -----------------------------------------------------------------------------------------------

READERS = {"official": rules.read, "vlmevalkit": rules.read_vlmevalkit, "lmms_eval": rules.read_lmms_eval}


def score(questions, answers) -> Result:
    """The sums perception (at most 2000) and cognition (800); each subtask's score, accuracy and accuracy+.

    A picture with a question that failed is left out, and a sum with a subtask that is missing.
    """
    counts = answer_files.count(questions, answers)
    notes = answer_files.notes(counts)
    rows, alone = {}, 0
    for name, of_task in answer_files.by_field(questions, "subtask").items():
        pairs = list(zip(of_task[::2], of_task[1::2]))
        whole = [pair for pair in pairs if all(answers[question.key] is not None for question in pair)]
        alone += len(of_task) - 2 * len(pairs)
        rows[name] = [row_of(question, answers[question.key]) for pair in whole for question in pair]
    rows = {name: of_task for name, of_task in rows.items() if of_task}
    if not rows:
        raise ValueError("MME: no picture has answers to both of its questions; there is nothing to score")
    if alone:
        notes.append(f"{alone} question without the second one about its picture is left out")
    if set(rows) == set(rules.SUBTASKS) and len(questions) != NUM_QUESTIONS:
        notes.append(f"{len(questions)} questions; MME has 2,374")
    if set(rows) != set(rules.SUBTASKS):
        notes.append(f"{len(rows)} of 14 subtasks; sums with a missing one are left out")
    scores = {protocol: table(rows, reader) for protocol, reader in READERS.items()}
    counts["other"] = sum(rules.read(row[3]) == "other" for of_task in rows.values() for row in of_task)
    return Result(scores, counts, tuple(notes))


def table(rows, reader) -> dict:
    tasks = {name: rules.score_subtask(of_task, reader) for name, of_task in rows.items()}
    numbers = {title.lower(): total for title, total in rules.sums(tasks).items()}
    for name, task in tasks.items():
        numbers |= {name: task["score"], f"{name} acc": task["acc"], f"{name} acc+": task["acc_plus"]}
    return numbers
