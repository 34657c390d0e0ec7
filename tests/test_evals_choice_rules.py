"""Rules of the benchmarks whose answers are options: MMBench, SEED-Bench, MMMU."""
import random

import pytest

from harmonkit.evals.rules import mmbench, mmmu, seed

PETS = {"A": "a cat", "B": "a dog", "C": "a bird", "D": "a horse"}


# ---- MMBench ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, now, march_2025", [
    ("B", "B", "B"), ("[B]!", "B", "B"), ("B-", None, None), ("B?", None, None),
    ("a dog and a bird", None, None), ("A B A", None, None), ("b", None, None),
    ("D one two three", "D", "D"), ("D one two three four", None, "D"),
    ("D one two three D", None, "D"),           # the first place counts
    ("D is what it is and the answer is c", "C", "D"), ("THE ANSWER IS * *d", "D", None),
    ("the answer is clear", "C", None), ("the answer is: b", None, None), ("the answer is not b", None, None),
    ("Z", "Z", "Z"), ("Z or A", "A", "A"), ("Z A B", None, None),
    ("I can't process this file. A", "Z", "Z"), ("i can't process this file.", None, None),
    ("Failed to obtain answer via API: a bird", "C", "C"), ("Failed to obtain answer via API B", None, None),
    ("Failed to obtain answer via API. Cannot determine the answer", None, None),
    ("a bird" + "." * 19, "C", "C"), ("a bird" + "." * 45, None, "C"), ("Dogs: a dog", "B", "B"),
])
def test_mmbench_reads_an_option(prediction, now, march_2025):
    assert mmbench.read(prediction, PETS) == now
    assert mmbench.read(prediction, PETS, march_2025=True) == march_2025


def test_mmbench_bounds_the_length_by_all_options():
    options = {"A": "red", "B": "blue"}                         # 7 characters in all
    assert mmbench.read("so red" + " " * 8, options) == "A"
    assert mmbench.read("so red" + " " * 9, options) is None


def rotations(index, answer, predictions, **fields):
    """Rows of a question of as many options as predictions, rotated by one each."""
    texts = list(PETS.values())[:len(predictions)]
    table = []
    for turn, prediction in enumerate(predictions):
        turned = dict(zip(PETS, texts[turn:] + texts[:turn]))
        letter = next(letter for letter, text in turned.items() if text == PETS[answer])
        table.append({"index": turn * 1_000_000 + index, **turned, "answer": letter, "prediction": prediction,
                      **fields})
    return table


def test_mmbench_counts_a_question_if_all_rotations_are_right():
    assert mmbench.score_group(rotations(1, "B", "BADC")) == {"circular": 1, "first_row_only": 1}
    assert mmbench.score_group(rotations(1, "B", "BADD")) == {"circular": 0, "first_row_only": 1}
    assert mmbench.score_group(rotations(1, "B", "bADC")) == {"circular": 0, "first_row_only": 0}
    far = rotations(1, "B", ["B, as I would say of it", "A", "D", "C"])
    assert mmbench.score_group(far)["circular"] == 0
    assert mmbench.score_group(far, march_2025=True)["circular"] == 1


def test_mmbench_scores_by_split_and_category():
    kinds = [{"split": "dev", "l2-category": "coarse_perception", "category": "image_style"},
             {"split": "dev", "l2-category": "logic_reasoning", "category": "future_prediction"},
             {"split": "test", "l2-category": "coarse_perception", "category": "image_style"}]
    table = (rotations(3, "A", "ADCB", **kinds[0]) + rotations(7, "A", "AA", **kinds[1])
             + rotations(8, "C", "CBA", **kinds[2]))
    report = mmbench.score(list(reversed(table)))
    assert report["hit"] == {"3": 1, "7": 0, "8": 1}
    assert report["circular"] == [
        {"split": "dev", "Overall": 0.5, "CP": 1.0, "LR": 0.0, "future_prediction": 0.0, "image_style": 1.0},
        {"split": "test", "Overall": 1.0, "CP": 1.0, "LR": None, "future_prediction": None,
         "image_style": 1.0}]
    assert report["first_row_only"][0]["Overall"] == 1.0
    assert mmbench.score(rotations(1, "A", "ADCB"))["circular"] == [{"split": "none", "Overall": 1.0}]


def test_mmbench_leaves_out_empty_options():
    row = {"index": 4, "A": "a cat", "B": 2, "C": float("nan"), "D": None, "answer": "B", "prediction": "C 2"}
    assert mmbench.options_of(row) == {"A": "a cat", "B": 2}
    assert mmbench.is_right(row) == 1


@pytest.mark.parametrize("table, fault", [
    (rotations(5, "A", "ADCB")[1:], "question 5 lacks its unrotated row"),
    (rotations(5, "A", "ADCB")[:3], "has 3 of its 4 rotations"),
    (rotations(5, "A", "ADCB") + rotations(5, "A", "ADCB")[:1], "the same row twice"),
    ([row | {"answer": None} for row in rotations(5, "A", "ADCB")], "answer of row 5 is None"),
    ([row | {"answer": "E"} for row in rotations(5, "A", "ADCB")], "answer of row 5 is 'E'"),
    ([], "no row"),
])
def test_mmbench_refuses(table, fault):
    with pytest.raises(ValueError, match=fault):
        mmbench.score(table)


def test_mmbench_takes_the_number_of_rotations_from_the_data():
    part = rotations(5, "A", "ADCB")[:3]
    assert mmbench.score(part, rotations={5: 3})["hit"] == {"5": 1}
    with pytest.raises(ValueError, match="has 4 of its 3"):
        mmbench.score(rotations(5, "A", "ADCB"), rotations={5: 3})
    with pytest.raises(ValueError, match="of one question were expected"):
        mmbench.score_group(rotations(5, "A", "ADCB") + rotations(6, "A", "ADCB"))


# ---- SEED-Bench ------------------------------------------------------------------------------------------

def seed_question(number, type_id, answer, data_type="image"):
    choices = {f"choice_{letter.lower()}": text for letter, text in PETS.items()}
    return {"question_id": number, "question_type_id": type_id, "data_type": data_type, "answer": answer,
            **choices}


@pytest.mark.parametrize("text, letters_equal, lmms_eval, vlmevalkit", [
    ("B", True, True, "B"), ("B\n", False, True, "B"), ("b.", False, True, None), ("(B)", False, False, "B"),
    ("", False, False, None), ("a dog", False, False, "B"), ("A dog, so B", False, False, "B"),
    ("Bus", False, True, None),
])
def test_seed_reads_an_answer(text, letters_equal, lmms_eval, vlmevalkit):
    question = seed_question("1", 1, "B")
    assert seed.right(text, question) is letters_equal
    assert seed.right_lmms_eval(text, question) is lmms_eval
    assert seed.read_vlmevalkit(text, question) == vlmevalkit
    assert seed.right_vlmevalkit(text, question) is (vlmevalkit == "B")


def test_seed_scores_by_type_and_medium():
    questions = [seed_question("1", 1, "A"), seed_question("2", 1, "B"), seed_question("3", 9, "C"),
                 seed_question("v4", 10, "D", "video")]
    answers = {"1": "A", "2": "b", "v4": "D"}               # no answer to question 3: wrong
    assert seed.score(questions, answers) == {
        "per_type": {"Scene Understanding": 50.0, "Text Understanding": 0.0, "Action Recognition": 100.0},
        "Total_accuracy": 50.0, "image_accuracy": pytest.approx(100 / 3), "video_accuracy": 100.0}
    assert seed.score(questions, answers, seed.right_lmms_eval)["image_accuracy"] == pytest.approx(200 / 3)
    assert seed.score(questions[:1], answers, names={1: "Scenes"}) == {
        "per_type": {"Scenes": 100.0}, "Total_accuracy": 100.0, "image_accuracy": 100.0,
        "video_accuracy": None}
    assert [seed.is_image_question(question) for question in questions] == [True, True, True, False]
    assert seed.upload_lines(questions[:2], answers) == [{"question_id": "1", "prediction": "A"},
                                                         {"question_id": "2", "prediction": "b"}]


def test_seed_refuses():
    for questions, fault in [([], "no question"), ([seed_question("1", 13, "A")], "unknown type 13"),
                             ([seed_question("1", 1, "A", "sound")], "data_type 'sound'")]:
        with pytest.raises(ValueError, match=fault):
            seed.score(questions, {"1": "A"})
    with pytest.raises(ValueError, match="no answer to question 2"):
        seed.upload_lines([seed_question("2", 1, "A")], {"1": "A"})


# ---- MMMU ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, letter", [
    ("B", "B"), ("'B.", "B"), (".'B'.", "B"), ("'.B.'", None),      # periods come off before quotes
    ("B!.", "B"), ("B.!", None), ("(A) B", "A"), ("C then (A)", "A"), ("A C B", "B"), ("(C)(B)(C)", "C"),
    ("B) a dog", None), ("B: a dog", None), ("b", None), ("a dog", None), ("", None), ("x\nB", None),
    ("there you see that a DOG barks", "B"), ("one sees a dog here", None),         # five words are too few
    ("I see a dog and then a cat", "A"), ("I see E in the picture now", None),
])
def test_mmmu_reads_a_choice(response, letter):
    assert mmmu.read_choice(response, list(PETS.values())) == letter


def test_mmmu_takes_the_first_of_two_options_at_the_same_place():
    assert mmmu.read_choice("I believe it must be 60 cm", ["6", "60", "0 cm"]) == "C"
    assert mmmu.read_choice("I believe it must be 60", ["6", "60", "m"]) == "A"


@pytest.mark.parametrize("response, numbers, texts", [
    ("5", {5.0}, set()), ("-1,234.5", {-1234.5, -1234.0, 234.5}, set()), ("1,000", {1000.0, 0.0}, set()),
    ("1e3", {1000.0, 3.0}, set()), ("it costs 5cm", set(), {"it costs 5cm"}),
    ("Answer: 7\nThe result is x = 8", {8.0}, set()),
    ("x = 3\n9", {3.0, 9.0}, {"x = 3\n9"}),               # "=" is a key word in the last line only
    ("so a\nis B.", set(), {" a", "a ", " b", "b "}), ("it is !", set(), {"it is !"}),
    ("the answer is so ", set(), {"so"}),
    ("is 0.125", {0.12}, set()), ("Final Answer ", set(), {"answer"}), ("...", set(), {""}),
    ("", set(), {""}), ("3.5.7", {3.5, 0.7}, {"3.5.7"}),
    ("nothing", set(), {"nothing"}), ("..ab.", set(), {"ab"}), ("infinity", {float("inf")}, set()),
])
def test_mmmu_reads_an_open_answer(response, numbers, texts):
    assert mmmu.read_open(response) == (numbers, texts)


@pytest.mark.parametrize("response, answer, verdict", [
    ("30 watts", "30", True), ("twenty-five", "five", True), ("carbon", "C", False), ("vitamin c", "C", True),
    ("5.001", "5", True), ("5.01", "5", False), ("about $60", ["sixty", "60"], True), ("60", "$60", False),
    ("1e3", "1,000", True), ("a", "b", False),
])
def test_mmmu_judges_an_open_answer(response, answer, verdict):
    assert mmmu.right_open(response, answer) is verdict


def test_mmmu_scores_by_subject_and_discipline():
    options = list(PETS.values())
    choice = {"question_type": "multiple-choice", "options": options}
    table = [{"id": "validation_Art_Theory_1", "response": "B", "answer": "B", **choice},
             {"id": "validation_Art_2", "response": "?", "answer": "A", **choice},
             {"id": "validation_Math_3", "response": "?", "answer": "A", **choice},
             {"id": "validation_Math_4", "response": "is 4", "answer": "4", "question_type": "open"},
             {"id": "validation_Math_5", "response": "(B)", "answer": "C", **choice}]
    report = mmmu.score(table)
    generator = random.Random(42)
    drawn = [generator.choice("ABCD"), generator.choice("ABCD")]
    assert drawn == ["A", "A"]
    assert report["letters"] == {"validation_Art_Theory_1": "B", "validation_Art_2": "A",
                                 "validation_Math_3": "A", "validation_Math_5": "B"}
    assert report["drawn"] == ["validation_Art_2", "validation_Math_3"]
    assert [verdict == "Correct" for verdict in report["judge"].values()] == [True, True, True, True, False]
    assert report["subjects"]["Math"] == {"num": 3, "acc": pytest.approx(2 / 3)}
    assert report["domains"] == {"Overall-Art and Design": {"num": 2, "acc": 1.0},
                                 "Overall-Science": {"num": 3, "acc": pytest.approx(2 / 3)}}
    assert report["overall"] == {"num": 5, "acc": pytest.approx(0.8)}
    assert report["main_eval_only"] == {
        "Overall-Art and Design": {"num": 2, "acc": 1.0}, "Art": {"num": 1, "acc": 1.0},
        "Art_Theory": {"num": 1, "acc": 1.0}, "Overall-Science": {"num": 3, "acc": 0.667},
        "Math": {"num": 3, "acc": 0.667}, "Overall": {"num": 5, "acc": 0.8}}


def test_mmmu_knows_thirty_subjects():
    assert len(set(mmmu.SUBJECTS)) == 30
    assert mmmu.subject_of("validation_Art_Theory_12") == "Art_Theory"
    for wrong in ("validation_Arts_1", "Math", "Math_1", "validation_1"):
        with pytest.raises(ValueError, match="validation_<Subject>_<number>"):
            mmmu.subject_of(wrong)
    row = {"id": "validation_Math_1", "question_type": "open", "response": "1", "answer": "1"}
    with pytest.raises(ValueError, match="comes twice"):
        mmmu.score([row, row])
    with pytest.raises(ValueError, match="no question"):
        mmmu.score([])


def test_mmmu_as_vlmevalkit_reads_it():
    options = list(PETS.values())
    assert mmmu.right_vlmevalkit("B.", options, "B") and mmmu.right_vlmevalkit("a dog", options, "B")
    assert mmmu.right_vlmevalkit("A", None, "five") and mmmu.right_vlmevalkit("it is five", None, "five")
    assert not mmmu.right_vlmevalkit("B", None, "five")
    assert not mmmu.right_vlmevalkit("The answer is b", options, "B", march_2025=True)
