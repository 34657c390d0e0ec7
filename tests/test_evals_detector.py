"""GenEval's detector and color classifier: each step on tensors made by hand, and the whole on tiny nets."""
import json
import math
import sys

import pytest
import torch
from PIL import Image

from harmonkit.evals import detector, geneval
from harmonkit.evals.__main__ import main


def logit(p):
    return math.log(p / (1 - p))


# ---- the detector's output ---------------------------------------------------------------------------------

def test_best_pairs_leave_out_no_object():
    probabilities = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.05, 0.75]])      # of 2 classes and "no object"
    scores, queries, labels = detector.best_pairs(probabilities.log(), 3)
    assert scores.tolist() == pytest.approx([0.5, 0.2, 0.1])
    assert (queries.tolist(), labels.tolist()) == ([0, 1, 0], [0, 0, 1])
    assert len(detector.best_pairs(torch.zeros(100, 81))[0]) == 100
    assert len(detector.best_pairs(probabilities.log())[0]) == 4


def test_mask_scores_are_means_where_the_logit_is_above_0():
    logits = torch.tensor([[[logit(0.8), logit(0.6)], [logit(0.4), 0.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
    assert detector.mask_scores(logits, logits > 0).tolist() == pytest.approx([0.7, 0.0])


def test_boxes_end_after_the_last_pixel():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    assert detector.tight_box(mask) == (0.0, 0.0, 0.0, 0.0)
    mask[2, 3] = True
    assert detector.tight_box(mask) == (3.0, 2.0, 4.0, 3.0)
    mask[5, 7] = True
    assert detector.tight_box(mask) == (3.0, 2.0, 8.0, 6.0)


def test_masks_are_scaled_without_the_padding():
    """Logits at half the size of an input of 4 × 8, whose right half is padding, of a picture of 2 × 2."""
    logits = torch.tensor([[[1.0, -1.0, 9.0, 9.0], [1.0, -1.0, 9.0, 9.0]]])
    full = detector.full_size(logits, (4, 8), (4, 4), (2, 2))
    # Without the padding a row of the input has 1, 0.5, -0.5, 1.5.
    assert full.flatten().tolist() == pytest.approx([0.75, 0.5, 0.75, 0.5])


@pytest.mark.parametrize("size, scaled", [
    ((512, 512), (800, 800)), ((256, 512), (667, 1333)), ((100, 900), (148, 1333)), ((643, 700), (800, 871)),
    ((1600, 1600), (800, 800))])
def test_the_detectors_input_size(size, scaled):
    assert detector.scaled_size(*size) == scaled


def test_the_detectors_input(monkeypatch):
    monkeypatch.setattr(detector, "SHORT_SIDE", 40)
    pixels, size = detector.detector_input(Image.new("RGB", (20, 10), (255, 0, 124)))
    assert (pixels.shape, size) == ((1, 3, 64, 96), (40, 80))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (124 / 255 - 0.406) / 0.225]
    assert pixels[0, :, 39, 79].tolist() == pytest.approx(expected, abs=1e-5)
    assert pixels[0, :, 40:].abs().max() == pixels[0, :, :, 80:].abs().max() == 0


def test_detections_of_a_nets_output():
    """Two queries on a picture of 4 × 4: a dog on its left half, and a rather certain nothing."""
    class_logits = torch.full((2, 81), -20.0)
    class_logits[0, 16], class_logits[0, 80] = math.log(0.9), math.log(0.1)
    class_logits[1, 0], class_logits[1, 80] = math.log(0.2), math.log(0.8)
    mask_logits = torch.full((2, 4, 4), -5.0)
    mask_logits[0, :, :2] = logit(0.7)
    found = detector.detections(class_logits, mask_logits, (4, 4), (4, 4), (4, 4))
    dog = max(found["dog"], key=lambda detection: detection["score"])
    assert dog["score"] == pytest.approx(0.9 * 0.7, abs=1e-5)
    assert dog["box"] == (0.0, 0.0, 2.0, 4.0)
    assert dog["mask"].sum() == 8
    assert found["person"][0]["score"] < 1e-6
    assert sum(map(len, found.values())) == 100
    assert list(found) == [name for name in geneval.NAMES if name in found]
    assert geneval.rules.kept(found, "single_object").keys() == {"dog"}


# ---- the color classifier's input --------------------------------------------------------------------------

def test_outside_of_the_mask_is_grey():
    image = Image.new("RGB", (6, 5), (200, 10, 20))
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1, 2] = mask[3, 4] = True
    crop = detector.isolated(image, mask, detector.tight_box(mask))
    grey, color = (0x99, 0x99, 0x99), (200, 10, 20)
    assert crop.size == (3, 3)
    assert crop.tobytes() == bytes([*color, *grey * 7, *color])


def test_clip_sees_the_middle_square():
    image = Image.new("RGB", (40, 10), "white")
    image.paste((0, 0, 0), (15, 0, 25, 10))
    pixels = detector.clip_input(image, 20)
    assert pixels.shape == (1, 3, 20, 20)
    assert pixels[0, :, 10, 10].tolist() == pytest.approx([-m / s for m, s in zip(
        detector.CLIP_MEAN, detector.CLIP_STD)], abs=1e-5)
    assert detector.clip_input(Image.new("RGB", (7, 300)), 224).shape == (1, 3, 224, 224)


# ---- the whole ---------------------------------------------------------------------------------------------

def test_missing_packages_are_named(monkeypatch):
    args = type("Args", (), {"scorer": "ours", "detector": "nowhere", "clip": "nowhere"})
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r'scipy is not installed; pip install "harmon\[evals\]"'):
        geneval.check(args)


def test_models_are_looked_for_before_anything_is_drawn(tmp_path):
    pytest.importorskip("scipy")
    args = type("Args", (), {"scorer": "ours", "detector": str(tmp_path), "clip": "nowhere"})
    with pytest.raises(ValueError, match="--detector .*: it cannot be loaded"):
        geneval.check(args)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Folders of a tiny Mask2Former that sees a dog with every query, and of a tiny CLIP, weights random."""
    pytest.importorskip("scipy")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"])
    found = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=6,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=1, num_attention_heads=2,
        dim_feedforward=16, id2label=dict(enumerate(geneval.NAMES))))
    with torch.no_grad():
        found.class_predictor.bias[16] = 20
    found.save_pretrained(folder / "detector")
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = part | dict(vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=part | dict(image_size=32, patch_size=8), projection_dim=8,
    )).save_pretrained(folder / "clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "-", "-</w>", *letters, *(f"{c}</w>" for c in letters)]
    transformers.CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, []).save_pretrained(
        folder / "clip")
    return folder


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A prompt file about dogs of each color, and pictures: of each prompt the same four."""
    monkeypatch.setattr(detector, "SHORT_SIDE", 64)
    lines = [{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": color}],
              "prompt": f"a photo of a {color} dog"} for color in geneval.rules.COLORS]
    lines.append({"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"})
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    args = type("Args", (), {"data": data})
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (geneval.PER_PROMPT, 24 * 32 * 3), dtype=torch.uint8, generator=generator)
    noises = [Image.frombytes("RGB", (32, 24), bytes(row.tolist())) for row in values]
    for number, item in enumerate(geneval.read(args)):
        geneval.prepare(out, number, item)
        (out / item.name / "samples").mkdir()
        for sample, noise in enumerate(noises):
            noise.save(out / geneval.picture(number, item, sample))
    return data, out


def test_pictures_are_scored_by_tiny_nets(nets, pictures, capsys):
    data, out = pictures
    flags = ["--data", data, "--scorer", "ours", "--detector", nets / "detector", "--clip", nets / "clip"]
    main(["score", "geneval", str(out), *map(str, flags)])
    assert "another training" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / geneval.RESULTS).read_text().splitlines()]
    assert len(lines) == 44
    assert list(lines[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    # Every picture has a dog of one color: of the ten prompts exactly one is right.
    for sample in range(4):
        right = [line for line in lines[sample:40:4] if line["correct"]]
        assert len(right) == 1
        color = json.loads(right[0]["metadata"])["include"][0]["color"]
        assert all(line["reason"].endswith(f"; and 1 {color}") for line in lines[sample:40:4]
                   if not line["correct"])
    assert {line["reason"] for line in lines[40:]} == {"expected cat>=1, found 0"}
    boxes = json.loads(lines[0]["details"])["dog"]
    assert 1 <= len(boxes) <= 6
    assert all(len(box) == 5 and 0 <= box[0] < box[2] <= 32 and 0.3 < box[4] <= 1 for box in boxes)
    args = type("Args", (), {"data": data, "scorer": "official"})
    result = geneval.read_scores(out / geneval.RESULTS, args)
    assert result.scores["ours"]["colors"] == pytest.approx(0.1)


def test_colors_agree_with_transformers_own_way(nets):
    import transformers

    models = detector.load(nets / "detector", nets / "clip", "cpu")
    vectors = detector.color_vectors(models, "dog")
    assert vectors.norm(dim=-1).tolist() == pytest.approx([1] * 10)
    texts = ["a photo of a blue dog", "a photo of a blue-colored dog", "a photo of a blue object"]
    clip = transformers.CLIPModel.from_pretrained(nets / "clip").eval()
    with torch.no_grad():
        found = clip.get_text_features(**models.tokenizer(texts, padding=True, return_tensors="pt"))
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    mean = (found / found.norm(dim=-1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(vectors[4], mean / mean.norm())


def test_nets_that_cannot_be_used(nets, tmp_path):
    with pytest.raises(ValueError, match="^--detector .*nowhere: it cannot be loaded"):
        detector.load(tmp_path / "nowhere", nets / "clip", "cpu")
    config = json.loads((nets / "clip" / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    for file in (nets / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="computes with quick_gelu"):
        detector.load(nets / "detector", tmp_path, "cpu")
