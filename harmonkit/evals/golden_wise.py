"""WISE's golden cases: texts of the judge, score files, and score files that are told by a rule."""
import ast
import json
import re

from harmonkit.evals.rules import wise

RANGE = r"\d+(?:(?:\.\.| to |-)\d+)?"
NUMBERS = rf"{RANGE}(?:(?:, | and |, and )(?:ids? )?{RANGE})*"
EXCEPTION = re.compile(rf"(?:the lines? of )?ids? ({NUMBERS}) "
                       r"(?:(?:is |are |stands? )?(?:there )?(missing|twice)|ha(?:s|ve) (\w+) ([^\s,]+))")
SYNTAX = (ast.Expression, ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.Compare, ast.IfExp,
          ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.cmpop)


def wise_case(case):
    given = case["input"]
    edition = "verified" if "verified" in case.get("kind", "") else "original"
    if "text" in given:
        return wise.judge_scores(given["text"], edition)
    if "lines" in given:
        return wise.score_lines(given["lines"], edition)
    return wise.wiscore(**given)


def wise_score(case):
    edition = "verified" if "verified" in case["input"]["rule"] else "original"
    return wise.aggregate(lines_of_rule(case["input"]["rule"]), edition)


def lines_of_rule(rule):
    """"for id in 1..1000: score = id mod 2, …, but id 17 missing" -> the lines of a WISE score file.

    After "but": "id 17 missing", "the line of id 17 has realism null"; several numbers may stand for 17.
    Raises ValueError for other rules.
    """
    body = re.fullmatch(r".*?for id in (\d+)\.\.(\d+): (.*?)(?:,? but (.*))?", rule)
    if not body:
        raise ValueError(f"a rule like 'for id in 1..1000: score = id mod 2' is expected, not {rule!r}")
    first, last, assignments, exceptions = body.groups()
    formulas = [assignment.split(" = ", 1) for assignment in assignments.split(", ")]
    lines = {number: {"prompt_id": number} for number in range(int(first), int(last) + 1)}
    for name, formula in formulas:
        formula = re.sub(r"(?<![=<>!])=(?!=)", "==", formula.replace(" mod ", " % "))
        code = compile(arithmetic(formula), rule, "eval")
        for number, line in lines.items():
            line[name.strip()] = eval(code, {"__builtins__": {}}, {"id": number})
    twice = []
    for numbers, what, name, value in EXCEPTION.findall(exceptions or ""):
        for number in ids_of(numbers):
            if what == "missing":
                del lines[number]
            elif what == "twice":
                twice.append(lines[number])
            else:
                lines[number][name] = json.loads(value.replace("'", '"'))
    left = EXCEPTION.sub("", exceptions or "").strip(" ,.")
    if left not in ("", "and"):
        raise ValueError(f"the exception {left!r} is not understood in the rule {rule!r}")
    return [*lines.values(), *twice]


def ids_of(text) -> list:
    """"3, 5..7 and 9" -> [3, 5, 6, 7, 9]"""
    found = []
    for first, last in re.findall(r"(\d+)(?:(?:\.\.| to |-)(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


def arithmetic(formula):
    """The syntax tree of a formula in `id`, numbers and operators; ValueError for anything else."""
    tree = ast.parse(formula.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, SYNTAX) or isinstance(node, ast.Name) and node.id != "id":
            raise ValueError(f"only arithmetic with id is expected in a rule, not {formula!r}")
    return tree
