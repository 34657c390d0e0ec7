"""python -m harmonkit.data inspect, cache."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from data_files import LINES, RATIO, write_sources
from PIL import Image

from harmonkit.data.__main__ import main
from harmonkit.data.mixture import MixtureDataset, open_mixture


@pytest.fixture
def folder(tmp_path):
    """A mixture of all formats; one image is broken."""
    write_sources(tmp_path)
    (tmp_path / "mixture.json").write_text(json.dumps(LINES))
    (tmp_path / "images" / "2.png").write_bytes(b"not an image")
    return tmp_path


def test_inspect_reports_and_draws(folder, capsys):
    out = folder / "out" / "sheet.png"
    main(["inspect", str(folder / "mixture.json"), "--size", "64", "--out", str(out)])
    report = capsys.readouterr().out
    assert "data_info.json: text2image, weight 1, 6 samples; 6 checked: 1 bad, 0 outside the rules" in report
    assert "data_info.json:3: " in report and "not an image" in report
    assert "00001}.tar: text2image, weight 3, 10 samples; 10 checked: 0 bad, 0 outside the rules" in report
    assert "text tokens: 5% ≤ 19, 50% ≤ 19, 95% ≤ 19, 99% ≤ 19, 100% ≤ 19" in report            # text.json
    sheet = Image.open(out)
    assert sheet.size == (4 * 240, 4 * 374)
    weights = {"text2image": 5, "image2text": 2, "text": 1}
    dataset = MixtureDataset(open_mixture(folder / "mixture.json"), weights, 1, 64)
    for i in range(16):
        batch = dataset[i]
        x, y = i % 4 * 240, i // 4 * 374
        text = sheet.crop((x, y + 246, x + 240, y + 374))
        has_red = any(red > green + 100 for _, (red, green, _) in text.getcolors(2 ** 20))
        assert has_red == (batch["task"] in ("image2text", "text"))                     # answers are learned
        if batch["task"] == "text2image":
            pixel = ((batch["pixels"][0, :, 8, 8] + 1) * 127.5).tolist()            # of an image of one color
            assert sheet.getpixel((x + 38, y + 38)) == pytest.approx(tuple(pixel), abs=2)


def test_cache_writes_a_mixture_with_latents(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    main(["cache", "mixture.json", "--size", "64", "--out", "cache"])
    output = capsys.readouterr()
    assert output.out == "cache/mixture.json\n"
    assert output.err.count("skipped ") == 2
    assert "data_info.json:3: " in output.err and "llava.jsonl:3: " in output.err
    monkeypatch.chdir(ROOT)
    sources = open_mixture(folder / "cache" / "mixture.json")
    assert [s.latents is None for s in sources] == [False, False, False, False, True, False]
    assert [s.latents.get(1).shape[0] for s in sources if s.latents] == [2, 2, 2, 1, 1]
    batch = MixtureDataset(sources, RATIO, 2, 64)[0]
    assert batch["latents"].shape == (2, 8, 8, 8)


def test_one_crop_with_center(folder, capsys):
    (folder / "mixture.json").write_text(json.dumps([LINES[2]]))
    main(["cache", str(folder / "mixture.json"), "--size", "64", "--center", "--out", str(folder / "cache")])
    source, = open_mixture(folder / "cache" / "mixture.json")
    assert source.latents.get(0).shape == (1, 8, 8, 8)


def test_bad_input_is_one_line_and_status_2(folder, capsys):
    command = [sys.executable, "-m", "harmonkit.data", "inspect", "nowhere.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "harmonkit.data: nowhere.json: no such file\n")
    for args, message in (
        (["cache", "mixture.json"], "cache needs --out, a folder"),
        (["cache", "mixture.json", "--vae", "nothing.ckpt", "--out", "x"], "nothing.ckpt: no such file"),
        (["inspect", "mixture.json", "--tokenizer", "mixture.json"], "mixture.json: no such file"),
        (["cache", "nowhere.json", "--out", "x"], "nowhere.json: no such file"),
    ):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
