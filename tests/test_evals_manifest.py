"""manifest.json: what it tells, whose folder it is, and what is never overwritten."""
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harmonkit.evals import benchmark, manifest, origins
from harmonkit.evals.benchmark import Loaded, Result

SETTINGS = {"num_iter": 64, "cfg": 3.0, "size": [512, 512]}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def loaded(weights="0123456789abcdef", **files):
    model = SimpleNamespace(device=torch.device("cpu"))
    return Loaded(model, {"weights": weights}, files or {"model.safetensors": "11"})


def args(**changes):
    return SimpleNamespace(**{"model": "harmon-tiny", "seed": 0, "limit": None, "overwrite": False} | changes)


def run(out, numbers=None, result=None, weights=None, **changes):
    """A whole run -> its manifest as it stands in the folder."""
    options = {"settings": SETTINGS, "protocol": "janus", "data": [], "seed_rule": "seed", "scorer": None}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    name = changes.pop("benchmark", "pope")
    begun = manifest.start(out, name, args(**changes), weights or loaded(), **options)
    manifest.finish(out, begun, numbers or {"of": 10}, result)
    return manifest.read(out)


def test_digests_are_sha256(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert origins.digest(tmp_path / "a.txt") == hashlib.sha256(b"abc").hexdigest()
    whole = origins.digest(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_bytes(b"abc")
    assert origins.digest(tmp_path) != whole
    listed = "".join(f"{name} {hashlib.sha256(b'abc').hexdigest()}\n" for name in ("a.txt", "sub/b.txt"))
    assert origins.digest(tmp_path) == hashlib.sha256(listed.encode()).hexdigest()
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        origins.digest(tmp_path / "nowhere")


def test_a_run_from_start_to_end(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    begun = manifest.start(out, "dpg", args(seed=3), loaded(), settings=SETTINGS, protocol=None,
                           data=[tmp_path / "prompts.jsonl"], seed_rule="seed + 100000·prompt + sample")
    told = manifest.read(out)
    assert told["status"] == "running" and told["runs"][0]["wall_seconds"] is None
    result = Result({"official": {"overall": 0.5}}, {"prompts": 2}, ("Mind this.",))
    assert manifest.finish(out, begun, {"prompts": 2, "of": 2, "failed": 1}, result) == result
    told = manifest.read(out)
    assert (told["benchmark"], told["status"], told["seed"]) == ("dpg", "complete", 3)
    assert told["weights"] == {"fingerprint": "0123456789abcdef", "files": {"model.safetensors": "11"}}
    assert told["data"] == {"prompts.jsonl": hashlib.sha256(b"{}\n").hexdigest()}
    assert told["settings"] == SETTINGS and told["numbers"]["failed"] == 1
    [run] = told["runs"]
    assert run["wall_seconds"] >= 0 and run["processes"] == 1 and run["device"].startswith("cpu")
    assert run["versions"].keys() >= {"harmon", "python", "torch", "numpy", "pillow"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", run["started"])
    assert json.loads((out / "scores.json").read_text()) == {
        "benchmark": "dpg", "scores": {"official": {"overall": 0.5}}, "counts": {"prompts": 2},
        "notes": ["Mind this."]}


def test_runs_add_up_and_tell_their_flags(tmp_path):
    run(tmp_path)
    more = {"judge_url": "https://me:secret@host/v1", "images": Path("x"), "loaded": object()}
    runs = run(tmp_path, **more)["runs"]
    assert [one["flags"]["model"] for one in runs] == 2 * ["harmon-tiny"]
    assert runs[1]["flags"]["limit"] is None and runs[1]["flags"]["judge_url"] == "https://host/v1"
    assert runs[1]["flags"].keys() == {"model", "seed", "limit", "overwrite", "judge_url", "images"}


@pytest.mark.parametrize("changes, message", [
    ({"benchmark": "mme"}, "benchmark is pope there and mme here"),
    ({"weights": loaded("ffff")}, "weights is 0123456789abcdef there and ffff here"),
    ({"settings": SETTINGS | {"cfg": 1.0}}, "cfg is 3.0 there and 1.0 here"),
    ({"settings": SETTINGS | {"mode": "packed"}}, "mode is not given there and packed here"),
    ({"protocol": "llava"}, "protocol is janus there and llava here"),
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"seed_rule": "seed + 1"}, "seed_rule is seed there and seed + 1 here"),
    ({"limit": 3}, "results of all are here, and --limit 3"),
    ({"seed": 1, "overwrite": True}, "seed is 0 there and 1 here")])
def test_another_runs_folder_is_refused(tmp_path, changes, message):
    run(tmp_path, result=Result({"a": {"b": 1}}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError) as raised:
        run(tmp_path, **changes)
    text = str(raised.value)
    assert message in text and str(tmp_path / "manifest.json") in text and text.endswith("give another --out")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_data_are_refused(tmp_path):
    data = tmp_path / "pope.json"
    data.write_text("a")
    run(tmp_path / "out", data=[data])
    data.write_text("b")
    with pytest.raises(ValueError, match="pope.json is ca978112.* there and 3e23e816.* here"):
        run(tmp_path / "out", data=[data])


def test_the_same_weights_in_other_files_are_the_same(tmp_path):
    run(tmp_path)
    assert len(run(tmp_path, weights=loaded(**{"official.pth": "22"}), model="official.pth")["runs"]) == 2


def test_a_part_may_grow_but_not_shrink(tmp_path):
    score = Result({"official": {"accuracy": 1.0}})
    assert run(tmp_path, limit=2, result=score)["status"] == "part"
    note = "A part of the benchmark, the first 2 of 10: not comparable with the whole."
    assert json.loads((tmp_path / "scores.json").read_text())["notes"] == [note]
    with pytest.raises(ValueError, match="results of the first 2 are here, and --limit 1"):
        run(tmp_path, limit=1)
    assert run(tmp_path, limit=5)["status"] == "part"
    assert not (tmp_path / "scores.json").exists(), "the scores of two are not those of five"
    assert run(tmp_path, limit=10)["status"] == "complete", "a limit of all"


def test_overwriting_takes_the_old_scores_away(tmp_path):
    run(tmp_path, result=Result({"a": {"b": 1}}))
    run(tmp_path)
    assert (tmp_path / "scores.json").exists()
    run(tmp_path, overwrite=True)
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json"):
        run(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_leftovers_of_a_kill_are_removed(tmp_path):
    names = (".manifest.json.abcd1234.json", ".scores.json.abcd_234.json", ".other.json.abcd1234.json")
    for name in names:
        (tmp_path / name).write_text("{")
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[2], "manifest.json"]


def test_a_second_process_checks_and_writes_nothing(tmp_path, monkeypatch):
    run(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(tmp_path, result=Result({"a": {"b": 1}}))
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        run(tmp_path, seed=1)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert not (tmp_path / "scores.json").exists()


def test_weight_files_are_a_models_files(tmp_path):
    names = ("config.json", "model-1.safetensors", "merges.txt", "notes.md", "training.json")
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "kl16.ckpt").write_text("vae")
    files = origins.weight_files(tmp_path, vae=tmp_path / "kl16.ckpt")
    assert set(files) == {"config.json", "model-1.safetensors", "merges.txt", "kl16.ckpt"}
    assert files["config.json"] == hashlib.sha256(b"config.json").hexdigest()
    assert set(origins.weight_files(tmp_path / "kl16.ckpt")) == {"kl16.ckpt"}
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        origins.weight_files("nowhere")


def test_the_commit_of_an_installed_package_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "BUNDLED", tmp_path / "bundled")
    assert origins.git_commit.__wrapped__() is None
    (tmp_path / ".git").write_text("broken")
    assert origins.git_commit.__wrapped__() is None


def test_scored_files_have_a_manifest(tmp_path):
    file, data = tmp_path / "theirs.jsonl", tmp_path / "pope.json"
    file.write_text("answers")
    data.write_text("questions")
    given = SimpleNamespace(file=file, name=None, data=data, template="janus")
    result = Result({"official": {"accuracy": 0.8}}, {"questions": 3})
    manifest.write_scored(tmp_path / "out", "pope", given, result)
    told = manifest.read(tmp_path / "out")
    assert (told["status"], told["model"], told["weights"]) == ("scored", "theirs", None)
    assert told["scorer"] == {"theirs.jsonl": hashlib.sha256(b"answers").hexdigest()}
    assert told["numbers"] == {"questions": 3}
    manifest.write_scored(tmp_path / "out", "pope", given, result)
    file.write_text("other answers")
    with pytest.raises(ValueError, match="theirs.jsonl is .* give another --out"):
        manifest.write_scored(tmp_path / "out", "pope", given, result)
    with pytest.raises(ValueError, match="give another --out"):
        run(tmp_path / "out")


def test_the_score_of_an_official_scorer_joins_the_manifest_of_the_drawn_pictures(tmp_path):
    out, file, data = tmp_path / "out", tmp_path / "results.jsonl", tmp_path / "prompts.jsonl"
    file.write_text("scores")
    data.write_text("prompts")
    drawn = run(out, benchmark="geneval", data=[data])
    given, result = SimpleNamespace(file=file, name=None), Result({"official": {"overall": 0.5}})
    with pytest.raises(ValueError, match="benchmark is geneval there and dpg here"):
        manifest.write_scored(out, "dpg", given, result, [data])
    manifest.write_scored(out, "geneval", given, result, [data])
    digest = hashlib.sha256(b"scores").hexdigest()
    assert manifest.read(out) == drawn | {"scorer": {"results.jsonl": digest}}
    told = json.loads((out / "scores.json").read_text())
    assert told["scores"] == result.scores and "results.jsonl" in told["notes"][0]
    manifest.write_scored(out, "geneval", given, result, [data])
    file.write_text("other scores")
    with pytest.raises(ValueError, match="results.jsonl is .* give another --out"):
        manifest.write_scored(out, "geneval", given, result, [data])
    file.write_text("scores")
    assert run(out, benchmark="geneval", data=[data])["scorer"] == {"results.jsonl": digest}
    with pytest.raises(ValueError, match="scores.json: of another scorer"):
        run(out, benchmark="geneval", data=[data], scorer={"detector": "ours"})
    manifest.write(out, drawn | {"status": "drawing"})
    with pytest.raises(ValueError, match="the run here is not finished"):
        manifest.write_scored(out, "geneval", given, result, [data])


def test_scores_of_one_scorer_are_not_replaced_by_another_ones(tmp_path):
    result = Result({"official": {"overall": 0.5}})
    run(tmp_path, scorer={"judge": "me"}, result=result)
    assert run(tmp_path)["scorer"] == {"judge": "me"}
    with pytest.raises(ValueError, match="scores.json: of another scorer: judge is me there and you here"):
        run(tmp_path, scorer={"judge": "you"}, result=result)
    (tmp_path / "scores.json").unlink()
    assert run(tmp_path, scorer={"judge": "you"}, result=result)["scorer"] == {"judge": "you"}


def test_flags_keep_no_key(tmp_path):
    given = SimpleNamespace(judge_url="https://me:pass@host/v1?api_key=SECRET", seed=3)
    assert origins.flags(given) == {"judge_url": "https://host/v1", "seed": 3}


def test_results_are_shown_as_markdown(capsys):
    scores = {"official": {"F1": 0.87654, "yes-ratio": 0.5}, "vlmevalkit": {"total": 1155.256, "n": 3}}
    result = Result(scores, {"questions": 9, "failed": 0}, ("Mind this.",))
    assert result.headline == ("official", "F1", 0.87654)
    benchmark.show("pope", result)
    lines = capsys.readouterr().out.split("\n")
    assert [line for line in lines if line] == [
        "## pope", "official:", "| F1 | yes-ratio |", "|---|---|", "| 0.8765 | 0.5000 |",
        "vlmevalkit:", "| total | n |", "|---|---|", "| 1155.26 | 3 |", "questions: 9, failed: 0",
        "Note: Mind this."]
