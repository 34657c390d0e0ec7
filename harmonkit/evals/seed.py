"""SEED-Bench, the image part: multiple-choice questions in nine types.

    python -m harmonkit.evals seed --model … --data SEED-Bench.json --images SEED-Bench-image
    python -m harmonkit.evals score seed predictions.jsonl --data SEED-Bench.json

--data is {"questions": [{question_id, data_id, data_type, question_type_id, question, choice_a to choice_d,
answer}], "question_type": {name: id}}; types 1 to 9 are images, the videos are not asked. A picture is the
file data_id of --images. OUT/seed_predictions.jsonl has lines {question_id, prediction}. The official scorer
generates nothing: it ranks the options' texts by likelihood. Papers let the model name a letter, as here, and
print one of these protocols: llava, the answer equals the letter, so "B." is wrong; lmms_eval, its first
character is the letter, in any case; vlmevalkit, read as for MMBench.
"""
from functools import partial
from pathlib import Path

from harmonkit.evals import answer_files
from harmonkit.evals.answer_files import field, filled_field, text_field
from harmonkit.evals.benchmark import Question, Result
from harmonkit.evals.json_files import write_objects
from harmonkit.evals.rules import seed as rules
from harmonkit.evals.templates import JANUS, LLAVA, add_template, janus_choice, llava_choice
from harmonkit.terminal import file_path

NUM_QUESTIONS = 14232           # not verified
PREDICTIONS = "seed_predictions.jsonl"
ASK = {JANUS: janus_choice, LLAVA: llava_choice}
TEMPLATES = {JANUS: "question, options, an empty line, a request for the letter",
             LLAVA: "question, options, a request for the letter"}
SUFFIXES = ("", ".jpg", ".png", ".jpeg")
PROTOCOLS = {"llava": rules.right, "lmms_eval": rules.right_lmms_eval, "vlmevalkit": rules.right_vlmevalkit,
             "march_2025": partial(rules.right_vlmevalkit, march_2025=True)}


def add_arguments(parser):
    parser.add_argument("--data", type=file_path, required=True, help="SEED-Bench.json")
    parser.add_argument("--images", type=file_path, help="folder of the pictures, SEED-Bench-image")
    add_template(parser, list(TEMPLATES))


# ---- data ------------------------------------------------------------------------------------------------

def rows_of(path) -> tuple:
    """([(place, question of the file), …], images and videos; {type: name}). Raises FileNotFoundError or
    ValueError.
    """
    content = answer_files.json_document(path, dict)
    rows = content.get("questions")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: no list of questions in it")
    places = [(f"question {number}", row) for number, row in enumerate(rows, start=1)]
    for place, row in places:
        type_id = field(path, place, row, "question_type_id")
        if not str(type_id).isdigit() or int(type_id) not in rules.TYPES:
            raise ValueError(f"{path}, {place}: question_type_id is {type_id!r}; 1 to 12 is expected")
    ids = [str(field(path, place, row, "question_id")) for place, row in places]
    answer_files.check_unique(path, zip(ids, (place for place, _ in places)))
    types = content.get("question_type")
    names = rules.TYPES
    if isinstance(types, dict):
        names = {int(number): name for name, number in types.items() if str(number).isdecimal()}
    return places, names


def read(args) -> list:
    """The Questions about images; the key is question_id. Raises ValueError or FileNotFoundError."""
    questions = []
    places, names = rows_of(args.data)
    for place, row in places:
        if not rules.is_image_question(row):
            continue
        if row.get("data_type") != "image":
            raise ValueError(f"{args.data}, {place}: data_type is {row.get('data_type')!r} in a question "
                             "about an image")
        options = {letter: option(args.data, place, row, f"choice_{letter.lower()}") for letter in "ABCD"}
        if text_field(args.data, place, row, "answer") not in options:
            raise ValueError(f"{args.data}, {place}: the answer is {row['answer']!r}; A to D is expected")
        asked = ASK[args.template](filled_field(args.data, place, row, "question"), options)
        image = picture_path(args.images, filled_field(args.data, place, row, "data_id"))
        kind = int(row["question_type_id"])
        if kind not in names:
            raise ValueError(f"{args.data}, {place}: question_type has no name for the type {kind}")
        fields = {"row": row, "type": names[kind]}
        questions.append(Question(str(row["question_id"]), asked, image, fields))
    if not questions:
        raise ValueError(f"{args.data}: there is no question about an image")
    return questions


def option(path, place, row, name) -> str:
    """The text of an option, which may be a number. Raises ValueError."""
    is_number = isinstance(row.get(name), (int, float))
    return str(row[name]) if is_number else text_field(path, place, row, name)


def picture_path(folder, name) -> Path:
    """A picture's file, whose name may lack its suffix in the data."""
    paths = [(folder or Path()) / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if folder is not None and path.is_file()), paths[0])


# ---- answers ---------------------------------------------------------------------------------------------

def write(folder, questions, answers):
    write_objects(folder / PREDICTIONS, rules.upload_lines([q.fields["row"] for q in questions], answers))


def read_answers(file, questions, args) -> dict:
    """Lines {question_id, prediction}, or text in the place of prediction, in any order; or answers.jsonl.

    Answers to questions about videos are left out. Raises ValueError.
    """
    rows = answer_files.answer_rows(file)
    if answer_files.is_own(rows):
        return answer_files.own_answers(file, rows, questions)
    videos = {str(row["question_id"]) for _, row in rows_of(args.data)[0] if not rules.is_image_question(row)}
    found = [(place, str(field(file, place, row, "question_id")),
              text_field(file, place, row, "prediction", "text")) for place, row in rows]
    found = [answer for answer in found if answer[1] not in videos]
    return answer_files.by_key(file, found, [question.key for question in questions])


def score(questions, answers) -> Result:
    """Accuracy in percent over all questions and by type, in each protocol."""
    counts = answer_files.count(questions, answers)
    rows = [question.fields["row"] for question in answer_files.answered(questions, answers)]
    names = {int(question.fields["row"]["question_type_id"]): question.fields["type"]
             for question in questions}
    scores = {}
    for protocol, right in PROTOCOLS.items():
        report = rules.score(rows, answers, right, names)
        scores[protocol] = {"accuracy": report["image_accuracy"]} | report["per_type"]
    notes = answer_files.notes(counts)
    if len(questions) != NUM_QUESTIONS:
        notes.append(f"{len(questions)} questions; the image part has 14,232 (not verified)")
    notes += ["letters were generated; the official scorer ranks the options by "
             "likelihood instead"]
    return Result(scores, counts, tuple(notes))
