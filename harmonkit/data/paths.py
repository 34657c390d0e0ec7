"""The files of a folder, and the paths of a pattern."""
import glob
import os
import re
from functools import lru_cache

from harmonkit.data.records import is_junk

TRAIN = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)", re.IGNORECASE)       # in the paths of a folder's files
HELD_OUT = re.compile(r"(^|[/_.-])(test|val|valid|validation|dev)([/_.-]|$)", re.IGNORECASE)


@lru_cache(maxsize=1)
def list_folder(path) -> tuple:
    """The files of a folder and its subfolders as relative paths, in the order of their names."""
    return tuple(walk(path, "", [os.path.realpath(path)]))


def walk(folder, inside, around):
    """The files of a folder by name. inside: its relative path. around: real paths of the folders around."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_junk(entry.name):
            continue
        if not entry.is_dir():
            yield f"{inside}{entry.name}"
            continue
        real = os.path.realpath(entry.path)
        if real not in around:                                  # a link to a folder around would never end
            yield from walk(entry.path, f"{inside}{entry.name}/", [*around, real])


def training_split(files) -> list:
    """Without the files of held-out splits, where there are files of a train split."""
    files = list(files)
    if any(map(TRAIN.search, files)):
        files = [file for file in files if TRAIN.search(file) or not HELD_OUT.search(file)]
    return files


def expand(pattern) -> list:
    """The paths of a pattern, as in a shell: "a{8..9}.tar" -> a8.tar, a9.tar; "{a,b}", "*", "**", "?", "[…]".

    A path that no file has is kept, so that it can be named as missing.
    """
    if os.path.exists(pattern):                                 # a name may hold these characters
        return [pattern]
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    inside = os.path.relpath(pattern, folder or ".")
    paths = [path for part in expand_braces(inside) for path in expand_stars(part, folder)]
    return list(dict.fromkeys(paths))


def expand_braces(pattern) -> list:
    """a{8..10} -> a8, a9, a10; a{08..10} -> a08, …; a{x,y{1..2}} -> ax, ay1, ay2."""
    # Cut the first outermost pair of braces at the commas that lie in no inner pair.
    depth = 0
    cuts = []
    for place in range(max(0, pattern.find("{")), len(pattern)):
        letter = pattern[place]
        depth -= letter == "}"
        if (depth == 0 and letter in "{}") or (depth == 1 and letter == ","):
            cuts.append(place)
        depth += letter == "{"
        if depth == 0:
            break
    if depth or not cuts:
        return [pattern]
    choices = [pattern[start + 1:end] for start, end in zip(cuts, cuts[1:])]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", choices[0])
    if len(choices) > 1:
        inside = [part for choice in choices for part in expand_braces(choice)]
    elif numbers:
        first, last = map(int, numbers.groups())
        step = 1 if first <= last else -1
        inside = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + step, step)]
    else:
        inside = [f"{{{part}}}" for part in expand_braces(choices[0])]
    before, after = pattern[:cuts[0]], pattern[cuts[-1] + 1:]
    return [f"{before}{part}{rest}" for part in inside for rest in expand_braces(after)]


def expand_stars(pattern, folder) -> list:
    """The paths in a folder that match, in the order of their names; the pattern itself if there are none."""
    found = sorted(glob.glob(pattern, root_dir=folder or None, recursive=True))
    return [os.path.join(folder, path) for path in found or [pattern]]
