"""Names of the numbered classes in shards and tables, where a sample has a label but no words.

They come from a file of names beside the data (classes.py lists them). Without one, labels 0 … 999 are taken
for ImageNet-1k's, unless a large source has only small ones: 0 … 9 are then classes of something else.
"""
from harmonkit.data.classes import candidates, plain_name, read_content, readable
from harmonkit.data.imagenet import imagenet_classes

LABEL_FIELDS = ("label", "labels", "cls", "class", "class_id", "fine_label")
MANY = 1000                         # samples; among so many of ImageNet-1k a label is at least 100


def label_names(path, labels, count) -> tuple:
    """{label: name} of the data at a path, and where the names come from; ({}, "nothing") if unknown.

    labels: some of those there. count: of the samples there. Raises ValueError for a broken file of names.
    """
    file = next((file for file in candidates(path) if file.is_file()), None)
    if file is not None:
        return names_in(file), file.name
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and 0 <= min(numbers) and max(numbers) < 1000 and (count < MANY or max(numbers) >= 100):
        return dict(enumerate(imagenet_classes().values())), "ImageNet-1k"
    return {}, "nothing"


def names_in(file) -> dict:
    """{label: name} in a file of names. Raises ValueError."""
    content = read_content(file)
    values = list(content.values())
    if all(isinstance(value, int) for value in values):         # {"owl": 0}
        return {value: plain_name(key) for key, value in content.items()}
    if all(isinstance(value, list) and len(value) == 2 for value in values):
        content = {key: name for key, (_, name) in content.items()}     # {"0": ["n01440764", "tench"]}
    if not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"{file}: class names are expected, as a list or as {{number: name}}")
    if all(key.isdigit() for key in content):
        return {int(key): plain_name(name) for key, name in content.items()}
    return {label: readable(key, name) for label, (key, name) in enumerate(content.items())}


def read_label(content, names) -> tuple:
    """(label, name) of what a sample says its class is: a number, a name, or a WordNet id.

    names: {label: name}. The label is -1, or the name None, if it is unknown.
    """
    text = str(content).strip()
    synsets = imagenet_classes()
    if text in synsets:
        return list(synsets).index(text), synsets[text]
    if text.removeprefix("-").isdigit():
        label = max(-1, int(text))
        return label, names.get(label)
    name = plain_name(text)
    label = next((label for label, known in names.items() if known == name), -1)
    return label, name or None
