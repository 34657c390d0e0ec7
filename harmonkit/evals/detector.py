"""GenEval's scoring over transformers: Mask2Former finds objects, CLIP ViT-L/14 names their colors.

The post-processing is that of mmdet 2.x's Mask2Former (open-mmlab/mmdetection:mmdet/models/seg_heads/
panoptic_fusion_heads/maskformer_fusion_head.py) and of GenEval's color classifier. The detector's weights are
another training of the same net, so scores are marked as ours. Packages: pip install "harmon[evals]".
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from harmonkit.devices import choose_device
from harmonkit.evals.rules import geneval as rules
from harmonkit.images import open_image
from harmonkit.prompts import shorten

# GenEval's names of COCO's 80 classes, in COCO's order.
NAMES = tuple((Path(__file__).parent / "data/geneval_object_names.txt").read_text("utf-8").splitlines()[:80])
NUM_PAIRS = 100                                             # best (query, class) pairs of an image
SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32             # of the detector's input
DETECTOR_MEAN, DETECTOR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = "#999"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}",
             "a photo of a {color} object")
SOME_LABELS = {0: "person", 16: "dog", 22: "zebra", 79: "toothbrush"}   # COCO's order


@dataclass(frozen=True)
class Models:
    """detector: a Mask2FormerForUniversalSegmentation; clip: a CLIPModel with its tokenizer."""
    detector: object
    clip: object
    tokenizer: object
    device: torch.device
    classifiers: dict = field(default_factory=dict)         # {class: text vectors of the colors (10, D)}


# ---- loading ---------------------------------------------------------------------------------------------

def check(detector, clip):
    """Raise ValueError, before hours of drawing, if a package is missing or a model cannot be found."""
    try:
        import scipy  # noqa: F401  transformers' Mask2Former needs it
        import transformers
    except ImportError as error:
        message = f'--scorer ours: {error.name} is not installed; pip install "harmon[evals]"'
        raise ValueError(message) from None
    load_one("--detector", transformers.AutoConfig, detector)
    load_one("--clip", transformers.AutoConfig, clip)


def load(detector, clip, device=None) -> Models:
    """The models of two folders or hub names. Raises ValueError, naming the flag, if one cannot be used."""
    check(detector, clip)
    import transformers

    device = choose_device(device)
    found = load_one("--detector", transformers.Mask2FormerForUniversalSegmentation, detector)
    found = found.to(device).eval()
    labels = {int(number): name for number, name in found.config.id2label.items()}
    if len(labels) != len(NAMES) or any(labels[number] != name for number, name in SOME_LABELS.items()):
        raise ValueError(f"--detector {detector}: its classes are not COCO's 80 in their order")
    colors = load_one("--clip", transformers.CLIPModel, clip).to(device).eval()
    if {colors.config.text_config.hidden_act, colors.config.vision_config.hidden_act} != {"quick_gelu"}:
        raise ValueError(f"--clip {clip}: OpenAI's CLIP computes with quick_gelu; this one does not")
    return Models(found, colors, load_one("--clip", transformers.CLIPTokenizer, clip), device)


def load_one(flag, model_class, path):
    try:
        return model_class.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{flag} {path}: it cannot be loaded ({shorten(' '.join(str(error).split()), 200)})"
                         ) from None


# ---- scoring ---------------------------------------------------------------------------------------------

def score_pictures(pictures, detector, clip, device=None) -> list:
    """The result lines of [(path, Item), …]: filename, tag, prompt, correct, reason, metadata, details."""
    models = load(detector, clip, device)
    lines = []
    for path, item in tqdm(pictures, desc="scoring", disable=None, leave=False):
        lines.append(score_picture(models, path, item.fields))
    return lines


def score_picture(models, path, metadata) -> dict:
    """The result line of one picture. metadata: its line of the prompt file."""
    image = open_image(path)
    detections = detect(models, image)

    def color_of(detections, name, i):
        detection = detections[name][i]
        return color(models, isolated(image, detection["mask"], detection["box"]), name)
    verdict = rules.verdict(metadata, detections, color_of)
    details = {name: [[*detections[name][i]["box"], detections[name][i]["score"]] for i in indices]
               for name, indices in verdict["kept"].items()}
    return {"filename": str(path), "tag": metadata["tag"], "prompt": metadata["prompt"],
            "correct": verdict["correct"], "reason": verdict["reason"], "metadata": json.dumps(metadata),
            "details": json.dumps(details)}


# ---- the detector ----------------------------------------------------------------------------------------

@torch.inference_mode()
def detect(models, image) -> dict:
    """{class: [{"box", "score", "mask"}, …]} of a PIL image, the classes in COCO's order."""
    pixels, size = detector_input(image)
    pixels = pixels.to(models.device)
    found = models.detector(pixel_values=pixels, pixel_mask=torch.ones_like(pixels[:, 0], dtype=torch.long))
    return detections(found.class_queries_logits[0].float(), found.masks_queries_logits[0].float(),
                      pixels.shape[-2:], size, image.size[::-1])


def scaled_size(height, width) -> tuple:
    """(height, width) scaled: the shorter side to 800, or the longer one to 1333 if it would exceed that."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def as_tensor(image, mean, std) -> torch.Tensor:
    """A PIL image as normalized pixels (1, 3, H, W)."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)[None].float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def detector_input(image) -> tuple:
    """(pixels (1, 3, H, W), (h, w)): the image scaled to h × w, padded with zeros to multiples of 32."""
    height, width = scaled_size(image.height, image.width)
    pixels = as_tensor(image, DETECTOR_MEAN, DETECTOR_STD)
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    return F.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE)), (height, width)


def detections(class_logits, mask_logits, padded, scaled, original) -> dict:
    """What the net's output says: {class: [{"box", "score", "mask" (H, W) on the CPU}, …]}.

    class_logits (Q, 81), the last for "no object"; mask_logits (Q, h, w) of the padded input; padded, scaled,
    original: (height, width) of the input, of the picture in it, and of the picture itself.
    """
    scores, queries, labels = best_pairs(class_logits)
    logits = full_size(mask_logits, padded, scaled, original)[queries]      # (n, H, W)
    masks = logits > 0
    scores = scores * mask_scores(logits, masks)
    found = {}
    for i in torch.argsort(labels, stable=True).tolist():
        box = tight_box(masks[i])
        detection = {"box": box, "score": scores[i].item(), "mask": masks[i].cpu()}
        found.setdefault(NAMES[labels[i]], []).append(detection)
    return found


def best_pairs(class_logits, most=NUM_PAIRS) -> tuple:
    """(probabilities, queries, classes), each (n,), of the most probable pairs, "no object" left out."""
    probabilities = class_logits.softmax(dim=-1)[:, :-1]                    # (Q, C)
    num_classes = probabilities.shape[1]
    scores, pairs = probabilities.flatten().topk(min(most, probabilities.numel()))
    return scores, pairs // num_classes, pairs % num_classes


def full_size(mask_logits, padded, scaled, original) -> torch.Tensor:
    """Mask logits (Q, h, w) of a padded input -> (Q, H, W) of the original picture, bilinear."""
    logits = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)
    logits = logits[..., :scaled[0], :scaled[1]]
    return F.interpolate(logits, original, mode="bilinear", align_corners=False)[0]


def mask_scores(logits, masks) -> torch.Tensor:
    """The mean probability (n,) within each mask (n, H, W), 0 for an empty one."""
    inside = masks.float()
    return (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)


def tight_box(mask) -> tuple:
    """(x1, y1, x2, y2) around a mask (H, W), its right and lower edge exclusive; zeros for an empty one."""
    columns, rows = (mask.any(dim=axis).nonzero().flatten().tolist() for axis in (0, 1))
    if not columns:
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# ---- the color classifier --------------------------------------------------------------------------------

def isolated(image, mask, box) -> Image.Image:
    """The part of a PIL image within a box, with #999 outside the mask (H, W)."""
    blank = Image.new("RGB", image.size, BACKGROUND)
    mask = Image.frombytes("L", image.size, (mask.to(torch.uint8) * 255).numpy().tobytes())
    return Image.composite(image, blank, mask).crop(tuple(round(edge) for edge in box))


def clip_input(image, size=224) -> torch.Tensor:
    """Pixels (1, 3, size, size) of a PIL image: shorter side to size, bicubic, center crop."""
    width, height = (size * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return as_tensor(image.crop((left, top, left + size, top + size)), CLIP_MEAN, CLIP_STD)


@torch.inference_mode()
def color(models, image, name) -> str:
    """The color of an object of a class on a PIL image, one of rules.COLORS."""
    if name not in models.classifiers:
        models.classifiers[name] = color_vectors(models, name)
    size = models.clip.config.vision_config.image_size
    seen = models.clip.vision_model(pixel_values=clip_input(image, size).to(models.device)).pooler_output
    vector = F.normalize(models.clip.visual_projection(seen)[0], dim=-1)    # (D,)
    return rules.COLORS[(models.classifiers[name] @ vector).argmax().item()]


@torch.inference_mode()
def color_vectors(models, name) -> torch.Tensor:
    """(10, D): of each color the normalized mean of the templates' normalized text vectors."""
    texts = [template.format(color=color, name=name) for color in rules.COLORS for template in TEMPLATES]
    tokens = models.tokenizer(texts, padding=True, return_tensors="pt").to(models.device)
    vectors = models.clip.text_projection(models.clip.text_model(**tokens).pooler_output)
    vectors = F.normalize(vectors, dim=-1).view(len(rules.COLORS), len(TEMPLATES), -1)
    return F.normalize(vectors.mean(dim=1), dim=-1)
