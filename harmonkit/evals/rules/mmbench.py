"""MMBench's rules: reading an option from an answer, and circular evaluation.

Source: open-compass/VLMEvalKit:vlmeval/utils/matching_util.py and
vlmeval/dataset/utils/multiple_choice.py, exact matching, no judge model.
"""
import re
from string import ascii_uppercase

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
API_FAILURE = "Failed to obtain answer via API"
TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Whether "answer is" may have capitals, and white space may stand between the stars, is not verified.
ANSWER_IS = re.compile(r"answer is[\s*]*([A-D])", re.IGNORECASE)
ROTATION = 1_000_000        # rows whose indices are equal modulo this are one question, its options rotated
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def read(prediction, options, march_2025=False):
    """A model's answer and its options {"A": text, …} -> the letter read, "Z" for a refusal, None: unread.

    `march_2025` leaves out the rules that came later: the place of the letter, the search for "answer is",
    and the bound on the length of an answer that holds an option's text.
    """
    answer = str(prediction)
    if API_FAILURE not in answer:
        letter = read_letter(answer, options, march_2025)
        if letter:
            return letter
    return read_text(answer, options, march_2025)


def read_letter(answer, options, march_2025):
    """Z for a refusal, else the only option letter among the words, else the letter after "answer is"."""
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(TO_SPACES).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        among_last_four = words.index(letters[0]) >= len(words) - 4
        if march_2025 or among_last_four:
            return letters[0]
    elif not letters and "Z" in words:
        return "Z"
    found = None if march_2025 else ANSWER_IS.search(answer)
    return found.group(1).upper() if found else None


def read_text(answer, options, march_2025):
    """The letter of the only option whose text the answer holds, in any case; None for none or several."""
    answer = answer.lower()
    texts = {letter: str(text) for letter, text in options.items()}
    if not march_2025 and len(answer) > 2 * sum(map(len, texts.values())):
        return None
    held = [letter for letter, text in texts.items() if text.lower() in answer]
    return held[0] if len(held) == 1 else None


def options_of(row):
    """{"A": text, …} of a row of the table; an empty cell (None, NaN or "") is no option."""
    cells = {letter: row[letter] for letter in ascii_uppercase if letter in row}
    return {letter: text for letter, text in cells.items() if text == text and text not in (None, "")}


def is_right(row, march_2025=False):
    """1 if the row's `prediction` is read as its `answer`, else 0; unread is wrong.

    Raises ValueError if `answer` is not one of the row's options: the test split has no answers.
    """
    options = options_of(row)
    if row.get("answer") not in options:
        raise ValueError(f"MMBench: the answer of row {row['index']} is {row.get('answer')!r}, none of "
                         f"{', '.join(options)}; the test split is scored on MMBench's server")
    return int(read(row["prediction"], options, march_2025) == row["answer"])


def group_rows(rows, rotations=None):
    """Rows -> {index of the question: its rows, the unrotated one first}.

    `rotations` {index: number of rows} says how many a question has; None: as many as it has options.
    Raises ValueError for a question with missing or repeated rows. The official tool leaves a question
    without its unrotated row out, and ignores other missing rows.
    """
    groups = {}
    for row in sorted(rows, key=lambda row: int(row["index"])):
        groups.setdefault(int(row["index"]) % ROTATION, []).append(row)
    for question, group in groups.items():
        indices = [int(row["index"]) for row in group]
        expected = rotations[question] if rotations else len(options_of(group[0]))
        if indices[0] != question:
            raise ValueError(f"MMBench: question {question} lacks its unrotated row, of index {question}")
        if len(set(indices)) != len(indices):
            raise ValueError(f"MMBench: question {question} has the same row twice: indices {indices}")
        if len(indices) != expected:
            raise ValueError(f"MMBench: question {question} has {len(indices)} of its {expected} rotations")
    return groups


def score_group(rows, march_2025=False, rotations=None):
    """The rows of one question -> {"circular": 0 or 1, "first_row_only": 0 or 1}.

    circular is 1 if every rotation is right. Raises what group_rows and is_right raise.
    """
    groups = group_rows(rows, rotations)
    if len(groups) != 1:
        raise ValueError(f"MMBench: rows of one question were expected, but they are of {len(groups)}")
    (group,) = groups.values()
    right = [is_right(row, march_2025) for row in group]
    return {"circular": min(right), "first_row_only": right[0]}


def score(rows, march_2025=False, rotations=None):
    """All rows -> {"hit": {index: 0 or 1}, "circular": […], "first_row_only": […]}.

    hit is by circular evaluation. Each list has a dict a split: its name, the share of right questions,
    that by l2-category (abbreviated) and by category. Raises what score_group raises.
    """
    groups = group_rows(rows, rotations)
    if not groups:
        raise ValueError("MMBench: there is no row to score")
    verdicts = {question: score_group(group, march_2025, rotations) for question, group in groups.items()}
    base_rows = {question: group[0] for question, group in groups.items()}
    report = {"hit": {str(question): verdict["circular"] for question, verdict in verdicts.items()}}
    for way in ("circular", "first_row_only"):
        hits = [(base_rows[question], verdict[way]) for question, verdict in verdicts.items()]
        report[way] = by_split(hits)
    return report


def by_split(hits):
    """[(base row, 0 or 1)] -> a dict a split: shares of right questions, None for a category it lacks."""
    parts = {}
    for row, hit in hits:
        parts.setdefault(row.get("split", "none"), []).append((row, hit))
    return [{"split": split, **by_category(parts[split], hits)} for split in sorted(parts)]


def by_category(hits, all_hits):
    shares = {"Overall": mean([hit for _, hit in hits])}
    for column in ("l2-category", "category"):
        for value in sorted({row[column] for row, _ in all_hits if column in row}):
            name = ABBREVIATIONS.get(value, value)
            shares[name] = mean([hit for row, hit in hits if row.get(column) == value])
    return shares


def mean(values):
    return sum(values) / len(values) if values else None
