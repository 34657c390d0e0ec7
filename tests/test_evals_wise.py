"""WISE: the rule in its corners, the data and score files of both editions, and a judge's scores."""
import argparse
import json

import judge_server
import pytest
from PIL import Image

from harmonkit.evals import wise
from harmonkit.evals.rules import wise as rules

SPELLINGS = {"CULTURE": "Cultural knowledge", "TIME": "time", "SPACE": "Spatial reasoning",
             "BIOLOGY": "biology", "PHYSICS": "Physical knowledge", "CHEMISTRY": "Chemistry"}


def arguments(*flags):
    parser = argparse.ArgumentParser()
    wise.add_arguments(parser)
    return parser.parse_args(list(map(str, flags)))


def entries(edition="original", ids=range(1, 1001)):
    return [{"Prompt": f"prompt {i} {{x}}", "Explanation": f"explanation {i}", "prompt_id": i,
             "Category": SPELLINGS[rules.category(i, edition)], "Subcategory": "s"} for i in ids]


def data_folder(folder, edition="original"):
    """WISE's three files."""
    folder.mkdir()
    for name, first, last in (("cultural", 1, 400), ("natural", 701, 1000), ("spatio", 401, 700)):
        (folder / f"{name}.json").write_text(json.dumps(entries(edition, range(first, last + 1))))
    return folder


def lines(edition="original"):
    """A line of scores for each of the 1,000 ids."""
    if edition == "verified":
        return [{"prompt_id": i, "Subcategory": "s", "score": int(i % 3 == 0)} for i in range(1, 1001)]
    return [{"prompt_id": i, "Subcategory": "s", "consistency": i % 3, "realism": i // 3 % 3,
             "aesthetic_quality": i // 7 % 3} for i in range(1, 1001)]


def score_file(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- the rule ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, scores", [
    ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", [2, 1, 0]),
    ("**Consistency**: 2, *REALISM* 1, **aesthetic quality**\n0", [2, 1, 0]),
    ("Consistency: 1\nRealism: 1\nAesthetic Quality: 1\nConsistency: 2", [2, 1, 1]),   # the last counts
    ("Thoughts.\n2\n 1\n0\n2", [2, 1, 0]),
    ("Consistency: two\n2\n1\n0", [2, 1, 0]),
    ("Consistency: 7\nRealism: 12\nAesthetic Quality: 0.9", [7, 1, 0])])
def test_complete_replies(text, scores):
    read = rules.judge_scores(text)
    assert read["complete"]
    assert [read["scores"][aspect] for aspect in rules.ASPECTS] == scores
    assert read["wiscore"] == pytest.approx(0.35 * scores[0] + 0.1 * scores[1] + 0.05 * scores[2])


@pytest.mark.parametrize("text, scores", [
    ("Consistency: 2\n2\n1\n0", {"consistency": 2}),            # lone digits count only if no name is found
    ("**Consistency:** 2", {}), ("2\n1\n3\n", {}), ("2 1 0", {}), ("", {})])
def test_incomplete_replies(text, scores):
    assert rules.judge_scores(text) == {"scores": scores, "complete": False}


@pytest.mark.parametrize("text, score", [
    ("**Score**: 1", 1), ("score\n0", 0), ("Score: 1.5", 1), ("I think:\n 0 ", 0), ("Score: 2\n1", 1),
    ("Score: 10", None), ("1\n1", None), ("Score = 1", None), ("yes", None)])
def test_replies_of_the_verified_edition(text, score):
    read = rules.judge_scores(text, "verified")
    assert read == {"scores": {} if score is None else {"score": score}, "complete": score is not None}


@pytest.mark.parametrize("number, original, verified", [
    (0, None, None), (1, "CULTURE", "CULTURE"), (400, "CULTURE", "CULTURE"), (401, "TIME", "TIME"),
    (520, "TIME", "TIME"), (521, "TIME", "SPACE"), (567, "TIME", "SPACE"), (568, "SPACE", "SPACE"),
    (641, "SPACE", "BIOLOGY"), (700, "SPACE", "BIOLOGY"), (701, "BIOLOGY", "BIOLOGY"),
    (761, "BIOLOGY", "PHYSICS"), (881, "PHYSICS", "CHEMISTRY"), (1000, "CHEMISTRY", "CHEMISTRY"),
    (1001, None, None)])
def test_categories_by_id(number, original, verified):
    assert (rules.category(number), rules.category(number, "verified")) == (original, verified)


# ---- the data ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("edition", ["original", "verified"])
def test_prompts_of_three_files_and_of_one(tmp_path, edition):
    items = wise.read(arguments("--data", data_folder(tmp_path / "data", edition)))
    assert [item.name for item in items] == [str(i) for i in range(1, 1001)]
    assert {item.fields["edition"] for item in items} == {edition}
    assert (items[566].prompt, wise.picture(566, items[566], 0)) == ("prompt 567 {x}", "567.png")
    file = tmp_path / "all.json"
    file.write_text(json.dumps(entries(edition)[::-1]))
    assert wise.read(arguments("--data", file)) == items


@pytest.mark.parametrize("change, fault", [
    (lambda all: all[:-1], "1 of 1000 prompts are missing: prompt_id 1000"),
    (lambda all: all + all[:1], "entry 1001: prompt_id 1 stands twice"),
    (lambda all: [all[0] | {"Prompt": ""}], "entry 1: no Prompt"),
    (lambda all: [all[0] | {"prompt_id": "1"}], "entry 1: prompt_id is '1'"),
    (lambda all: [all[0] | {"prompt_id": 1001}], "entry 1: prompt_id is 1001"),
    (lambda all: ["a text"], "entry 1: a str where an object"),
    (lambda all: {"a": 1}, "a dict where a JSON array"),
    (lambda all: all[:600] + [all[600] | {"Category": "biology"}] + all[601:], "agree with no edition"),
    (lambda all: [entry | {"Category": "knowledge"} for entry in all], "do not tell which edition")])
def test_bad_data(tmp_path, change, fault):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(change(entries())))
    with pytest.raises(ValueError, match=fault) as raised:
        wise.read(arguments("--data", file))
    assert str(file) in str(raised.value)


def test_cut_and_missing_data(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries(), indent=1)[:2000])
    with pytest.raises(ValueError, match="data.json, line [0-9]+: not JSON"):
        wise.read(arguments("--data", file))
    with pytest.raises(ValueError, match="--data is missing"):
        wise.read(arguments())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a folder without .json files"):
        wise.read(arguments("--data", tmp_path / "empty"))


def test_the_flag_must_agree_with_the_data(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries("verified")))
    with pytest.raises(ValueError, match="--edition original: .* is the edition verified"):
        wise.read(arguments("--data", file, "--edition", "original"))
    file.write_text(json.dumps([entry | {"Category": "knowledge"} for entry in entries()]))
    items = wise.read(arguments("--data", file, "--edition", "verified"))
    assert items[0].fields["edition"] == "verified"


# ---- score files -------------------------------------------------------------------------------------------

def test_scores_of_the_original_edition(tmp_path):
    result = wise.read_scores(score_file(tmp_path / "scores.jsonl", lines()), arguments())
    means = {"cultural": 0.499375, "time": 0.5014970059880239, "space": 0.49774436090225554,
             "biology": 0.5065, "physics": 0.496, "chemistry": 0.4965}
    assert result.scores["original"] == pytest.approx({"overall": 0.4996} | means)
    plain = result.scores["plain mean, as RecA and BAGEL"]
    assert plain == {"overall": pytest.approx(sum(means.values()) / 6)}
    assert result.headline == ("original", "overall", pytest.approx(0.4996))


def test_scores_of_the_verified_edition_in_several_files(tmp_path):
    score_file(tmp_path / "1_scores.jsonl", lines("verified")[:400])
    score_file(tmp_path / "2_scores.jsonl", lines("verified")[400:])
    result = wise.read_scores(tmp_path, arguments())
    assert list(result.scores) == ["verified"]
    assert result.scores["verified"]["overall"] == pytest.approx(0.4 * 0.3325 + 0.6 / 3)
    with pytest.raises(ValueError, match="scores of the edition verified, not of original"):
        wise.read_scores(tmp_path, arguments("--edition", "original"))
    (tmp_path / "data.json").write_text(json.dumps(entries()))
    with pytest.raises(ValueError, match="scores of the edition verified, not of original"):
        wise.read_scores(tmp_path, arguments("--data", tmp_path / "data.json"))


@pytest.mark.parametrize("change, fault", [
    (lambda all: all[:16] + all[17:], "1 of 1000 scores are missing: prompt_id 17"),
    (lambda all: all + [all[4]], "line 1001: prompt_id 5 stands on .*, line 5 too"),
    (lambda all: [all[0] | {"realism": None}], "line 1: realism is None; a number from 0 to 2"),
    (lambda all: [all[0] | {"consistency": 2.5}], "line 1: consistency is 2.5"),
    (lambda all: [all[0] | {"aesthetic_quality": float("nan")}], "line 1: aesthetic_quality is nan"),
    (lambda all: [all[0] | {"prompt_id": 0}], "line 1: prompt_id is 0"),
    (lambda all: [all[0] | {"prompt_id": "1"}], "line 1: prompt_id is '1'"),
    (lambda all: [all[0] | {"score": 1}], "line 1: scores of both editions in one line"),
    (lambda all: [{"prompt_id": 1, "score": 0.5}], "line 1: score is 0.5; 0 or 1"),
    (lambda all: all[:500] + lines("verified")[500:], "line 501: a score of the verified.*, line 1 has")])
def test_bad_score_files(tmp_path, change, fault):
    file = score_file(tmp_path / "scores.jsonl", change(lines()))
    with pytest.raises(ValueError, match=fault):
        wise.read_scores(file, arguments())


# ---- the judge ---------------------------------------------------------------------------------------------

def pictures(folder, items):
    folder.mkdir()
    for item in items:
        number = int(item.name)
        Image.new("RGB", (4, 4), (number // 256, number % 256, 0)).save(folder / f"{number}.png")
    return folder


def judged(request):
    """Scores of `lines`, by the id that the request tells."""
    line = lines()[int(request.text.split("Prompt: prompt ")[1].split()[0]) - 1]
    return (f"Consistency: {line['consistency']}\nRealism: {line['realism']}\n"
            f"Aesthetic Quality: {line['aesthetic_quality']}")


@pytest.fixture
def original(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries()))
    return file


def judge_flags(server, data):
    return arguments("--data", data, "--judge-url", server.url, "--judge-model", "some-judge")


def test_a_judge_gives_scores(tmp_path, original):
    with judge_server.running(judged) as server:
        args = judge_flags(server, original)
        items = wise.read(args)[:5]
        out = pictures(tmp_path / "out", items)
        result = wise.score(out, items, args)
        assert len(server.requests) == 5
        assert wise.score(out, items, args) == result
        assert len(server.requests) == 5
    asked, = [request.text for request in server.requests if "prompt 3 {x}" in request.text]
    assert "explanation 3" in asked
    values = [rules.line_score(line) for line in lines()[:5]]
    mean = pytest.approx(sum(values) / 5)
    assert result.scores == {"original, a part": {"mean": mean, "cultural": mean}}
    assert "not by GPT-4o-2024-05-13" in result.notes[0]
    assert "5 of 1000 prompts: no WISE score" in result.notes[1]
    written = [json.loads(line) for line in (out / wise.SCORES).read_text().splitlines()]
    assert written == lines()[:5]


def test_a_judge_that_gives_no_scores_is_asked_three_times(tmp_path, original):
    def sometimes(request):
        again = sum(earlier.text == request.text for earlier in server.requests) < 3
        return "I cannot say." if "prompt 2 " in request.text and again else judged(request)
    with judge_server.running(sometimes) as server:
        args = judge_flags(server, original)
        items = wise.read(args)[:3]
        result = wise.score(pictures(tmp_path / "out", items), items, args)
        assert (result.counts["prompts"], len(server.requests)) == (3, 5)
    with judge_server.running(lambda request: "I cannot say.") as server:
        with pytest.raises(ValueError, match="3 of 3 pictures have no scores .* no WISE score"):
            wise.score(tmp_path / "out", items, judge_flags(server, original))
        assert len(server.requests) == 9


def test_missing_pictures_are_refused(tmp_path, original):
    args = arguments("--data", original, "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x")
    items = wise.read(args)
    out = pictures(tmp_path / "out", items[:990])
    with pytest.raises(ValueError, match="10 of 1000 pictures are missing: 991, .*, 995 and 5 more"):
        wise.read_scores(out, args)


def test_without_a_judge_pictures_are_for_wises_own(tmp_path, original, capsys):
    args = arguments("--data", original)
    assert wise.score(tmp_path, wise.read(args), args) is None
    assert "WISE's own scripts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a folder without .jsonl files"):
        wise.read_scores(tmp_path, args)
