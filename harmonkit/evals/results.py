"""Results in folders: which runs are there, under which conditions they were made, and where these differ."""
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from harmonkit.evals.entries import CATALOG
from harmonkit.evals.manifest import NAME, SCORES
from harmonkit.prompts import parse_json, read_text, shorten

FINISHED = ("complete", "part", "scored")
# Counts that show in the table whenever they are above 0.
FAULTS = ("failed", "missing", "missing prompts", "no answer")
# What runs of one model on different benchmarks need not have in common.
OF_ONE_BENCHMARK = ("per_prompt", "data", "template", "max_new_tokens", "number", "part", "seed_rule")


@dataclass(frozen=True)
class Run:
    """What a folder holds: a manifest, scores, or both."""
    folder: Path
    benchmark: str
    model: str
    weights: str | None             # their fingerprint, None if unknown
    status: str
    conditions: dict                # {name: text}: what scores depend on besides the weights
    scores: dict = field(default_factory=dict)          # {protocol: {name: number}}, none if not finished
    counts: dict = field(default_factory=dict)
    notes: tuple = ()

    @property
    def headline(self) -> tuple:
        """(protocol, name) of the score that stands for the benchmark; (None, None) without scores."""
        protocol, scores = next(iter(self.scores.items()), (None, {}))
        return protocol, next(iter(scores), None)


# ---- read ------------------------------------------------------------------------------------------------

def find(folders) -> list:
    """The Runs in and below the folders, by benchmark in the order of the catalog, then by path.

    Raises FileNotFoundError or ValueError, in one line that names the file, for a folder without results and
    for a file that is broken or of another program.
    """
    runs = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise ValueError(f"{folder}: a file; a folder of results is expected")
        found = [Path(path) for path, _, files in os.walk(folder) if NAME in files or SCORES in files]
        if not found:
            raise ValueError(f"{folder}: neither {NAME} nor {SCORES} is in it or below it")
        runs |= {path.resolve(): path for path in found}
    order = list(CATALOG)
    return sorted(map(read_run, runs.values()), key=lambda run: (order.index(run.benchmark), str(run.folder)))


def read_run(folder) -> Run:
    """The Run in a folder. Raises ValueError."""
    manifest = read_object(folder / NAME)
    scores = read_object(folder / SCORES)
    if scores is not None:
        check_scores(folder / SCORES, scores)
    if manifest is None:
        counts, notes = scores.get("counts", {}), scores.get("notes", ())
        return Run(folder, scores["benchmark"], folder.name, None, "scored", number_of(counts),
                   scores["scores"], counts, (f"no {NAME}: weights and settings are not known", *notes))
    check_manifest(folder / NAME, manifest)
    if scores is not None and scores["benchmark"] != manifest["benchmark"]:
        raise ValueError(f"{folder}: {NAME} is of {manifest['benchmark']}, {SCORES} of {scores['benchmark']}")
    numbers, status = manifest.get("numbers") or {}, str(manifest.get("status"))
    fingerprint = (manifest.get("weights") or {}).get("fingerprint")
    run = {"folder": folder, "benchmark": manifest["benchmark"], "model": str(manifest.get("model")),
           "weights": None if fingerprint is None else str(fingerprint), "status": status,
           "conditions": conditions_of(manifest)}
    if status not in FINISHED:
        return Run(**run, notes=(f"not finished (status: {status}), so no score is shown",))
    if scores is None or not scores["scores"]:
        return Run(**run, notes=("not scored: a scorer is needed that was not there",))
    counts = scores.get("counts", {})
    faults = {name: count for name, count in (numbers | counts).items() if name in FAULTS and count}
    notes = [f"{name}: {count}" for name, count in faults.items()]
    if status == "scored":
        notes.insert(0, "scored from a file: under which settings it was made is not known")
    return Run(**run, scores=scores["scores"], counts=counts, notes=(*notes, *scores.get("notes", ())))


def read_object(file) -> dict | None:
    """The JSON object in a file, None if the file is not there."""
    if not file.exists():
        return None
    content = parse_json(file, read_text(file))
    if not isinstance(content, dict) or str(content.get("benchmark")) not in CATALOG:
        raise ValueError(f"{file}: not written by a benchmark of `python -m harmonkit.evals list`")
    return content


def check_manifest(file, manifest):
    """Raise ValueError for fields of other types than `manifest.py` writes."""
    for name in ("weights", "settings", "data", "numbers"):
        if not isinstance(manifest.get(name) or {}, dict):
            raise ValueError(f"{file}: {name} is {shorten(manifest[name], 40)}; an object is expected")
    limit, whole = manifest.get("limit"), (manifest.get("numbers") or {}).get("of")
    if not all(isinstance(value, (int, type(None))) for value in (limit, whole)):
        raise ValueError(f"{file}: limit is {shorten(limit, 40)} of {shorten(whole, 40)}; numbers are "
                         "expected")


def check_scores(file, content):
    """Raise ValueError for anything but {"scores": {protocol: {name: number}}, "counts", "notes"}."""
    scores, counts, notes = content.get("scores"), content.get("counts", {}), content.get("notes", [])
    if not isinstance(scores, dict) or not all(part and isinstance(part, dict) for part in scores.values()):
        raise ValueError(f"{file}: scores must be an object of objects, {{protocol: {{name: number}}}}")
    if not isinstance(counts, dict):
        raise ValueError(f"{file}: counts must be an object, {{name: number}}")
    for part in (*scores.values(), counts):
        for name, value in part.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ValueError(f"{file}: {shorten(name)} is {shorten(value, 40)!r}; a number is expected")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"{file}: notes must be a list of sentences")


# ---- conditions ------------------------------------------------------------------------------------------

def conditions_of(manifest) -> dict:
    """{name: text} of everything in a manifest that scores depend on besides the weights.

    data: the first digits of the files' sha256, or of the prompts' where there is no file.
    """
    settings = dict(manifest.get("settings") or {})
    prompts = settings.pop("prompts_sha256", None)
    conditions = {name: text_of(value) for name, value in settings.items()}
    if manifest.get("protocol") is not None and manifest.get("status") != "scored":
        conditions["template"] = text_of(manifest["protocol"])
    if manifest.get("seed_rule") is not None:               # answers are read greedily and need no seed
        conditions |= {"seed": text_of(manifest.get("seed")), "seed_rule": text_of(manifest["seed_rule"])}
    digests = list((manifest.get("data") or {}).values()) or [prompts]
    if digests != [None]:
        conditions["data"] = " ".join(sorted(str(digest)[:12] for digest in digests))
    numbers = manifest.get("numbers") or {}
    limit, whole = manifest.get("limit"), numbers.get("of")
    is_part = limit is not None and (whole is None or limit < whole)
    return conditions | number_of(numbers) | {"part": f"the first {limit}" if is_part else "all"}


def number_of(counts) -> dict:
    """{"number": how many prompts or questions the data have}, {} if that is not known."""
    found = [counts[name] for name in ("of", "questions", "prompts") if counts.get(name) is not None]
    return {"number": text_of(found[0])} if found else {}


def text_of(value) -> str:
    if isinstance(value, (list, tuple)):
        return "×".join(map(text_of, value))
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.12g}"
    return "default" if value is None else str(value)


def differences(runs, where, expected=None, ignored=()) -> list:
    """For each of the runs, {name: sentence}: where it differs from the expected conditions or other runs.

    where: what the runs share, "row" or "column". expected: {name: text}. ignored: names that may differ.
    """
    expected = expected or {}
    names = dict.fromkeys(name for run in runs for name in run.conditions if name not in ignored)
    sentences = [{} for _ in runs]
    for name in dict.fromkeys([*expected, *names]):
        values = [run.conditions.get(name) for run in runs]
        known = sorted({value for value in values if value is not None})
        for said, value in zip(sentences, values):
            if name in expected and value != expected[name]:
                said[name] = f"{name}: {value or 'not known'}; expected: {expected[name]}"
            elif name not in expected and value is not None and len(known) > 1:
                others = ", ".join(other for other in known if other != value)
                said[name] = f"{name}: {value}; others in the {where}: {others}"
    return sentences
