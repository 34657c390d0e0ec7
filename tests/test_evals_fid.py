"""FID benchmarks: prompt files, one PNG a prompt, and the distance of a library that a stub stands for.

The stub's features are a picture's mean colors, and its distance is exact for them: no Inception is here.
"""
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from harmonkit.evals import fid
from harmonkit.evals.__main__ import main

MJHQ = {"a1": {"category": "animals", "prompt": "a red fox"}, "b/2": {"category": "food", "prompt": "soup"}}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def library(monkeypatch):
    """A stub of cleanfid.fid. library.asked: the modes and batch sizes that it was given."""
    asked = []

    def build_feature_extractor(mode, device, use_dataparallel):
        assert not use_dataparallel
        return f"features of {mode} on {device}"

    def get_folder_features(folder, model, *, mode, batch_size, num_workers, device, description, verbose):
        asked.append((model, mode, batch_size))
        names = sorted(name for name in map(str, fid.Path(folder).rglob("*.png")))
        return np.array([np.asarray(Image.open(name).convert("RGB")).mean((0, 1)) for name in names])

    def frechet_distance(mu1, sigma1, mu2, sigma2):
        return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2)
    module = ModuleType("cleanfid.fid")
    for function in (build_feature_extractor, get_folder_features, frechet_distance):
        setattr(module, function.__name__, function)
    package = ModuleType("cleanfid")
    package.fid = module
    monkeypatch.setitem(sys.modules, "cleanfid", package)
    monkeypatch.setitem(sys.modules, "cleanfid.fid", module)
    return SimpleNamespace(asked=asked)


def write(path, *colors):
    """A folder of pictures of one color each."""
    for i, color in enumerate(colors):
        (path / "sub").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), color).save(path / "sub" / f"{i}.png")
    return path


def args(**changes):
    given = {"data": None, "reference": None, "fid_mode": "clean", "fid_batch_size": 32, "device": "cpu"}
    return SimpleNamespace(**given | changes)


def error(*argv):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    return stop.value.code


# ---- prompts ---------------------------------------------------------------------------------------------

def test_mjhqs_meta_data(tmp_path):
    (tmp_path / "meta_data.json").write_text(json.dumps(MJHQ))
    items = fid.read(args(data=tmp_path / "meta_data.json"))
    assert [(item.name, item.prompt) for item in items] == [("a1", "a red fox"), ("b-2", "soup")]
    assert [fid.picture(i, item, 0) for i, item in enumerate(items)] == [
        "images/animals/a1.png", "images/food/b-2.png"]


def test_cocos_captions_and_other_lists(tmp_path):
    captions = [{"image_id": 9, "id": 370509, "caption": "a bus"},
                {"image_id": 9, "id": 4, "caption": "buses"}]
    content = {"info": {}, "images": [{"id": 9, "file_name": "x.jpg"}], "annotations": captions}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    items = fid.read(args(data=tmp_path / "captions.json"))
    assert [(item.name, item.prompt) for item in items] == [("370509", "a bus"), ("4", "buses")]
    assert fid.picture(0, items[0], 0) == "images/370509.png"
    (tmp_path / "list.txt").write_text("a bus\na cat\n")
    names = [item.name for item in fid.read(args(data=tmp_path / "list.txt"))]
    assert names == ["00000-a-bus", "00001-a-cat"]
    (tmp_path / "lines.json").write_text('{"prompt": "a bus", "category": "x"}\n{"prompt": "a cat"}\n')
    assert [item.fields for item in fid.read(args(data=tmp_path / "lines.json"))] == [{}, {}]


def test_bad_prompt_files_are_refused(tmp_path):
    data = tmp_path / "meta_data.json"
    with pytest.raises(ValueError, match="--data is missing"):
        fid.read(args())
    data.write_text(json.dumps(MJHQ | {"c": {"prompt": "rain"}}))
    with pytest.raises(ValueError, match="meta_data.json, entry 'c': no category, which other entries have"):
        fid.read(args(data=data))
    data.write_text(json.dumps(MJHQ)[:-9])
    with pytest.raises(ValueError, match="meta_data.json, line 1: not JSON"):
        fid.read(args(data=data))


# ---- the distance ----------------------------------------------------------------------------------------

def test_the_distance_between_two_folders(tmp_path, library):
    """Means 20 and 50 in red; variances 200 and 0."""
    drawn = write(tmp_path / "drawn", (10, 0, 0), (30, 0, 0))
    real = write(tmp_path / "real", (50, 0, 0), (50, 0, 0), (50, 0, 0))
    result = fid.read_scores(drawn, args(reference=real, fid_mode="legacy_pytorch", fid_batch_size=5))
    assert result.scores == {"clean-fid, mode legacy_pytorch": {"FID": pytest.approx(30 ** 2 + 200)}}
    assert result.counts == {"pictures": 2, "reference pictures": 3}
    assert library.asked == 2 * [("features of legacy_pytorch on cpu", "legacy_pytorch", 5)]
    assert result.notes == (
        "FID by clean-fid, mode legacy_pytorch, against real.",
        "2 pictures and 3 reference pictures: FID is biased upward below 10000 and not comparable.",
        "The benchmark has 30000 pictures (not verified), here are 2.")


def test_the_distance_to_statistics(tmp_path, library):
    drawn = write(tmp_path / "drawn", (10, 0, 0), (30, 0, 0))
    np.savez(tmp_path / "coco.npz", mu=np.array([20.0, 0, 7]), sigma=np.eye(3))
    result = fid.read_scores(drawn, args(reference=tmp_path / "coco.npz"))
    assert result.headline == ("clean-fid, mode clean", "FID", pytest.approx(7 ** 2 + 200 + 3))
    assert "against coco.npz" in result.notes[0]


def test_enough_pictures_bring_no_warning(tmp_path, library, monkeypatch):
    monkeypatch.setattr(fid, "FEW", 2)
    monkeypatch.setattr(fid, "WHOLE", 2)
    drawn = write(tmp_path / "drawn", (10, 0, 0), (30, 0, 0))
    assert len(fid.read_scores(drawn, args(reference=drawn)).notes) == 1


def test_a_limit_without_prompts_is_refused(tmp_path, library):
    drawn = write(tmp_path / "drawn", (10, 0, 0), (30, 0, 0))
    with pytest.raises(ValueError, match="--limit: --data is missing"):
        fid.read_scores(drawn, args(reference=drawn, limit=2))


def test_a_picture_that_the_library_does_not_read_is_an_error(tmp_path, library):
    drawn = write(tmp_path / "drawn", (10, 0, 0), (30, 0, 0))
    real = write(tmp_path / "real", (50, 0, 0), (50, 0, 0))
    (real / "sub/1.png").rename(real / "sub/1.JPG")
    with pytest.raises(ValueError, match="real: clean-fid read 1 of 2 pictures"):
        fid.read_scores(drawn, args(reference=real))


def test_what_cannot_be_scored_is_refused(tmp_path, library):
    drawn, empty = write(tmp_path / "drawn", (10, 0, 0), (30, 0, 0)), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="--reference is missing"):
        fid.read_scores(drawn, args())
    with pytest.raises(ValueError, match="empty: there is no picture in it"):
        fid.read_scores(drawn, args(reference=empty))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        fid.read_scores(drawn, args(reference=tmp_path / "nowhere"))
    (tmp_path / "list.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(ValueError, match="drawn: 2 pictures for 3 prompts"):
        fid.read_scores(drawn, args(reference=drawn, data=tmp_path / "list.txt"))
    for content in ({"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.eye(2)}, {"mu": np.zeros((1, 3)),
                    "sigma": np.eye(3)}, {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}):
        np.savez(tmp_path / "bad.npz", **content)
        with pytest.raises(ValueError, match="bad.npz"):
            fid.read_scores(drawn, args(reference=tmp_path / "bad.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="bad.npz: not statistics"):
        fid.read_scores(drawn, args(reference=tmp_path / "bad.npz"))


def test_the_library_is_asked_for_only_with_a_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    fid.check(args())
    assert fid.score(tmp_path, [], args()) is None
    with pytest.raises(ValueError, match=r'FID needs clean-fid .* pip install "harmon\[evals\]"'):
        fid.check(args(reference=write(tmp_path / "real", (1, 2, 3))))


# ---- from end to end -------------------------------------------------------------------------------------

def test_mjhq_is_drawn_and_scored(small, tmp_path, library, capsys):
    small.save_pretrained(tmp_path / "model")
    (tmp_path / "meta_data.json").write_text(json.dumps(MJHQ))
    real = write(tmp_path / "real", (50, 0, 0), (60, 0, 0))
    main(["mjhq", "--data", f"{tmp_path}/meta_data.json", "--model", f"{tmp_path}/model", "--steps", "1",
          "--reference", str(real), "--out", f"{tmp_path}/out"])
    out = tmp_path / "out"
    pictures = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    assert pictures == {"images/animals/a1.png", "images/food/b-2.png"}
    red = np.array([np.asarray(Image.open(out / name)).mean((0, 1)) for name in sorted(pictures)])
    expected = np.sum((red.mean(0) - [55, 0, 0]) ** 2) + red.var(0, ddof=1).sum() + 50
    told = json.loads((out / "scores.json").read_text())
    assert told["scores"]["clean-fid, mode clean"]["FID"] == pytest.approx(expected)
    assert "biased upward" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["data"].keys() == {"meta_data.json"}


def test_faults_are_one_line_before_the_model_is_loaded(tmp_path, library, capsys):
    (tmp_path / "list.txt").write_text("one\n")
    assert error("coco", "--model", "nowhere") == 2
    assert error("coco", "--model", "nowhere", "--data", tmp_path / "list.txt", "--reference", "gone") == 2
    assert error("score", "coco", tmp_path / "list.txt", "--reference", tmp_path) == 2
    assert capsys.readouterr().err == (
        "harmonkit.evals: --data is missing: MJHQ's meta_data.json, or any prompt file\n"
        "harmonkit.evals: gone: no such file or folder\n"
        f"harmonkit.evals: {tmp_path}/list.txt: a folder of pictures is expected\n")
