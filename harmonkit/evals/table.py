"""All scores side by side, beside the paper's: python -m harmonkit.evals table FOLDER… [--json FILE]

The folders hold manifest.json and scores.json, or have such folders below them. The first table has a row
for each model and a column for each benchmark's headline; then each benchmark has a table of all its scores.
A number [n] leads to the run in the list at the end. There stands what makes its scores unlike others in the
same row or column: another size, template or data, a part of the prompts, failed questions, a run that is not
finished.
"""
import json
import math
from pathlib import Path

from harmonkit.checkpoints import write_text
from harmonkit.evals import catalog, results
from harmonkit.evals.benchmark import number
from harmonkit.evals.entries import CATALOG, ENTRIES, LARGE, SMALL
from harmonkit.terminal import file_path


def add_arguments(parser):
    parser.add_argument("--json", type=file_path, help="also write the table there as JSON")


def main(folders, args):
    """Print the tables as Markdown. Raises ValueError or OSError for folders that cannot be read."""
    runs = results.find(folders)
    unlike = unlikeness(runs)
    if args.json:
        write_text(args.json, json.dumps(as_json(runs, unlike), indent=2, ensure_ascii=False) + "\n")
    print(markdown(runs, unlike))


def unlikeness(runs) -> list:
    """For each run, what makes its scores unlike others in the same column or row, the paper's included."""
    said = [{} for _ in runs]

    def compare(group, *arguments):
        for i, sentences in zip(group, results.differences([runs[i] for i in group], *arguments)):
            said[i] = sentences | said[i]               # one sentence a condition, the column's first
    scored = [i for i, run in enumerate(runs) if run.scores]
    for name, entry in CATALOG.items():
        compare([i for i in scored if runs[i].benchmark == name], "column", entry.conditions)
    rows = {}
    for i in scored:
        if runs[i].weights is not None:                 # drawing and answering have other settings
            rows.setdefault((runs[i].weights, CATALOG[runs[i].benchmark].draws), []).append(i)
    for group in rows.values():
        compare(group, "row", None, results.OF_ONE_BENCHMARK)
    return [[*run.notes, *sentences.values()] for run, sentences in zip(runs, said)]


# ---- Markdown ----------------------------------------------------------------------------------------------

def markdown(runs, unlike) -> str:
    labels = labels_of(runs)
    blocks = ["# Scores", overview(runs, unlike, labels)]
    for entry in ENTRIES:
        numbers = [i for i, run in enumerate(runs) if run.benchmark == entry.name]
        if any(runs[i].scores for i in numbers):
            blocks += [f"## {entry.title}", section(entry, runs, numbers, labels)]
            blocks += [f"Others: {line}" for line in catalog.others_lines(entry)]
    blocks += ["## Runs", *(about(i, run, labels[i], unlike[i]) for i, run in enumerate(runs))]
    return "\n\n".join(blocks)


def labels_of(runs) -> list:
    """A name for each run's model; equal names of unequal weights get the weights' first digits."""
    names = [Path(run.model).name or run.model for run in runs]
    weights_of = {}
    for name, run in zip(names, runs):
        weights_of.setdefault(name, set()).add(run.weights)
    return [name if len(weights_of[name]) == 1 else f"{name} {(run.weights or 'unknown')[:8]}"
            for name, run in zip(names, runs)]


def overview(runs, unlike, labels) -> str:
    """A row for each model, a column for each headline. Several runs of one model have rows of their own."""
    columns = list(dict.fromkeys((run.benchmark, *run.headline) for run in runs if run.scores))
    rows = [[f"{model}, paper", *(paper(CATALOG[name], *of_name, which) for name, *of_name in columns)]
            for which, model in enumerate((SMALL, LARGE))]
    models = {}
    for i, run in enumerate(runs):
        column = (run.benchmark, *run.headline)
        cells = models.setdefault(run.weights or run.folder, (labels[i], {}))[1]
        cells.setdefault(column if run.scores else None, []).append(i)
    for label, cells in models.values():
        shown = [cells.get(column, []) for column in columns]
        for line in range(max(1, *map(len, shown)) if shown else 0):
            picked = [numbers[line] if line < len(numbers) else None for numbers in shown]
            rows.append([label, *(headline(runs, unlike, i) for i in picked)])
    heads = [f"{CATALOG[name].title}, {score} ({protocol})" for name, protocol, score in columns]
    return grid(["", *heads], rows) if columns else "No run here is finished and scored."


def headline(runs, unlike, i) -> str:
    if i is None:
        return "–"
    protocol, name = runs[i].headline
    return score_text(runs[i].scores[protocol][name]) + (f" [{i + 1}]" if unlike[i] else "")


def section(entry, runs, numbers, labels) -> str:
    """All scores of a benchmark: a row a score, a column a run."""
    names = dict.fromkeys((protocol, name) for i in numbers for protocol, scores in runs[i].scores.items()
                          for name in scores)
    heads = ["", *([f"{SMALL}, paper", f"{LARGE}, paper"] if entry.paper else [])]
    rows = []
    for protocol, name in names:
        row = [f"{name} ({protocol})"]
        if entry.paper:
            row += [paper(entry, protocol, name, which) for which in (0, 1)]
        for i in numbers:
            scores = runs[i].scores.get(protocol, {})
            row.append(score_text(scores[name]) if name in scores else "–")
        rows.append(row)
    return grid([*heads, *(f"{labels[i]} [{i + 1}]" for i in numbers)], rows)


def about(i, run, label, unlike) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in run.counts.items())
    title = f"[{i + 1}] {label}, {CATALOG[run.benchmark].title}, {run.folder}: {run.status}"
    lines = [f"{title} ({counts})" if counts else title, *(f"- {sentence}" for sentence in unlike)]
    return "\n".join(map(cell, lines))


def paper(entry, protocol, name, which) -> str:
    """The paper's number of Harmon-0.5B (0) or 1.5B (1) beside our score of that name, on our scale."""
    pair = entry.paper.get(name)
    if pair is None or pair[which] is None or protocol in entry.not_the_papers:
        return "–"
    return catalog.number(round(pair[which] / entry.unit, 6))


def score_text(value) -> str:
    return "–" if value is None else number(value)


def cell(text) -> str:
    """A text for one cell or line of Markdown."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(printable.split()).replace("|", "\\|")


def grid(heads, rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines)


# ---- JSON --------------------------------------------------------------------------------------------------

def as_json(runs, unlike) -> dict:
    """{"runs": […], "paper": {benchmark: {score: {model: number}}}, "others": {benchmark: […]}}."""
    def finite(scores):
        return {name: value if value is not None and math.isfinite(value) else None
                for name, value in scores.items()}
    listed = [{"folder": str(run.folder), "benchmark": run.benchmark, "model": run.model,
               "weights": run.weights, "status": run.status, "conditions": run.conditions,
               "counts": run.counts, "notes": said,
               "scores": {protocol: finite(scores) for protocol, scores in run.scores.items()}}
              for run, said in zip(runs, unlike)]
    shown = [CATALOG[name] for name in dict.fromkeys(run.benchmark for run in runs)]
    return {"runs": listed, "paper": {entry.name: paper_json(entry) for entry in shown},
            "others": {entry.name: catalog.others_lines(entry) for entry in shown}}


def paper_json(entry) -> dict:
    return {name: {model: None if value is None else round(value / entry.unit, 6)
                   for model, value in zip((SMALL, LARGE), pair)} for name, pair in entry.paper.items()}
