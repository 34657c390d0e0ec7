"""Our rules on the recorded cases in golden/evals, and the command that checks such files."""
import json

import pytest
from conftest import ROOT

from harmonkit.evals import golden
from harmonkit.evals.__main__ import main
from harmonkit.evals.golden_rules import BENCHMARKS
from harmonkit.evals.golden_wise import lines_of_rule

FILES = sorted((ROOT / "tests" / "golden" / "evals").glob("*.json"))
POPE = {
    "source": "RUCAIBox/POPE:evaluate.py",
    "cases": [{"kind": "plain", "input": {"answer": "No"}, "expected": "no", "vlmevalkit": "No"},
              {"kind": "case", "input": {"answer": "NO"}, "expected": "yes", "vlmevalkit": "No"}],
    "aggregate": {"input": [{"answer": "yes", "label": "yes"}, {"answer": "yes", "label": "no"}],
                  "expected": {"TP": 1, "acc": 0.5}},
}


def write(folder, content, name="cases.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(benchmark, **fields):
    return json.loads(json.dumps(benchmark)) | fields


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_case_is_met(path):
    content = json.loads(path.read_text())
    number, _, failures = golden.check_file(path)
    assert failures == []
    assert number == len(content["cases"]) + 1 + len(content.get("more_aggregates", []))


def test_all_benchmarks_are_recorded():
    assert {path.stem for path in FILES} == set(BENCHMARKS)


def test_the_command_counts_and_returns_0(tmp_path, capsys):
    first, second = write(tmp_path, POPE), write(tmp_path, POPE, "other.json")
    with pytest.raises(SystemExit) as exit_status:
        main(["golden", str(first), str(second)])
    assert exit_status.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{first}: 3 passed, 0 failed", f"{second}: 3 passed, 0 failed", "total: 6 passed, 0 failed"]


def test_a_planted_mistake_is_shown_and_returns_1(tmp_path, capsys):
    wrong = changed(POPE)
    wrong["cases"][1]["vlmevalkit"] = "Yes"
    wrong["aggregate"]["expected"]["acc"] = 0.50001
    path = write(tmp_path, wrong)
    with pytest.raises(SystemExit) as exit_status:
        main(["golden", str(path)])
    assert exit_status.value.code == 1
    assert capsys.readouterr().out.splitlines()[:9] == [
        f"{path}: case 2 (case), vlmevalkit",
        '    given:    {"answer": "NO"}', '    expected: "Yes"', '    got:      "No"',
        f"{path}: aggregate 1, expected",
        '    given:    [{"answer": "yes", "label": "yes"}, {"answer": "yes", "label": "no"}]',
        '    expected: {"TP": 1, "acc": 0.50001}',
        '    got:      {"TP": 1, "FP": 1, "TN": 0, "FN": 0, "acc": 0.5, "precision": 0.5, "recall": 1.0, '
        '"f1": 0.6666666666666666, "yes_ratio": 1.0}',
        f"{path}: 1 passed, 2 failed"]


@pytest.mark.parametrize("content, fault", [
    ("{", "not a JSON file"), ("3", "a JSON object with `cases`, not int"),
    ({"source": "POPE"}, "holds no cases"),
    ({"source": "POPE", "cases": [{"input": {"answer": ""}}]}, "must have `input` and `expected`"),
    ({"cases": [{"input": {"reply": ""}, "expected": "x"}]}, "name it after one of pope, mme"),
    ({"cases": [{"input": [{"reply": ""}], "expected": "x"}]}, "name it after one of pope, mme"),
    ({"source": "POPE", "cases": None, "aggregate": None, "more_aggregates": None}, "holds no cases"),
    ({"source": "POPE", "cases": {}}, "holds no cases"),
    ({"source": "POPE", "cases": {"input": 1}}, "`cases` and `more_aggregates` must be lists"),
])
def test_a_file_of_another_form_is_an_error(tmp_path, capsys, content, fault):
    path = write(tmp_path, content)
    with pytest.raises(SystemExit) as exit_status:
        main(["golden", str(path)])
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and fault in error
    with pytest.raises(OSError):
        golden.main([tmp_path / "none.json"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_benchmark_is_told_by_source_or_name_or_form(path, tmp_path):
    content = golden.load(path)
    assert golden.benchmark_of(tmp_path / "x.json", content) == path.stem
    del content["source"]
    assert golden.benchmark_of(tmp_path / f"Private-{path.stem.upper()}_2.json", content) == path.stem
    assert golden.benchmark_of(tmp_path / "x.json", content) == path.stem


def test_the_form_of_a_few_cases_is_enough():
    for name, given, expected in [("wise", {"text": "2"}, {}), ("wise", {"lines": []}, {}),
                                  ("mmbench", {"rows": []}, {}), ("pope", {"answer": ""}, "yes"),
                                  ("mme", {"answer": ""}, "other"),
                                  ("gqa", {"text": "a", "answer": "a"}, {})]:
        assert golden.by_form([{"input": given, "expected": expected}]) == [name]
    assert golden.by_form([]) == []


def failures_of(folder, content):
    return golden.check_file(write(folder, content))[2]


def test_a_score_where_the_official_tool_stops_is_a_failure(tmp_path):
    stops = changed(POPE, cases=[{"input": {"answer": "No"}, "expected": {"error": "stops"}}])
    assert [failure.got for failure in failures_of(tmp_path, stops)] == ["no"]
    refused = changed(POPE, cases=[{"input": {"answer": None}, "expected": {"error": "stops"}}])
    assert failures_of(tmp_path, refused) == []
    nothing_else = changed(POPE, aggregate=POPE["aggregate"] | {"expected": {"error": "stops"}})
    assert len(failures_of(tmp_path, nothing_else)) == 1
    # Where it had printed something before, ours must have that too.
    for true_negatives, number in ((1, 0), (2, 1)):
        expected = {"TN": true_negatives, "acc": None, "error": "ZeroDivisionError"}
        partly = changed(POPE, aggregate={"input": [{"answer": "no", "label": "no"}], "expected": expected})
        assert len(failures_of(tmp_path, partly)) == number


def test_a_refusal_passes_only_where_the_official_tool_gives_no_score_or_drops_rows(tmp_path):
    refused = {"input": {"answer": None}, "expected": "yes"}
    assert len(failures_of(tmp_path, changed(POPE, cases=[refused]))) == 1
    assert failures_of(tmp_path, changed(POPE, cases=[refused | {"note": "rows are missing"}])) == []
    lists = {"input": {"answers": ["no"], "labels": ["no", "yes"]}, "expected": {"TN": 1}}
    assert failures_of(tmp_path, changed(POPE, aggregate=lists)) == []
    lists["input"]["answers"] = ["no", None]
    assert len(failures_of(tmp_path, changed(POPE, aggregate=lists))) == 1


def test_a_crash_is_a_failure_that_stops_no_other_case(tmp_path):
    cases = [{"input": {"reply": "No"}, "expected": "no"}, {"input": {"answer": "Yes"}, "expected": "no"}]
    failures = failures_of(tmp_path, changed(POPE, cases=cases))
    assert [type(failure.got) for failure in failures] == [KeyError, str]


@pytest.mark.parametrize("expected, got, same", [
    (1, 1 + 9e-7, True), (1, 1 + 2e-6, False), ([1, "a"], (1, "a"), True), ([1], [1, 2], False),
    ({"a": 1}, {"a": 1, "b": 2}, False), ({"a": 1, "b": 2}, {"a": 1}, False), (None, float("nan"), True),
    (None, 0, False), (True, 1, False), (1, True, False), ("1", 1, False), (float("inf"), float("inf"), True),
    ({"fine": 1}, {"fine": 1.004}, True), ({"fine": [1, {"x": 1}]}, {"fine": [1, {"x": 1.006}]}, False),
])
def test_values_are_compared_within_the_tolerance_of_their_key(expected, got, same):
    assert golden.equal(expected, got, {"fine": 0.005}, 1e-6) is same


def test_partly_equal_dicts_may_hold_more():
    assert golden.equal({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, {}, 0, partly=True)
    assert not golden.equal({"a": {"b": 1}}, {"a": {"c": 2}}, {}, 0, partly=True)


def test_the_lines_of_a_rule():
    rule = ("verified edition, for id in 1..6: a = (id // 2) mod 2, b = 1 if id mod 3 = 0 else 0, "
            "but ids 2, 3 and 6 missing, and the line of id 5 has a null")
    assert lines_of_rule(rule) == [{"prompt_id": 1, "a": 0, "b": 0}, {"prompt_id": 4, "a": 0, "b": 0},
                                   {"prompt_id": 5, "a": None, "b": 0}]
    rule = "for id in 1..5: a = id, but id 2 is there twice, ids 3 to 4 missing and id 5 has a 'x'"
    found = [(line["prompt_id"], line["a"]) for line in lines_of_rule(rule)]
    assert found == [(1, 1), (2, 2), (5, "x"), (2, 2)]
    for wrong in ("for id in 1..2: a = __import__('os')", "for id in 1..2: a = id, but id 1 is odd",
                  "for id in 1..2: a = id ** 2", "all ids"):
        with pytest.raises(ValueError, match="expected|understood"):
            lines_of_rule(wrong)
