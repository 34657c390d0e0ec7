"""Names and numbers of the classes of class folders.

Names come from a file beside the folders or up to two folders above, otherwise from ImageNet's synsets
(n01440764 is "tench"), otherwise from the folders: tree_frog is "tree frog".
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from harmonkit.data.imagenet import imagenet_classes
from harmonkit.data.words import decode

FILES = ("classes.json", "imagenet_class_index.json", "class_names.json", "class_to_idx.json",
         "LOC_synset_mapping.txt", "synset_words.txt", "classes.txt", "classnames.txt", "labels.txt")
SPLITS = {                          # folders that hold classes or images, but are no class
    "train", "training", "val", "valid", "validation", "test", "data",
    "images", "image", "imgs", "img", "photos", "pictures",
}
SYNSET = re.compile(r"(?<![a-z0-9])n\d{8}(?![0-9])")


@dataclass(frozen=True)
class Classes:
    """The classes of a folder."""
    names: dict                     # {class: name}, without the classes of unknown name
    labels: dict                    # {class: number}
    origin: str                     # of the names: "ImageNet-1k", a file's name, or "" for the folders


def class_of(file):
    """The class of an image by its path: a synset, else its first folder that is no split; None = none."""
    synsets = SYNSET.findall(file)                              # of a folder, or n01440764_18.JPEG
    if synsets:
        return synsets[-1]
    folders = [folder for folder in file.split("/")[:-1] if folder.lower() not in SPLITS]
    if len(folders) > 1 and len(folders[0]) == 1 and folders[0].isalpha():      # Places365: a/abbey/1.jpg
        return folders[1]
    return folders[0] if folders else None


def find_classes(path, classes) -> Classes:
    """Names and labels of the classes in a folder. Raises ValueError for a file of names without them."""
    classes = sorted(classes)
    synsets = imagenet_classes()
    names = {name: synsets[name] for name in classes if name in synsets}
    labels = {name: number for number, name in enumerate(classes)}
    origin = "ImageNet-1k" if names else ""
    if classes:
        named, order, file = names_beside(path, classes)
        names.update(named)
        origin = file or origin
        if order:
            labels = {name: order.index(name) if name in order else -1 for name in classes}
    if all(name in synsets for name in classes):
        order = list(synsets)
        labels = {name: order.index(name) for name in classes}
    plain = {name: plain_name(name) for name in classes if not is_code(name)}
    return Classes(plain | names, labels, origin)


def names_beside(path, classes):
    """`read_names` of the nearest file of names, and its name; {}, [], "" without one. Raises ValueError."""
    for file in filter(Path.is_file, candidates(path, [*FILES, "words.txt"])):
        try:
            return *read_names(file, classes), file.name
        except ValueError:
            if file.parent != Path(path).absolute().parents[1]:  # two folders above, it may be of other data
                raise
    return {}, [], ""


def candidates(path, files=FILES) -> list:
    """Where a file of names may lie: at a path, beside it, and a folder above, the nearest first."""
    folders = [Path(path), *Path(path).absolute().parents[:2]]
    return [folder / file for folder in folders for file in files]


def is_code(folder) -> bool:
    """Whether a folder's name is a number in a catalogue, not a word to draw."""
    return bool(re.fullmatch(r"n\d{8}|\d{3,}", folder))


def plain_name(folder) -> str:
    """tree_frog -> tree frog; 001.Black_footed_Albatross -> Black footed Albatross."""
    return re.sub(r"^\d+[._]\s*(?=\D)", "", folder).replace("_", " ").strip()


# ---- files of names ------------------------------------------------------------------------------------

def read_names(file, classes):
    """{class: name}, and the classes in the order of their labels, [] if it has none. Raises ValueError."""
    content = names_by_form(file, read_content(file), classes)
    if not set(classes) & set(content):
        raise ValueError(f"{file}: none of the class folders is in it, such as {classes[0]}")
    names = {name: readable(name, content[name]) for name in classes if name in content}
    has_order = not SYNSET.fullmatch(next(iter(content))) or file.suffix == ".json"
    return names, list(content) if has_order else []


def read_content(file) -> dict:
    """The {key: value} of a file of names; of a list, the keys are numbers as texts. Raises ValueError."""
    text = decode(file.read_bytes())
    if file.suffix == ".txt":
        content = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [line.split(None, 1) for line in content]
        if all(len(pair) == 2 and (pair[0].isdigit() or SYNSET.fullmatch(pair[0])) for pair in pairs):
            content = dict(pairs)
    else:
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
    if isinstance(content, list):
        content = {str(number): name for number, name in enumerate(content)}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: class names are expected, as a list or as {{folder: name}}")
    return content


def names_by_form(file, content, classes) -> dict:
    """{folder: name} of any {key: value}. Raises ValueError."""
    folders = set(classes)
    values = list(content.values())
    if all(isinstance(value, list) and value for value in values):
        if folders & set(content):                              # {"n01440764": ["tench", "Tinca tinca"]}
            content = {key: value[0] for key, value in content.items()}
        else:                                                   # {"0": ["n01440764", "tench"]}
            content = {str(value[0]): value[-1] for value in values}
    elif all(isinstance(value, int) for value in values):       # {"owl": 0}
        content = {key: key for key in sorted(content, key=content.get)}
    if not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"{file}: class names are expected, as a list or as {{folder: name}}")

    names = list(content.values())
    if folders & set(content):
        return content
    if not all(key.isdigit() for key in content):               # {"tench": "n01440764"}
        return {value: key for key, value in content.items()}
    if folders <= set(names):                                   # the folders themselves, in order
        return {name: name for name in names}
    if len(names) == len(classes):                              # names of the sorted folders
        return dict(zip(classes, names, strict=True))
    raise ValueError(f"{file}: {len(names)} class names, but {len(classes)} class folders")


def readable(folder, name) -> str:
    """The first synonym of a synset; blanks for underscores."""
    if SYNSET.fullmatch(folder):
        name = name.split(",")[0]
    return plain_name(name)
