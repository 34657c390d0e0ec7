"""The catalog of benchmarks: its numbers, its estimates, and that docs/evals.md says the same.

`sections()` is what docs/evals.md holds for each benchmark, whatever its line breaks.
"""
import re
import shlex
from argparse import Namespace

import evals_data
import pytest
import torch
from conftest import ROOT

from harmonkit.evals import __main__ as command
from harmonkit.evals import catalog, wise
from harmonkit.evals.entries import CATALOG, ENTRIES, LARGE, SMALL
from harmonkit.evals.rules import geneval
from harmonkit.pipeline import token_grid
from harmonkit.scripts.benchmark import count, make_model

DOCS = (ROOT / "docs" / "evals.md").read_text(encoding="utf-8")


def section(entry) -> str:
    """The text of docs/evals.md about a benchmark."""
    bullets = [("Data", f"{catalog.amount(entry)}. From: {entry.source}. Licence: {entry.licence}. "
                        f"Needed: {entry.needs}.")]
    if entry.name == "shapes":
        bullets.append(("Time", f"{catalog.SHAPES_TIME}."))
    else:
        times = "; ".join(f"{model}: {catalog.time_of(entry, model)}" for model in (SMALL, LARGE))
        bullets.append(("Time on one A100, an estimate", f"{times}."))
    paper = [f"{model}: {catalog.paper_line(entry, model)}." for model in (SMALL, LARGE)
             if catalog.paper_line(entry, model)]
    bullets += [("Paper", " ".join(paper))] if paper else []
    others = [f"{line}." for line in catalog.others_lines(entry)]
    bullets += [("Others", " ".join(others))] if others else []
    bullets.append(("Traps", " ".join(entry.traps)))
    lines = "\n".join(f"- **{name}.** {text}" for name, text in bullets)
    return f"### {entry.title}\n\n{entry.asks}\n\n    {catalog.command(entry)}\n\n{lines}\n"


def sections() -> str:
    return "\n".join(map(section, ENTRIES))


def words(text) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", CATALOG)
def test_the_docs_say_what_the_catalog_says(name):
    entry = CATALOG[name]
    start = DOCS.index(f"### {entry.title}\n")
    end = re.compile(r"^##", re.MULTILINE).search(DOCS, start + 4)
    assert words(DOCS[start:end.start() if end else None]) == words(section(entry))


@pytest.mark.parametrize("name", CATALOG)
def test_the_commands_have_these_flags(name, tmp_path):
    flags = shlex.split(catalog.command(CATALOG[name]))[3:]
    assert flags[0] == name
    args = command.parse([name], flags[1:])[name]
    assert name == "shapes" or (args.model, args.size) == ("wusize/Harmon-1_5B", "512")


def test_the_list(capsys):
    command.main(["list"])
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if re.match(r"\w+: ", line)] == list(CATALOG)
    assert "not measurements: counted arithmetic at 60% of 312 TFLOP/s" in words(text)
    assert "paper Harmon-1.5B: overall 0.76, single_object 0.99, two_object 0.86" in words(text)
    assert "time Harmon-1.5B 1.2 h to 18 h" in words(text)
    for entry in ENTRIES:
        assert len(entry.asks.splitlines()) == 2 and f"    run     {catalog.command(entry)}\n" in text


def test_numbers_of_the_paper():
    """A few of each table, typed anew from the paper."""
    numbers = {name: CATALOG[name].paper for name in CATALOG}
    assert numbers["geneval"]["position"] == (.55, .74) and numbers["geneval"]["overall"] == (.71, .76)
    for of_model in (0, 1):                     # the overall score is the mean of the six
        overall, *tags = (pair[of_model] for pair in numbers["geneval"].values())
        assert len(tags) == 6 and abs(sum(tags) / 6 - overall) <= 0.01
    weights = dict(cultural=.4, time=.167, space=.133, biology=.1, physics=.1, chemistry=.1)
    wise = {name: pair[1] for name, pair in numbers["wise"].items()}
    assert abs(sum(weights[name] * wise[name] for name in weights) - wise["overall"]) < 0.006
    assert (numbers["mjhq"]["FID"], numbers["coco"]["FID"]) == ((6.08, 5.15), (8.86, 8.39))
    assert numbers["mme"] == {"perception": (1148, 1155), "cognition": (260, 321)}
    rest = [next(iter(numbers[name].values())) for name in ("pope", "mmbench", "seed", "gqa", "mmmu")]
    assert rest == [(86.5, 87.6), (59.8, 65.5), (62.5, 67.1), (56.3, 58.9), (34.2, 38.9)]


@pytest.mark.parametrize("name", ["pope", "mme", "mmbench", "seed", "gqa", "mmmu"])
def test_the_papers_numbers_have_the_names_and_scale_of_our_scores(name, tmp_path):
    """Right answers to all questions reach the largest number that the paper's column can have."""
    entry, module = CATALOG[name], command.module_of(name)
    data = getattr(evals_data, name)(tmp_path)
    questions = module.read(command.parse([name], ["--data", str(data)])[name])
    answers = {}
    for question in questions:
        fields = question.fields.get("row", question.fields)
        answer = fields.get("label", fields.get("answer"))
        answers[question.key] = answer if isinstance(answer, str) else answer[0]
    scores = next(iter(module.score(questions, answers).scores.values()))
    best = {score: scores[score] * entry.unit for score in entry.paper}
    assert best == ({"perception": 2000, "cognition": 800} if name == "mme" else dict.fromkeys(best, 100))
    assert next(iter(scores)) in entry.paper


def test_the_papers_numbers_have_the_names_of_our_scores_of_pictures():
    assert set(CATALOG["geneval"].paper) == {"overall", *geneval.TAGS}
    assert set(CATALOG["wise"].paper) == {"overall", *wise.NAMES.values()}


def test_time_is_work_over_rate():
    least, most = catalog.hours(CATALOG["geneval"], LARGE)
    assert least == pytest.approx(553 * 4 * 360e12 / (0.6 * 312e12) / 3600)
    assert most == pytest.approx(553 * 4 * 30 / 3600)
    assert catalog.hours(CATALOG["mmbench"], SMALL) == (pytest.approx(1164 * 4 * 1.7 / 187.2 / 3600), None)
    hours = (0.001, 0.3, 0.94, 0.96, 9.94, 9.96)
    assert [catalog.duration(h) for h in hours] == ["1 min", "18 min", "56 min", "1.0 h", "9.9 h", "10 h"]


def test_arithmetic_of_a_picture_is_that_of_scaling():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for model, size in ((SMALL, "0.5B"), (LARGE, "1.5B")):
        row = next(line for line in text.splitlines() if line.startswith(f"| {size} | 512 | 64 |"))
        assert f"**{catalog.PICTURE_TFLOP[model]}**" in row


@pytest.mark.parametrize("model", [SMALL, LARGE])
@torch.no_grad()
def test_arithmetic_of_a_question_is_counted(model):
    """Encoding a picture of 512 pixels and one pass over it and 32 tokens of text, without the weights."""
    meta = make_model(Namespace(model=model.lower(), dtype="bfloat16"), "meta")
    h, w = token_grid(meta, 512)
    mask = torch.zeros(1, h * w, dtype=torch.bool)

    def read():
        latents = meta.encode(torch.zeros(1, 3, 512, 512, device="meta"))
        _, features = meta.visual_features(latents, mask)
        _, tokens, width = features.shape
        return meta.llm(inputs_embeds=torch.zeros(1, tokens + 32, width, device="meta"))
    gflop, _ = count(read)
    assert gflop / 1000 == pytest.approx(catalog.QUESTION_TFLOP[model], rel=0.02)


def test_figures_that_the_docs_repeat():
    small, large = ({name: entry.paper and {score: pair[i] for score, pair in entry.paper.items()}
                     for name, entry in CATALOG.items()} for i in (0, 1))
    steps = {model: re.search(rf"\| {model} \| ([\d.]+) \|", DOCS)[1] for model in (SMALL, LARGE)}
    assert steps == {SMALL: f"{small['geneval']['overall']:.2f}", LARGE: f"{large['geneval']['overall']:.2f}"}
    row = re.search(r"^\| 512 \|(.*)\|$", DOCS, re.MULTILINE)[1]
    mme = small["mme"]
    assert [float(cell) for cell in row.split("|")] == [
        small["pope"]["accuracy"], mme["perception"], mme["cognition"], small["gqa"]["accuracy"],
        small["mmmu"]["accuracy"], small["coco"]["FID"], small["mjhq"]["FID"], small["geneval"]["overall"]]
    seconds = catalog.PAPER_SECONDS
    assert f"{catalog.RATE:.0%} of an A100's {catalog.PEAK} TFLOP/s" in words(DOCS)
    assert f"the paper's {seconds[SMALL]} and {seconds[LARGE]} seconds a picture" in words(DOCS)
