"""POPE's rules: answers to yes/no questions about objects, "yes" being the positive class.

Sources: RUCAIBox/POPE:evaluate.py; VLMEvalKit's reading: rules/yes_no.py.
"""
from harmonkit.evals.rules.yes_no import read_vlmevalkit, require_text

NEGATIVE_WORDS = {"No", "no", "not"}


def read(answer):
    """A text -> "yes" or "no", as the official tool reads it.

    Only the text before the first period counts, a decimal point included. Without commas and split at
    single spaces, it is a no if "No", "no" or "not" is one of its words. Everything else is a yes: "", "NO",
    "Not", "No!", "**No**" too.
    """
    first = require_text(answer).split(".")[0]
    words = first.replace(",", "").split(" ")
    return "yes" if NEGATIVE_WORDS.isdisjoint(words) else "no"


def score(answers, labels):
    """Texts and their labels "yes" or "no" -> counts and fractions in 0..1, as the official tool prints them.

    A fraction without a denominator is None; the official tool stops there. Raises ValueError if the lists
    differ in length (the official tool cuts at the shorter one), are empty, or hold another label.
    """
    said_yes = [read(answer) == "yes" for answer in answers]
    is_yes = [label == "yes" for label in checked(answers, labels)]
    TP, FP, TN, FN = confusion(said_yes, is_yes)
    return {
        "TP": TP, "FP": FP, "TN": TN, "FN": FN,
        "acc": (TP + TN) / len(said_yes),
        **precision_recall_f1(TP, FP, FN),
        "yes_ratio": sum(said_yes) / len(said_yes),
    }


def score_vlmevalkit(answers, labels):
    """As score, by VLMEvalKit's reading: an answer that it cannot read is wrong, and is not a yes.

    The headline is f1. "unknown" counts the answers that could not be read. Raises what score raises.
    """
    labels = checked(answers, labels)
    read_as = [read_vlmevalkit(answer).lower() for answer in answers]
    said_yes = [word == "yes" for word in read_as]
    TP, FP, _, FN = confusion(said_yes, [label == "yes" for label in labels])
    right = sum(word == label for word, label in zip(read_as, labels))
    return {
        **precision_recall_f1(TP, FP, FN),
        "acc": right / len(labels),
        "yes_ratio": sum(said_yes) / len(labels),
        "unknown": read_as.count("unknown"),
    }


def checked(answers, labels):
    """`labels`, if there is one "yes" or "no" for each answer; ValueError otherwise."""
    if len(answers) != len(labels):
        raise ValueError(f"POPE: {len(answers)} answers for {len(labels)} questions")
    if not labels:
        raise ValueError("POPE: there is no question to score")
    for place, label in enumerate(labels, 1):
        if label not in ("yes", "no"):
            raise ValueError(f"POPE: the label of question {place} is {label!r}, not 'yes' or 'no'")
    return labels


def confusion(said_yes, is_yes):
    """Two lists of bool -> TP, FP, TN, FN."""
    pairs = list(zip(said_yes, is_yes))
    return tuple(pairs.count(pair) for pair in [(True, True), (True, False), (False, False), (False, True)])


def precision_recall_f1(TP, FP, FN):
    """Fractions in 0..1, None where the denominator is 0 or the fraction it is made of is None."""
    precision = TP / (TP + FP) if TP + FP else None
    recall = TP / (TP + FN) if TP + FN else None
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
    return {"precision": precision, "recall": recall, "f1": f1}
