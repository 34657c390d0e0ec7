"""WISE: the judge's text -> scores, a file of scores -> WiScores by category, and the overall score.

The rules of PKU-YuanGroup/WISE @eb51174. Edition "original": WISE_legacy/gpt_eval.py, Calculate.py; edition
"verified" (2026): vllm_eval.py and calculate_verified.py. A line of a score file is
{"prompt_id": int, "consistency", "realism", "aesthetic_quality"} or {"prompt_id": int, "score": 0 or 1}.
"""
import re

ASPECTS = ("consistency", "realism", "aesthetic_quality")
CATEGORIES = ("CULTURE", "TIME", "SPACE", "BIOLOGY", "PHYSICS", "CHEMISTRY")
NUM_PROMPTS = 1000
# The last prompt_id of each category, and its weight in the overall score.
LAST_IDS = {"original": (400, 567, 700, 800, 900, 1000), "verified": (400, 520, 640, 760, 880, 1000)}
WEIGHTS = {"original": (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), "verified": (0.4, 0.12, 0.12, 0.12, 0.12, 0.12)}

NAMED_SCORE = re.compile(r"(consistency|realism|aesthetic quality)\*{0,2}\s*:?\s*(\d)", re.IGNORECASE)
VERIFIED_SCORE = re.compile(r"score\*{0,2}\s*:?\s*([01])(?!\d)", re.IGNORECASE)


def lone_digits(text, digits) -> list:
    """The lines of a text that hold nothing but one of the digits, as numbers."""
    return [float(line) for line in map(str.strip, text.split("\n")) if line and line in tuple(digits)]


def judge_scores(text, edition="original") -> dict:
    """{"scores": {name: float}, "complete": whether all are there, "wiscore": if the original's are}.

    original: each name, stars beside it allowed, a colon or none, one digit; if none is found so, the first
    three lines that are a lone 0, 1 or 2. verified: the first "Score: 0" or "Score: 1", else the only line
    that is a lone 0 or 1. An incomplete answer is to be asked for again, three times in all.
    """
    if edition == "verified":
        found = VERIFIED_SCORE.search(text)
        digits = [float(found[1])] if found else lone_digits(text, "01")
        scores = {"score": digits[0]} if len(digits) == 1 else {}
        return {"scores": scores, "complete": bool(scores)}
    scores = {name.lower().replace(" ", "_"): float(digit) for name, digit in NAMED_SCORE.findall(text)}
    if not scores:
        digits = lone_digits(text, "012")[:3]
        scores = dict(zip(ASPECTS, digits)) if len(digits) == 3 else {}
    if len(scores) < len(ASPECTS):
        return {"scores": scores, "complete": False}
    return {"scores": scores, "complete": True, "wiscore": wiscore(**scores)}


def wiscore(consistency, realism, aesthetic_quality) -> float:
    """0 to 1 for scores from 0 to 2; the range is not checked."""
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic_quality) / 2


def category(prompt_id, edition="original"):
    """The category of an id, None for ids outside 1 to 1000."""
    if prompt_id < 1:
        return None
    return next((name for name, last in zip(CATEGORIES, LAST_IDS[edition]) if prompt_id <= last), None)


def line_score(line, edition="original"):
    """The score of a line of a score file, None if a value is missing or no number (verified: not 0 or 1)."""
    if edition == "verified":
        score = line.get("score")
        return float(score) if isinstance(score, (int, float)) and score in (0, 1) else None
    values = [line.get(aspect) for aspect in ASPECTS]
    return wiscore(*values) if all(isinstance(value, (int, float)) for value in values) else None


def score_lines(lines, edition="original") -> dict:
    """{"scores": {category: [score, …]}, "present_prompt_ids": [id, …]} of the lines of a score file.

    Lines that are no objects or whose prompt_id is no integer are skipped. A line without a score counts as
    present. An id that stands twice counts twice.
    """
    scores, present = {}, set()
    for line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("prompt_id"), int):
            continue
        present.add(line["prompt_id"])
        name, score = category(line["prompt_id"], edition), line_score(line, edition)
        if name is not None and score is not None:
            scores.setdefault(name, []).append(score)
    ordered = {name: scores[name] for name in CATEGORIES if name in scores}
    return {"scores": ordered, "present_prompt_ids": sorted(present)}


def aggregate(lines, edition="original") -> dict:
    """{"categories": {name: mean}, "samples": {name: number}, "overall", "printed", "plain_mean"}.

    overall: the official weighted sum; printed: with two places; plain_mean: of the six categories, as RecA
    and BAGEL print it. {"overall": None, "why": str, "missing": [id, …]} if an id of 1 to 1000 is missing
    or a category has no score.
    """
    read = score_lines(lines, edition)
    scores = read["scores"]
    missing = sorted(set(range(1, NUM_PROMPTS + 1)) - set(read["present_prompt_ids"]))
    if missing:
        return {"overall": None, "why": "missing prompt ids", "missing": missing}
    if len(scores) < len(CATEGORIES):
        return {"overall": None, "why": "a category without scores", "missing": []}
    means = {name: sum(column) / len(column) for name, column in scores.items()}
    overall = sum(weight * means[name] for name, weight in zip(CATEGORIES, WEIGHTS[edition]))
    return {"categories": means, "samples": {name: len(column) for name, column in scores.items()},
            "overall": overall, "printed": round(overall, 2), "plain_mean": sum(means.values()) / len(means)}
