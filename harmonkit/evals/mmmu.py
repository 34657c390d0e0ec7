"""MMMU, validation: questions of college exams with pictures, in thirty subjects; choice and open.

    python -m harmonkit.evals mmmu --model … --data MMMU/
    python -m harmonkit.evals score mmmu predictions.json --data MMMU/

--data is a folder of parquet files, one a subject as on Hugging Face, or one file: id, question, options (a
list as text), answer, question_type, image_1 to image_7 as {bytes, path} or bytes; other columns are not read
(the files: not verified). As in the official LLaVA runner (MMMU-Benchmark/MMMU:mmmu/utils/data_utils.py), the
model sees image_1 alone, and the marks <image 1> … stay in the text; questions with more pictures are
counted. OUT/mmmu_predictions.json is {id: letter or open answer}; where no letter can be read, one is drawn
as the official tool does it, and drawn ones are counted. Needs pyarrow: pip install "harmon[data]".
"""
import ast
import json
from string import ascii_uppercase

from harmonkit.checkpoints import write_text
from harmonkit.evals import answer_files
from harmonkit.evals.answer_files import field, filled_field, text_field
from harmonkit.evals.benchmark import Question, Result
from harmonkit.evals.rules import mmmu as rules
from harmonkit.evals.templates import JANUS, LETTER, OFFICIAL, add_template, janus_choice, lettered, word
from harmonkit.terminal import file_path

NUM_QUESTIONS = 900
PREDICTIONS = "mmmu_predictions.json"
CHOICE, OPEN = "multiple-choice", "open"
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
COLUMNS = ("id", "question", "options", "answer", "question_type", *IMAGES)
TEMPLATES = {
    JANUS: "question, options A. …, an empty line, a request for the letter; open: to answer directly",
    OFFICIAL: "question, options (A) …, an empty line, a request for the letter; open: for a few words"}


def add_arguments(parser):
    parser.add_argument("--data", type=file_path, required=True, help="folder of parquet files, or one file")
    add_template(parser, list(TEMPLATES))


def ask(template, question, options) -> str:
    """options: {letter: text}, empty for an open question. The line break before Janus's request to answer
    directly is not verified.
    """
    if template == JANUS:
        return janus_choice(question, options) if options else f"{question}\nAnswer the question directly. "
    if not options:
        return word(question)
    return f"{question}\n{lettered(options, '({letter}) {text}')}\n\n{LETTER}"


# ---- data ------------------------------------------------------------------------------------------------

def parquet_files(args) -> list:
    """The parquet files; of a folder with several splits, those of validation. Raises FileNotFoundError."""
    if not args.data.is_dir():
        return [args.data]
    found = sorted(args.data.rglob("*.parquet"))
    of_validation = [path for path in found if path.name.startswith("validation")]
    if not found:
        raise FileNotFoundError(f"{args.data}: there is no parquet file in it")
    return of_validation or found


def table(path) -> list:
    """[(place, {column: value}), …] of a parquet file. Raises FileNotFoundError or ValueError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: parquet files need pyarrow: pip install "harmon[data]"') from None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a parquet file, or cut off ({reason})") from None
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def read(args) -> list:
    """The Questions of all files; the key is the id. Raises ValueError or FileNotFoundError."""
    questions, places = [], []
    for path in parquet_files(args):
        for place, row in table(path):
            key = filled_field(path, place, row, "id")
            fields = fields_of(path, place, row)
            options = dict(zip(ascii_uppercase, fields["options"]))
            asked = ask(args.template, filled_field(path, place, row, "question"), options)
            image = image_bytes(path, place, row)
            questions.append(Question(key, asked, image, fields | {"id": key}))
            places.append((key, f"{path.name}, {place}"))
    if not questions:
        raise ValueError(f"{args.data}: there is no question in it")
    answer_files.check_unique(args.data, places)
    return questions


def fields_of(path, place, row) -> dict:
    """What the rules read of a row: its kind, options, answer and number of pictures. Raises ValueError."""
    kind = field(path, place, row, "question_type")
    options = as_list(field(path, place, row, "options"))
    answer = field(path, place, row, "answer")
    try:
        rules.subject_of(row["id"])
    except ValueError as error:
        raise ValueError(f"{path}, {place}: {error}") from None
    if kind not in (CHOICE, OPEN):
        raise ValueError(f"{path}, {place}: question_type is {kind!r}; {CHOICE} or {OPEN} is expected")
    if kind == CHOICE:
        if options is None or not 2 <= len(options) <= len(ascii_uppercase):
            raise ValueError(f"{path}, {place}: options are {str(row['options'])[:60]!r}; a list of two or "
                             "more is expected")
        if answer not in list(ascii_uppercase[:len(options)]):
            raise ValueError(f"{path}, {place}: the answer is {str(answer)[:40]!r}; a letter of the "
                             f"{len(options)} options is expected")
    else:
        options = []
        answer = answer if isinstance(answer, list) else as_list(answer) or answer
        if not answer or not all(isinstance(text, str) for text in answer):
            raise ValueError(f"{path}, {place}: the answer is {str(answer)[:40]!r}; a text or a list of "
                             "texts is expected")
    pictures = sum(row.get(name) is not None for name in IMAGES)
    return {"question_type": kind, "options": options, "answer": answer, "pictures": pictures}


def as_list(value):
    """A list of texts that stands there as text, or None: "['a', 'b']"."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return [str(text) for text in value] if isinstance(value, list) else None


def image_bytes(path, place, row) -> bytes:
    """The file of image_1, as {bytes, path} or bytes. Raises ValueError if there is none."""
    image = row.get(IMAGES[0])
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        raise ValueError(f"{path}, {place}: no picture in {IMAGES[0]}")
    return image


# ---- answers ---------------------------------------------------------------------------------------------

def rows_with(questions, answers) -> list:
    """What `rules.score` reads, of the questions that were answered."""
    return [question.fields | {"response": answers[question.key]}
            for question in answer_files.answered(questions, answers)]


def write(folder, questions, answers):
    """{id: letter or open answer}; letters that cannot be read are drawn."""
    letters = rules.score(rows_with(questions, answers))["letters"]
    predictions = {question.key: letters.get(question.key, answers[question.key]) for question in questions}
    write_text(folder / PREDICTIONS, json.dumps(predictions, indent=2, ensure_ascii=False) + "\n")


def read_answers(file, questions, args) -> dict:
    """{id: answer}; lines or a list of {id, response}, or text, or prediction; or answers.jsonl.

    Raises ValueError.
    """
    keys = [question.key for question in questions]
    try:
        content = answer_files.json_document(file, dict)
    except ValueError:
        content = {}
    if content and not {"id", "key"} & content.keys():
        found = [(f"id {key}", key, text_field(file, f"id {key}", content, key)) for key in content]
        return answer_files.by_key(file, found, keys)
    rows = answer_files.answer_rows(file)
    if answer_files.is_own(rows):
        return answer_files.own_answers(file, rows, questions)
    found = [(place, text_field(file, place, row, "id"),
              text_field(file, place, row, "response", "text", "prediction")) for place, row in rows]
    return answer_files.by_key(file, found, keys)


# ---- score -----------------------------------------------------------------------------------------------

def score(questions, answers) -> Result:
    """Shares of right answers: all, by discipline, by subject."""
    counts = answer_files.count(questions, answers)
    notes = answer_files.notes(counts)
    rows = rows_with(questions, answers)
    report = rules.score(rows)
    official = {"accuracy": report["overall"]["acc"]}
    official |= {name.removeprefix("Overall-"): part["acc"] for name, part in report["domains"].items()}
    official |= {name: part["acc"] for name, part in report["subjects"].items()}
    scores = {"official": official}
    for protocol, march_2025 in (("vlmevalkit", False), ("march_2025", True)):
        verdicts = [rules.right_vlmevalkit(row["response"], row["options"] or None, row["answer"], march_2025)
                    for row in rows]
        scores[protocol] = {"accuracy": sum(verdicts) / len(verdicts)}
    counts |= {"choice": len(report["letters"]), "drawn": len(report["drawn"]),
               "more pictures": sum(question.fields["pictures"] > 1 for question in questions)}
    if report["drawn"]:
        notes.append(f"no letter could be read from {len(report['drawn'])} of {counts['choice']} answers, so "
                     "they were drawn, as the official tool does it")
    if len(questions) != NUM_QUESTIONS:
        notes.append(f"{len(questions)} questions; the validation set has 900")
    return Result(scores, counts, tuple(notes))
