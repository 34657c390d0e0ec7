"""The table of ImageNet-1k's classes."""
import re

from harmonkit.data.imagenet import imagenet_classes

KNOWN = {                           # label: (WordNet id, name), from torchvision's and MAR's class lists
    0: ("n01440764", "tench"), 1: ("n01443537", "goldfish"), 22: ("n01614925", "bald eagle"),
    134: ("n02012849", "crane (bird)"), 207: ("n02099601", "golden retriever"),
    264: ("n02113186", "Cardigan Welsh corgi"), 474: ("n02963159", "cardigan"),
    517: ("n03126707", "crane (machine)"), 638: ("n03710637", "maillot"), 639: ("n03710721", "tank suit"),
    817: ("n04285008", "sports car"), 985: ("n11939491", "daisy"), 999: ("n15075141", "toilet tissue"),
}


def test_the_classes_are_in_the_order_of_their_labels():
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert list(classes) == sorted(classes)
    assert all(re.fullmatch(r"n\d{8}", wordnet_id) for wordnet_id in classes)
    entries = list(classes.items())
    assert {label: entries[label] for label in KNOWN} == KNOWN


def test_each_class_has_a_name_of_its_own():
    names = list(imagenet_classes().values())
    assert len({name.lower() for name in names}) == 1000
    assert all(name == name.strip() and "," not in name for name in names)
