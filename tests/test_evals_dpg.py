"""DPG-Bench: the rule in its corners, the table of questions, files of answers, and a judge's answers."""
import argparse
import csv
import json
from collections import Counter

import judge_server
import pytest
from PIL import Image

from harmonkit.evals import dpg
from harmonkit.evals.benchmark import Item
from harmonkit.evals.dpg_files import read_questions
from harmonkit.evals.rules import dpg as rules
from harmonkit.images import image_grid, open_image

HEADER = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
          "category_detailed", "tuple", "question_natural_language")
# item, number, parents, tuple, question
TABLE = [("b", 1, "0", "entity - whole (dog)", "Is there a dog?"),
         ("b", 2, "1", "attribute - color (dog, red)", "Is the dog red?"),
         ("a", 1, "0", "entity - whole (cat)", "Is there a cat?"),
         ("a", 2, "1", "relation - spatial (cat, mat)", "Is the cat on the mat?"),
         ("a", 3, "2", "global - (style)", "Is it a painting?")]
ANSWERS = {("b", 1): "yyyn", ("b", 2): "yynn", ("a", 1): "nyyy", ("a", 2): "ynyy", ("a", 3): "yyny"}


def arguments(*flags):
    parser = argparse.ArgumentParser()
    dpg.add_arguments(parser)
    return parser.parse_args(list(map(str, flags)))


def csv_file(path, rows=TABLE, answers=None):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER if answers is None else (*HEADER, *(f"answer_{i}" for i in range(1, 5))))
        for item, number, parents, text, question in rows:
            row = [item, "the prompt, with a comma", "", number, parents, "x", "y", text, question]
            writer.writerow(row if answers is None else row + words(answers[item, number]))
    return path


def words(letters):
    return [{"y": "yes", "n": "no", "-": None}.get(letter, letter) for letter in letters]


def answer_file(folder, answers=ANSWERS, order=TABLE):
    file = folder / "answers.jsonl"
    lines = [{"item_id": item, "proposition_id": number, "answers": words(answers[item, number])}
             for item, number, *_ in order]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def flags(tmp_path):
    """--data and --questions for two prompts, a and b."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"item_id": "a", "text": "A cat."}\n{"item_id": "b", "text": "A red dog."}\n')
    return "--data", prompts, "--questions", csv_file(tmp_path / "dpg_bench.csv")


# ---- the rule ----------------------------------------------------------------------------------------------

def questions(*rows):
    return [{"proposition_id": number, "dependency": parents, "tuple": text, "answers": words(answers)}
            for number, parents, text, answers in rows]


def test_zeros_are_passed_on_in_the_tables_order():
    family = [(1, "0", "x", "nnnn"), (2, "1", "x", "yyyy"), (3, "0, 2", "x", "yyyy"), (4, "0", "x", "yyyy")]
    assert rules.score_picture(questions(*family))["crops"] == [0.25] * 4
    child_first = [family[2], family[0], family[1], family[3]]
    assert rules.score_picture(questions(*child_first))["crops"] == [0.5] * 4


def test_only_the_word_yes_counts():
    assert list(map(rules.answer_value, ("yes", "Yes", "yes.", " yes", "", "no"))) == [1, 0, 0, 0, 0, 0]


def test_an_unknown_parent_fails_unless_an_earlier_one_is_no():
    with pytest.raises(ValueError, match="question 2 depends on question 7"):
        rules.score_picture(questions((1, "0", "x", "yyyy"), (2, "1,7", "x", "yyyy")))
    assert rules.score_picture(questions((1, "0", "x", "nnnn"), (2, "1,7", "x", "yyyy")))["score"] == 0
    with pytest.raises(ValueError, match="dependency is 'one'"):
        rules.score_picture(questions((1, "one", "x", "yyyy")))


def test_categories_hold_the_last_crop_before_zeroing():
    rows = questions((1, "0", "entity (dog)", "yyyn"), (2, "1", "other-count(dog)", "nnny"))
    assert rules.score_picture(rows) == {
        "crops": [0.5, 0.5, 0.5, 0.0], "score": 0.375,
        "category_answers": {"1": ["entity", 0.0], "2": ["other-count", 1.0]}}
    with pytest.raises(ValueError, match="question 1 has 3 answers; there are 4 crops"):
        rules.score_picture(questions((1, "0", "x", "yyy")))


# ---- prompts and pictures ----------------------------------------------------------------------------------

def test_the_official_prompts():
    items = dpg.read(arguments())
    assert len({item.name for item in items}) == 1065
    lines = [json.loads(line) for line in dpg.PROMPTS.read_text().splitlines()]
    assert [(item.name, item.prompt) for item in items] == [(line["item_id"], line["text"]) for line in lines]
    assert [dpg.grid(0, items[0]), dpg.picture(0, items[0], 3)] == ["0.png", "samples/0-3.png"]


def test_crops_are_the_pictures_row_by_row(tmp_path):
    colors = ["red", "lime", "blue", "white"]
    image_grid([Image.new("RGB", (8, 6), color) for color in colors]).save(tmp_path / "grid.png")
    crops = [open_image(crop) for crop in dpg.crops(tmp_path / "grid.png")]
    assert [crop.size for crop in crops] == [(8, 6)] * 4
    assert [crop.getcolors()[0] for crop in crops] == [
        (48, (255, 0, 0)), (48, (0, 255, 0)), (48, (0, 0, 255)), (48, (255, 255, 255))]
    Image.new("RGB", (9, 8)).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match="9 × 8 pixels are no grid"):
        dpg.crops(tmp_path / "odd.png")


# ---- the table ---------------------------------------------------------------------------------------------

def test_rows_of_the_table(tmp_path):
    rows = read_questions(csv_file(tmp_path / "table.csv"))
    assert [(row["item_id"], row["proposition_id"], row["question"]) for row in rows] == [
        (item, number, question) for item, number, _, _, question in TABLE]
    assert [row["is_first"] for row in rows] == [True, False, False, False, False]


@pytest.mark.parametrize("rows, fault", [
    ([("b", "one", "0", "x", "?")], "line 2: invalid literal"),
    ([("b", 1, "0", "x", "?"), ("b", 2, "x", "x", "?")], "line 3: dependency is 'x'")])
def test_bad_tables(tmp_path, rows, fault):
    with pytest.raises(ValueError, match=fault):
        read_questions(csv_file(tmp_path / "table.csv", rows))


def test_a_table_of_other_columns_is_refused(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("item_id,text\n0,a cat\n")
    with pytest.raises(ValueError, match="line 1: no column proposition_id, dependency, tuple"):
        read_questions(file)
    csv_file(file)
    file.write_text(file.read_text() + "b,cut off\n")
    with pytest.raises(ValueError, match="line 7: 2 cells under 9 columns"):
        read_questions(file)


def test_a_question_without_its_parent_leaves_the_prompt_out(tmp_path, flags):
    csv_file(flags[3], [*TABLE[:2], TABLE[2], TABLE[4]])                    # a's question 3 depends on 2
    result = dpg.read_scores(answer_file(tmp_path, order=[*TABLE[:3], TABLE[4]]), arguments(*flags))
    assert result.scores["all questions"]["overall"] == pytest.approx(100 * 2.5 / 4)
    assert (result.counts["scored prompts"], "official" in result.scores) == (1, False)
    assert result.notes[0].endswith("which is not there: a")


def test_prompts_without_questions_are_refused(tmp_path, flags):
    csv_file(flags[3], TABLE[:2])
    with pytest.raises(ValueError, match="no questions about a"):
        dpg.read_scores(answer_file(tmp_path, order=TABLE[:2]), arguments(*flags))


# ---- files of answers --------------------------------------------------------------------------------------

def test_scores_of_an_answers_file(tmp_path, flags):
    result = dpg.read_scores(answer_file(tmp_path), arguments(*flags))
    # b: crops 1, 1, 0.5, 0. a: crops 0; (1, 0, 0); (1, 1, 0); 1.
    b, a = (1 + 1 + 0.5 + 0) / 4, (0 + 1 / 3 + 2 / 3 + 1) / 4
    whole, official = result.scores["all questions"], result.scores["official"]
    assert whole["overall"] == pytest.approx(100 * (a + b) / 2)
    assert whole["entity"] == whole["entity - whole"] == 50                 # the last crops: b no, a yes
    assert (whole["attribute"], whole["relation"], whole["global"]) == (0, 100, 100)
    # The official tool loses b's first question, on which its second one depends: b falls out.
    assert official["overall"] == pytest.approx(100 * a)
    assert official["entity"] == 100
    assert result.counts == {"prompts": 2, "questions": 5, "scored prompts": 2, "no answer": 0,
                             "neither yes nor no": 0, "failed officially": 1}
    table = csv_file(tmp_path / "answered.csv", answers=ANSWERS)
    assert dpg.read_scores(table, arguments(*flags)).scores == result.scores


def test_prompts_without_an_answer_are_counted(tmp_path, flags):
    file = answer_file(tmp_path, ANSWERS | {("b", 2): "y-yn", ("a", 1): ["Yes", "yes", "yes", "yes"]})
    result = dpg.read_scores(file, arguments(*flags))
    assert result.scores["all questions"]["overall"] == pytest.approx(100 * (0 + 1 / 3 + 2 / 3 + 1) / 4)
    assert (result.counts["scored prompts"], result.counts["no answer"]) == (1, 1)
    assert result.counts["neither yes nor no"] == 1
    assert [note.split(":")[0] for note in result.notes] == [
        "1 of 2 prompts are left out", "answers that are neither yes nor no, and count as no"]
    none = answer_file(tmp_path, dict.fromkeys(ANSWERS, "y--y"))
    with pytest.raises(ValueError, match="10 of 20 answers are missing or cannot be read"):
        dpg.read_scores(none, arguments(*flags))


@pytest.mark.parametrize("order, fault", [
    (TABLE[:4], "answers to 4 questions; 5 are asked"),
    ([*TABLE, TABLE[4]], "answers to 6 questions; 5 are asked"),
    ([*TABLE[:3], TABLE[4], TABLE[3]], "line 4: question 3 of a; question 2 of a is expected there")])
def test_answers_to_other_questions_are_refused(tmp_path, flags, order, fault):
    with pytest.raises(ValueError, match=fault):
        dpg.read_scores(answer_file(tmp_path, order=order), arguments(*flags))


def test_bad_answer_files(tmp_path, flags):
    for answers in ("yyy", [True] * 4):
        with pytest.raises(ValueError, match="line 1: answers must be 4 texts"):
            dpg.read_scores(answer_file(tmp_path, ANSWERS | {("b", 1): answers}), arguments(*flags))
    with pytest.raises(ValueError, match="line 1: no column answer_1, answer_2"):
        dpg.read_scores(flags[3], arguments(*flags))
    with pytest.raises(ValueError, match="--questions is missing"):
        dpg.read_scores(answer_file(tmp_path), arguments(*flags[:2]))


# ---- the judge ---------------------------------------------------------------------------------------------

COLORS = ("red", "lime", "blue", "white")                   # of the four pictures of a grid
PIXELS = {(255, 0, 0): 0, (0, 255, 0): 1, (0, 0, 255): 2, (255, 255, 255): 3}


def answering(request):
    """Answers as in ANSWERS, in varying manners. The picture's color tells which of the four it is."""
    number = PIXELS[open_image(request.image).getpixel((0, 0))]
    row, = [row for row in TABLE if row[4] in request.text]
    word = words(ANSWERS[row[:2]])[number]
    return {0: word, 1: f"{word.capitalize()}.", 2: f"**{word}**", 3: f" {word}\n"}[number]


@pytest.fixture
def grids(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in "ab":
        image_grid([Image.new("RGB", (8, 8), color) for color in COLORS]).save(out / f"{name}.png")
    return out


def test_a_judge_answers(tmp_path, flags, grids):
    with judge_server.running(answering) as server:
        args = arguments(*flags, "--judge-url", server.url, "--judge-model", "some-judge")
        items = [Item("a", "A cat."), Item("b", "A red dog.")]
        result = dpg.score(grids, items, args)
        assert len(server.requests) == 20
        expected = dpg.read_scores(answer_file(tmp_path), arguments(*flags))
        assert result.scores == expected.scores
        assert "some-judge, not by mPLUG-large" in result.notes[0]
        # The file that it writes is one that can be scored; a second run asks nothing.
        assert dpg.read_scores(grids / dpg.ANSWERS, arguments(*flags)).scores == expected.scores
        assert dpg.read_scores(grids, args).scores == expected.scores
        assert len(server.requests) == 20


def test_a_judge_that_says_neither_is_asked_three_times(flags, grids):
    def unsure(request):
        return "It depends." if "mat" in request.text else "yes"
    with judge_server.running(unsure) as server:
        args = arguments(*flags, "--judge-url", server.url, "--judge-model", "some-judge")
        result = dpg.read_scores(grids, args)
        assert Counter("mat" in request.text for request in server.requests) == {True: 12, False: 16}
    assert result.scores["all questions"]["overall"] == 100
    assert (result.counts["scored prompts"], result.counts["no answer"]) == (1, 4)
    assert "official" not in result.scores              # it lacks b's first question, and a is left out
    assert result.notes[-1] == "the official tool scores none of these prompts"


def test_missing_pictures_are_refused(flags, grids):
    (grids / "a.png").unlink()
    args = arguments(*flags, "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "some-judge")
    with pytest.raises(ValueError, match="1 of 2 pictures are missing: a"):
        dpg.read_scores(grids, args)


def test_flags_that_are_missing(flags, grids, capsys):
    assert dpg.score(grids, dpg.read(arguments(*flags)), arguments(*flags)) is None
    assert "compute_dpg_bench.py" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a folder; give --judge-url"):
        dpg.read_scores(grids, arguments(*flags))
    with pytest.raises(ValueError, match="--judge-url: --questions is missing"):
        dpg.check(arguments(*flags[:2], "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x"))
