"""Rules of the benchmarks whose answers are yes or no, or a word: POPE, MME, GQA."""
import pytest

from harmonkit.evals.rules import gqa, mme, mmmu, pope, yes_no

# ---- yes or no -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, verdict", [
    ("YES", "Yes"), ("It is a yes.", "Yes"), ("(no)", "No"), ("Not", "Unknown"), ("nope", "Unknown"),
    ("yes no", "Unknown"), ("", "Unknown"),
    ("yes,no", "Unknown"),              # a comma alone becomes a space: two words
    ("yes,no or 1,000", "Unknown"),     # a comma between digits has all marks deleted: "yesno"
    ("yes,it is 1,000", "Unknown"),     # as above, so "yesit"
    ("yes,it is", "Yes"),
    ("no-one, really", "No"),           # only the comma stands beside a space; the hyphen becomes one
    ("no- one", "No"), ("a -no", "No"),
    ("a;-b no-one", "No"),              # the space that a mark leaves does not count as one beside the next
    ("so-no -", "Unknown"),
    ("yes\n,no", "Unknown"), ("'yes'", "Unknown"), ("n.o", "No"), ("yes. No.", "Unknown"), ("no 2.5", "No"),
])
def test_yes_or_no_of_vlmevalkit(answer, verdict):
    assert yes_no.read_vlmevalkit(answer) == verdict


def test_a_missing_answer_is_not_read():
    for rule in (yes_no.read_vlmevalkit, pope.read, mme.read, mme.read_lmms_eval, gqa.convert,
                 mmmu.read_open):
        with pytest.raises(ValueError, match="one is None"):
            rule(None)


# ---- POPE ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, verdict", [
    ("no, there is none", "no"), ("It is not", "no"), ("It is,not", "yes"), ("n,o", "no"), ("No .", "no"),
    ("Yes. There is no dog", "yes"), ("about 2.0 no", "yes"), ("", "yes"), ("NO", "yes"), ("Not", "yes"),
    ("No!", "yes"), ("**No**", "yes"), ("no\n", "yes"), ("no\tdog", "yes"), ("none", "yes"), (" no ", "no"),
])
def test_pope_reads_an_answer(answer, verdict):
    assert pope.read(answer) == verdict


def test_pope_scores_by_both_readings():
    answers = ["yes", "Yes!", "NO", "no", "no", "maybe"]
    labels = ["yes", "no", "no", "no", "yes", "yes"]
    assert pope.score(answers, labels) == {
        "TP": 2, "FP": 2, "TN": 1, "FN": 1, "acc": 0.5, "precision": 0.5, "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7), "yes_ratio": pytest.approx(4 / 6)}
    # VLMEvalKit reads NO as a no and cannot read "maybe": wrong, and no yes.
    assert pope.score_vlmevalkit(answers, labels) == {
        "f1": pytest.approx(2 / 5), "acc": 0.5, "precision": 0.5, "recall": pytest.approx(1 / 3),
        "yes_ratio": pytest.approx(2 / 6), "unknown": 1}


def test_pope_gives_no_fraction_without_a_denominator():
    all_no = pope.score(["no", "no"], ["no", "yes"])
    assert (all_no["precision"], all_no["recall"], all_no["f1"], all_no["acc"]) == (None, 0, None, 0.5)
    no_positive = pope.score(["yes", "no"], ["no", "no"])
    assert (no_positive["precision"], no_positive["recall"], no_positive["f1"]) == (0, None, None)
    assert pope.score(["yes", "no"], ["no", "yes"])["f1"] is None


@pytest.mark.parametrize("answers, labels, fault", [
    (["yes"], ["yes", "no"], "1 answers for 2 questions"), (["yes", "no"], ["yes"], "2 answers for 1"),
    ([], [], "no question"), (["yes", "no"], ["yes", "No"], "question 2 is 'No'"),
])
def test_pope_refuses(answers, labels, fault):
    for rule in (pope.score, pope.score_vlmevalkit):
        with pytest.raises(ValueError, match=fault):
            rule(answers, labels)


# ---- MME -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, official, lmms_eval, vlmevalkit", [
    ("Yes", "yes", "yes", "yes"), ("NO.", "no", "no", "no"), ("Yes, no", "yes", "yes", "other"),
    ("No, yes", "no", "no", "other"), ("  yes", "other", "yes", "yes"), (" yes", "yes", "yes", "yes"),
    ("**yes", "other", "other", "other"), ("*yes*", "yes", "yes", "other"), ("Snow", "no", "no", "other"),
    ("y", "other", "yes", "other"), (" N. ", "other", "no", "other"), ("ye", "other", "other", "other"),
    ("...yes", "other", "yes", "yes"), ("y e s", "other", "other", "other"), ("", "other", "other", "other"),
    ("The answer is yes", "other", "other", "yes"), ("piano", "other", "other", "other"),
])
def test_mme_reads_an_answer(answer, official, lmms_eval, vlmevalkit):
    readings = (mme.read(answer), mme.read_lmms_eval(answer), mme.read_vlmevalkit(answer))
    assert readings == (official, lmms_eval, vlmevalkit)


def rows(*pairs):
    """(truth, answer) pairs -> rows of an MME file, two a picture."""
    return [(f"{number // 2}.jpg", "Is it?", *pair) for number, pair in enumerate(pairs)]


def test_mme_scores_a_subtask():
    numbers = mme.score_subtask(rows(("Yes", "yes"), ("No", "no"),        # both right
                                     ("Yes", "Yes."), ("No", "yes"),
                                     ("Yes", "hm"), ("No", "No")))
    assert numbers == {"TP": 2, "FN": 0, "TN": 2, "FP": 1, "precision": pytest.approx(2 / 3), "recall": 1.0,
                       "other_num": 1, "acc": pytest.approx(4 / 6), "acc_plus": pytest.approx(1 / 3),
                       "score": pytest.approx(100)}
    unread = mme.score_subtask(rows(("Yes", "?"), ("No", "?")))
    assert (unread["other_num"], unread["precision"], unread["recall"], unread["score"]) == (2, 0, 0, 0)
    # Two in a row are one picture, by place, whatever their names.
    shifted = rows(("Yes", "no"), ("No", "no"), ("Yes", "yes"), ("No", "yes"))
    assert mme.score_subtask(shifted)["acc_plus"] == 0
    assert mme.score_subtask(shifted[1:3] + shifted[:1] + shifted[3:])["acc_plus"] == 0.5


def test_mme_sums_the_subtasks():
    right = rows(("Yes", "yes"), ("No", "no"))
    half = rows(("Yes", "yes"), ("No", "yes"))
    subtasks = {name: right for name in mme.SUBTASKS} | {"OCR": half, "code_reasoning": half}
    report = mme.score(subtasks)
    assert (report["Perception"], report["Cognition"]) == (9 * 200 + 50, 3 * 200 + 50)
    assert list(report["tasks"]) == list(mme.SUBTASKS) and len(mme.SUBTASKS) == 14
    subtasks["count"] = rows(("Yes", "  yes"), ("No", "n"))
    assert mme.score(subtasks)["tasks"]["count"]["score"] == 0
    assert mme.score(subtasks, mme.read_lmms_eval)["tasks"]["count"]["score"] == 200


def test_mme_refuses():
    for faulty, fault in [([], "has 0"), (rows(("Yes", "yes")), "has 1"),
                          (rows(("Yes", "a\tb"), ("No", "no")), "a tab inside"),
                          (rows(("Yes", "a\r"), ("No", "no")), "a line break inside"),
                          (rows(("Ja", "yes"), ("No", "no")), "one is .*Ja"),
                          ([("1.jpg", "Is it?", "Yes")] * 2, "one is")]:
        with pytest.raises(ValueError, match=fault):
            mme.score_subtask(faulty)
    right = rows(("Yes", "yes"), ("No", "no"))
    with pytest.raises(ValueError, match=r"missing: \['OCR'\]; unknown: \['ocr'\]"):
        mme.score({name: right for name in mme.SUBTASKS if name != "OCR"} | {"ocr": right})
    with pytest.raises(ValueError, match="^scene: "):
        mme.score({name: right for name in mme.SUBTASKS} | {"scene": right[:1]})


# ---- GQA -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, prediction, official, vlmevalkit, lmms_eval", [
    ("Yes...", "yes", True, False, True), (". yes", ". yes", False, False, False),
    ("yes. ", "yes. ", False, False, False), (" YES", " yes", False, True, False),
    ("y-e's!", "y-e's!", False, False, True), ("yes", "yes", True, True, True),
])
def test_gqa_reads_an_answer(text, prediction, official, vlmevalkit, lmms_eval):
    assert gqa.convert(text) == prediction
    assert gqa.right(prediction, "yes") is official
    assert gqa.right_vlmevalkit(text, "yes") is vlmevalkit
    assert gqa.right_lmms_eval(text, "yes") is lmms_eval
    assert not gqa.right("yes", "Yes")          # the gold answer is taken as it is


def gqa_question(text, answer, structural, group, steps=(), balanced=True):
    return {"question": text, "answer": answer, "isBalanced": balanced,
            "types": {"structural": structural, "semantic": "obj"}, "groups": {"global": group},
            "semantic": [{"operation": operation, "argument": argument} for operation, argument in steps]}


def test_gqa_scores_as_the_official_tool():
    steps = [("select", "dog (1)"), ("exist", "?"), ("query", "name"), ("choose name", "a|b"),
             ("query", "color")]
    questions = {
        "1": gqa_question("Is it a dog?", "yes", "verify", "animal", steps),
        "2": gqa_question("Is it a cat?", "yes", "logical", "animal"),
        "3": gqa_question("Which animal?", "dog", "query", "animal"),
        "4": gqa_question("What color?", "red", "query", None),
        "5": gqa_question("Left?", "no", "verify", "animal", balanced=False)}
    predictions = {"1": "yes", "2": "no", "3": "dog", "4": "blue"}
    report = gqa.score(questions, predictions)
    # Gold: yes twice, dog once. Predicted: yes once, dog once. (1 - 2)² / 2 = 0.5, over 100.
    assert report == {
        "binary": 50.0, "open": 50.0, "accuracy": 50.0, "validity": 0.0, "plausibility": 0.0,
        "distribution": pytest.approx(0.005),
        "structural": {"logical": [0.0, 1], "query": [50.0, 2], "verify": [100.0, 1]},
        "semantic": {"obj": [50.0, 4]}, "steps": {0: [pytest.approx(100 / 3), 3], 2: [100.0, 1]},
        "words": {2: [50.0, 2], 4: [50.0, 2]}}
    report = gqa.score({"4": questions["4"]}, predictions)
    assert (report["binary"], report["open"], report["distribution"]) == (0.0, 0.0, None)


def test_gqa_weights_groups_by_their_questions():
    questions = {str(i): gqa_question("?", "a", "query", "first") for i in range(3)}
    questions["3"] = gqa_question("?", "b", "query", "second")
    # First: (0 - 3)² / 3 = 3, three questions. Second: 0, one question.
    predictions = {"0": "x", "1": "x", "2": "x", "3": "b"}
    assert gqa.score(questions, predictions)["distribution"] == pytest.approx(3 * 3 / 4 / 100)


def test_gqa_refuses():
    questions = {"1": gqa_question("?", "a", "query", None), "2": gqa_question("?", "a", "query", None)}
    with pytest.raises(ValueError, match="1 balanced questions have no prediction, first 2"):
        gqa.score(questions, {"1": "a"})
    with pytest.raises(ValueError, match="no balanced question"):
        gqa.score({"1": gqa_question("?", "a", "query", None, balanced=False)}, {"1": "a"})
