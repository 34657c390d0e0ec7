"""compare.py: what counts as equal, what is reported, and the table of causes."""
import json

import compare
import export
import numpy as np
import pytest
from conftest import SMALL
from parameters import read_safetensors
from safetensors.numpy import save_file


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    (folder / "config.json").write_text(json.dumps(SMALL.to_json()))
    export.export(export.random_model(folder), folder, origin="random")
    return folder


@pytest.fixture(scope="module")
def content(vectors):
    return json.loads((vectors / "index.json").read_text()), read_safetensors(vectors / "vectors.safetensors")


def verdict(a, b, **about):
    about = {"name": "x", "dtype": "float32", "kind": "computed", **about}
    return compare.compare({"tensors": [about]}, {about["name"]: a}, {about["name"]: b})[0]


def test_what_counts_as_equal():
    a = np.array([[1.0, -4.0], [0.5, 2.0]], np.float32)
    assert verdict(a, a + 3e-4).verdict == "equal"                          # 4e-4 is 1e-4 of the largest
    assert verdict(a, a + 5e-4).verdict == "differs"
    assert verdict(a, a + 3e-4).error == pytest.approx(7.5e-5, rel=1e-2)
    assert verdict(a, a + 5e-4, rounding=1e-5).verdict == "equal"
    assert verdict(a, a + 3e-4, dtype="int64").verdict == "differs"
    assert verdict(a, a + 3e-4, name="mlp.fc2.in").verdict == "differs"
    assert verdict(a, a + 3e-4, name="mlp.fc2.in", rounding=2e-5).verdict == "equal"
    assert verdict(a * 2e-9, a * 1e-9).verdict == "equal"                   # below the floor
    assert verdict(a, np.where(a > 1, np.nan, a)).verdict == "differs"
    assert verdict(a, a[:1]).verdict == "shape"
    assert verdict(a[:0], a[:0]).verdict == "equal"
    byte = np.array([200, 7], np.uint8)
    assert verdict(byte, byte + np.uint8(1), dtype="uint8").verdict == "equal"
    assert verdict(byte, byte - np.uint8(3), dtype="uint8").verdict == "differs"


def test_padding_is_not_compared():
    a = np.ones((2, 3, 4), np.float32)
    mask = np.array([[True, True, True], [True, True, False]])
    index = {"tensors": [dict(name="x", dtype="float32", kind="computed", attention_mask=["mask", 1])]}
    b = a.copy()
    b[1, 2] = 7
    assert compare.compare(index, {"x": a, "mask": mask}, {"x": b})[0].verdict == "equal"
    b[1, 1] = 7
    assert compare.compare(index, {"x": a, "mask": mask}, {"x": b})[0].verdict == "differs"


def test_the_vectors_equal_themselves(vectors, capsys):
    assert compare.main([str(vectors), str(vectors)]) == 0
    assert " 0 differ, 0 of a wrong shape, 0 missing, 0 left out" in capsys.readouterr().out


def test_missing_and_misshapen_tensors_are_named_and_the_status_tells(vectors, content, tmp_path, capsys):
    index, expected = content
    optional = [about["name"] for about in index["tensors"] if about["kind"] != "computed"]
    mine = {name: x for name, x in expected.items() if name not in optional}
    lost = mine.pop("understand/z_enc")
    mine["understand/latents"] = mine["understand/latents"].transpose(0, 3, 1, 2)[:, :, 1:].copy()
    mine["generate/step1/mar.z"] = mine["generate/step1/mar.z"] + 1
    save_file(mine, tmp_path / "mine.safetensors")
    assert compare.main([str(vectors), str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "missing: understand/z_enc" in text and "1 later ones differ as well" in text
    assert "understand/latents  float32" in text and "shape (1, 4, 3, 4), expected (1, 4, 4, 4)" in text
    assert f"1 differ, 1 of a wrong shape, 1 missing, {len(optional)} left out" in text
    right = {name: expected[name] for name in ("understand/latents", "generate/step1/mar.z")}
    save_file({**mine, **right, "understand/z_enc": lost}, tmp_path / "mine.safetensors")
    assert compare.main([str(vectors), str(tmp_path)]) == 0


def test_bad_input_is_said_in_one_line(vectors, tmp_path, capsys):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x.safetensors").write_bytes((vectors / "vectors.safetensors").read_bytes()[:1000])
    cases = ((tmp_path, vectors, "no index.json"), (vectors, tmp_path, "no .safetensors"),
             (vectors, tmp_path / "cut", "not a complete safetensors"))
    for first, second, words in cases:
        assert compare.main([str(first), str(second)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_every_row_of_causes_is_the_first_for_some_tensor(content):
    causes = {compare.cause_of(about["name"]) for about in content[0]["tensors"]} | {compare.cause_of("x")}
    lines = compare.PITFALLS.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 60
    assert not [row for row in rows if not any(row.endswith(f"| {cause} |") for cause in causes)]
