"""How the cases of a golden file are given to the rules: one Benchmark for each of the nine files.

A golden file holds inputs and what the official tool made of them. The keys of a case besides `input` name
readings: "expected" is the official tool's, "vlmevalkit", "lmms_eval" and "march_2025" are others'.
"""
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harmonkit.evals.golden_wise import wise_case, wise_score
from harmonkit.evals.rules import dpg, geneval, gqa, mmbench, mme, mmmu, pope, seed, yes_no

TWO_PLACES = 0.005 + 1e-9           # the official tool prints two


@dataclass(frozen=True)
class Benchmark:
    source: str                     # what the file's `source` contains, a regular expression
    readings: dict                  # {key of a case: case -> what ours makes of its input}
    aggregates: dict                # the same of an aggregate
    tolerances: dict = field(default_factory=dict)      # {key: for the numbers below it}; "" for all others
    in_order: Callable = lambda case, value: value      # puts what may come in any order in a fixed one


def pope_score(case):
    if isinstance(case["input"], dict):
        return pope.score(case["input"]["answers"], case["input"]["labels"])
    return pope.score([line["answer"] for line in case["input"]], [line["label"] for line in case["input"]])


def mme_score(case):
    default = case["input"].get("default")
    tasks = case["input"]["tasks"]
    return mme.score({name: tasks.get(name, default) for name in mme.SUBTASKS if default or name in tasks})


def mmbench_case(case, **options):
    if "rows" not in case["input"]:
        return mmbench.read(case["input"]["prediction"], case["input"]["options"], **options)
    rows = case["input"]["rows"]
    number = case["input"].get("all_rotations")
    rotations = {int(row["index"]) % mmbench.ROTATION: number for row in rows} if number else None
    return mmbench.score_group(rows, rotations=rotations, **options)


def splits_in_order(case, value):
    if not isinstance(value, dict):
        return value
    return {key: sorted(part, key=lambda row: row["split"]) if isinstance(part, list) else part
            for key, part in value.items()}


def seed_score(case):
    """Without the types' names in the file, those of 3 and 4 are not verified: both orders are tried."""
    questions = case["input"]["questions"]
    answers = {str(line["question_id"]): line["text"] for line in case["input"]["results"]}
    exchanged = seed.TYPES | {3: seed.TYPES[4], 4: seed.TYPES[3]}
    names = {number: name for name, number in case["input"].get("question_type", {}).items()}
    for candidate in ([names] if names else [seed.TYPES, exchanged]):
        report = seed.score(questions, answers, names=candidate)
        wanted = case["expected"].get("per_type") or {}
        if all(abs(report["per_type"].get(name, -1) - share) <= TWO_PLACES for name, share in wanted.items()):
            break
    image_questions = filter(seed.is_image_question, questions)
    answered = [question for question in questions if str(question["question_id"]) in answers]
    return {
        **report,
        "official_image_filter_ids": [question["question_id"] for question in image_questions],
        "upload_lines": seed.upload_lines(answered, answers),
    }


def gqa_case(case):
    prediction = gqa.convert(case["input"]["text"])
    return {"prediction": prediction, "correct": gqa.right(prediction, case["input"]["answer"])}


def gqa_case_by(right):
    return lambda case: right(case["input"]["text"], case["input"]["answer"])


def gqa_score(case):
    questions = {question["questionId"]: question for question in case["input"]}
    answered = {key: question["text"] for key, question in questions.items() if "text" in question}
    predictions = {key: gqa.convert(text) for key, text in answered.items()}
    report = gqa.score(questions, predictions)
    for part in ("steps", "words"):
        report[part] = {str(number): share for number, share in report[part].items()}
    lines = [{"questionId": key, "prediction": prediction} for key, prediction in predictions.items()]
    return {**report, "predictions": lines}


def mmmu_case(case):
    response = case["input"]["response"]
    if case["input"]["question_type"] == "multiple-choice":
        letter = mmmu.read_choice(response, case["input"]["options"])
        if letter is not None:
            return {"letter": letter}
        return {"letter": mmmu.draw(case["input"]["options"], random.Random(mmmu.SEED)), "drawn": True}
    numbers, texts = mmmu.read_open(response)
    correct = mmmu.right_open(response, case["input"]["answer"])
    return {"numbers": list(numbers), "strings": list(texts), "correct": correct}


def mmmu_vlmevalkit(case):
    given = case["input"]
    return mmmu.right_vlmevalkit(given["response"], given.get("options"), given["answer"])


def sets_in_order(case, value):
    return {key: sorted(part) if isinstance(part, list) else part for key, part in value.items()}


def mmmu_in_order(case, value):
    """Sets in order; a discipline without questions, which the official tool prints as 0 of 0, is none."""
    value = sets_in_order(case, value)
    if isinstance(value.get("main_eval_only"), dict):
        parts = value["main_eval_only"].items()
        value["main_eval_only"] = {name: part for name, part in parts if part["num"]}
    return value


def dpg_in_order(case, value):
    """An item may be named by its picture's file."""
    if "failed" not in value:
        return value
    return value | {"failed": sorted(Path(name).stem for name in value["failed"])}


def geneval_case(case):
    return geneval.verdict(case["input"]["metadata"], case["input"]["detections"])


def geneval_in_order(case, value):
    """Equal scores may stand in any order, and so may two relations in one reason."""
    value = dict(value)
    if case.get("kept_order_free") and "kept" in value:
        value["kept"] = {name: sorted(indices) for name, indices in value["kept"].items()}
    if case.get("reason_order_free") and "reason" in value:
        value["reason"] = sorted(re.split(r"\s|(?=,)", value["reason"]))
    return value


def geneval_score(case):
    lines = []
    for prompt in case["input"]:
        metadata = prompt["metadata"]
        for detections in prompt["detections_per_image"]:
            correct = geneval.verdict(metadata, detections)["correct"]
            lines.append({"tag": metadata["tag"], "metadata": json.dumps(metadata), "correct": correct})
    return geneval.aggregate(lines)


def dpg_case(case):
    return dpg.score_picture(case["input"]["questions"], case["input"].get("pic_num", 4))


BENCHMARKS = {
    "pope": Benchmark(
        source="POPE",
        readings={"expected": lambda case: pope.read(case["input"]["answer"]),
                  "vlmevalkit": lambda case: yes_no.read_vlmevalkit(case["input"]["answer"])},
        aggregates={"expected": pope_score},
    ),
    "mme": Benchmark(
        source="Awesome-Multimodal-Large-Language-Models",
        readings={"expected": lambda case: mme.read(case["input"]["answer"]),
                  "vlmevalkit": lambda case: yes_no.read_vlmevalkit(case["input"]["answer"]),
                  "lmms_eval": lambda case: mme.read_lmms_eval(case["input"]["answer"])},
        aggregates={"expected": mme_score},
    ),
    "mmbench": Benchmark(
        source="multiple_choice",
        readings={"expected": mmbench_case,
                  "march_2025": lambda case: mmbench_case(case, march_2025=True)},
        aggregates={"expected": lambda case: mmbench.score(case["input"]),
                    "march_2025": lambda case: mmbench.score(case["input"], march_2025=True)},
        in_order=splits_in_order,
    ),
    "seed": Benchmark(
        source="convert_seed|SEED-Bench",
        readings={"expected": lambda case: seed.right(case["input"]["text"], case["input"]),
                  "lmms_eval": lambda case: seed.right_lmms_eval(case["input"]["text"], case["input"]),
                  "vlmevalkit": lambda case: seed.read_vlmevalkit(case["input"]["text"], case["input"])},
        aggregates={"expected": seed_score},
        tolerances={"": TWO_PLACES},
    ),
    "gqa": Benchmark(
        source="GQA|convert_gqa",
        readings={"expected": gqa_case,
                  "vlmevalkit": gqa_case_by(gqa.right_vlmevalkit),
                  "lmms_eval": gqa_case_by(gqa.right_lmms_eval)},
        aggregates={"expected": gqa_score},
        tolerances={"": TWO_PLACES},
    ),
    "mmmu": Benchmark(
        source="MMMU",
        readings={"expected": mmmu_case, "vlmevalkit": mmmu_vlmevalkit},
        aggregates={"expected": lambda case: mmmu.score(case["input"])},
        in_order=mmmu_in_order,
    ),
    "geneval": Benchmark(
        source="geneval",
        readings={"expected": geneval_case},
        aggregates={"expected": geneval_score},
        tolerances={"": TWO_PLACES, "overall": 5e-6},
        in_order=geneval_in_order,
    ),
    "dpg": Benchmark(
        source="dpg_bench|ELLA",
        readings={"expected": dpg_case},
        aggregates={"expected": lambda case: dpg.official_aggregate(case["input"])},
        in_order=dpg_in_order,
    ),
    "wise": Benchmark(
        source="WISE",
        readings={"expected": wise_case},
        aggregates={"expected": wise_score},
        tolerances={"printed": TWO_PLACES},
    ),
}
