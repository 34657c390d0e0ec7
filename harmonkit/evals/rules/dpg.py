"""DPG-Bench: a picture's score from the judge's answers to its questions, and the scores of many pictures.

The rules of TencentQQGYLab/ELLA:dpg_bench/compute_dpg_bench.py @3c228f1. A question is
{"proposition_id": int, "dependency": "1, 2" (0 = none), "tuple": "attribute - color (dog, red)",
"answers": [one a crop, row by row]}.
"""


def answer_value(answer) -> float:
    """1 for exactly "yes", 0 for every other answer."""
    return float(answer == "yes")


def parents(dependency) -> list:
    """"1, 2" -> [1, 2]; 0 stands for none. Raises ValueError for other texts."""
    try:
        return [int(part) for part in str(dependency).split(",")]
    except ValueError:
        raise ValueError(f"dependency is {dependency!r}; a list of numbers like '1, 2' is expected") from None


def category(text) -> str:
    """The category of a tuple: "attribute - color (dog, red)" -> "attribute - color"."""
    return text.split("(")[0].strip()


def zeroed(values, dependencies) -> dict:
    """{number: value} after a question with a parent whose value is 0 has become 0.

    The questions are taken in their order, so a 0 is passed on to grandchildren if parents stand first.
    Raises ValueError for a parent that is not there, where the official tool leaves the picture out.
    """
    values = dict(values)
    for number, others in dependencies.items():
        for parent in others:
            if parent == 0:
                continue
            if parent not in values:
                raise ValueError(f"question {number} depends on question {parent}, which is not there")
            if values[parent] == 0:
                values[number] = 0.0
                break
    return values


def score_picture(questions, pic_num=4) -> dict:
    """{"crops": [score, …], "score": their mean, "category_answers": {"number": [category, value]}}.

    A crop's score is the mean of its questions' values after `zeroed`; category_answers hold the values of
    the last crop before it. Of two questions with one number the later one takes the earlier one's place.
    Raises ValueError for no questions, too few answers, or an unknown parent.
    """
    if not questions:
        raise ValueError("a picture without questions cannot be scored")
    by_number = {int(question["proposition_id"]): question for question in questions}
    for number, question in by_number.items():
        if len(question["answers"]) < pic_num:
            raise ValueError(f"question {number} has {len(question['answers'])} answers; there are {pic_num} "
                             "crops")
    dependencies = {number: parents(question["dependency"]) for number, question in by_number.items()}
    crops = []
    for crop in range(pic_num):
        answers = {number: answer_value(question["answers"][crop]) for number, question in by_number.items()}
        values = zeroed(answers, dependencies)
        crops.append(sum(values.values()) / len(values))
    categories = {str(number): [category(by_number[number]["tuple"]), value]
                  for number, value in answers.items()}
    return {"crops": crops, "score": sum(crops) / len(crops), "category_answers": categories}


def aggregate(items, pic_num=4) -> dict:
    """The scores of [{"item_id", "questions", "image": whether it is there (default True)}, …], × 100.

    {"score", "level1": {category before "-": score}, "level2": {category: score}, "failed": [item_id, …]}.
    Items without an image are left out, as the official tool does it, and so are the failed ones, whose
    questions name an unknown parent. Raises ValueError if nothing is left.
    """
    scores, values, failed = [], {}, []
    for item in items:
        if not item.get("image", True):
            continue
        try:
            picture = score_picture(item["questions"], pic_num)
        except ValueError:
            failed.append(item["item_id"])
            continue
        scores.append(picture["score"])
        for name, value in picture["category_answers"].values():
            values.setdefault(name, []).append(value)
    if not scores:
        raise ValueError("DPG-Bench: no picture could be scored")
    levels = {}
    for name, of_category in values.items():
        levels.setdefault(name.split("-")[0].strip(), []).extend(of_category)
    return {"score": 100 * sum(scores) / len(scores), "level1": percents(levels), "level2": percents(values),
            "failed": failed}


def percents(values) -> dict:
    return {name: 100 * sum(column) / len(column) for name, column in values.items()}


def without_first_question(items) -> list:
    """The items as the official tool reads them: it skips the table's first row, so the first item lacks a
    question.
    """
    first, *others = items
    return [{**first, "questions": first["questions"][1:]}, *others]


def official_aggregate(items, pic_num=4) -> dict:
    """`aggregate` without the table's first question, as the official tool prints it."""
    return aggregate(without_first_question(items), pic_num)
