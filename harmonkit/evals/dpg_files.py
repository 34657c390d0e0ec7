"""DPG-Bench's table of questions, and files of a judge's answers to them.

The table is dpg_bench/dpg_bench.csv of TencentQQGYLab/ELLA @3c228f1: a row for each question about a prompt.
An answers file has a line for each row, in the table's order:

    {"item_id": "0", "proposition_id": 1, "answers": ["yes", "no", "yes", "yes"]}

with an answer for each picture, row by row of the grid, null where there is none; or it is the table itself
with four more columns answer_1 to answer_4.
"""
from pathlib import Path

from harmonkit.evals.json_files import read_objects, several
from harmonkit.evals.rules import dpg as rules
from harmonkit.prompts import read_text, table_rows

PER_PROMPT = 4
ANSWER_COLUMNS = tuple(f"answer_{number}" for number in range(1, PER_PROMPT + 1))
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


def read_questions(path) -> list:
    """The rows of dpg_bench.csv in its order, as the rules take them, with their "place" and "is_first".

    Raises ValueError for a missing column, and for a row whose numbers cannot be read.
    """
    lines = table_rows(Path(path), read_text(path), ",")
    if not lines:
        raise ValueError(f"{path}: an empty table")
    header = [cell.strip() for cell in lines[0][1]]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; there are: {', '.join(header)}")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells under {len(header)} columns")
        row = dict(zip(header, cells)) | {"place": f"line {number}", "is_first": not rows}
        try:
            row["proposition_id"] = int(row["proposition_id"])
            rules.parents(row["dependency"])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row | {"question": row["question_natural_language"]})
    return rows


def rows_of(rows, items, path) -> list:
    """The rows of the items, in the table's order. Raises ValueError for an item without questions."""
    asked = {row["item_id"] for row in rows}
    missing = [item.name for item in items if item.name not in asked]
    if missing:
        raise ValueError(f"{path}: no questions about {several(missing)}")
    names = {item.name for item in items}
    return [row for row in rows if row["item_id"] in names]


def read_answers(path, rows):
    """Put the answers of a file into the rows as "answers". Raises ValueError if it is not of these rows."""
    is_table = Path(path).suffix.lower() == ".csv"
    answered = table_answers(path) if is_table else line_answers(path)
    for row, (place, item_id, number, answers) in zip(rows, answered):
        wanted = row["proposition_id"], row["item_id"]
        if (number, item_id) != wanted:
            raise ValueError(f"{path}, {place}: question {number} of {item_id}; question {wanted[0]} of "
                             f"{wanted[1]} is expected there, as in the table")
        row["answers"] = answers
    if len(answered) != len(rows):
        raise ValueError(f"{path}: answers to {len(answered)} questions; {len(rows)} are asked")


def line_answers(path) -> list:
    """[(place, item_id, number, answers), …] of JSON lines."""
    found = []
    for place, line in read_objects(path):
        item_id, number, answers = (line.get(name) for name in ("item_id", "proposition_id", "answers"))
        if not isinstance(item_id, str) or not isinstance(number, int) or not isinstance(answers, list):
            raise ValueError(f"{path}, {place}: item_id, proposition_id and answers are expected")
        if len(answers) != PER_PROMPT or not all(isinstance(answer, (str, type(None))) for answer in answers):
            raise ValueError(f"{path}, {place}: answers must be {PER_PROMPT} texts (null: not answered)")
        found.append((place, item_id, number, answers))
    return found


def table_answers(path) -> list:
    """[(place, item_id, number, answers), …] of the table with ANSWER_COLUMNS."""
    rows = read_questions(path)
    missing = [name for name in ANSWER_COLUMNS if name not in rows[0]] if rows else ANSWER_COLUMNS
    if missing:
        raise ValueError(f"{path}, line 1: no column {', '.join(missing)}")
    return [(row["place"], row["item_id"], row["proposition_id"], [row[name] for name in ANSWER_COLUMNS])
            for row in rows]
