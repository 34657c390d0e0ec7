"""MME's rules: 14 subtasks of yes/no questions, two questions an image.

Sources: BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation: tools/eval_tool.zip; other
readings: EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/mme/utils.py, VLMEvalKit's in rules/yes_no.py.
"""
from harmonkit.evals.rules import yes_no
from harmonkit.evals.rules.pope import confusion
from harmonkit.evals.rules.yes_no import require_text

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
              "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION


def read(answer):
    """A text -> "yes", "no" or "other", as the official tool reads the fourth column.

    "yes" among the first four characters of the lower-cased text is a yes, else "no" there is a no. Nothing
    is stripped: "Not sure" and "Snow" are a no, "  yes" and "**Yes**" are other.
    Raises ValueError for a tab or a line break, which would break the official tool's line.
    """
    for mark, name in [("\t", "tab"), ("\n", "line break"), ("\r", "line break")]:
        if mark in require_text(answer):
            raise ValueError(f"MME: a {name} inside the answer {answer!r} breaks the result file's columns")
    return within_four_characters(answer.lower())


def read_lmms_eval(answer):
    """As read, by lmms-eval: without white space at the ends and without periods; a lone y or n counts."""
    text = require_text(answer).lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or within_four_characters(text)


def read_vlmevalkit(answer):
    """As read, by VLMEvalKit: the one of the words "yes" and "no" that the text holds."""
    word = yes_no.read_vlmevalkit(answer).lower()
    return "other" if word == "unknown" else word


def within_four_characters(text):
    for word in ("yes", "no"):
        if word in text[:4]:
            return word
    return "other"


def score_subtask(rows, read=read):
    """Rows (image, question, "Yes" or "No", answer), two in a row an image -> the official tool's numbers.

    acc is over questions, acc_plus over images with both answers right, score = 100·acc + 100·acc_plus. An
    answer read as other is wrong and counted in other_num; precision and recall leave it out, and are 0 if
    nothing is left to divide by, as in the official tool.
    Raises ValueError for no row, an odd number of them, or a row of another shape.
    """
    if not rows or len(rows) % 2:
        raise ValueError(f"MME: a subtask needs two questions for each image, but has {len(rows)} in all")
    truths, answers = [], []
    for row in rows:
        if len(row) != 4 or str(row[2]).lower() not in ("yes", "no"):
            raise ValueError(f"MME: a row must be image, question, Yes or No, answer, but one is {row!r}")
        truths.append(row[2].lower())
        answers.append(read(row[3]))
    right = [answer == truth for answer, truth in zip(answers, truths)]
    both_right = [first and second for first, second in zip(right[::2], right[1::2])]
    acc = sum(right) / len(right)
    acc_plus = sum(both_right) / len(both_right)

    readable = [(answer, truth) for answer, truth in zip(answers, truths) if answer != "other"]
    TP, FP, TN, FN = confusion([answer == "yes" for answer, _ in readable],
                               [truth == "yes" for _, truth in readable])
    return {
        "TP": TP, "FN": FN, "TN": TN, "FP": FP,
        "precision": TP / (TP + FP) if TP + FP else 0.0,
        "recall": TP / (TP + FN) if TP + FN else 0.0,
        "other_num": answers.count("other"),
        "acc": acc, "acc_plus": acc_plus, "score": 100 * acc + 100 * acc_plus,
    }


def score(subtasks, read=read):
    """{subtask: rows} of all 14 -> {"Perception": 0..2000, "Cognition": 0..800, "tasks": {subtask: numbers}}.

    Raises ValueError for a subtask that is missing or unknown, and what score_subtask raises.
    """
    if set(subtasks) != set(SUBTASKS):
        missing = [name for name in SUBTASKS if name not in subtasks]
        unknown = [name for name in subtasks if name not in SUBTASKS]
        raise ValueError(f"MME: all 14 subtasks are needed; missing: {missing}; unknown: {unknown}")
    tasks = {}
    for name in SUBTASKS:
        try:
            tasks[name] = score_subtask(subtasks[name], read)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return {**sums(tasks), "tasks": tasks}


def sums(tasks):
    """{subtask: numbers} -> {"Perception": 0..2000, "Cognition": 0..800}, of whole groups alone."""
    parts = {"Perception": PERCEPTION, "Cognition": COGNITION}
    return {title: sum(tasks[name]["score"] for name in names)
            for title, names in parts.items() if tasks.keys() >= set(names)}
