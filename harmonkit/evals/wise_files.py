"""WISE's prompts and score files. Which edition a file is of follows from what it holds.

Prompts are JSON arrays of Prompt, Explanation, Category, Subcategory, prompt_id, in one file or in a folder.
Each edition has its own ranges of ids for the categories.

Scores are JSON lines, in one file or in a folder: prompt_id and, in the edition "original", consistency,
realism and aesthetic_quality from 0 to 2; in the edition "verified" score, which is 0 or 1.
"""
from harmonkit.evals.json_files import read_objects, several
from harmonkit.evals.rules import wise as rules
from harmonkit.prompts import parse_json, read_text

FIELDS = ("Prompt", "Explanation", "Category", "Subcategory")
IDS = range(1, rules.NUM_PROMPTS + 1)
# Parts of the names that the data give the categories; how the files spell these is not verified.
STEMS = {"cultur": "CULTURE", "time": "TIME", "space": "SPACE", "spatial": "SPACE", "biolog": "BIOLOGY",
         "physic": "PHYSICS", "chemi": "CHEMISTRY"}


# ---- prompts -----------------------------------------------------------------------------------------------

def read_data(path) -> dict:
    """{prompt_id: entry} of a file or folder. Raises ValueError for anything but all 1,000 ids, once each."""
    entries = {}
    for file in files_at(path, ".json"):
        array = parse_json(file, read_text(file))
        if not isinstance(array, list):
            raise ValueError(f"{file}: a {type(array).__name__} where a JSON array of prompts is expected")
        for number, entry in enumerate(array, start=1):
            fault = fault_of_entry(entry)
            if fault is None and entry["prompt_id"] in entries:
                fault = f"prompt_id {entry['prompt_id']} stands twice"
            if fault:
                raise ValueError(f"{file}, entry {number}: {fault}")
            entries[entry["prompt_id"]] = entry
    check_ids(path, entries, "prompts")
    return entries


def files_at(path, suffix) -> list:
    """The file, or the files of a folder with a suffix. Raises ValueError for a folder without."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(f"*{suffix}"))
    if not files:
        raise ValueError(f"{path}: a folder without {suffix} files")
    return files


def check_ids(path, ids, what):
    """Raise ValueError if one of the 1,000 ids is missing."""
    missing = [number for number in IDS if number not in ids]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(IDS)} {what} are missing: prompt_id "
                         f"{several(missing)}")


def fault_of_id(entry):
    number = entry.get("prompt_id")
    if isinstance(number, int) and number in IDS:
        return None
    return f"prompt_id is {number!r}; a number from 1 to {len(IDS)} is expected"


def fault_of_entry(entry):
    """What is wrong with an entry of the data, or None."""
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__} where an object is expected"
    for name in FIELDS:
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            return f"no {name}"
    return fault_of_id(entry)


def edition_of(path, entries, wanted=None) -> str:
    """The edition in which the ids have the categories that the entries name.

    wanted: an edition, needed where the categories tell none. Raises ValueError if it is another one.
    """
    named = [(entry["prompt_id"], named_category(entry)) for entry in entries]
    fitting = [edition for edition in rules.WEIGHTS
               if all(name in (None, rules.category(number, edition)) for number, name in named)]
    if not fitting:
        raise ValueError(f"{path}: prompt_id and Category agree with no edition of WISE")
    if wanted is None and len(fitting) > 1:
        raise ValueError(f"{path}: the categories do not tell which edition this is; give --edition")
    if wanted is not None and wanted not in fitting:
        raise ValueError(f"--edition {wanted}: {path} is the edition {fitting[0]}")
    return wanted or fitting[0]


def named_category(entry):
    """The one of rules.CATEGORIES that an entry's Category names, None if it names none or several."""
    found = {name for stem, name in STEMS.items() if stem in entry["Category"].lower()}
    return found.pop() if len(found) == 1 else None


# ---- scores ------------------------------------------------------------------------------------------------

def read_lines(path) -> tuple:
    """(lines, edition) of a score file or folder. Raises ValueError for anything but one valid line of one
    edition for each of the 1,000 ids.
    """
    lines, places, editions = [], {}, {}
    for file in files_at(path, ".jsonl"):
        for place, line in read_objects(file):
            place = f"{file}, {place}"
            fault = fault_of_scores(line)
            if fault is None and line["prompt_id"] in places:
                fault = f"prompt_id {line['prompt_id']} stands on {places[line['prompt_id']]} too"
            if fault:
                raise ValueError(f"{place}: {fault}")
            places[line["prompt_id"]] = place
            editions.setdefault("verified" if "score" in line else "original", place)
            lines.append(line)
    if len(editions) > 1:
        raise ValueError(f"{editions['verified']}: a score of the verified edition; {editions['original']} "
                         "has the original's, and the two cannot be mixed")
    check_ids(path, places, "scores")
    return lines, next(iter(editions))


def fault_of_scores(line):
    """What is wrong with a line of a score file, or None."""
    if fault_of_id(line):
        return fault_of_id(line)
    if "score" in line:
        if any(aspect in line for aspect in rules.ASPECTS):
            return "scores of both editions in one line"
        return None if line["score"] in (0, 1) else f"score is {line['score']!r}; 0 or 1 is expected"
    for aspect in rules.ASPECTS:
        value = line.get(aspect)
        if not isinstance(value, (int, float)) or not 0 <= value <= 2:
            return f"{aspect} is {value!r}; a number from 0 to 2 is expected"
    return None
