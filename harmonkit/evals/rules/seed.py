"""SEED-Bench's rules for generated letters. The official scorer ranks the options by likelihood instead.

Sources: haotian-liu/LLaVA:scripts/convert_seed_for_submission.py (the protocol of most papers);
EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/seedbench/utils.py; VLMEvalKit's reading: rules/mmbench.py;
AILab-CVC/SEED-Bench:eval.py (the image part).
"""
from harmonkit.evals.rules import mmbench
from harmonkit.evals.rules.yes_no import require_text

# The data file holds these names too (question_type); which of 3 and 4 is which is not verified.
TYPES = {
    1: "Scene Understanding", 2: "Instance Identity", 3: "Instance Attributes", 4: "Instance Location",
    5: "Instances Counting", 6: "Spatial Relation", 7: "Instance Interaction", 8: "Visual Reasoning",
    9: "Text Understanding", 10: "Action Recognition", 11: "Action Prediction", 12: "Procedure Understanding",
}
IMAGE_TYPES = range(1, 10)


def right(text, question):
    """LLaVA's protocol: True if the text equals the question's `answer`; "B." and " B" are wrong."""
    return require_text(text) == question["answer"]


def right_lmms_eval(text, question):
    """lmms-eval's protocol: True if the first character after stripping is the answer, in any case."""
    return require_text(text).strip()[:1].lower() == question["answer"].lower().strip()


def read_vlmevalkit(text, question, march_2025=False):
    """VLMEvalKit's reading, as for MMBench: the letter, "Z" for a refusal, None if nothing can be read."""
    options = {letter: question[f"choice_{letter.lower()}"] for letter in "ABCD"}
    return mmbench.read(text, options, march_2025)


def right_vlmevalkit(text, question, march_2025=False):
    """True if VLMEvalKit reads the question's answer from the text."""
    return read_vlmevalkit(text, question, march_2025) == question["answer"]


def is_image_question(question):
    """The official filter of the image part: types 1 to 9."""
    return int(question["question_type_id"]) in IMAGE_TYPES


def score(questions, answers, right=right, names=TYPES):
    """Questions of SEED-Bench.json and {question_id as str: text} -> shares of right answers in percent.

    {"per_type": {name: %}, "Total_accuracy", "image_accuracy", "video_accuracy"}; a part without questions
    is None. A question without an answer is wrong. `names` is {question_type_id: name}.
    Raises ValueError for no question at all or an unknown type.
    """
    if not questions:
        raise ValueError("SEED-Bench: there is no question to score")
    types, media, everything = {}, {"image": [], "video": []}, []
    for question in questions:
        type_id = int(question["question_type_id"])
        if type_id not in names or question["data_type"] not in media:
            raise ValueError(f"SEED-Bench: question {question['question_id']} has an unknown type {type_id} "
                             f"or data_type {question['data_type']!r}")
        text = answers.get(str(question["question_id"]))
        verdict = text is not None and right(text, question)
        for verdicts in (types.setdefault(type_id, []), media[question["data_type"]], everything):
            verdicts.append(verdict)
    return {
        "per_type": {names[type_id]: percent(types[type_id]) for type_id in sorted(types)},
        "Total_accuracy": percent(everything),
        "image_accuracy": percent(media["image"]),
        "video_accuracy": percent(media["video"]),
    }


def percent(verdicts):
    return 100 * sum(verdicts) / len(verdicts) if verdicts else None


def upload_lines(questions, answers):
    """The official result file: [{"question_id", "prediction"}], in the questions' order.

    Raises ValueError for a question without an answer.
    """
    for question in questions:
        if str(question["question_id"]) not in answers:
            raise ValueError(f"SEED-Bench: no answer to question {question['question_id']}")
    return [{"question_id": question["question_id"], "prediction": answers[str(question["question_id"])]}
            for question in questions]
