"""MMBench: the TSV as distributed, three templates, circular and plain scores."""
import csv

import evals_data
import pytest
from evals_data import arguments, refused, write_lines, write_table

from harmonkit.evals import mmbench
from harmonkit.images import open_image


@pytest.fixture
def data(tmp_path):
    return evals_data.mmbench(tmp_path)


def right(questions):
    return {question.key: question.fields["row"]["answer"] for question in questions}


def test_rows_refer_to_the_pictures_of_others(data):
    questions = mmbench.read(arguments(mmbench, data))
    assert [question.key for question in questions] == ["7", "1000007", "2000007", "3000007", "12", "1000012"]
    assert questions[3].image == questions[0].image == evals_data.image_bytes(7)
    assert questions[5].image == evals_data.image_bytes(12) and open_image(questions[5].image).width == 64


LETTER = "Answer with the option's letter from the given choices directly."
SELECT = "Please select the correct answer from the options above. \n"
FOUR = "A. circle\nB. square\nC. star\nD. cross\n"


@pytest.mark.parametrize("template, first, last", [
    ("janus", f'Hint: Look\nclosely\nWhat is "it"? (7)\n{FOUR}\n{LETTER}',
     f'What is "it"? (12)\nA. no\nB. yes\n\n{LETTER}'),
    ("official", f'Hint: Look\nclosely\nQuestion: What is "it"? (7)\nOptions:\n{FOUR}{SELECT}',
     f'Question: What is "it"? (12)\nOptions:\nA. no\nB. yes\n{SELECT}'),
    ("llava", f'Look\nclosely\nWhat is "it"? (7)\n{FOUR}{LETTER}',
     f'What is "it"? (12)\nA. no\nB. yes\n{LETTER}')])
def test_templates(data, template, first, last):
    questions = mmbench.read(arguments(mmbench, data, "--template", template))
    assert questions[0].text == first and questions[-1].text == last


def test_circular_and_plain_scores_by_category(data):
    questions = mmbench.read(arguments(mmbench, data))
    result = mmbench.score(questions, right(questions) | {"2000007": "Cross."})
    scores = result.scores["vlmevalkit"]
    assert result.headline == ("vlmevalkit", "circular", 0.5) and scores["plain"] == 1
    assert scores["circular FP-S"] == 0 and scores["circular CP"] == 1
    assert scores["circular object_localization"] == 0 and scores["plain image_scene"] == 1
    assert result.counts == {"questions": 2, "answered": 6, "failed": 0, "empty": 0, "rows": 6, "circular": 2,
                             "plain": 2}
    # A letter far from the end is read by the rules of March 2025 alone.
    result = mmbench.score(questions, right(questions) | {"7": "A since there is nothing else to see"})
    assert result.scores["vlmevalkit"]["plain"] == 0.5 and result.scores["march_2025"]["circular"] == 1


def test_a_question_without_all_rotations_is_left_out(data):
    questions = mmbench.read(arguments(mmbench, data))
    result = mmbench.score(questions, right(questions) | {"1000012": None, "12": "B"})
    scores = result.scores["vlmevalkit"]
    assert scores["circular"] == 1 and scores["plain"] == 0.5 and "circular CP" not in scores
    assert (result.counts["circular"], result.counts["plain"], result.counts["failed"]) == (1, 2, 1)
    assert "circular is over 1 of 2 questions, those with all the answers that it needs" in result.notes
    part = questions[:3]                                            # of --limit
    result = mmbench.score(part, right(part) | {"7": "B"})
    assert result.headline == ("vlmevalkit", "plain", 0) and result.counts["circular"] == 0
    with pytest.raises(ValueError, match="no question has an answer to its first row; give a larger --limit"):
        mmbench.score(part, right(part) | {"7": None})


def test_a_table_without_rotations_has_a_plain_score(tmp_path):
    rows = [row for row in evals_data.mmbench_rows() if int(row["index"]) < 1000]
    data = evals_data.mmbench(tmp_path, rows)
    questions = mmbench.read(arguments(mmbench, data))
    result = mmbench.score(questions, right(questions) | {"7": "B"})
    assert result.headline == ("vlmevalkit", "plain", 0.5) and "circular" not in result.scores["vlmevalkit"]


def test_the_test_split_is_written_but_not_scored(tmp_path, capsys):
    rows = [{key: cell for key, cell in row.items() if key != "answer"} for row in evals_data.mmbench_rows()]
    args = arguments(mmbench, evals_data.mmbench(tmp_path, rows))
    questions = mmbench.read(args)
    answers = dict.fromkeys([question.key for question in questions], "A")
    assert mmbench.score(questions, answers) is None and "MMBench's server" in capsys.readouterr().out
    mmbench.write(tmp_path, questions, answers)
    with pytest.raises(ValueError, match="no right answers are in it"):
        mmbench.read_answers(tmp_path / "MMBench_DEV_EN_predictions.tsv", questions, args)


def test_official_files_are_read_back(data, tmp_path):
    args = arguments(mmbench, data)
    questions = mmbench.read(args)
    answers = right(questions) | {"7": 'a "circle"\tor\nnot'}
    mmbench.write(tmp_path, questions, answers)
    path = tmp_path / "MMBench_DEV_EN_predictions.tsv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = [name for name in evals_data.MMBENCH_COLUMNS if name != "image"]
    assert list(rows[0]) == [*columns, "prediction"] and rows[0]["prediction"] == answers["7"]
    assert rows[0]["hint"] == "Look\nclosely" and rows[4]["hint"] == ""
    assert mmbench.read_answers(path, questions, args) == answers
    write_table(path, rows[::-1])                                   # keyed by index, so the order is free
    assert mmbench.read_answers(path, questions, args) == answers
    write_table(path, rows[:-1])
    with pytest.raises(ValueError, match="1 of 6 questions have no answer, the first of them is '1000012'"):
        mmbench.read_answers(path, questions, args)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cells under 14 columns; is the file cut off"):
        mmbench.read_answers(path, questions, args)
    rows = [{"index": int(key), "prediction": text} for key, text in answers.items()]
    write_lines(tmp_path / "p.jsonl", rows)
    assert mmbench.read_answers(tmp_path / "p.jsonl", questions, args) == answers
    with pytest.raises(ValueError, match="save the sheet as TSV"):
        mmbench.read_answers(tmp_path / "p.xlsx", questions, args)


@pytest.mark.parametrize("index, change, message", [
    (0, {"image": ""}, "line 2: no image"),
    (1, {"image": "8"}, "line 4: the image is that of row '8', which holds none"),
    (1, {"index": "x"}, "line 4: index is 'x'; a number is expected"),
    (1, {"index": "7"}, "line 4: the question '7' stands on line 2 too"),
    (0, {"question": " "}, "line 2: question is empty"),
    (0, {"answer": "E"}, "line 2: the answer 'E' is none of the options A, B, C, D"),
    (1, {"answer": ""}, "1 of 6 rows have no answer, the first of them is that of index 1000007"),
    (4, {"B": ""}, "line 10: fewer than two options"),
    (1, {"index": "9000009"}, "question 7 has 3 rows for 4 rotations; is the file cut short?")])
def test_bad_rows(tmp_path, index, change, message):
    rows = evals_data.mmbench_rows()
    rows[index] |= change
    data = evals_data.mmbench(tmp_path, rows)
    found = refused(mmbench, arguments(mmbench, data))
    assert found.startswith(str(data)) and message in found


def test_a_table_that_is_cut_off(data):
    args = arguments(mmbench, data)
    whole = data.read_bytes()
    data.write_bytes(whole[:-12])
    assert "line 11: 12 cells under 14 columns; is the file cut off?" in refused(mmbench, args)
    data.write_bytes(whole[:whole.rindex(b'"') - 3])
    assert "line 11: not a table, or cut off" in refused(mmbench, args)
    data.write_bytes(whole[:whole.rindex(b"\n", 0, -1) + 1])
    assert "question 12 has 1 rows for 2 rotations" in refused(mmbench, args)
    data.write_bytes(whole[:whole.index(b"\n") + 1])
    assert "there is no row under a header" in refused(mmbench, args)
    data.unlink()
    assert refused(mmbench, args) == f"{data}: no such file"


def test_pictures_that_are_not_base64_make_the_question_fail(tmp_path):
    rows = evals_data.mmbench_rows()
    rows[0]["image"] = rows[0]["image"][:-3]
    rows[4]["image"] = "ü" * 80
    questions = mmbench.read(arguments(mmbench, evals_data.mmbench(tmp_path, rows)))
    with pytest.raises(ValueError):
        open_image(questions[0].image)
    with pytest.raises(ValueError):
        open_image(questions[4].image)
