"""MMMU: parquet as distributed, the official parser with its draws, scores by subject."""
import json

import evals_data
import pytest
from evals_data import arguments, refused, write_lines

from harmonkit.evals import mmmu
from harmonkit.images import open_image

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
KEYS = ["validation_Accounting_1", "validation_Math_1", "validation_Math_2", "validation_Physics_3"]


@pytest.fixture
def data(tmp_path):
    return evals_data.mmmu(tmp_path)


def write_rows(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_the_validation_files_of_all_subjects(data):
    args = arguments(mmmu, data)
    questions = mmmu.read(args)
    assert [question.key for question in questions] == KEYS
    assert all(question.image == evals_data.image_bytes(1, "PNG") for question in questions)
    assert open_image(questions[0].image).width == 64
    assert questions[0].fields["options"] == ["a circle", "it's a star", "a cross"]
    assert questions[2].fields["answer"] == ["24/7", "3.429"] and questions[3].fields["answer"] == "red"
    assert [question.fields["pictures"] for question in questions] == [1, 2, 1, 1]


@pytest.mark.parametrize("template, choice, open_ended", [
    ("janus", "Which shape is in <image 1>?\nA. a circle\nB. it's a star\nC. a cross\n\n"
              "Answer with the option's letter from the given choices directly.",
     "What is its color in <image 1>?\nAnswer the question directly. "),
    ("official", "Which shape is in <image 1>?\n(A) a circle\n(B) it's a star\n(C) a cross\n\n"
                 "Answer with the option's letter from the given choices directly.",
     "What is its color in <image 1>?\nAnswer the question using a single word or phrase.")])
def test_templates(data, template, choice, open_ended):
    questions = mmmu.read(arguments(mmmu, data, "--template", template))
    assert questions[0].text == choice and questions[3].text == open_ended


def test_pictures_as_plain_bytes(tmp_path):
    rows = evals_data.mmmu_rows()
    for row in rows:
        row["image_1"] = row["image_1"]["bytes"]
    questions = mmmu.read(arguments(mmmu, write_rows(tmp_path / "one.parquet", rows)))
    assert questions[0].image == evals_data.image_bytes(1, "PNG")


def test_scores_by_subject_and_drawn_letters(data):
    questions = mmmu.read(arguments(mmmu, data))
    answers = dict(zip(KEYS, ("B.", "no idea", "3.43", "It is red.")))
    result = mmmu.score(questions, answers)
    official = result.scores["official"]
    assert result.headline == ("official", "accuracy", 1.0)         # the draw of seed 42 is A
    assert official["Business"] == 1 and official["Science"] == 1 and official["Math"] == 1
    assert result.counts == {"questions": 4, "answered": 4, "failed": 0, "empty": 0, "choice": 2, "drawn": 1,
                             "more pictures": 1}
    assert "no letter could be read from 1 of 2 answers" in result.notes[0]
    assert result.scores["vlmevalkit"]["accuracy"] == 0.5
    result = mmmu.score(questions, answers | {KEYS[0]: None, KEYS[3]: "blue"})
    assert result.headline[2] == pytest.approx(2 / 3) and result.counts["failed"] == 1


def test_official_files_are_read_back(data, tmp_path):
    args = arguments(mmmu, data)
    questions = mmmu.read(args)
    answers = dict(zip(KEYS, ("(C) a cross", "no idea", "3.43", "")))
    mmmu.write(tmp_path, questions, answers)
    path = tmp_path / "mmmu_predictions.json"
    assert json.loads(path.read_text()) == dict(zip(KEYS, ("C", "A", "3.43", "")))
    assert mmmu.read_answers(path, questions, args) == dict(zip(KEYS, ("C", "A", "3.43", "")))
    write_lines(path, [{"id": key, "response": text} for key, text in reversed(answers.items())])
    assert mmmu.read_answers(path, questions, args) == answers
    for content, message in (({KEYS[0]: "A"}, "3 of 4 questions have no answer, the first of them is"),
                             (answers | {"validation_Math_9": "A"}, "validation_Math_9: .* is no question"),
                             (answers | {KEYS[1]: None}, "validation_Math_1 is None; a text is expected")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"mmmu_predictions.json.*{message}"):
            mmmu.read_answers(path, questions, args)
    path.write_text('{"validation_Math_1": "A", "valid')
    with pytest.raises(ValueError, match="mmmu_predictions.json, line 1: not JSON"):
        mmmu.read_answers(path, questions, args)


@pytest.mark.parametrize("change, message", [
    ({"image_1": None}, "row 2: no picture in image_1"),
    ({"question_type": "essay"}, "row 2: question_type is 'essay'; multiple-choice or open is expected"),
    ({"options": "['a'"}, "row 2: options are"), ({"options": "['a']"}, "row 2: options are"),
    ({"answer": "C"}, "row 2: the answer is 'C'; a letter of the 2 options is expected"),
    ({"answer": "AB"}, "row 2: the answer is 'AB'; a letter of the 2 options is expected"),
    ({"id": "validation_Magic_1"}, "row 2: MMMU: 'validation_Magic_1' is not an id"),
    ({"question": " "}, "row 2: question is empty"),
    ({"question_type": "open", "answer": ""}, "row 2: the answer is ''; a text or a list of texts")])
def test_bad_rows(tmp_path, change, message):
    rows = evals_data.mmmu_rows()
    rows[1] |= change
    path = write_rows(tmp_path / "one.parquet", rows)
    assert refused(mmmu, arguments(mmmu, path)).startswith(f"{path}, {message}")


def test_a_question_twice_and_files_that_are_cut_off_or_missing(data, tmp_path):
    rows = evals_data.mmmu_rows()
    path = write_rows(tmp_path / "one.parquet", [*rows, rows[0]])
    found = refused(mmmu, arguments(mmmu, path))
    assert "row 5: the question 'validation_Accounting_1' stands on one.parquet, row 1 too" in found
    path.write_bytes(path.read_bytes()[:-50])
    assert refused(mmmu, arguments(mmmu, path)).startswith(f"{path}: not a parquet file, or cut off (")
    path = tmp_path / "no.parquet"
    assert refused(mmmu, arguments(mmmu, path)) == f"{path}: no such file"
    (tmp_path / "empty").mkdir()
    assert "there is no parquet file in it" in refused(mmmu, arguments(mmmu, tmp_path / "empty"))
