"""python -m harmonkit.evals: its commands, flags of several benchmarks, and faults in one line."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from harmon import Harmon
from harmonkit.evals import benchmark
from harmonkit.evals.__main__ import ANSWERING, BENCHMARKS, OTHERS, main, parse

LINES = [{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"}]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stopped(capsys):
    """Run a command that ends the process: (exit status, stdout, stderr)."""
    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, argv)))
        return stop.value.code, *capsys.readouterr()
    return run


# ---- help and names --------------------------------------------------------------------------------------

def test_help_lists_all_and_imports_no_torch():
    code = ("import sys\nfrom harmonkit.evals.__main__ import ANSWERING, main\ntry:\n    main(['--help'])\n"
            "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert not [name for name in (*BENCHMARKS, *OTHERS) if name not in run.stdout]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_shows_its_flags(name, stopped):
    status, out, err = stopped(name, "--help")
    assert (status, err) == (0, "")
    wanted = ["--model", "--data" if name in ANSWERING else "--seed", "--out"]
    wanted += ["--cfg"] if name in ("geneval", "coco", "shapes") else []
    wanted += ["--max-new-tokens", "--template"] if name in ("pope", "mmmu") else []
    assert not [flag for flag in wanted if flag not in out]


def test_several_benchmarks_show_their_flags_by_name(stopped):
    status, out, _ = stopped("geneval", "coco", "--help")
    assert status == 0 and "--geneval-data" in out and "--coco-reference" in out
    assert "--geneval-data" not in stopped("geneval", "--help")[1]


@pytest.mark.parametrize("argv, message", [
    (["genval"], "'genval' is no benchmark; did you mean geneval? There are geneval, dpg,"),
    (["geneval", "Pope2"], "'Pope2' is no benchmark; did you mean pope?"),
    (["tabel"], "'tabel' is no benchmark; did you mean table?"),
    (["xyzzy"], "'xyzzy' is no benchmark; There are"),
    ([], "name a benchmark: geneval, dpg,"),
    (["score"], "score needs a benchmark"),
    (["score", "shapes", "x"], "'shapes' is no benchmark"),
    (["score", "pope", "gone.jsonl", "--data", "gone.json"], "gone.json: no such file"),
    (["geneval", "--data", "gone.jsonl"], "gone.jsonl: no such file"),
    (["geneval", "--limit", "0"], "--limit is 0; it must be at least 1"),
    (["geneval", "shapes", "--limit", "3"], "--limit: shapes has none"),
    (["geneval", "--model", "nowhere"], "nowhere: no such file or folder"),
    (["table", "nowhere"], "nowhere: no such folder"),
    (["golden", "nowhere.json"], "nowhere.json")])
def test_faults_are_one_line(argv, message, stopped):
    status, out, err = stopped(*argv)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("harmonkit.evals") and err.count("\n") == 1


@pytest.mark.parametrize("argv, message", [
    ("geneval dpg --foo 3", "unrecognized arguments: --foo 3"),
    ("geneval --seed 1 extra", "unrecognized arguments: extra"),
    ("geneval dpg --pope-data x", "unrecognized arguments: --pope-data x"),
    ("geneval --geneval-data x", "unrecognized arguments: --geneval-data x"),
    ("geneval --seed 1 --seed 2", "given twice"),
    ("geneval dpg --data x --dpg-data y", "given twice")])
def test_flags_that_nobody_knows_are_refused(argv, message, capsys):
    names = [name for name in argv.split() if name in BENCHMARKS]
    with pytest.raises(SystemExit) as stop:
        parse(names, argv.split()[len(names):])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_flags_reach_the_benchmarks_that_they_mean():
    flags = "--coco-data c.json --geneval-data g.jsonl --pope-data p --seed 5 --reference real --steps 7"
    parsed = parse(["geneval", "coco", "pope"], flags.split())
    assert [str(parsed[name].data) for name in parsed] == ["g.jsonl", "c.json", "p"]
    assert [getattr(args, "seed", None) for args in parsed.values()] == [5, 5, None]
    assert str(parsed["coco"].reference) == "real" and parsed["geneval"].num_iter == 7
    parsed = parse(["mjhq", "coco"], ["--data", "both.txt"])
    assert {str(parsed[name].data) for name in parsed} == {"both.txt"}


# ---- run and score ---------------------------------------------------------------------------------------

def test_several_benchmarks_of_one_command(small, tmp_path, monkeypatch, capsys, stopped):
    small.save_pretrained(tmp_path / "model")
    (tmp_path / "lines.jsonl").write_text("".join(map(json.dumps, LINES)))
    (tmp_path / "captions.txt").write_text("a bus\na cat\n")
    loaded, original = [], Harmon.from_pretrained

    def from_pretrained(*args, **options):
        loaded.append(args)
        return original(*args, **options)
    monkeypatch.setattr(Harmon, "from_pretrained", from_pretrained)
    flags = ["geneval", "coco", "--geneval-data", tmp_path / "lines.jsonl", "--model", tmp_path / "model",
             "--steps", "1", "--out", tmp_path / "out"]
    status, _, err = stopped(*flags, "--coco-data", tmp_path / "gone.txt")
    assert status == 2 and "gone.txt: no such file" in err
    status, _, err = stopped(*flags, "--coco-data", tmp_path / "captions.txt", "--reference", "gone")
    assert status == 2 and "gone: no such file or folder" in err
    assert loaded == [] and not (tmp_path / "out").exists(), "no benchmark begins before all are checked"
    main([*map(str, flags), "--coco-data", f"{tmp_path}/captions.txt"])
    assert len(loaded) == 1, "the model is loaded once"
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "geneval/manifest.json", "geneval/00000/metadata.jsonl",
        *(f"geneval/00000/samples/000{s}.png" for s in range(4)),
        "coco/manifest.json", "coco/images/00000-a-bus.png", "coco/images/00001-a-cat.png"}
    assert (tmp_path / "out/geneval/00000/metadata.jsonl").read_text() == json.dumps(LINES[0])


def test_results_have_a_folder_without_out(monkeypatch):
    args = parse(["geneval"], ["--model", "wusize/Harmon-1_5B"])["geneval"]
    assert str(benchmark.default_folder(args, "geneval")) == "results/Harmon-1_5B/geneval"
    args.model = "files/harmon_1.5b.pth"
    assert str(benchmark.default_folder(args, "geneval")) == "results/harmon_1.5b/geneval"


def test_scoring_what_another_model_answered(tmp_path, capsys, stopped):
    labels = ("yes", "no", "no", "yes")
    for part in ("random", "popular", "adversarial"):
        lines = [{"question_id": i, "image": f"{i}.jpg", "label": label,
                  "text": f"Is there a cup in picture {i}?"} for i, label in enumerate(labels, start=1)]
        (tmp_path / f"coco_pope_{part}.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    lines = [{"question": f"Is there a cup in picture {i}?", "answer": answer}
             for i, answer in enumerate(("Yes", "No", "Yes", "yes, there is"), start=1)]
    file = tmp_path / "answers.jsonl"
    file.write_text(3 * "".join(f"{json.dumps(line)}\n" for line in lines))
    flags = ["score", "pope", file, "--data", tmp_path]
    main([*map(str, flags), "--out", f"{tmp_path}/out", "--name", "theirs"])
    shown = capsys.readouterr().out
    assert "## pope" in shown and "0.7500" in shown
    told = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (told["model"], told["status"]) == ("theirs", "scored")
    headline = next(iter(json.loads((tmp_path / "out/scores.json").read_text())["scores"].values()))
    assert 0.75 in headline.values()
    first = tmp_path / "first.jsonl"
    first.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    main([*map(str, ["score", "pope", first, "--data", tmp_path, "--limit", 2, "--out", tmp_path / "part"])])
    assert "A part of the benchmark, the first 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "part/manifest.json").read_text())["limit"] == 2
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    status, out, err = stopped(*flags)
    assert (status, out) == (2, "") and "answers.jsonl" in err and err.count("\n") == 1


def test_list_tells_every_benchmark(capsys):
    main(["list"])
    out = capsys.readouterr().out
    assert not [name for name in BENCHMARKS if name not in ("classes", "reconstruction") and name not in out]
