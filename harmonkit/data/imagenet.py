"""ImageNet-1k's classes: WordNet ids and English names, in the order of the class labels 0 … 999.

Sorted ids give this order; MAR's class embeddings have it too. The names are WordNet's first lemmas. Four are
changed, because another class has the same one: two cranes, Cardigan (a dog) and a maillot.
"""
from functools import cache
from importlib.resources import files


@cache
def imagenet_classes() -> dict:
    """{WordNet id: name} of the 1000 classes, {"n01440764": "tench", …}; the i-th entry has label i."""
    lines = files("harmonkit.data").joinpath("imagenet.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
