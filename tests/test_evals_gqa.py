"""GQA: balanced questions, the official list of predictions, scores by type."""
import json

import evals_data
import pytest
from evals_data import arguments, refused, write_lines

from harmonkit.evals import gqa


@pytest.fixture
def data(tmp_path):
    return evals_data.gqa(tmp_path)


def test_balanced_questions_alone(data, tmp_path):
    questions = gqa.read(arguments(gqa, data, "--images", tmp_path / "images"))
    assert [question.key for question in questions] == ["20000", "20001", "20002"]
    assert questions[1].text == ("What is it, number 1?\nAnswer the question using a single word or phrase.")
    assert questions[1].image == tmp_path / "images/n1.jpg" and questions[1].image.is_file()


def test_scores(data):
    questions = gqa.read(arguments(gqa, data))
    result = gqa.score(questions, {"20000": "Yes.", "20001": "Red ", "20002": "LEFT"})
    official = result.scores["official"]
    assert result.headline == ("official", "accuracy", pytest.approx(200 / 3))
    assert official["binary"] == 100 and official["open"] == 0 and official["structural query"] == 0
    assert official["words 5"] == pytest.approx(200 / 3) and official["distribution"] == pytest.approx(0.01)
    assert result.scores["vlmevalkit"]["accuracy"] == pytest.approx(200 / 3)
    assert result.scores["lmms_eval"]["accuracy"] == pytest.approx(200 / 3)
    result = gqa.score(questions, {"20000": "Yes", "20001": None, "20002": ""})
    assert result.headline[2] == 50 and result.counts["failed"] == 1 and result.counts["empty"] == 1


def test_official_files_are_read_back(data, tmp_path):
    args = arguments(gqa, data)
    questions = gqa.read(args)
    gqa.write(tmp_path, questions, {"20000": "Yes.", "20001": "Dark Red...", "20002": ""})
    path = tmp_path / "testdev_balanced_predictions.json"
    rows = json.loads(path.read_text())
    assert rows == [{"questionId": "20000", "prediction": "yes"},
                    {"questionId": "20001", "prediction": "dark red"},
                    {"questionId": "20002", "prediction": ""}]
    path.write_text(json.dumps([*rows[::-1], {"questionId": "20003", "prediction": "dog"}]))
    answers = {"20000": "yes", "20001": "dark red", "20002": ""}
    assert gqa.read_answers(path, questions, args) == answers       # 20003 is not balanced
    write_lines(path, [{"question_id": key, "text": text} for key, text in answers.items()])
    assert gqa.read_answers(path, questions, args) == answers
    for wrong, message in ((rows[1:], "1 of 3 questions have no answer, the first of them is '20000'"),
                           ([*rows, rows[0]], "entry 4: a second answer to '20000'"),
                           ([*rows, {"questionId": "5", "prediction": ""}], "entry 4: '5' is no question"),
                           ([{"questionId": "20000"}, *rows[1:]], "entry 1: no field prediction or text"),
                           ([3, *rows], "entry 1: a int where an object is expected")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"predictions.json.*{message}"):
            gqa.read_answers(path, questions, args)


@pytest.mark.parametrize("change, message", [
    ({"isBalanced": "true"}, "isBalanced is 'true'; true or false is expected"),
    ({"question": ""}, "question is empty"), ({"imageId": 3}, "imageId is 3; a text is expected"),
    ({"answer": None}, "answer is None; a text is expected"),
    ({"types": {"semantic": "attr"}}, "types, groups or semantic is missing"),
    ({"semantic": [{}]}, "types, groups or semantic is missing")])
def test_bad_questions(data, change, message):
    rows = json.loads(data.read_text())
    rows["20001"] |= change
    data.write_text(json.dumps(rows))
    assert refused(gqa, arguments(gqa, data)).startswith(f"{data}, question 20001: {message}")


def test_files_that_are_cut_off_or_empty(data):
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert f"{data}, line 1: not JSON" in refused(gqa, arguments(gqa, data))
    data.write_text("{}")
    assert refused(gqa, arguments(gqa, data)) == f"{data}: it is empty"
    data.write_text(json.dumps({"1": {"isBalanced": False}}))
    assert "there is no balanced question" in refused(gqa, arguments(gqa, data))
