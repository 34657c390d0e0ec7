"""The table of scores: what stands beside what, what is said of unlike runs, and files that are refused."""
import argparse
import json
from types import SimpleNamespace

import pytest

from harmonkit.evals import manifest, results, table
from harmonkit.evals.benchmark import Result
from harmonkit.evals.entries import CATALOG

DRAWING = {"num_iter": 64, "cfg": 3.0, "cfg_schedule": "constant", "temperature": 1.0, "size": [512, 512],
           "dtype": "bfloat16", "per_prompt": 4, "num_sampling_steps": None}
GENEVAL = Result({"official": {"overall": 0.7583, "position": 0.7425}}, {"prompts": 553, "images": 2212})


def put(folder, name, result=None, settings=(), **fields):
    """A folder of results of the paper's settings, with these changes."""
    content = {"benchmark": name, "model": "wusize/Harmon-1_5B", "weights": {"fingerprint": "aaaa11112222"},
               "settings": DRAWING | dict(settings), "protocol": None, "data": {"prompts.jsonl": "d" * 64},
               "seed": 0, "seed_rule": "seed + 100000·prompt + sample", "limit": None, "status": "complete",
               "numbers": {"of": CATALOG[name].number, "failed": 0}, "runs": []}
    manifest.write(folder, content | fields)
    if result is not None:
        manifest.write_scores(folder, name, result)
    return folder


def shown(capsys, *folders, json_file=None):
    """({first cell: the other cells} of all tables, {number of a run: its lines}, the whole text)"""
    table.main(folders, SimpleNamespace(json=json_file))
    text = capsys.readouterr().out
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *others = line[2:-2].split(" | ")
            rows.setdefault(first, []).append(others)
    runs = {block.split("]")[0][1:]: block.splitlines() for block in text.split("\n\n") if block[0] == "["}
    return rows, runs, text


def test_beside_the_paper(tmp_path, capsys):
    put(tmp_path / "geneval", "geneval", GENEVAL)
    rows, runs, text = shown(capsys, tmp_path)
    assert "|  | GenEval, overall (official) |\n" in text
    assert rows["Harmon-0.5B, paper"] == [["0.71"]] and rows["Harmon-1.5B, paper"] == [["0.76"]]
    assert rows["Harmon-1_5B"] == [["0.7583"]]                      # no number: nothing to say about it
    assert rows["overall (official)"] == [["0.71", "0.76", "0.7583"]]
    assert rows["position (official)"] == [["0.55", "0.74", "0.7425"]]
    about = f"[1] Harmon-1_5B, GenEval, {tmp_path}/geneval: complete (prompts 553, images 2212)"
    assert runs == {"1": [about]}
    assert "Others: RecA's authors, the prompts as they are: overall 0.676 (Harmon-0.5B), 0.729" in text


def test_the_papers_percent_on_our_scale(tmp_path, capsys):
    answering = {"seed_rule": None, "settings": {"size": [512, 512]}, "protocol": "janus"}
    put(tmp_path / "mmmu", "mmmu", Result({"official": {"accuracy": 0.381}}), **answering)
    put(tmp_path / "pope", "pope", Result({"official": {"accuracy": 0.8825, "F1": 0.86}}), **answering)
    put(tmp_path / "gqa", "gqa", Result({"official": {"accuracy": 57.0}}), **answering)
    rows, _, _ = shown(capsys, tmp_path)
    assert rows["Harmon-1.5B, paper"] == [["0.876", "58.9", "0.389"]]
    assert rows["Harmon-1_5B"] == [["0.8825", "57.00", "0.3810"]]
    assert rows["F1 (official)"] == [["–", "–", "0.8600"]]


@pytest.mark.parametrize("settings, fields, said", [
    ({"size": [64, 64]}, {}, "size: 64×64; expected: 512×512"),
    ({"cfg": 1.0}, {}, "cfg: 1; expected: 3"),
    ({"num_iter": 16}, {}, "num_iter: 16; expected: 64"),
    ({}, {"limit": 3, "status": "part", "numbers": {"of": 553}},
     "part: the first 3; expected: all"),
    ({}, {"numbers": {"of": 10}}, "number: 10; expected: 553"),
    ({}, {"numbers": {"of": 553, "failed": 2}}, "failed: 2")])
def test_unlike_the_paper(tmp_path, capsys, settings, fields, said):
    put(tmp_path, "geneval", GENEVAL, settings, **fields)
    rows, runs, _ = shown(capsys, tmp_path)
    assert rows[table.labels_of(results.find([tmp_path]))[0]] == [["0.7583 [1]"]]
    assert runs["1"][1:] == [f"- {said}"]


@pytest.mark.parametrize("settings, fields, one, other", [
    ({"dtype": "float32"}, {}, "dtype: bfloat16; others in the column: float32",
     "dtype: float32; others in the column: bfloat16"),
    ({}, {"data": {"prompts.jsonl": "e" * 64}}, f"data: {'d' * 12}; others in the column: {'e' * 12}",
     f"data: {'e' * 12}; others in the column: {'d' * 12}"),
    ({}, {"seed": 1}, "seed: 0; others in the column: 1", "seed: 1; others in the column: 0"),
    ({"solver": "ddim"}, {}, None, None)])
def test_unlike_each_other(tmp_path, capsys, settings, fields, one, other):
    put(tmp_path / "a", "geneval", GENEVAL)
    put(tmp_path / "b", "geneval", GENEVAL, settings, weights={"fingerprint": "bbbb"}, **fields)
    rows, runs, _ = shown(capsys, tmp_path)
    assert runs["1"][1:] == ([f"- {one}"] if one else [])
    assert runs["2"][1:] == ([f"- {other}"] if other else [])
    mark = [" [1]", " [2]"] if one else ["", ""]
    assert rows["Harmon-1_5B aaaa1111"] == [[f"0.7583{mark[0]}"]]
    assert rows["Harmon-1_5B bbbb"] == [[f"0.7583{mark[1]}"]]


def test_questions_put_otherwise(tmp_path, capsys):
    for template in ("janus", "plain"):
        put(tmp_path / template, "pope", Result({"official": {"F1": 88.25}}), seed_rule=None,
            settings={"size": [512, 512]}, protocol=template)
    rows, runs, _ = shown(capsys, tmp_path)
    assert rows["Harmon-1_5B"] == [["88.25 [1]"], ["88.25 [2]"]]            # never in one cell
    assert runs["2"][1:] == ["- template: plain; others in the column: janus"]


def test_other_rules_have_other_columns(tmp_path, capsys):
    for scorer in ("official", "ours"):
        put(tmp_path / scorer, "geneval", Result({scorer: {"overall": 0.5}}, notes=(f"by {scorer}",)))
    rows, runs, text = shown(capsys, tmp_path)
    assert "|  | GenEval, overall (official) | GenEval, overall (ours) |" in text
    assert rows["Harmon-1_5B"] == [["0.5000 [1]", "0.5000 [2]"]]
    assert rows["overall (ours)"] == [["0.71", "0.76", "–", "0.5000"]]
    assert runs["2"][1:] == ["- by ours"]


def test_unlike_in_one_row(tmp_path, capsys):
    put(tmp_path / "dpg", "dpg", Result({"all questions": {"overall": 80.0}}), {"size": [256, 256]})
    put(tmp_path / "geneval", "geneval", GENEVAL, {"per_prompt": 1}, data={"other": "f" * 64})
    put(tmp_path / "pope", "pope", Result({"official": {"F1": 88.0}}), {"max_new_tokens": 1024})
    rows, runs, _ = shown(capsys, tmp_path)
    assert rows["Harmon-1_5B"] == [["0.7583 [1]", "80.00 [2]", "88.00"]]
    assert runs["1"][1:] == ["- size: 512×512; others in the row: 256×256"]
    assert runs["2"][1:] == ["- size: 256×256; others in the row: 512×512"]


def test_a_run_that_is_not_finished(tmp_path, capsys):
    put(tmp_path / "a", "geneval", GENEVAL, status="running")
    put(tmp_path / "b", "geneval", None)
    rows, runs, text = shown(capsys, tmp_path)
    assert "No run here is finished and scored." in text and "0.7583" not in text
    assert runs["1"][1:] == ["- not finished (status: running), so no score is shown"]
    assert runs["2"][1:] == ["- not scored: a scorer is needed that was not there"]


def test_scores_of_other_programs(tmp_path, capsys):
    manifest.write_scores(tmp_path / "theirs", "geneval", GENEVAL)
    rows, runs, _ = shown(capsys, tmp_path)
    assert rows["theirs"] == [["0.7583 [1]"]]
    assert runs["1"][1:3] == ["- no manifest.json: weights and settings are not known",
                              "- part: not known; expected: all"]
    args = SimpleNamespace(name=None, file=tmp_path / "x.jsonl", data=None, template="janus")
    args.file.write_text("")
    result = Result({"official": {"F1": 50.0}}, {"questions": 8910})
    manifest.write_scored(tmp_path / "scored", "pope", args, result)
    put(tmp_path / "scored" / "own", "pope", Result({"official": {"F1": 60.0}}), protocol="plain", data={},
        seed_rule=None)
    rows, runs, text = shown(capsys, tmp_path / "scored")
    assert rows["x"] == [["50.00 [1]"]] and rows["Harmon-1_5B"] == [["60.00"]]
    assert runs["1"][1:] == ["- scored from a file: under which settings it was made is not known",
                             "- number: 8910; expected: 9000", "- size: not known; expected: 512×512"]


def test_wise_of_another_edition_is_not_beside_the_paper(tmp_path, capsys):
    put(tmp_path / "new", "wise", Result({"verified": {"overall": 0.3, "time": 0.2}}))
    put(tmp_path / "old", "wise", Result({"original": {"overall": 0.4, "time": 0.5}}))
    rows, _, _ = shown(capsys, tmp_path)
    assert rows["overall (verified)"] == [["–", "–", "0.3000", "–"]]
    assert rows["time (original)"] == [["–", "0.48", "–", "0.5000"]]


def test_manifests_as_they_are_written(tmp_path, capsys, small):
    loaded = SimpleNamespace(model=small, about={"weights": "0123456789abcdef"}, files={})
    args = SimpleNamespace(model="small", seed=0, limit=2, overwrite=False)
    (tmp_path / "prompts").write_text("a")
    begun = manifest.start(tmp_path / "out", "geneval", args, loaded, settings=DRAWING,
                           data=[tmp_path / "prompts"], seed_rule="seed + prompt")
    run, = results.find([tmp_path])
    assert run.status == "running" and run.scores == {} and run.conditions["cfg"] == "3"
    manifest.finish(tmp_path / "out", begun, {"prompts": 2, "of": 553, "failed": 1}, GENEVAL)
    rows, runs, _ = shown(capsys, tmp_path)
    assert rows["small"] == [["0.7583 [1]"]]
    assert runs["1"][1] == "- failed: 1" and "- part: the first 2; expected: all" in runs["1"]


def test_json(tmp_path, capsys):
    put(tmp_path / "a", "geneval", Result({"official": {"overall": float("nan"), "position": None}}),
        {"size": [64, 64]})
    shown(capsys, tmp_path, json_file=tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    run, = content["runs"]
    assert run["scores"] == {"official": {"overall": None, "position": None}}
    assert run["notes"] == ["size: 64×64; expected: 512×512"] and run["conditions"]["size"] == "64×64"
    assert run["weights"] == "aaaa11112222" and run["status"] == "complete" and run["benchmark"] == "geneval"
    assert content["paper"]["geneval"]["position"] == {"Harmon-0.5B": 0.55, "Harmon-1.5B": 0.74}
    assert len(content["others"]["geneval"]) == 3


def test_order_and_no_run_twice(tmp_path, capsys):
    for name in ("pope", "dpg", "geneval"):
        put(tmp_path / "r" / name, name, Result({"p": {"score": 1.5}}))
    _, runs, _ = shown(capsys, tmp_path, tmp_path / "r", tmp_path / "r" / "dpg")
    assert [lines[0].split(", ")[1] for lines in runs.values()] == ["GenEval", "DPG-Bench", "POPE"]


def test_names_cannot_break_the_table(tmp_path, capsys):
    put(tmp_path, "geneval", Result({"of|ficial\n": {"over\x1b[2Jall": 0.5}}), model="a|b\n| c |")
    _, _, text = shown(capsys, tmp_path)
    assert "\x1b" not in text and "| a\\|b \\| c \\| [1] |" in text
    assert "| over [2Jall (of\\|ficial ) | – | – | 0.5000 |" in text


@pytest.mark.parametrize("name, content, said", [
    ("manifest.json", '{"benchmark": "gen', "manifest.json, line 1: not JSON"),
    ("manifest.json", '{"name": "something"}', "manifest.json: not written by a benchmark"),
    ("manifest.json", '{"benchmark": ["geneval"]}', "manifest.json: not written by a benchmark"),
    ("manifest.json", '[]', "manifest.json: not written by a benchmark"),
    ("manifest.json", '{"benchmark": "geneval", "settings": 3}', "manifest.json: settings is 3"),
    ("manifest.json", b"\xff\xfe\x00", "manifest.json, line 1: not"),
    ("scores.json", "", "scores.json, line 1: not JSON"),
    ("scores.json", '{"settings": {}, "seen 16": {}}', "scores.json: not written by a benchmark"),
    ("manifest.json", '{"benchmark": "geneval", "limit": "3"}', "manifest.json: limit is 3 of None; numbers"),
    ("scores.json", '{"benchmark": "dpg"}', "scores.json: scores must be an object of objects"),
    ("scores.json", '{"benchmark": "dpg", "scores": {"all": 1}}', "scores must be an object of objects"),
    ("scores.json", '{"benchmark": "dpg", "scores": {"p": {}}}', "scores must be an object of objects"),
    ("scores.json", '{"benchmark": "dpg", "scores": {"p": {"all": "1"}}}', "all is '1'; a number"),
    ("scores.json", '{"benchmark": "dpg", "scores": {"p": {"all": true}}}', "all is 'True'; a number"),
    ("scores.json", '{"benchmark": "dpg", "scores": {}, "counts": {"n": []}}', "n is '[]'; a number"),
    ("scores.json", '{"benchmark": "dpg", "scores": {}, "counts": 3}', "counts must be an object"),
    ("scores.json", '{"benchmark": "dpg", "scores": {}, "notes": "x"}', "notes must be a list")])
def test_broken_and_foreign_files(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        results.find([tmp_path])
    assert str(error.value).startswith(f"{tmp_path}/") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        results.find([tmp_path / "none"])
    with pytest.raises(ValueError, match="neither manifest.json nor scores.json is in it or below it"):
        results.find([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a folder of results is expected"):
        results.find([tmp_path / "file"])
    put(tmp_path, "geneval")
    manifest.write_scores(tmp_path, "dpg", GENEVAL)
    with pytest.raises(ValueError, match="manifest.json is of geneval, scores.json of dpg"):
        results.find([tmp_path])


def test_the_command(tmp_path, capsys):
    from harmonkit.evals.__main__ import main

    put(tmp_path / "a", "geneval", GENEVAL)
    main(["table", str(tmp_path / "a"), "--json", str(tmp_path / "table.json")])
    assert "| Harmon-1_5B | 0.7583 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["runs"][0]["model"] == "wusize/Harmon-1_5B"
    (tmp_path / "a" / "scores.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        main(["table", str(tmp_path / "a")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1
    assert f"{tmp_path}/a/scores.json, line 1: not JSON" in err


def test_flags():
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    assert parser.parse_args(["--json", "a.json"]).json.name == "a.json"
    assert set(CATALOG) == set("geneval dpg wise mjhq coco shapes pope mme mmbench seed gqa mmmu".split())
