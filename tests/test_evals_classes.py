"""The benchmark of drawing by class: rendered scenes get the scores that they deserve."""
import pytest
from PIL import Image

from harmonkit import mar_files
from harmonkit.evals import classes
from harmonkit.evals.__main__ import main
from harmonkit.shapes_world import world

SCENES = {}
for i in range(2000):
    scene = world.scene("test/classes", i)
    SCENES.setdefault(world.label(scene), scene)


def test_names_and_combinations_are_those_of_the_labels():
    names = world.class_names()
    assert len(names) == len(set(names)) == world.LABELS
    assert [names[label] for label in (0, 30, 61, 92, 123)] == [
        "red circle", "two red circles", "three red squares", "four red triangles",
        "red star and another thing"]
    for label, scene in SCENES.items():
        first = world.reading_order(scene)[0]
        assert world.combination(label) == (first.color, first.shape)
        assert first.color in names[label] and first.shape in names[label].replace("crosses", "cross")
    assert len(classes.LABELS) == 120 and set(classes.LABELS) >= set(SCENES)


def test_rendered_scenes_are_right_for_their_label_alone():
    labels = sorted(SCENES)
    assert len(labels) > 100
    for label, other in zip(labels, labels[1:] + labels[:1]):
        image = world.render(SCENES[label])
        assert classes.correct(image, label), world.class_names()[label]
        assert not classes.correct(image, other)
    empty = Image.new("RGB", (64, 64), "white")
    assert not any(classes.correct(empty, label) for label in labels)


class Painter:
    """Paints a scene of each label, an empty picture for labels in `wrong`."""

    def __init__(self, wrong=()):
        self.wrong, self.seeds, self.given = wrong, [], {}
        self.config = mar_files.load("harmon-tiny").config

    def generate_image(self, labels, seed, **given):
        self.seeds += [seed + i for i in range(len(labels))]
        self.given = given
        empty = world.Scene("single", (), ((220, 220, 220), (220, 220, 220)))
        return [world.render(empty if label in self.wrong else SCENES.get(label, empty)) for label in labels]


def test_scores_tables_and_sheets(monkeypatch, tmp_path, capsys):
    lost = set(classes.LABELS) - set(SCENES)
    painter = Painter(wrong={0, 1, 3})
    monkeypatch.setattr(mar_files, "load", lambda *args, **options: painter)
    main(["classes", "--cfg", "1", "2.5", "--steps", "7", "--seed", "5", "--batch", "50",
          "--out", str(tmp_path)])
    expected = f"{(117 - len(lost)) / 120:.3f} of 120"
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"| 1 | 7 | {expected} |") and lines[3].startswith(f"| 2.5 | 7 | {expected} |")
    assert painter.seeds == [*range(5, 125)] * 2
    assert (painter.given["cfg"], painter.given["cfg_schedule"]) == (2.5, "linear")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes-1.png", "classes-2.5.png"]


@pytest.mark.parametrize("flags, message", [
    (["--count", "0"], "--count is 0"), (["--cfg", "-1"], "cfg is -1.0"), (["--steps", "0"], "num_iter is 0"),
    (["--model", "nothing.pth"], "nothing.pth: no such file")])
def test_bad_input_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(["classes", *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_the_bundled_mar_draws_its_classes():
    """With guidance most classes are right; without a class hardly a picture is, by chance."""
    model = mar_files.load("harmon-tiny", device="cpu")
    labels, fast = classes.LABELS[::8], dict(num_iter=16, num_sampling_steps=25)
    images = classes.draw(model, labels, 24, cfg=model_guidance(), **fast)
    right = sum(map(classes.correct, images, labels))
    assert right >= 8, right
    plain = model.generate_image([-1] * 6, **fast)
    assert sum(map(classes.correct, plain, labels)) <= 2


def model_guidance():
    return mar_files.defaults(mar_files.load("harmon-tiny").config)["cfg"]
