"""python -m harmonkit.data inspect, cache."""
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from data_files import LINES, RATIO, write_shard, write_sources
from every_form import write_every_form
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
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if "data_info.json: text2image, weight 1" in line)
    assert lines[start + 1:start + 3] == [
        "    pairs of image and annotation, 6 samples; 6 looked at: 5 usable, 1 bad, 0 outside the rules",
        "    1 × not an image that can be read: it is text "
        f"({folder}/data_info.json:3: {folder}/images/2.png)"]
    assert lines[start + 4:start + 7] == ["    'caption 0'", "    'caption 3'", "    'caption 5'"]
    assert "00001}.tar: text2image, weight 3\n    WebDataset, 10 samples; 10 looked at: 10 usable" in report
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


def inspect_json(capsys, *args):
    """The objects that `inspect --json` prints."""
    main(["inspect", *map(str, args), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def test_inspect_prints_json(folder, capsys):
    reports = inspect_json(capsys, folder / "mixture.json")
    keys = "path format task samples looked_at usable bad outside cut reasons captions".split()
    assert [list(report) for report in reports] == [keys] * 6
    paths = [str(folder / line["path"]) for line in LINES[:-1]]
    assert [report["path"] for report in reports] == [*paths, "shapes"]
    assert [report["task"] for report in reports] == [line["task"] for line in LINES]
    assert [report["samples"] for report in reports] == [6, 10, 2, 6, 6, 20]
    assert [report["looked_at"] for report in reports] == [6, 10, 2, 6, 6, 20]
    assert [report["usable"] for report in reports] == [5, 10, 2, 5, 6, 0]
    assert [report["bad"] for report in reports] == [1, 0, 0, 1, 0, 0]
    assert [report["outside"] for report in reports] == [0, 0, 0, 0, 0, 20]             # 64 pixels
    assert reports[0]["reasons"] == {"not an image that can be read: it is text": 1}
    assert reports[5]["reasons"] == {"sides must be above 80": 20}
    assert reports[0]["captions"] == ["caption 0", "caption 3", "caption 5"]
    assert reports[2]["captions"] == ["owl", "tree frog"]
    assert reports[3]["captions"] == ["a color"] * 3
    assert reports[4]["captions"] == ["yes, 0", "yes, 3", "yes, 5"]
    assert reports[5]["captions"] == []


def test_inspect_knows_every_form(tmp_path, capsys):
    written = write_every_form(tmp_path, with_parquet=find_spec("pyarrow") is not None)
    (tmp_path / "mixture.json").write_text(json.dumps([line for line, _, _ in written]))
    reports = inspect_json(capsys, tmp_path / "mixture.json", "--size", 64)
    assert len(reports) >= 27
    for (line, format, words), report in zip(written, reports, strict=True):
        path = str(tmp_path / line["path"])
        expected = {"path": path, "format": format, "task": line["task"], "samples": 12, "looked_at": 12,
                    "usable": 12, "bad": 0, "outside": 0, "reasons": {}}
        assert expected.items() <= report.items()
        assert report["captions"][:1] == [words] * (words is not None)


def test_inspect_prints_nothing_but_json(folder, capsys):
    """As a process, from another folder, without a model."""
    command = [sys.executable, "-m", "harmonkit.data", "inspect", str(folder / "mixture.json"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 6
    (folder / "00001.tar").write_bytes(b"not a tar file")
    with pytest.raises(SystemExit, match="2"):
        main(command[3:])
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "mixture.json: source 2: " in output.err
    assert "00001.tar: not an uncompressed tar file" in output.err


def test_inspect_looks_at_2000_samples_at_most(tmp_path, capsys):
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps([{"path": "shapes-text", "task": "text", "count": 3000}]))
    first, = inspect_json(capsys, mixture)
    assert (first["samples"], first["looked_at"], first["usable"]) == (3000, 2000, 2000)
    assert inspect_json(capsys, mixture) == [first]


def test_captions_and_answers_are_those_of_the_task(tmp_path, capsys):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "an answer"}]
    Image.new("RGB", (96, 120)).save(tmp_path / "0.png")
    row = {"image": "0.png", "caption": "words", "conversations": turns}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    lines = [{"path": "a.json", "task": task} for task in ("text2image", "image2text", "text")]
    (tmp_path / "mixture.json").write_text(json.dumps(lines))
    reports = inspect_json(capsys, tmp_path / "mixture.json")
    assert [report["captions"] for report in reports] == [["words"], ["an answer"], ["an answer"]]


def test_the_report_counts_system_turns_and_many_reasons(tmp_path, capsys):
    turns = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"},
             {"role": "assistant", "content": "yes\u2028sir"}, {"role": "user", "content": "and?"}]
    rows = [{"messages": turns}] * 3 + [{"messages": turns[1:2]}, {"messages": []}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    (tmp_path / "mixture.json").write_text(json.dumps([{"path": "chat.json", "task": "text"}]))
    report, = inspect_json(capsys, tmp_path / "mixture.json")
    assert (report["usable"], report["bad"], sum(report["reasons"].values())) == (3, 2, 2)
    assert report["captions"] == ["yes\u2028sir"] * 3
    main(["inspect", str(tmp_path / "mixture.json"), "--out", str(tmp_path / "sheet.png")])
    assert "    3 system turns dropped\n" in capsys.readouterr().out


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
    assert [s.latents.get(1, s.samples[1]).shape[0] for s in sources if s.latents] == [2, 2, 2, 1, 1]
    batch = MixtureDataset(sources, RATIO, 2, 64)[0]
    assert batch["latents"].shape == (2, 8, 8, 8)


def test_one_crop_with_center(folder, capsys):
    (folder / "mixture.json").write_text(json.dumps([LINES[2]]))
    main(["cache", str(folder / "mixture.json"), "--size", "64", "--center", "--out", str(folder / "cache")])
    source, = open_mixture(folder / "cache" / "mixture.json")
    assert source.latents.get(0, source.samples[0]).shape == (1, 8, 8, 8)


def test_what_is_cut_is_counted(folder, capsys):
    (folder / "mixture.json").write_text(json.dumps(LINES[3:5]))
    counts = {}
    for max_length in (1024, 20, 10):
        reports = inspect_json(capsys, folder / "mixture.json", "--size", 64, "--max-length", max_length)
        counts[max_length] = [(report["usable"], report["bad"], report["cut"]) for report in reports]
    assert counts == {1024: [(5, 1, 0), (6, 0, 0)], 20: [(5, 1, 5), (6, 0, 0)], 10: [(0, 6, 0), (0, 6, 0)]}
    reason = ("its question fills all 10 text tokens, so no answer is left to learn; a larger --max-length "
              "has room for it")
    assert reports[1]["reasons"] == {reason: 6}
    main(["inspect", str(folder / "mixture.json"), "--max-length", "20", "--out", str(folder / "sheet.png")])
    assert "\n    5 of the usable are cut to 20 text tokens (--max-length)\n" in capsys.readouterr().out


def test_cache_runs_again_on_what_it_wrote(folder, capsys):
    """Although an image has changed, so that training refuses the latents."""
    (folder / "mixture.json").write_text(json.dumps(LINES[:1] + LINES[4:5]))
    out = folder / "cache"
    main(["cache", str(folder / "mixture.json"), "--size", "64", "--out", str(out)])
    assert open_mixture(out / "mixture.json")[1].latents is None
    (folder / "images" / "2.png").write_bytes((folder / "images" / "3.png").read_bytes())
    with pytest.raises(ValueError, match="cache/mixture.json: source 1: .*: sample 3: 2.png has .* bytes"):
        open_mixture(out / "mixture.json")
    with pytest.raises(SystemExit):
        main(["inspect", str(out / "mixture.json"), "--json"])
    capsys.readouterr()
    main(["cache", str(out / "mixture.json"), "--size", "64", "--out", str(out)])
    assert "cache/0/00000.safetensors: made again: sample 3: 2.png has " in capsys.readouterr().err
    source, _ = open_mixture(out / "mixture.json")
    assert torch.equal(source.latents.get(2, source.samples[2]), source.latents.get(3, source.samples[3]))


def test_inspect_reads_cached_latents(folder, capsys):
    (folder / "mixture.json").write_text(json.dumps(LINES[:1]))
    main(["cache", str(folder / "mixture.json"), "--size", "64", "--out", str(folder / "cache")])
    capsys.readouterr()
    report, = inspect_json(capsys, folder / "cache" / "mixture.json", "--size", "64")
    assert (report["usable"], report["bad"], report["outside"]) == (5, 1, 0)
    assert report["reasons"] == {"not an image that can be read: it is text": 1}
    sheet = folder / "sheet.png"
    main(["inspect", str(folder / "cache" / "mixture.json"), "--size", "64", "--out", str(sheet)])
    assert capsys.readouterr().out.endswith(f"{sheet}\n")


# ---- interruptions -------------------------------------------------------------------------------------

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HEAD = """
import os, signal, sys, time
from harmonkit import checkpoints
from harmonkit.data import latents
from harmonkit.data.__main__ import main
latents.SHARD = 8
"""


def script(folder, lines=""):
    """The path of a file that runs the command with shards of eight samples, after some lines of Python."""
    (folder / "command.py").write_text(f"{HEAD}{lines}\nmain(sys.argv[1:])\n")
    return str(folder / "command.py")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Arguments that cache 30 images, without the folder, and {name: bytes} of their complete cache."""
    folder = tmp_path_factory.mktemp("whole")
    write_shard(folder / "a.tar", range(30), corrupt=(3,))
    (folder / "mixture.json").write_text(json.dumps([{"path": "a.tar", "task": "image2text"}]))
    arguments = ["cache", str(folder / "mixture.json"), "--size", "32", "--device", "cpu", "--out"]
    subprocess.run([sys.executable, script(folder), *arguments, str(folder / "out")], cwd=ROOT, check=True,
                   env=ENVIRONMENT, capture_output=True)
    return arguments, contents(folder / "out")


def begin(tmp_path, arguments, lines=""):
    """The running command, with tmp_path/out as its folder."""
    command = [sys.executable, script(tmp_path, lines), *arguments, str(tmp_path / "out")]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


INSIDE_THE_SECOND = """
save, calls = checkpoints.save_file, []
def save_file(tensors, path, **options):
    calls.append(path)
    if len(calls) == 2:
        open(path, "wb").write(b"half a shard")
        {}
    save(tensors, path, **options)
checkpoints.save_file = save_file
"""


def test_a_kill_inside_a_shards_write_leaves_whole_files(tmp_path, whole):
    arguments, complete = whole
    process = begin(tmp_path, arguments, INSIDE_THE_SECOND.format("os.kill(os.getpid(), signal.SIGKILL)"))
    process.communicate()
    assert process.returncode == -9
    left = contents(tmp_path / "out")
    temporary, = (name for name in left if name.startswith("0/.00001.safetensors"))
    assert left.pop(temporary) == b"half a shard"
    assert left == {name: complete[name] for name in ("0/about.json", "0/00000.safetensors")}

    # torchrun with two processes, and at the same time another command, complete it.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    many = subprocess.Popen([*torchrun, script(tmp_path), *arguments, str(tmp_path / "out")], cwd=ROOT,
                            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    one = begin(tmp_path, arguments)
    errors = [process.communicate()[1] for process in (many, one)]
    assert [many.returncode, one.returncode] == [0, 0], errors
    assert contents(tmp_path / "out") == complete


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_command_with_one_line(tmp_path, whole, number):
    arguments, complete = whole
    process = begin(tmp_path, arguments, INSIDE_THE_SECOND.format("print('now', flush=True); time.sleep(60)"))
    assert process.stdout.readline() == "now\n"
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[1:] == ["", "harmonkit.data: interrupted"]           # after "skipped …"
    left = ("0/about.json", "0/00000.safetensors")
    assert contents(tmp_path / "out") == {name: complete[name] for name in left}


def test_a_full_disk_is_one_line(tmp_path, whole):
    """A limit on the size of files stands for the disk."""
    arguments, complete = whole
    lines = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    process = begin(tmp_path, arguments, lines)
    _, errors = process.communicate()
    assert process.returncode == 2
    line = errors.splitlines()[-1]
    file = tmp_path / "out" / "0" / "00000.safetensors"
    assert line.startswith(f"harmonkit.data: {file}: could not be written (") and "File too large" in line
    assert line.endswith("; what is complete stays, and the same command goes on from there")
    assert contents(tmp_path / "out") == {"0/about.json": complete["0/about.json"]}


def test_bad_input_is_one_line_and_status_2(folder, capsys, monkeypatch):
    command = [sys.executable, "-m", "harmonkit.data", "inspect", "nowhere.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "harmonkit.data: nowhere.json: no such file\n")
    monkeypatch.chdir(folder)
    for args, message in (
        (["cache", "mixture.json"], "cache needs --out, a folder"),
        (["cache", "mixture.json", "--vae", "nothing.ckpt", "--out", "x"], "nothing.ckpt: no such file"),
        (["inspect", "mixture.json", "--tokenizer", "mixture.json"], "mixture.json: not a tokenizer file"),
        (["cache", "mixture.json", "--size", "0", "--out", "x"], "--size is 0; a whole number from 1"),
        (["cache", "mixture.json", "--size", "60", "--out", "x"], "--size is 60; a multiple of 8 is"),
        (["inspect", "mixture.json", "--max-length", "-5"], "--max-length is -5; a whole number from 1"),
        (["cache", "nowhere.json", "--out", "x"], "nowhere.json: no such file"),
        (["cache", "mixture.json", "--out", "x", "--json"], "--json belongs to inspect"),
    ):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
