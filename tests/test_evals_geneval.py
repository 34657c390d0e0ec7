"""GenEval: the rule in its corners, the files around the pictures, and result files, good and bad."""
import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from harmonkit.evals import geneval
from harmonkit.evals.__main__ import main
from harmonkit.evals.rules import geneval as rules

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
CAT = {"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
OFFICIAL_LINE = (
    '{"filename":"OUT\\/00000\\/samples\\/0000.png","tag":"single_object","prompt":"a photo of a dog",'
    '"correct":true,"reason":"","metadata":"{\\"tag\\": \\"single_object\\", \\"include\\": [{\\"class\\": '
    '\\"dog\\", \\"count\\": 1}], \\"prompt\\": \\"a photo of a dog\\"}","details":"{\\"dog\\": [[0.0, 0.0, '
    '20.0, 20.0, 0.949999988079071]]}"}\n')


def arguments(*flags):
    parser = argparse.ArgumentParser()
    geneval.add_arguments(parser)
    return parser.parse_args(list(map(str, flags)))


def found(*boxes, score=0.9, colors=()):
    detections = [{"box": box, "score": score} for box in boxes]
    return [detection | {"color": color} for detection, color in zip(detections, colors)] or detections


def prompt_file(folder, *lines, name="prompts.jsonl"):
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def result_file(folder, *verdicts, name="results.jsonl", **changes):
    """A result file with a line for each (metadata, correct)."""
    lines = []
    for number, (metadata, correct) in enumerate(verdicts):
        lines.append({"filename": f"OUT/{number:05}/samples/0000.png", "tag": metadata["tag"],
                      "prompt": metadata["prompt"], "correct": correct, "reason": "",
                      "metadata": json.dumps(metadata), "details": "{}"} | changes)
    return prompt_file(folder, *lines, name=name)


# ---- the rule ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag, score, counts", [
    ("colors", 0.3, 0), ("colors", 0.3 + 1e-9, 0), ("colors", 0.30001, 1),      # two are equal as float32
    ("counting", 0.9, 0), ("counting", 0.90001, 1), ("counting", 0.5, 0)])
def test_thresholds_are_strict_in_float32(tag, score, counts):
    assert len(rules.kept({"dog": found((0, 0, 1, 1), score=score)}, tag).get("dog", [])) == counts


def test_the_best_16_of_a_class_count():
    detections = {"cup": [{"box": (0, 0, 1, 1), "score": 0.95 + 0.001 * i} for i in range(20)]}
    assert rules.kept(detections, "counting") == {"cup": list(range(19, 3, -1))}
    metadata = {"tag": "counting", "include": [], "exclude": [{"class": "cup", "count": 17}]}
    assert rules.verdict(metadata, detections)["correct"]


@pytest.mark.parametrize("a, b, expected", [
    ((0, 0, 10, 10), (30, 0, 40, 10), ["left of"]),
    ((30, 40, 40, 50), (0, 0, 10, 10), ["right of", "below"]),
    ((0, 0, 10, 10), (100, 58, 110, 68), ["left of"]),              # 56 of 115.6 downward: less than half
    ((0, 0, 10, 10), (100, 64, 110, 74), ["left of", "above"]),     # 62 of 118.7: more than half
    ((0, 0, 10, 10), (2, 0, 12, 10), []),                           # within a tenth of both widths
    ((0, 0, 10, 10), (4, 0, 14, 10), []),                           # exactly half is not enough
    ((0, 0, 10, 10), (4.001, 0, 14.001, 10), ["left of"]),
    ((0, 0, 10, 100), (0, 25, 10, 125), []),                        # tall boxes have a tall dead zone
    ((5, 5, 5, 5), (5, 5, 5, 5), [])])
def test_relations(a, b, expected):
    assert rules.relations(a, b) == expected


def test_a_clause_cannot_refer_to_itself_or_a_later_one():
    metadata = {"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 1]},
                                               {"class": "cat", "count": 1}]}
    boxes = {"dog": found((0, 0, 9, 9)), "cat": found((0, 50, 9, 59))}
    with pytest.raises(ValueError, match="clause 1"):
        rules.verdict(metadata, boxes)
    metadata["include"][0]["position"] = ["above", 0]
    with pytest.raises(ValueError, match="clause 0"):
        rules.verdict(metadata, boxes)
    # A clause that fails before its position is looked at refers to nothing.
    assert rules.verdict(metadata, {})["reason"] == "expected dog>=1, found 0\nexpected cat>=1, found 0"


def test_a_clause_that_fails_is_no_target():
    cat = {"class": "cat", "count": 1, "color": "red"}
    metadata = {"tag": "position", "include": [cat, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    boxes = {"dog": found((0, 0, 9, 9)), "cat": found((50, 0, 59, 9), colors=["red"])}
    assert rules.verdict(metadata, boxes)["correct"]
    boxes["cat"][0]["color"] = "blue"
    assert rules.verdict(metadata, boxes)["reason"].splitlines() == [
        "expected red cat>=1, found 0 red; and 1 blue", "no target for dog to be left of"]


def test_colors_are_listed_in_their_own_order():
    metadata = {"tag": "colors", "include": [{"class": "car", "count": 4, "color": "green"}]}
    colors = ("white", "red", "green", "red")
    verdict = rules.verdict(metadata, {"car": found(*[(0, 0, 9, 9)] * 4, colors=colors)})
    assert verdict["reason"] == "expected green car>=4, found 1 green; and 2 red, 1 green, 1 white"


def test_colors_are_asked_only_for_the_objects_that_count():
    asked = []
    metadata = {"tag": "colors", "include": [{"class": "car", "count": 2, "color": "red"}]}
    detections = {"car": [{"box": (0, 0, 9, 9), "score": score} for score in (0.5, 0.9, 0.2, 0.8)]}

    def color_of(_, name, i):
        asked.append((name, i))
        return "red"
    assert rules.verdict(metadata, detections, color_of)["correct"]
    assert asked == [("car", 1), ("car", 3)]
    with pytest.raises(ValueError, match="detection 1 of 'car' has no color"):
        rules.verdict(metadata, detections)


def test_overall_is_the_mean_of_the_tasks():
    lines = [{"tag": tag, "metadata": text, "correct": correct} for tag, text, correct in
             [("colors", "a", True), ("colors", "a", False), ("colors", "b", False), ("position", "c", True)]]
    summary = rules.aggregate(lines)
    assert summary["overall"] == pytest.approx((1 / 3 + 1) / 2)
    assert summary["correct_images_percent"] == 50
    assert summary["correct_prompts_percent"] == pytest.approx(200 / 3)
    assert summary["tasks"]["colors"] == {"percent": pytest.approx(100 / 3), "correct": 1, "of": 3}
    with pytest.raises(ValueError, match="no results"):
        rules.aggregate([])


# ---- prompts and pictures ----------------------------------------------------------------------------------

def test_the_official_prompts():
    items = geneval.read(arguments())
    assert len(items) == 553
    assert Counter(item.fields["tag"] for item in items) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
        "color_attr": 100}
    assert len(geneval.NAMES) == len(set(geneval.NAMES)) == 80
    assert [geneval.NAMES[i] for i in (0, 64, 79)] == ["person", "computer mouse", "toothbrush"]
    assert geneval.picture(7, items[7], 3) == "00007/samples/0003.png"


def test_metadata_is_one_json_object(tmp_path):
    item = geneval.read(arguments())[552]
    geneval.prepare(tmp_path, 552, item)
    written = (tmp_path / "00552" / "metadata.jsonl").read_text()
    assert written == geneval.PROMPTS.read_text().splitlines()[552]                     # and no line break


@pytest.mark.parametrize("line, fault", [
    ('{"tag": "colors", "inc', "line 2: not JSON"),
    ("[1]", "line 2: a list where a JSON object"),
    (DOG | {"prompt": " "}, "line 2: no prompt"),
    (DOG | {"tag": "color"}, "line 2: tag is 'color'; known: single_object"),
    (DOG | {"include": None}, "line 2: include and exclude"),
    (DOG | {"include": [{"class": "remote", "count": 1}]}, "must be one of the 80"),
    (DOG | {"exclude": [{"class": "dog", "count": 0}]}, "count must be a number from 1 up"),
    (DOG | {"include": [{"class": "dog", "count": 1, "color": "grey"}]}, "known colors"),
    (DOG | {"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier clause"),
    (DOG | {"include": [{"class": "dog", "count": 1, "position": "above"}]}, "earlier clause")])
def test_bad_prompt_files(tmp_path, line, fault):
    file = prompt_file(tmp_path, DOG, line)
    with pytest.raises(ValueError, match=fault) as raised:
        geneval.read(arguments("--data", file))
    assert str(file) in str(raised.value)


def test_pictures_to_score(tmp_path):
    item, = geneval.read(arguments("--data", prompt_file(tmp_path, DOG)))
    geneval.prepare(tmp_path, 0, item)
    samples = tmp_path / "00000" / "samples"
    samples.mkdir()
    for name in ("0000.png", "0001.png", "00002.png", "grid.png", "0003.jpg"):
        Image.new("RGB", (8, 8)).save(samples / name)
    with pytest.raises(ValueError, match="samples: 3 of 4 pictures are there"):
        geneval.pictures_of(tmp_path, item)
    Image.new("RGB", (8, 8)).save(samples / "0003.png")
    names = [path.name for path in geneval.pictures_of(tmp_path, item)]
    assert names == ["0000.png", "0001.png", "00002.png", "0003.png"]
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(DOG, indent=1))
    assert len(geneval.pictures_of(tmp_path, item)) == 4
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(CAT))
    with pytest.raises(ValueError, match="not number 0 of --data, 'a photo of a dog'"):
        geneval.pictures_of(tmp_path, item)


def test_without_our_scorer_pictures_are_for_the_official_one(tmp_path, capsys):
    assert geneval.score(tmp_path, geneval.read(arguments()), arguments()) is None
    assert "evaluate_images.py" in capsys.readouterr().out


# ---- result files ------------------------------------------------------------------------------------------

def test_result_lines_are_the_official_ones():
    assert geneval.result_line(json.loads(OFFICIAL_LINE)) == OFFICIAL_LINE


def test_scores_of_a_result_file(tmp_path, capsys):
    data = prompt_file(tmp_path, DOG, CAT)
    file = result_file(tmp_path, *[(DOG, True)] * 4, *[(CAT, False)] * 3, (CAT, True))
    result = geneval.read_scores(file, arguments("--data", data))
    assert result.scores == {"official": {"overall": 0.625, "single_object": 1.0, "two_object": 0.25,
                                          "images": 0.625, "prompts": 1.0}}
    assert result.counts == {"prompts": 2, "images": 8, "nothing found": 8}
    assert any("mean of 2 of 6 tasks" in note for note in result.notes)
    assert any("found nothing in 8 of 8" in note for note in result.notes)
    assert geneval.read_scores(file, arguments("--data", data, "--scorer", "ours")).scores.keys() == {"ours"}
    main(["score", "geneval", str(file), "--data", str(data)])
    assert "0.625" in capsys.readouterr().out or "62.5" in capsys.readouterr().out


def test_scores_by_our_detector_are_marked_as_ours(tmp_path):
    data = prompt_file(tmp_path, DOG)
    file = result_file(tmp_path, *[(DOG, True)] * 4, name=geneval.RESULTS, details='{"dog": []}')
    result = geneval.read_scores(file, arguments("--data", data))
    assert result.scores.keys() == {"ours"}
    assert geneval.NOT_OFFICIAL in result.notes


@pytest.mark.parametrize("verdicts, changes, fault", [
    ([(DOG, True)] * 4, {}, "1 of 2 prompts have no result: a photo of a cat"),
    ([(DOG, True)] * 4 + [(CAT, True)] * 3, {}, "1 of 2 prompts have fewer than 4 results: a photo of a cat"),
    ([(DOG, True), (CAT, True), (DOG | {"prompt": "a dog"}, True)], {}, "'a dog' is no prompt of --data"),
    ([(DOG, True), (CAT, True)], {"filename": "a.png"}, "line 2: a.png stands on line 1 too"),
    ([(DOG, True)], {"correct": "yes"}, "line 1: correct is 'yes'"),
    ([(DOG, True)], {"correct": 1}, "line 1: correct is 1"),
    ([(DOG, True)], {"filename": None}, "line 1: no filename"),
    ([(DOG, True)], {"metadata": "{"}, "line 1: metadata is not JSON"),
    ([(DOG, True)], {"tag": "colors"}, "line 1: tag and prompt differ")])
def test_bad_result_files(tmp_path, verdicts, changes, fault):
    data = prompt_file(tmp_path, DOG, CAT)
    file = result_file(tmp_path, *verdicts, **changes)
    with pytest.raises(ValueError, match=fault) as raised:
        geneval.read_scores(file, arguments("--data", data))
    assert str(file) in str(raised.value)


def test_a_cut_result_file_is_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(OFFICIAL_LINE + OFFICIAL_LINE[:99])
    with pytest.raises(ValueError, match="line 2: not JSON"):
        geneval.read_scores(file, arguments())
    file.write_text("")
    with pytest.raises(ValueError, match="an empty file"):
        geneval.read_scores(file, arguments())
    with pytest.raises(FileNotFoundError):
        geneval.read_scores(Path("nowhere.jsonl"), arguments())
    with pytest.raises(ValueError, match="a folder"):
        geneval.read_scores(tmp_path, arguments())
