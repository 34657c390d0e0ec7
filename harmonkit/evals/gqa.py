"""GQA: questions about photos that are answered with a word or phrase.

    python -m harmonkit.evals gqa --model … --data testdev_balanced_questions.json --images gqa/images
    python -m harmonkit.evals score gqa predictions.json --data testdev_balanced_questions.json

--data is {id: {imageId, question, answer, isBalanced, types, groups, semantic}}; only balanced questions are
asked. A picture is --images/<imageId>.jpg. OUT/testdev_balanced_predictions.json is the list of {questionId,
prediction} for GQA's eval.py: final periods removed, lower case
(haotian-liu/LLaVA:scripts/convert_gqa_for_eval.py).
"""
import json
from pathlib import Path

from harmonkit.checkpoints import write_text
from harmonkit.evals import answer_files
from harmonkit.evals.answer_files import field, filled_field, text_field
from harmonkit.evals.benchmark import Question, Result
from harmonkit.evals.rules import gqa as rules
from harmonkit.evals.templates import JANUS, LLAVA, add_template, word
from harmonkit.terminal import file_path

NUM_QUESTIONS = 12578           # not verified
TEMPLATES = dict.fromkeys((JANUS, LLAVA), "the question, a line break, a request for one word or phrase")


def add_arguments(parser):
    parser.add_argument("--data", type=file_path, required=True, help="testdev_balanced_questions.json")
    parser.add_argument("--images", type=file_path, help="folder of <imageId>.jpg")
    add_template(parser, list(TEMPLATES))


# ---- data ------------------------------------------------------------------------------------------------

def rows_of(path) -> dict:
    """{id: question of the file}, balanced or not. Raises FileNotFoundError or ValueError."""
    rows = answer_files.json_document(path, dict)
    for key, row in rows.items():
        place = f"question {key}"
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: a {type(row).__name__} where an object is expected")
        if not isinstance(field(path, place, row, "isBalanced"), bool):
            raise ValueError(f"{path}, {place}: isBalanced is {row['isBalanced']!r}; true or false is "
                             "expected")
    return rows


def read(args) -> list:
    """The balanced Questions; the key is the id. Raises ValueError or FileNotFoundError."""
    questions = []
    for key, row in rows_of(args.data).items():
        place = f"question {key}"
        if not row["isBalanced"]:
            continue
        asked = word(filled_field(args.data, place, row, "question"))
        filled_field(args.data, place, row, "answer")
        check_kind(args.data, place, row)
        name = filled_field(args.data, place, row, "imageId")
        image = (args.images or Path()) / f"{name}.jpg"
        questions.append(Question(key, asked, image, {"row": row, "file": args.data.stem}))
    if not questions:
        raise ValueError(f"{args.data}: there is no balanced question")
    return questions


def check_kind(path, place, row):
    """Raise ValueError if a question lacks what the scores by type, steps and group read."""
    try:
        rules.count_steps(row)
        known = [row["types"]["structural"], row["types"]["semantic"], row["groups"]["global"] or ""]
        if not all(isinstance(text, str) for text in known):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError(f"{path}, {place}: types, groups or semantic is missing or not as in GQA's "
                         "files") from None


# ---- answers ---------------------------------------------------------------------------------------------

def write(folder, questions, answers):
    name = questions[0].fields["file"].removesuffix("_questions") + "_predictions.json"
    rows = [{"questionId": q.key, "prediction": rules.convert(answers[q.key])} for q in questions]
    write_text(folder / name, json.dumps(rows, ensure_ascii=False))


def read_answers(file, questions, args) -> dict:
    """A JSON list of {questionId, prediction}; lines {question_id, text}; or answers.jsonl. In any order.

    Answers to questions that are not balanced are left out. Raises ValueError.
    """
    rows = answer_files.answer_rows(file)
    if answer_files.is_own(rows):
        return answer_files.own_answers(file, rows, questions)
    others = {key for key, row in rows_of(args.data).items() if not row["isBalanced"]}
    found = [(place, str(field(file, place, row, "questionId", "question_id")),
              text_field(file, place, row, "prediction", "text")) for place, row in rows]
    found = [answer for answer in found if answer[1] not in others]
    return answer_files.by_key(file, found, [question.key for question in questions])


# ---- score -----------------------------------------------------------------------------------------------

def score(questions, answers) -> Result:
    """Percent of right answers: all, binary, open, and by type; distribution, of which less is better.

    testdev has no choices file, without which the official tool prints 0 for validity and plausibility.
    """
    counts = answer_files.count(questions, answers)
    asked = answer_files.answered(questions, answers)
    rows = {question.key: question.fields["row"] for question in asked}
    report = rules.score(rows, {question.key: rules.convert(answers[question.key]) for question in asked})
    official = {name: report[name] for name in ("accuracy", "binary", "open", "distribution")}
    for kind in ("structural", "semantic", "steps", "words"):
        official |= {f"{kind} {value}": percent for value, (percent, _) in report[kind].items()}
    scores = {"official": answer_files.known(official)}
    for protocol, right in (("vlmevalkit", rules.right_vlmevalkit), ("lmms_eval", rules.right_lmms_eval)):
        verdicts = [right(answers[question.key], question.fields["row"]["answer"]) for question in asked]
        scores[protocol] = {"accuracy": 100 * sum(verdicts) / len(verdicts)}
    notes = answer_files.notes(counts)
    if len(questions) != NUM_QUESTIONS:
        notes.append(f"{len(questions)} questions; testdev, balanced, has 12,578 (not verified)")
    return Result(scores, counts, tuple(notes))
