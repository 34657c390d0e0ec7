"""POPE: files as distributed, official answer files, scores by part."""
import json
from pathlib import Path

import evals_data
import pytest
from evals_data import arguments, refused, write_lines

from harmonkit.evals import pope


@pytest.fixture
def data(tmp_path):
    return evals_data.pope(tmp_path)


def answer_by_label(questions, wrong=()):
    """Every answer right but those of these indices."""
    said = [{"yes": "Yes", "no": "No"}, {"yes": "No", "no": "Yes"}]
    return {question.key: said[i in wrong][question.fields["label"]] for i, question in enumerate(questions)}


def test_the_three_parts_in_their_order(data):
    questions = pope.read(arguments(pope, data, "--images", "coco"))
    assert [question.key for question in questions] == [
        f"{part}/{number}" for part in ("random", "popular", "adversarial") for number in range(1, 7)]
    assert questions[0].text == ("Is there a circle in the image?\n"
                                 "Answer the question using a single word or phrase.")
    assert questions[2].image == Path("coco/COCO_val2014_000000000008.jpg")
    plain = pope.read(arguments(pope, data, "--template", "plain"))
    assert plain[7].text == "Is there a popular snowboard in the image?" and plain[7].fields["label"] == "no"
    assert pope.files(arguments(pope, data)) == [data / f"coco_pope_{part}.json" for part in evals_data.PARTS]


def test_one_part_alone(data):
    args = arguments(pope, data / "coco_pope_popular.json")
    questions = pope.read(args)
    assert [question.key for question in questions] == [f"popular/{number}" for number in range(1, 7)]
    result = pope.score(questions, answer_by_label(questions))
    assert "accuracy, F1 and yes ratio are of the part popular alone" in result.notes


def test_scores_by_part_and_their_mean(data):
    questions = pope.read(arguments(pope, data))
    result = pope.score(questions, answer_by_label(questions, wrong=(1, 6)) | {"random/3": ""})
    official = result.scores["official"]
    assert result.headline == ("official", "accuracy", pytest.approx((5 / 6 + 5 / 6 + 1) / 3))
    assert official["random yes ratio"] == pytest.approx(4 / 6)             # an empty answer is a yes
    assert official["random F1"] == pytest.approx(6 / 7) and official["random recall"] == 1
    assert official["popular F1"] == pytest.approx(0.8) and official["popular precision"] == 1
    assert official["F1"] == pytest.approx((6 / 7 + 0.8 + 1) / 3)
    vlmevalkit = result.scores["vlmevalkit"]
    assert vlmevalkit["random unknown"] == 1 and vlmevalkit["random accuracy"] == pytest.approx(4 / 6)
    assert result.counts == {"questions": 18, "answered": 18, "failed": 0, "empty": 1, "random": 6,
                             "popular": 6, "adversarial": 6}
    assert "the random part has 6 questions here; it has 3,000, an older one 2,910" in result.notes


def test_failed_questions_are_left_out_and_counted(data):
    questions = pope.read(arguments(pope, data))
    result = pope.score(questions, answer_by_label(questions, wrong=(0,)) | {"random/1": None})
    assert result.scores["official"]["random accuracy"] == 1 and result.counts["failed"] == 1
    assert "1 of 18 questions failed" in result.notes[0]


def test_shares_without_a_denominator_are_not_invented(data):
    questions = pope.read(arguments(pope, data))[1::2]              # those whose label is no
    scores = pope.score(questions, answer_by_label(questions)).scores["official"]
    assert scores["accuracy"] == 1 and "F1" not in scores and "random precision" not in scores


def test_official_files_are_read_back(data, tmp_path):
    args = arguments(pope, data)
    questions = pope.read(args)
    answers = answer_by_label(questions, wrong=(3, 9))
    pope.write(tmp_path, questions, answers)
    rows = (tmp_path / "coco_pope_popular_answers.jsonl").read_text().splitlines()
    assert json.loads(rows[0]) == {"question": "Is there a popular circle in the image?", "answer": "Yes"}
    assert len(rows) == 6
    assert pope.read_answers(tmp_path, questions, args) == answers
    together = tmp_path / "all.jsonl"
    together.write_text("".join((tmp_path / f"coco_pope_{part}_answers.jsonl").read_text()
                                for part in evals_data.PARTS))
    assert pope.read_answers(together, questions, args) == answers


def answer_lines(questions, **fields):
    return [{"question": question.fields["text"], "answer": "Yes"} | fields for question in questions]


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[:-1], "17 answers to 18 questions; was it cut short"),
    (lambda rows: rows + rows[:1], "19 answers to 18 questions; is it of other data"),
    (lambda rows: [rows[1], rows[0], *rows[2:]], "line 1: an answer to 'Is there a snowboard in the"),
    (lambda rows: [*rows[:-1], {"question": rows[-1]["question"]}], "line 18: no field answer or text"),
    (lambda rows: [{"answer": 3}, *rows[1:]], "line 1: answer is 3; a text is expected"),
    (lambda rows: [{"answer": "Yes", "question_id": 2}, *rows[1:]], "line 1: an answer to question 2")])
def test_answers_that_do_not_fit_are_refused(data, tmp_path, change, message):
    args = arguments(pope, data)
    questions = pope.read(args)
    write_lines(tmp_path / "file.jsonl", change(answer_lines(questions)))
    with pytest.raises(ValueError, match=f"file.jsonl.*{message}"):
        pope.read_answers(tmp_path / "file.jsonl", questions, args)


def test_bad_data(data, tmp_path):
    args = arguments(pope, data)
    path = data / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert refused(pope, args).startswith(f"{path}, line 6: not JSON")
    for change, message in (({"label": "maybe"}, "line 2: label is 'maybe'; yes or no is expected"),
                            ({"image": " "}, "line 2: image is empty"),
                            ({"text": ""}, "line 2: text is empty"),
                            ({"question_id": 1}, "line 2: the question 'random/1' stands on line 1 too")):
        write_lines(path, [rows[0], rows[1] | change])
        assert refused(pope, args) == f"{path}, {message}"
    write_lines(path, [rows[0], {key: rows[1][key] for key in ("question_id", "text", "label")}])
    assert refused(pope, args).startswith(f"{path}, line 2: no field image")
    path.unlink()
    assert refused(pope, args).startswith(f"{path}: no such file; give a part's file")
    assert "no such file" in refused(pope, arguments(pope, tmp_path / "nowhere.json"))
