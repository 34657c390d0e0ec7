"""What a resumed command changes in a run: harmless changes are said, others refused with what to do."""
import sys

from harmonkit.training.recipes import as_text, flag_of

DATA_SETTINGS = {"batch", "micro_batch", "seed", "ratio"}                   # the order of the data
SAME_WEIGHTS = {"save_every", "sample_every", "checkpointing"}              # settings that do not change them


def compare(folder, before, now, is_finished) -> list:
    """What a command changes in a run, in words. before, now: records; before may lack all but settings.

    Raises ValueError for changes that would make another run of it.
    """
    elsewhere = f"to train on from its weights, give --init {folder} and another --runs"
    compare_parts(folder, before["settings"], now["settings"], elsewhere)
    said = compare_starts(folder, before["start"], now["start"]) if "start" in before else []
    changed = [key for key, value in now["settings"].items() if before["settings"].get(key) != value]
    if is_finished and set(changed) - SAME_WEIGHTS:
        words = ", ".join(f"{flag_of(key)} {as_text(before['settings'].get(key))}" for key in changed)
        raise ValueError(f"{folder}: this run is finished, with {words}; another --runs trains anew, more "
                         "--steps train on")
    if now["data"] is None:
        said.append("its data as they were; they cannot be opened now")
    elif "data" in before:
        for key in {"seed", "scenes"} & set(changed):                       # of the shapes world
            elsewhere = f"{flag_of(key)} was {before['settings'].get(key)}; {elsewhere}"
        said += compare_data(folder, before["data"], now["data"], elsewhere)
    said += [f"{key} {before['settings'].get(key)} -> {now['settings'][key]}" for key in changed]
    if DATA_SETTINGS & set(changed):
        said.append("the data come in another order from here")
    return said


def compare_parts(folder, before, now, elsewhere):
    """Raises ValueError if other parts of the model are trained, or by another optimizer."""
    if set(before["lr"]) != set(now["lr"]):
        raise ValueError(f"{folder}: the run has trained {', '.join(sorted(before['lr']))} so far, not "
                         f"{', '.join(sorted(now['lr']))}; {elsewhere}")
    if before.get("muon", False) != now["muon"]:
        raise ValueError(f"{folder}: --muon {as_text(now['muon'])}, but the state of this run's optimizer is "
                         f"from --muon {as_text(before.get('muon', False))}; {elsewhere}")


def compare_starts(folder, before, now) -> list:
    """Notes on files that have changed since. Raises ValueError for another start."""
    said = []
    for key, asked in now.items():
        had = before.get(key)
        same_path = had is not None and had["path"] == asked["path"]
        is_gone = asked["fingerprint"] is None
        if had and (same_path if is_gone else asked["fingerprint"] == had["fingerprint"]):
            continue
        if key == "after" and had:
            raise ValueError(f"{folder}: {asked['path']} has changed since this run started from it; another "
                             "--runs, or no such folder, starts from it anew")
        if key == "after":
            continue
        if not same_path:
            raise ValueError(f"{folder}: {flag_of(key)} {asked['path']}, but this run started with "
                             f"{words_of(before)}; leave the flag out to go on, or give another --runs")
        said.append(f"its own weights; {asked['path']} has changed since")
    if set(before) - {"after"} and not set(now) - {"after"}:
        said.append(f"{words_of(before)}, which is left out here")
    return said


def words_of(start) -> str:
    """What a run started from, as it is written."""
    words = [f"{flag_of(key)} {file['path']}" for key, file in start.items() if key != "after"]
    words += [f"the weights of {file['path']}" for key, file in start.items() if key == "after"]
    return ", ".join(words) or "random weights"


def compare_data(folder, before, now, elsewhere) -> list:
    """Notes on other weights and places. Raises ValueError if samples or their order are others."""
    lists = [", ".join(f"{source['path']} ({source['task']})" for source in data) for data in (before, now)]
    if [source["task"] for source in before] != [source["task"] for source in now]:
        raise ValueError(f"{folder}: this run has trained on {lists[0]}, not on {lists[1]}; {elsewhere}")
    said = []
    for had, has in zip(before, now, strict=True):
        if had["samples"] != has["samples"]:
            raise ValueError(f"{folder}: {has['path']} has {has['samples']} samples now, and had "
                             f"{had['samples']} when the run began ({had['path']}); {elsewhere}")
        if had["fingerprint"] != has["fingerprint"]:
            raise ValueError(f"{folder}: the samples of {has['path']}, their order or their words are others "
                             f"than when the run began ({had['path']}, {had['format']}); {elsewhere}")
        if had["weight"] != has["weight"]:
            said.append(f"weight {had['weight']:g} -> {has['weight']:g} of {has['path']}, and the data in "
                        "another order")
        if bool(had["latents"]) != bool(has["latents"]):
            kind = "cached latents" if has["latents"] else "pixels"
            said.append(f"{kind} of {has['path']}, and other crops")
    return said


def compare_versions(before, start) -> list:
    """Notes on other software or machines than at the last start, where bits may differ."""
    last = before.get("starts", [])[-1:]
    if not last:
        return []
    last = last[0]
    said = [f"{package} {last['versions'].get(package)} -> {version}"
            for package, version in start["versions"].items() if last["versions"].get(package) != version]
    for key in ("device", "processes"):
        if last[key] != start[key]:
            said.append(f"{key} {last[key]} -> {start[key]}")
    commits = [git["commit"] if git else None for git in (last["git"], start["git"])]
    if None not in commits and commits[0] != commits[1]:
        said.append(f"the code of commit {commits[0][:9]} -> {commits[1][:9]}")
    return said


def say(changes, rank=0):
    if changes and rank == 0:
        print(f"warning: the run goes on with {'; '.join(changes)}", file=sys.stderr)
