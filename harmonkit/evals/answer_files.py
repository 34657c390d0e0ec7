"""Files of answers: our own answers.jsonl, and what the benchmarks' official scorers read.

    {"key": "random/17", "answer": "Yes"}
    {"key": "random/18", "failed": "COCO_val2014_000000000042.jpg: no such file"}

Answers that do not fit the questions are refused in one line that names the file and the place in it. Some
official scorers cut at the shorter list, score a shifted list, or leave questions out.
"""
from pathlib import Path

from harmonkit.evals.json_files import read_objects
from harmonkit.prompts import check_text, parse_json, read_text, shorten

# ---- rows of a file --------------------------------------------------------------------------------------


def json_document(path, kind):
    """The content of a JSON file, a dict or a list as `kind` says. Raises FileNotFoundError, ValueError."""
    content = parse_json(path, read_text(path))
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"{path}: {expected} is expected, it holds a {type(content).__name__}")
    if not content:
        raise ValueError(f"{path}: it is empty")
    return content


def answer_rows(path) -> list:
    """[(place, object), …] of a file of answers: JSON lines, or a JSON list of objects."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; a file of answers is expected")
    if read_text(path).lstrip()[:1] != "[":
        return read_objects(path)
    rows = [(f"entry {number}", row) for number, row in enumerate(json_document(path, list), start=1)]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: a {type(row).__name__} where an object is expected")
    return rows


def field(path, place, row, *names):
    """The value of the first of these fields that a row has. Raises ValueError."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{path}, {place}: no field {' or '.join(names)}; there is: {shorten(', '.join(row))}")


def text_field(path, place, row, *names) -> str:
    """The text in the first of these fields that a row has. Raises ValueError."""
    value = field(path, place, row, *names)
    name = next(name for name in names if name in row)
    if not isinstance(value, str):
        raise ValueError(f"{path}, {place}: {name} is {shorten(repr(value))}; a text is expected")
    check_text(value, f"{path}, {place}: {name}")
    return value


def filled_field(path, place, row, *names) -> str:
    """`text_field` that is not blank. Raises ValueError."""
    text = text_field(path, place, row, *names)
    if not text.strip():
        raise ValueError(f"{path}, {place}: {' or '.join(names)} is empty")
    return text


# ---- answers of questions --------------------------------------------------------------------------------

def is_own(rows) -> bool:
    """Whether rows are of our own answers.jsonl."""
    return "key" in rows[0][1] and ("answer" in rows[0][1] or "failed" in rows[0][1])


def own_answers(path, rows, questions) -> dict:
    """{key: text, None = failed} of an answers.jsonl."""
    answers = []
    for place, row in rows:
        text = None if "failed" in row else text_field(path, place, row, "answer")
        answers.append((place, text_field(path, place, row, "key"), text))
    return by_key(path, answers, [question.key for question in questions])


def by_key(path, answers, keys) -> dict:
    """{key: text} of [(place, key, text), …]: one answer a key, in any order.

    Raises ValueError for a key that is unknown, missing or there twice.
    """
    known, found = set(keys), {}
    for place, key, text in answers:
        if key not in known:
            raise ValueError(f"{path}, {place}: {key!r} is no question of the data")
        if key in found:
            raise ValueError(f"{path}, {place}: a second answer to {key!r}")
        found[key] = text
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(keys)} questions have no answer, the first of them "
                         f"is {missing[0]!r}; was the file cut short?")
    return {key: found[key] for key in keys}


def check_count(path, count, expected, hint=""):
    """Raise ValueError unless there are as many answers as questions."""
    if count != expected:
        problem = "was it cut short" if count < expected else "is it of other data"
        raise ValueError(f"{path}: {count} answers to {expected} questions; {problem}{hint}?")


def by_field(questions, name) -> dict:
    """{value of a field: the questions that have it}, in their order."""
    groups = {}
    for question in questions:
        groups.setdefault(question.fields[name], []).append(question)
    return groups


# ---- what every benchmark counts -------------------------------------------------------------------------

def answered(questions, answers) -> list:
    """The questions that did not fail."""
    return [question for question in questions if answers[question.key] is not None]


def count(questions, answers) -> dict:
    """How many questions there are, were answered, failed, and were answered with nothing."""
    texts = [answers[question.key] for question in answered(questions, answers)]
    return {"questions": len(questions), "answered": len(texts), "failed": len(questions) - len(texts),
            "empty": sum(not text.strip() for text in texts)}


def notes(counts) -> list:
    """Sentences about questions that failed and answers that are empty. counts: of `count`."""
    found = []
    if counts["failed"]:
        found.append(f"{counts['failed']} of {counts['questions']} questions failed, see answers.jsonl; they "
                     "are left out, so this is not the whole benchmark's score")
    if counts["empty"]:
        found.append(f"answers that are empty: {counts['empty']}")
    return found


def known(numbers) -> dict:
    """The numbers that are not None: a None has no denominator, and the official tool stops there."""
    return {name: number for name, number in numbers.items() if number is not None}


def check_unique(path, places):
    """places: [(key, place), …] of the questions. Raise ValueError if two have one key."""
    seen = {}
    for key, place in places:
        if key in seen:
            raise ValueError(f"{path}, {place}: the question {key!r} stands on {seen[key]} too")
        seen[key] = place
