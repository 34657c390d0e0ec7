"""manifest.json beside every result: what was run, with which weights, data and settings, and how it went.

A folder belongs to the first run that wrote its manifest. A later run may go on there, or redo it, only with
the same COMPARED fields.
"""
import json
import time
from dataclasses import replace
from pathlib import Path

from harmonkit.checkpoints import write_text
from harmonkit.devices import from_first_process, rank_and_world_size
from harmonkit.evals.origins import device_name, digest, flags, git_commit, now, versions, weights
from harmonkit.prompts import parse_json, read_text, shorten

NAME, SCORES = "manifest.json", "scores.json"
COMPARED = ("benchmark", "weights", "settings", "protocol", "data", "seed", "seed_rule")


# ---- start and finish ------------------------------------------------------------------------------------

def start(out, benchmark, args, loaded, *, settings, data=(), protocol=None, seed_rule=None,
          scorer=None) -> dict:
    """Claim the folder `out` for a run: write its manifest, and return it for `finish`.

    args: of the command (model, seed, limit, overwrite). loaded: a benchmark.Loaded. settings: a dictionary
    for JSON: all that results depend on besides weights and data. data: paths of the files that are read.
    protocol: the name of the question template. seed_rule: how a picture's seed comes about, in words.
    scorer: what the scores depend on besides, a dictionary, or None if this run scores nothing.
    Only process 0 of torchrun writes. Raises ValueError, in all processes, if the folder is another run's.
    """
    out = Path(out)
    rank, world_size = rank_and_world_size()
    wanted = {
        "benchmark": benchmark, "model": str(args.model), "weights": weights(loaded), "settings": settings,
        "protocol": protocol, "data": {Path(path).name: digest(path) for path in data},
        "seed": getattr(args, "seed", None), "seed_rule": seed_rule, "limit": args.limit}
    run = {"started": now(), "device": device_name(loaded.model.device), "processes": world_size,
           "flags": flags(args), "versions": versions(), "git_commit": git_commit(), "wall_seconds": None}

    def look():
        earlier = read(out)
        if earlier is None:
            return wanted | {"status": "running", "numbers": {}, "scorer": scorer, "runs": [run]}
        check_same(out / NAME, earlier, wanted)
        before = earlier.get("scorer")
        if scorer:
            check_scorer(out, before, scorer)
        return wanted | {"status": "running", "numbers": {}, "scorer": scorer or before,
                         "runs": [*earlier.get("runs", []), run]}

    def claim():
        manifest = look()
        remove_leftovers(out)
        # Scores of fewer prompts must not stand beside more pictures.
        earlier = read(out)
        if earlier is not None and (earlier.get("limit") != args.limit or args.overwrite):
            (out / SCORES).unlink(missing_ok=True)
        write(out, manifest)
        return manifest
    manifest = from_first_process(claim)
    if manifest is None:                # processes that cannot talk to each other
        manifest = claim() if rank == 0 else look()
    return manifest | {"began": time.monotonic()}


def finish(out, manifest, numbers, result=None, status=None):
    """Write how the run ended: scores.json if there is a Result, and manifest.json. In process 0 alone.

    numbers: {"prompts": 553, "of": 553, "drawn": 2212, "failed": 0, …}; "of": those of the whole benchmark.
    status: default "complete", or "part" if --limit left some out. Returns the Result as written: a part's
    has a note that says so.
    """
    if rank_and_world_size()[0] != 0:
        return None
    out = Path(out)
    limit, whole = manifest["limit"], numbers.get("of")
    is_part = limit is not None and (whole is None or limit < whole)
    if is_part and result is not None:
        result = as_part(result, limit, whole)
    if result is not None:
        write_scores(out, manifest["benchmark"], result)
    seconds = round(time.monotonic() - manifest["began"], 1)
    runs = [*manifest["runs"][:-1], manifest["runs"][-1] | {"wall_seconds": seconds}]
    ended = {key: value for key, value in manifest.items() if key != "began"}
    ended |= {"status": status or ("part" if is_part else "complete"), "numbers": dict(numbers), "runs": runs}
    write(out, ended)
    return result


def as_part(result, limit, whole=None):
    """The Result with a note that it is of the first `limit` prompts or questions alone."""
    of = "" if whole is None else f" of {whole}"
    note = f"A part of the benchmark, the first {limit}{of}: not comparable with the whole."
    return replace(result, notes=(note, *result.notes))


def check_scorer(out, before, scorer):
    """Raise ValueError if the folder has scores of another scorer."""
    if (out / SCORES).exists() and before not in (None, scorer):
        raise ValueError(f"{out / SCORES}: of another scorer: {difference('scorer', before, scorer)}; delete "
                         "the file, or give another --out")


def check_same(file, earlier, wanted):
    """Raise ValueError if the manifest in `file` is of another run than the wanted one."""
    for name in COMPARED:
        there, here = earlier.get(name), wanted[name]
        if name == "weights":           # the same weights may come from files of other names and formats
            there, here = ((some or {}).get("fingerprint") for some in (there, here))
        if there != here:
            raise ValueError(f"{file}: results of another run are here: {difference(name, there, here)}; "
                             "give another --out")
    before, now = earlier.get("limit"), wanted["limit"]
    if now is not None and (before is None or before > now):
        whole = "all" if before is None else f"the first {before}"
        raise ValueError(f"{file}: results of {whole} are here, and --limit {now} would make a part of "
                         "them; give another --out")


def difference(name, there, here) -> str:
    """Where two values of a manifest's field differ: "cfg is 3.0 there and 1.0 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        name = next(key for key in (*here, *there) if there.get(key) != here.get(key))
        there, here = there.get(name), here.get(name)
    return f"{name} is {shown(there)} there and {shown(here)} here"


def shown(value) -> str:
    return "not given" if value is None else shorten(value, 60)


def write_scored(out, benchmark, args, result, data=()):
    """The manifest and scores of a file that another model or an official scorer wrote.

    args: of `score` (file, name). data: paths of the benchmark's files. Pictures that were drawn in this
    folder, for a scorer elsewhere, keep their manifest. Of another model it is not known how it was asked, so
    no template is named. Raises ValueError if the folder holds other results.
    """
    out, scored = Path(out), {args.file.name: digest(args.file)}
    wanted = {"benchmark": benchmark, "data": {Path(path).name: digest(path) for path in data},
              "limit": getattr(args, "limit", None)}
    earlier = read(out)
    if earlier is not None:
        if earlier.get("status") not in ("complete", "part", "scored"):
            raise ValueError(f"{out / NAME}: the run here is not finished; give another --out")
        check_scorer(out, earlier.get("scorer"), scored)
        for name, here in wanted.items():
            if earlier.get(name) != here:
                found = difference(name, earlier.get(name), here)
                raise ValueError(f"{out / NAME}: other results are here: {found}; give another --out")
    if earlier is not None and earlier["status"] != "scored":
        note = f"scored elsewhere, in the file {args.file.name}"
        write_scores(out, benchmark, replace(result, notes=(note, *result.notes)))
        write(out, earlier | {"scorer": scored})
        return
    write_scores(out, benchmark, result)
    run = {"started": now(), "device": None, "processes": 1, "versions": versions(),
           "flags": flags(args), "git_commit": git_commit(), "wall_seconds": None}
    write(out, wanted | {
        "model": args.name or args.file.stem, "weights": None, "settings": {}, "protocol": None,
        "scorer": scored, "status": "scored", "numbers": result.counts, "runs": [run]})


# ---- files -----------------------------------------------------------------------------------------------

def read(out):
    """The manifest of a folder, or None if there is none. Raises ValueError for one that cannot be read."""
    file = Path(out) / NAME
    if not file.exists():
        return None
    manifest = parse_json(file, read_text(file))
    if not isinstance(manifest, dict) or "benchmark" not in manifest:
        raise ValueError(f"{file}: not a manifest of harmonkit.evals; give another --out")
    return manifest


def remove_leftovers(out):
    """Delete the temporary files with which a killed process was writing manifest.json or scores.json."""
    for name in (NAME, SCORES):
        for leftover in out.glob(f".{name}.????????.json"):
            leftover.unlink(missing_ok=True)


def write(out, manifest):
    write_text(Path(out) / NAME, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_scores(out, benchmark, result):
    """scores.json: {"benchmark", "scores", "counts", "notes"}, as in benchmark.Result."""
    content = {"benchmark": benchmark, "scores": result.scores, "counts": result.counts,
               "notes": list(result.notes)}
    write_text(Path(out) / SCORES, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
