"""MMBench: multiple-choice questions about pictures, asked once for each rotation of their options.

    python -m harmonkit.evals mmbench --model … --data MMBench_DEV_EN.tsv
    python -m harmonkit.evals score mmbench predictions.tsv --data MMBench_DEV_EN.tsv

--data is the TSV with columns index, question, hint, A to D, answer, category, l2-category, split, image:
base64, or with at most 64 characters the index of the row that holds it. OUT/NAME_predictions.tsv is the
table without pictures plus prediction, for MMBench's server (as xlsx) or VLMEvalKit. A question counts as
right by circular evaluation if all its rotations are right; plain: its first row alone. The test split has no
answers: only the server can score it. Stricter than the official tool, which overlooks missing rotations: a
question that lacks one is refused.
"""
import base64
import csv
import io
from collections import Counter

from harmonkit.checkpoints import write_text
from harmonkit.evals import answer_files
from harmonkit.evals.benchmark import Question, Result
from harmonkit.evals.rules import mmbench as rules
from harmonkit.evals.templates import (
    JANUS,
    LLAVA,
    OFFICIAL,
    add_template,
    janus_choice,
    lettered,
    llava_choice,
)
from harmonkit.prompts import read_text
from harmonkit.terminal import file_path

NUM_QUESTIONS = 1164            # of the dev part
LONGEST_REFERENCE = 64          # characters of an image cell that names another row
PREDICTION = "prediction"


def official_choice(question, options, hint=""):
    label = f"Hint: {hint}\n" if hint else ""
    return (f"{label}Question: {question}\nOptions:\n{lettered(options)}\n"
            "Please select the correct answer from the options above. \n")


ASK = {JANUS: janus_choice, OFFICIAL: official_choice, LLAVA: llava_choice}
TEMPLATES = {
    JANUS: "hint, question, options, an empty line, a request for the letter",
    OFFICIAL: "the labels Hint, Question and Options, and a request for the correct answer",
    LLAVA: "hint, question, options, a request for the letter"}


def add_arguments(parser):
    parser.add_argument("--data", type=file_path, required=True, help="the TSV")
    add_template(parser, list(TEMPLATES))


# ---- data ------------------------------------------------------------------------------------------------

def table(path) -> list:
    """[(place, {column: cell}), …] of a TSV with a header. Raises FileNotFoundError or ValueError."""
    csv.field_size_limit(2 ** 31 - 1)                   # a cell may hold a picture
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True)
    rows, header, line = [], None, 1
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns; "
                                     "is the file cut off?")
                rows.append((f"line {line}", dict(zip(header, cells))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not a table, or cut off ({error})") from None
    if not rows:
        raise ValueError(f"{path}: there is no row under a header")
    return rows


def read(args) -> list:
    """The Questions, one a row; the key is its index. Raises ValueError or FileNotFoundError."""
    rows = table(args.data)
    for name in ("index", "question", "A", "image"):
        answer_files.field(args.data, "line 1", rows[0][1], name)
    answer_files.check_unique(args.data, ((row["index"], place) for place, row in rows))
    questions, groups = [], Counter()
    images = {row["index"]: row["image"] for _, row in rows}
    for place, row in rows:
        if not (row["index"].isascii() and row["index"].isdigit()):
            raise ValueError(f"{args.data}, {place}: index is {row['index'][:40]!r}; a number is expected")
        answer_files.filled_field(args.data, place, row, "question")
        options = rules.options_of(row)
        if len(options) < 2:
            raise ValueError(f"{args.data}, {place}: fewer than two options")
        if row.get("answer") and row["answer"] not in options:
            raise ValueError(f"{args.data}, {place}: the answer {row['answer'][:40]!r} is none of the "
                             f"options {', '.join(options)}")
        asked = ASK[args.template](row["question"], options, row.get("hint", ""))
        without_image = {name: cell for name, cell in row.items() if name != "image"}
        fields = {"row": without_image, "file": args.data.stem}
        image = picture(args.data, place, row["image"], images)
        questions.append(Question(row["index"], asked, image, fields))
        groups[group_of(questions[-1])] += 1
    without = [question.key for question in questions if not question.fields["row"].get("answer")]
    if without and len(without) < len(questions):
        raise ValueError(f"{args.data}: {len(without)} of {len(questions)} rows have no answer, the first of "
                         f"them is that of index {without[0]}")
    for question in questions:
        question.fields["rotations"] = groups[group_of(question)]
    check_rotations(args.data, questions)
    return questions


def picture(path, place, cell, images) -> bytes:
    """The picture's file of an image cell. Raises ValueError for an empty cell or a wrong reference."""
    if not cell.strip():
        raise ValueError(f"{path}, {place}: no image")
    if len(cell) <= LONGEST_REFERENCE:
        other = images.get(cell.strip(), "")
        if len(other) <= LONGEST_REFERENCE:
            raise ValueError(f"{path}, {place}: the image is that of row {cell!r}, which holds none")
        cell = other
    try:
        return base64.b64decode(cell)
    except ValueError:
        return cell.encode()                            # the question will fail


def group_of(question) -> int:
    """The index of a question's first rotation."""
    return int(question.key) % rules.ROTATION


def check_rotations(path, questions):
    """Raise ValueError for a question without some of its rotations, unless all questions have one row."""
    if all(question.fields["rotations"] == 1 for question in questions):
        return
    for question in questions:
        there, options = question.fields["rotations"], len(rules.options_of(question.fields["row"]))
        if there != options:
            raise ValueError(f"{path}: question {group_of(question)} has {there} rows for {options} "
                             "rotations; is the file cut short?")


# ---- answers ---------------------------------------------------------------------------------------------

def write(folder, questions, answers):
    """NAME_predictions.tsv: the table without pictures, plus prediction."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow([*questions[0].fields["row"], PREDICTION])
    for question in questions:
        writer.writerow([*question.fields["row"].values(), answers[question.key]])
    write_text(folder / f"{questions[0].fields['file']}_predictions.tsv", text.getvalue())


def read_answers(file, questions, args) -> dict:
    """A TSV with index and prediction, rows in any order; JSON lines of both; or answers.jsonl.

    Raises ValueError.
    """
    if file.suffix.lower() in (".xlsx", ".xls"):
        raise ValueError(f"{file}: save the sheet as TSV; its columns index and prediction are read")
    is_table = file.suffix.lower() in (".tsv", ".txt", ".csv")
    rows = table(file) if is_table else answer_files.answer_rows(file)
    if answer_files.is_own(rows):
        answers = answer_files.own_answers(file, rows, questions)
    else:
        found = [(place, str(answer_files.field(file, place, row, "index")),
                  answer_files.text_field(file, place, row, PREDICTION)) for place, row in rows]
        answers = answer_files.by_key(file, found, [question.key for question in questions])
    if not has_answers(questions):
        raise ValueError(f"{args.data}: no right answers are in it; MMBench's server scores the test split")
    return answers


def has_answers(questions) -> bool:
    return all(question.fields["row"].get("answer") for question in questions)


# ---- score -----------------------------------------------------------------------------------------------

def score(questions, answers):
    """Shares of right questions, circular and plain, by l2-category and category; None for the test split.

    Circular leaves out questions with a rotation that failed or was not asked, plain those whose first row
    did.
    """
    if not has_answers(questions):
        print(f"{questions[0].fields['file']}: the right answers are not in the data; MMBench's server "
              "scores the table of predictions")
        return None
    counts = answer_files.count(questions, answers)
    notes = answer_files.notes(counts)
    answered = answer_files.answered(questions, answers)
    first_rows = [question for question in answered if int(question.key) == group_of(question)]
    parts = {"circular": whole_questions(answered), "plain": first_rows}
    number = len(set(map(group_of, questions)))
    if number != NUM_QUESTIONS:
        notes.append(f"{number} questions; the dev part has 1,164")
    del counts["questions"]                             # it counted rows
    sizes = {name: len(set(map(group_of, part))) for name, part in parts.items()}
    counts = {"questions": number} | sizes | {"rows": len(questions)} | counts
    notes += [f"{name} is over {size} of {number} questions, those with all the answers that it needs"
              for name, size in sizes.items() if size < number]
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        raise ValueError("no question has an answer to its first row; give a larger --limit")
    scores = {}
    for protocol, march_2025 in (("vlmevalkit", False), ("march_2025", True)):
        scores[protocol] = named({name: report(name, part, answers, march_2025)
                                  for name, part in parts.items()})
    return Result(scores, counts, tuple(notes))


def whole_questions(answered) -> list:
    """Those of several rotations whose rotations are all there."""
    sizes = Counter(map(group_of, answered))
    return [question for question in answered
            if sizes[group_of(question)] == question.fields["rotations"] > 1]


def report(name, questions, answers, march_2025) -> dict:
    """{"Overall": share, category: share, …} of questions that have the answers which `name` needs."""
    rows = [question.fields["row"] | {"index": int(question.key), "split": "all",
                                      PREDICTION: answers[question.key]} for question in questions]
    rotations = Counter(map(group_of, questions))
    way = {"circular": "circular", "plain": "first_row_only"}[name]
    return rules.score(rows, march_2025, rotations)[way][0]


def named(reports) -> dict:
    """{"circular": {"Overall": share, category: share, …}, …} -> {"circular": share, …}."""
    shares = {name: report["Overall"] for name, report in reports.items()}
    for name, report in reports.items():
        shares |= {f"{name} {part}": share for part, share in report.items()
                   if part not in ("Overall", "split")}
    return answer_files.known(shares)
