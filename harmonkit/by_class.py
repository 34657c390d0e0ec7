"""sample.py --classes: pictures by class, from MAR alone."""
import difflib
import json
import re

from harmonkit import mar_files, outputs
from harmonkit.data.imagenet import imagenet_classes
from harmonkit.devices import DTYPES, choose_device, choose_dtype
from harmonkit.drawing import about, draw_sheets, sampling_settings
from harmonkit.fast import accelerate
from harmonkit.outputs import Picture, Sheet, image_seed
from harmonkit.prompts import slug
from harmonkit.repeatable import make_repeatable

NONE = -1                                           # the label that stands for no class
DEFAULTS = "mar_base 2.9, mar_large 3.0, mar_huge 3.2, others 3"
MOST = 10 ** 5                                      # images of a class, each with its own seed


# ---- classes ---------------------------------------------------------------------------------------------

def class_names(config) -> list:
    """A name for each label. Where none are known: "class 0", "class 1", …"""
    if config.class_names:
        return list(config.class_names)
    if config.mar.class_num == 1000:
        return list(imagenet_classes().values())
    return [f"class {label}" for label in range(config.mar.class_num)]


def read_class(text, names) -> int:
    """The label of a class: of its number, its name, its WordNet id, or "none". Raises ValueError."""
    wanted = plain(text)
    if wanted == "none":
        return NONE
    if re.fullmatch(r"[+-]?[0-9]+", wanted):
        if len(wanted) < 10 and 0 <= int(wanted) < len(names):
            return int(wanted)
        raise ValueError(f"--classes {wanted[:20]}: this MAR has classes 0 to {len(names) - 1}, and none")
    labels = {plain(name): label for label, name in enumerate(names)}
    if len(names) == 1000:
        labels |= {synset: label for label, synset in enumerate(imagenet_classes())}
    for form in (wanted, re.sub(r"^(an?|the) ", "", wanted)):
        if form in labels:
            return labels[form]
    near = difflib.get_close_matches(wanted, labels, n=3, cutoff=0.6)
    near = near or [name for name in labels if wanted in name or name in wanted][:3]
    hint = f"the first one is {names[0]}"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise ValueError(f"--classes {text[:60]!r}: this MAR has no such class; {hint}")


def labels_of(words, names) -> list:
    """The labels of classes, each once."""
    return list(dict.fromkeys(read_class(word, names) for word in words))


def wants_all(words) -> bool:
    return [plain(word) for word in words] == ["all"]


def plain(name) -> str:
    return " ".join(name.replace("_", " ").lower().split())


# ---- plan ------------------------------------------------------------------------------------------------

def plan(words, names, num_images, seed, settings, folder) -> tuple:
    """Sheets of the classes that `words` name, and the label of each picture, {path: label}.

    Image s of a class has the seed SEED + 100000·class + s. ["all"]: num_images in all, equally many of each
    class, 00000.png, …, else num_images of each class. Raises ValueError.
    """
    labels = {}

    def picture(name, label, s, **more):
        path = folder / f"{name}.png"
        labels[path] = label
        text = "no class" if label == NONE else names[label]
        texts = json.dumps(settings | {"class": label} | more)
        return Picture(path, text, image_seed(seed, label, s), texts)

    if wants_all(words):
        per_class, rest = divmod(num_images or len(names), len(names))
        if rest or per_class > MOST:
            near = min(MOST, max(1, per_class)) * len(names)
            raise ValueError(f"--num-images is {num_images}; all {len(names)} classes get equally many, so "
                             f"{near} or another multiple of {len(names)} is expected")
        digits = max(5, len(str(num_images or 0)))
        sheets = [Sheet((picture(f"{i:0{digits}d}", i // per_class, i % per_class),), None)
                  for i in range(per_class * len(names))]
        return sheets, labels

    sheets = []
    per_class = num_images or 4
    for label in labels_of(words, names):
        name = "none" if label == NONE else slug(f"{label} {names[label]}")
        if per_class == 1:
            sheets.append(Sheet((picture(name, label, 0),), None))
        else:
            pictures = tuple(picture(f"{name}-{s}", label, s) for s in range(per_class))
            sheets.append(Sheet(pictures, picture(name, label, 0, pictures=per_class)))
    return sheets, labels


# ---- draw ------------------------------------------------------------------------------------------------

def draw(args, size):
    """The command. args: the flags of sample.py. size: (H, W) or None. Raises ValueError or OSError."""
    outputs.check_folder(args.out)
    device = choose_device(args.device)
    source, config, tensors = mar_files.read_files(args.model, args.vae)
    names = class_names(config)
    if not wants_all(args.classes):
        labels_of(args.classes, names)                  # unknown ones are refused before the weights are read
    side = config.mar.img_size
    if size not in (None, (side, side)):
        raise ValueError(f"--size is {args.size}; this MAR draws {side}x{side} pixels by class")
    sampling = sampling_settings(args, **mar_files.defaults(config))
    if args.dtype == "auto":
        of_mar = [tensor for name, tensor in tensors.items() if name.startswith("mar.")]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in of_mar)
        dtype = choose_dtype(args.model, device, num_bytes)
    else:
        dtype = DTYPES[args.dtype]
    model = mar_files.build(source, config, tensors, device=device, dtype=dtype)
    settings = about(model, sampling, (side, side), args)
    sheets, labels = plan(args.classes, names, args.num_images, args.seed, settings, args.out)
    make_repeatable(accelerate(model, args.mode))

    def draw_batch(pictures):
        given = {name: settings[name] for name in vars(sampling)}
        return model.generate_image([labels[picture.path] for picture in pictures], progress=True,
                                    seed=[picture.seed for picture in pictures], **given)
    called = "pictures" if wants_all(args.classes) else "classes"
    # Classes take no padding, so any pictures share a batch.
    draw_sheets(sheets, draw_batch, settings, args, padded_length=lambda name: 0, called=called)
