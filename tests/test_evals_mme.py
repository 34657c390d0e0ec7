"""MME: both layouts of its files, four-column results, pairs."""
import evals_data
import pytest
from evals_data import arguments, refused

from harmonkit.evals import mme
from harmonkit.evals.rules.mme import SUBTASKS


@pytest.fixture
def data(tmp_path):
    return evals_data.mme(tmp_path, pairs=2)


def right(questions):
    return {question.key: question.fields["label"] for question in questions}


def test_questions_and_pictures_of_all_subtasks(data):
    questions = mme.read(arguments(mme, data))
    assert len(questions) == 56
    assert [question.key for question in questions[:5]] == [
        "existence/1", "existence/2", "existence/3", "existence/4", "count/1"]
    assert questions[0].text == ("Is there a circle 0? Please answer yes or no.\n"
                                 "Answer the question using a single word or phrase.")
    assert questions[0].image == data / "existence/000000.jpg"
    assert questions[6].image == data / "count/images/000001.jpg"
    assert all(question.image.is_file() for question in questions)
    official = mme.read(arguments(mme, data, "--template", "official"))
    assert official[1].text == "Is there a snowboard 0? Please answer yes or no."
    assert mme.files(arguments(mme, data))[1] == data / "count.txt"


def test_the_folder_of_pictures_with_a_text_file_each(tmp_path):
    data = evals_data.mme_release(tmp_path)
    args = arguments(mme, data)
    questions = mme.read(args)
    assert len(questions) == 28 and mme.files(args) == [data]
    assert questions[0].image == data / "existence/0001.png"
    assert questions[3].image == data / "count/images/0001.png"
    assert questions[3].fields == {"subtask": "count", "picture": "0001", "label": "No",
                                   "text": "Is there a dog? Please answer yes or no."}


def test_scores(data):
    questions = mme.read(arguments(mme, data))
    perfect = mme.score(questions, right(questions))
    assert perfect.headline == ("official", "perception", 2000)
    assert perfect.scores["official"]["cognition"] == 800
    answers = right(questions) | {"existence/1": "No", "count/3": "**Yes**", "OCR/1": "Yes\tit\nis"}
    result = mme.score(questions, answers)
    official = result.scores["official"]
    assert (official["existence"], official["existence acc"], official["existence acc+"]) == (125, 0.75, 0.5)
    assert official["count"] == 125 and official["OCR"] == 200 and official["perception"] == 1850
    assert result.scores["lmms_eval"]["perception"] == 1850
    assert result.counts["other"] == 1
    assert "56 questions; MME has 2,374" in result.notes


def test_a_failed_question_takes_its_picture_along(data):
    questions = mme.read(arguments(mme, data))
    for failed in ("existence/1", "existence/2"):
        result = mme.score(questions, right(questions) | {failed: None, "existence/3": "No"})
        assert result.scores["official"]["existence"] == 50 and result.counts["failed"] == 1
    assert "1 of 56 questions failed" in result.notes[0]


def test_nothing_is_scored_without_a_whole_pair(data):
    [question, *_] = mme.read(arguments(mme, data))
    with pytest.raises(ValueError, match="no picture has answers to both of its questions"):
        mme.score([question], {question.key: "yes"})


def test_a_part_has_no_sums_of_missing_subtasks(data):
    questions = mme.read(arguments(mme, data))[:7]
    result = mme.score(questions, right(questions))
    assert list(result.scores["official"])[:2] == ["existence", "existence acc"]
    assert "1 question without the second one about its picture is left out" in result.notes
    assert "2 of 14 subtasks; sums with a missing one are left out" in result.notes


def test_official_files_are_read_back(data, tmp_path):
    args = arguments(mme, data)
    questions = mme.read(args)
    answers = right(questions) | {"color/2": " yes, it\tis\n"}
    mme.write(tmp_path / "out", questions, answers)
    lines = (tmp_path / "out/color.txt").read_text().split("\n")
    assert lines[1] == "000000.jpg\tIs there a snowboard 0? Please answer yes or no.\tNo\t yes, it is "
    assert len(list((tmp_path / "out").iterdir())) == len(SUBTASKS)
    assert mme.read_answers(tmp_path / "out", questions, args) == answers | {"color/2": " yes, it is "}
    path = tmp_path / "out/color.txt"
    path.write_text("\n".join([*lines[2:4], *lines[:2]]))           # another order, the pairs whole
    assert mme.read_answers(tmp_path / "out", questions, args)["color/2"] == " yes, it is "


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[:3], "3 questions; each picture has two, so is the file cut short"),
    (lambda lines: lines[:2], "2 of 4 questions have no answer, the first of them is 'color/3'"),
    (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2: the second question of a pair is"),
    (lambda lines: [lines[0].replace("\tYes\tYes", "\tYes"), *lines[1:]], "line 1: 3 columns"),
    (lambda lines: [lines[0].replace("\tYes\tYes", "\tNo\tYes"), *lines[1:]], "line 1: the right answer is"),
    (lambda lines: [*lines[:2], *lines[:2]], "line 3: no question of the data, or a second answer")])
def test_results_that_do_not_fit_are_refused(data, tmp_path, change, message):
    args = arguments(mme, data)
    questions = mme.read(args)
    mme.write(tmp_path / "out", questions, right(questions))
    path = tmp_path / "out/color.txt"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=f"color.txt.*{message}"):
        mme.read_answers(tmp_path / "out", questions, args)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="color.txt: no such file"):
        mme.read_answers(tmp_path / "out", questions, args)


def test_bad_data(data):
    args = arguments(mme, data)
    path = data / "color.txt"
    lines = path.read_text().splitlines(keepends=True)
    for change, message in ((lines[:3], "3 questions; each picture has two"),
                            ([lines[0], lines[2], lines[1], lines[3]], "line 2: the second question of"),
                            (["a\tb\n", *lines], "line 1: 2 columns"),
                            (["a\tb\tmaybe\n", *lines], "line 1: a question and Yes or No are expected")):
        path.write_text("".join(change))
        message_of = refused(mme, args)
        assert str(path) in message_of and message in message_of
    path.unlink()
    assert "the subtask color is missing" in refused(mme, args)
