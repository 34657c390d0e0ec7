"""GQA's rules: one word or phrase, equal to the gold answer.

Sources: Stanford's eval.py as carried by SHI-Labs/VCoder:playground/data/eval/gqa/data/eval/eval.py, with
LLaVA's edits; haotian-liu/LLaVA:scripts/convert_gqa_for_eval.py. Other readings: open-compass/VLMEvalKit:
vlmeval/dataset/utils/vqa_eval.py; EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/gqa/gqa.yaml.
"""
import string
from collections import Counter, defaultdict

from harmonkit.evals.rules.yes_no import require_text

# An operation whose "operation: argument" holds one of these is no step of reasoning.
NO_STEP = ("exist", "query: name", "choose name")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def convert(text):
    """A model's text -> the prediction of the official file: final periods off, then lower case."""
    return require_text(text).rstrip(".").lower()


def right(prediction, answer):
    """True if the converted prediction equals the gold answer as it is."""
    return prediction == answer


def right_vlmevalkit(text, answer):
    """VLMEvalKit: equal after both are stripped and lower-cased; periods stay, so "Yes." is wrong."""
    return require_text(text).strip().lower() == answer.strip().lower()


def right_lmms_eval(text, answer):
    """lmms-eval: equal without ASCII punctuation, in any case; white space counts."""
    return require_text(text).lower().translate(NO_PUNCTUATION) == answer.lower().translate(NO_PUNCTUATION)


def score(questions, predictions):
    """{id: question of the data file} and {id: converted text} -> the official tool's numbers.

    Percent over the questions with isBalanced: accuracy, binary (structural type other than query), open
    (query); 0 where there is none, as in the official tool. structural, semantic, steps and words are
    {value: [percent, number of questions]}. distribution is the mean chi-square of the answers' frequencies
    in each global group / 100, lower is better, None without a group. validity and plausibility need the
    choices file, which testdev has not: 0, as the official tool prints.
    Raises ValueError for a balanced question without a prediction, or if there is no balanced question.
    """
    balanced = {key: question for key, question in questions.items() if question["isBalanced"]}
    if not balanced:
        raise ValueError("GQA: there is no balanced question to score")
    missing = [key for key in balanced if key not in predictions]
    if missing:
        raise ValueError(f"GQA: {len(missing)} balanced questions have no prediction, first {missing[0]}")

    verdicts = {key: right(predictions[key], question["answer"]) for key, question in balanced.items()}
    binary = [verdicts[key] for key, question in balanced.items() if answer_type(question) == "binary"]
    open_ended = [verdicts[key] for key, question in balanced.items() if answer_type(question) == "open"]
    return {
        "binary": percent(binary),
        "open": percent(open_ended),
        "accuracy": percent(list(verdicts.values())),
        "validity": 0.0,
        "plausibility": 0.0,
        "distribution": distribution(balanced, predictions),
        "structural": split_by(balanced, verdicts, lambda question: question["types"]["structural"]),
        "semantic": split_by(balanced, verdicts, lambda question: question["types"]["semantic"]),
        "steps": split_by(balanced, verdicts, count_steps),
        "words": split_by(balanced, verdicts, count_words),
    }


def answer_type(question):
    return "open" if question["types"]["structural"] == "query" else "binary"


def count_words(question):
    return len(question["question"].split())


def count_steps(question):
    operations = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(word in operation for word in NO_STEP) for operation in operations)


def split_by(questions, verdicts, value_of):
    """{value: [percent, number of questions]}, by value."""
    parts = defaultdict(list)
    for key, question in questions.items():
        parts[value_of(question)].append(verdicts[key])
    return {value: [percent(parts[value]), len(parts[value])] for value in sorted(parts)}


def distribution(questions, predictions):
    """Chi-square of predicted against gold frequencies of the gold answers, averaged over the questions."""
    gold, predicted = defaultdict(Counter), defaultdict(Counter)
    for key, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            gold[group][question["answer"]] += 1
            predicted[group][predictions[key]] += 1
    weighted, total = 0.0, 0
    for group, counts in gold.items():
        chi_square = sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weighted += chi_square * counts.total()
        total += counts.total()
    return weighted / total / 100 if total else None


def percent(verdicts):
    return 100 * sum(verdicts) / len(verdicts) if verdicts else 0.0
