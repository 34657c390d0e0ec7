"""Are our rules the official ones? python -m harmonkit.evals golden FILE…

A file holds inputs and what a benchmark's official tool made of them: `cases`, `aggregate` and
`more_aggregates`. Prints "N passed, N failed" for each file and for all; the exit code is 1 if any failed.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from harmonkit.evals.golden_rules import BENCHMARKS

TOLERANCE = 1e-6
NOT_SCORES = ("error", "why")           # keys of `expected` that tell why there is no score


@dataclass(frozen=True)
class Refusal:
    """Ours raised ValueError: it gives no score for this input."""
    message: str

    def __repr__(self):
        return f"refused: {self.message}"


@dataclass(frozen=True)
class Failure:
    where: str
    given: object
    expected: object
    got: object


def main(files):
    """Check the files and print the results. Returns the exit code: 0, or 1 if any case failed.

    Raises ValueError or OSError for a file that cannot be read or holds no case.
    """
    passed = failed = 0
    for path in map(Path, files):
        number, refused, failures = check_file(path)
        for failure in failures:
            print(f"{path}: {failure.where}")
            for name in ("given", "expected", "got"):
                print(f"    {name + ':':10}{shown(getattr(failure, name))}")
        if refused:
            print(f"{path}: {refused} passed by a refusal, where the official tool stops or drops rows")
        print(f"{path}: {number - len(failures)} passed, {len(failures)} failed")
        passed += number - len(failures)
        failed += len(failures)
    print(f"total: {passed} passed, {failed} failed")
    return 1 if failed else 0


def check_file(path):
    """(number of cases and aggregates, how many of the passed ours refused, list of Failure)."""
    content = load(path)
    name = benchmark_of(path, content)
    benchmark = BENCHMARKS[name]
    failures, refused = [], 0
    checks = [(f"case {number} ({case.get('kind')})", case, benchmark.readings)
              for number, case in enumerate(content.get("cases") or [], 1)]
    checks += [(f"aggregate {number}", case, benchmark.aggregates)
               for number, case in enumerate(aggregates_of(content), 1)]
    if not checks:
        raise ValueError(f"{path}: holds no cases and no aggregate")
    for where, case, rules in checks:
        got = {key: attempt(rule, case) for key, rule in rules.items() if key in case}
        is_aggregate = rules is benchmark.aggregates
        wrong = [key for key, value in got.items()
                 if not agrees(case, case[key], value, benchmark, more_may_be_told=is_aggregate)]
        failures += [Failure(f"{where}, {key}", case["input"], case[key], got[key]) for key in wrong[:1]]
        if not wrong:
            refused += any(isinstance(value, Refusal) for value in got.values())
    return len(checks), refused, failures


def load(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    content = {"cases": content} if isinstance(content, list) else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a golden file is a JSON object with `cases`, not {type(content).__name__}")
    if not all(isinstance(content.get(name) or [], list) for name in ("cases", "more_aggregates")):
        raise ValueError(f"{path}: `cases` and `more_aggregates` must be lists")
    for case in [*(content.get("cases") or []), *aggregates_of(content)]:
        if not isinstance(case, dict) or not {"input", "expected"} <= set(case):
            raise ValueError(f"{path}: a case must have `input` and `expected`, but one is {shown(case)}")
    return content


def aggregates_of(content):
    """`aggregate` and `more_aggregates`; a null is none."""
    first = [content["aggregate"]] if content.get("aggregate") is not None else []
    return first + (content.get("more_aggregates") or [])


def benchmark_of(path, content):
    """The benchmark's name, by the file's `source`, else its name, else the form of its cases."""
    source = str(content.get("source", ""))
    named = [name for name, benchmark in BENCHMARKS.items() if re.search(benchmark.source, source)]
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    named = named if len(named) == 1 else [name for name in BENCHMARKS if name in words]
    named = named if len(named) == 1 else by_form(content.get("cases") or [])
    if len(named) != 1:
        raise ValueError(f"{path}: neither `source`, nor the file's name, nor the cases tell which benchmark "
                         f"it is of; name it after one of {', '.join(BENCHMARKS)}")
    return named[0]


def by_form(cases):
    """The names of the benchmarks whose inputs have such keys; MME alone reads an answer as other too."""
    keys = {key for case in cases if isinstance(case["input"], dict) for key in case["input"]}
    marks = {"geneval": {"detections"}, "dpg": {"questions"}, "mmmu": {"response"}, "seed": {"choice_a"},
             "mmbench": {"prediction", "rows"}, "wise": {"consistency", "lines"}}
    named = [name for name, marks_of_it in marks.items() if marks_of_it & keys]
    if named or not keys:
        return named
    if "text" in keys:
        return ["gqa" if "answer" in keys else "wise"]
    is_mme = any("lmms_eval" in case or case["expected"] == "other" for case in cases)
    return ["mme" if is_mme else "pope"] if "answer" in keys else []


def attempt(rule, case):
    """What the rule makes of the case. If it crashes, its error, so that the other cases still run."""
    try:
        return rule(case)
    except ValueError as error:
        return Refusal(str(error))
    except Exception as error:
        return error


def agrees(case, expected, got, benchmark, more_may_be_told):
    """Whether what ours made of a case is what the official tool made of it, or a refusal that may be.

    Where the official tool stops (`error`), ours may refuse, or give at least all that it had given before.
    """
    if isinstance(got, Refusal):
        return may_refuse(case, expected)
    if isinstance(got, Exception):
        return False
    stopped = isinstance(expected, dict) and "error" in expected
    if isinstance(expected, dict) and isinstance(got, dict):
        expected = {key: value for key, value in expected.items() if key not in NOT_SCORES}
        if stopped:
            expected = {key: value for key, value in expected.items() if value is not None}
        expected, got = benchmark.in_order(case, expected), benchmark.in_order(case, got)
        if stopped or more_may_be_told:
            got = {key: value for key, value in got.items() if key in expected}
    if stopped and not expected:
        return False
    tolerances = {"": TOLERANCE} | benchmark.tolerances
    return equal(expected, got, tolerances, tolerances[""], partly=stopped)


def may_refuse(case, expected):
    """Where ours may give no score: the official tool stops, gives none, or drops rows or answers."""
    if isinstance(expected, dict):
        scores = [value for key, value in expected.items() if key not in NOT_SCORES]
        if "error" in expected or all(value is None for value in scores):
            return True
    given = case["input"]
    if isinstance(given, dict) and {"answers", "labels"} <= set(given):
        return len(given["answers"]) != len(given["labels"])
    return bool(re.search("missing|refuse", str(case.get("note", ""))))


def equal(expected, got, tolerances, tolerance, partly=False):
    """Numbers within the tolerance of the last key above them, all else exactly. NaN and None are one.

    `partly` lets dicts of `got` hold more.
    """
    if isinstance(expected, dict) and isinstance(got, dict):
        if not set(expected) <= set(got) or not partly and len(got) > len(expected):
            return False
        return all(equal(value, got[key], tolerances, tolerances.get(key, tolerance), partly)
                   for key, value in expected.items())
    if isinstance(expected, list) and isinstance(got, (list, tuple)):
        if len(expected) != len(got):
            return False
        return all(equal(*pair, tolerances, tolerance, partly) for pair in zip(expected, got))
    if is_number(expected) and is_number(got):
        return expected == got or abs(expected - got) <= tolerance
    if is_nothing(expected) and is_nothing(got):
        return True
    return type(expected) is type(got) and expected == got


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def is_nothing(value):
    return value is None or value != value


def shown(value):
    """A value in one line; long ones are cut in the middle."""
    is_error = isinstance(value, (Refusal, Exception))
    text = repr(value) if is_error else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 600 else f"{text[:400]} … {text[-180:]}"
