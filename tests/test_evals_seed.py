"""SEED-Bench: the image part, letters in three protocols."""
import json

import evals_data
import pytest
from evals_data import arguments, refused, write_lines

from harmonkit.evals import seed


@pytest.fixture
def data(tmp_path):
    return evals_data.seed(tmp_path)


def test_questions_about_images_alone(data, tmp_path):
    questions = seed.read(arguments(seed, data, "--images", tmp_path / "SEED-Bench-image"))
    assert [question.key for question in questions] == ["900", "901", "902", "903"]
    assert all(question.image.is_file() for question in questions)
    assert questions[1].text == ("How many circles, 1?\nA. One\nB. Two\nC. Three\nD. Four\n\n"
                                 "Answer with the option's letter from the given choices directly.")
    llava = seed.read(arguments(seed, data, "--template", "llava"))
    assert llava[1].text == ("How many circles, 1?\nA. One\nB. Two\nC. Three\nD. Four\n"
                             "Answer with the option's letter from the given choices directly.")


def test_pictures_may_have_a_suffix(data, tmp_path):
    folder = tmp_path / "SEED-Bench-image"
    (folder / "101_1").rename(folder / "101_1.jpg")
    assert seed.read(arguments(seed, data, "--images", folder))[0].image == folder / "101_1.jpg"


def test_scores_in_every_protocol(data):
    questions = seed.read(arguments(seed, data))
    result = seed.score(questions, {"900": "A", "901": "b.", "902": "The answer is C", "903": ""})
    assert result.headline == ("llava", "accuracy", 25.0)
    assert result.scores["llava"]["Scene Understanding"] == 100
    assert result.scores["lmms_eval"]["accuracy"] == 50
    assert result.scores["lmms_eval"]["Counting"] == 50      # as the data calls it
    assert result.scores["vlmevalkit"]["accuracy"] == 50
    assert result.counts == {"questions": 4, "answered": 4, "failed": 0, "empty": 1}
    assert "ranks the options by likelihood" in result.notes[-1]
    result = seed.score(questions, {"900": None, "901": "B", "902": "C", "903": "D"})
    assert result.headline[2] == 100 and result.counts["failed"] == 1


def test_official_files_are_read_back(data, tmp_path):
    args = arguments(seed, data)
    questions = seed.read(args)
    answers = {"900": "A", "901": "B.", "902": "", "903": "D"}
    seed.write(tmp_path, questions, answers)
    path = tmp_path / "seed_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == {"question_id": "901", "prediction": "B."}
    assert seed.read_answers(path, questions, args) == answers
    llava = [{"question_id": int(row["question_id"]), "text": row["prediction"]} for row in rows[::-1]]
    write_lines(path, [*llava, {"question_id": 904, "text": "video"}])      # a video's answer is left out
    assert seed.read_answers(path, questions, args) == answers
    write_lines(path, [*llava, {"question_id": 77, "text": "A"}])
    with pytest.raises(ValueError, match="line 5: '77' is no question of the data"):
        seed.read_answers(path, questions, args)
    write_lines(path, llava[1:])
    with pytest.raises(ValueError, match="1 of 4 questions have no answer, the first of them is '903'"):
        seed.read_answers(path, questions, args)


@pytest.mark.parametrize("change, message", [
    ({"answer": "E"}, "question 2: the answer is 'E'; A to D is expected"),
    ({"question_type_id": 13}, "question 2: question_type_id is 13; 1 to 12 is expected"),
    ({"data_type": "video"}, "question 2: data_type is 'video' in a question about an image"),
    ({"data_id": ""}, "question 2: data_id is empty"),
    ({"choice_c": None}, "question 2: choice_c is None; a text is expected"),
    ({"question_id": "900"}, "question 2: the question '900' stands on question 1 too")])
def test_bad_questions(data, change, message):
    content = json.loads(data.read_text())
    content["questions"][1] |= change
    data.write_text(json.dumps(content))
    assert refused(seed, arguments(seed, data)) == f"{data}, {message}"


def test_a_type_without_a_name(data):
    content = json.loads(data.read_text())
    del content["question_type"]["Counting"]
    data.write_text(json.dumps(content))
    assert "question 2: question_type has no name for the type 5" in refused(seed, arguments(seed, data))
    del content["question_type"]
    data.write_text(json.dumps(content))
    assert seed.read(arguments(seed, data))[1].fields["type"] == "Instances Counting"


def test_a_file_that_is_cut_off(data):
    data.write_bytes(data.read_bytes()[:-100])
    assert "not JSON" in refused(seed, arguments(seed, data))
    data.write_text('{"questions": []}')
    assert "no list of questions" in refused(seed, arguments(seed, data))
    data.write_text("[1]")
    assert "an object is expected" in refused(seed, arguments(seed, data))
