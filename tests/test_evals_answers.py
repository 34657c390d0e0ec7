"""The runner of the answering benchmarks: parts, kills, processes, failures."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evals_data
import pytest
from conftest import ROOT

from harmonkit.drawing import about_model
from harmonkit.evals import answer_files, answers, pope
from harmonkit.evals.__main__ import main
from harmonkit.evals.benchmark import Loaded, Question, Result
from harmonkit.repeatable import make_repeatable

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


class Benchmark:
    """A benchmark of given questions; what was written and scored is kept."""
    TEMPLATES = {"plain": "the question alone"}

    def __init__(self, questions):
        self.questions = questions
        self.written, self.scored = None, None

    def files(self, args):
        return []

    def read(self, args):
        return list(self.questions)

    def write(self, folder, questions, texts):
        self.written = texts

    def score(self, questions, texts):
        self.scored = texts
        return Result({"official": {"accuracy": 0.5}}, answer_files.count(questions, texts),
                      tuple(answer_files.notes(answer_files.count(questions, texts))))


def questions_of(count, folder=None):
    """Questions of several lengths; three in a row are about one picture, every fifth one about none."""
    made = []
    for i in range(count):
        image = evals_data.image_bytes(i // 3) if folder is None else folder / f"{i // 3}.jpg"
        text = f"What is it, number {i}?" + " Look again and again at all of it." * (i % 3)
        made.append(Question(f"q/{i}", text, None if i % 5 == 4 else image))
    return made


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def loaded(small):
    return Loaded(make_repeatable(copy.deepcopy(small)), about_model(small, "small", "eager"), {})


@pytest.fixture
def run(loaded, tmp_path):
    def run(benchmark, out="out", **flags):
        settings = {"model": "small", "batch_size": 4, "limit": None, "size": None, "max_new_tokens": 6,
                    "seed": 0, "overwrite": False, "template": "plain", "loaded": loaded}
        return answers.run("test", benchmark, SimpleNamespace(**settings | flags), tmp_path / out)
    return run


def content(tmp_path, out="out"):
    return (tmp_path / out / "answers.jsonl").read_bytes()


def lines(tmp_path, out="out"):
    return [json.loads(line) for line in content(tmp_path, out).decode().splitlines()]


def test_answers_stand_in_the_order_of_the_questions_and_equal_those_of_chat(run, tmp_path, small):
    benchmark = Benchmark(questions_of(10))
    result = run(benchmark)
    assert [line["key"] for line in lines(tmp_path)] == [f"q/{i}" for i in range(10)]
    for line, question in zip(lines(tmp_path), benchmark.questions):
        assert line["answer"] == "".join(small.chat(question.text, question.image, max_new_tokens=6)).strip()
    assert benchmark.written == benchmark.scored == {line["key"]: line["answer"] for line in lines(tmp_path)}
    assert result.headline == ("official", "accuracy", 0.5)
    assert "template plain: the question alone" in result.notes[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers.jsonl", "manifest.json", "scores.json"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["protocol"] == "plain"
    assert manifest["settings"] == {"size": [32, 32], "max_new_tokens": 6, "dtype": "float32",
                                    "mode": "eager"}
    assert manifest["numbers"] == {"questions": 10, "of": 10, "answered": 10, "failed": 0, "empty": 0}


def test_a_killed_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    benchmark = Benchmark(questions_of(14))
    run(benchmark, "whole")
    answer_batch, asked = answers.answer_batch, []

    def kill(model, questions, images, **options):
        asked.extend(questions)
        if len(asked) > 8:
            raise KeyboardInterrupt
        return answer_batch(model, questions, images, **options)
    monkeypatch.setattr(answers, "answer_batch", kill)
    with pytest.raises(KeyboardInterrupt):
        run(benchmark)
    part = tmp_path / "out/answers-part-0000-0000.jsonl"
    written = part.read_bytes()
    before = written.count(b"\n")
    assert 4 <= before <= 8
    part.write_bytes(written[:-10])                         # the last line is half-written
    asked.clear()

    def count(model, questions, images, **options):
        asked.extend(questions)
        return answer_batch(model, questions, images, **options)
    monkeypatch.setattr(answers, "answer_batch", count)
    run(benchmark)
    assert content(tmp_path) == content(tmp_path, "whole")
    assert 14 - before < len(asked) <= 14 - before + 4      # the batch of the broken line, and what was left
    assert not part.exists()
    asked.clear()
    run(benchmark)                                          # nothing is left to answer
    assert asked == [] and content(tmp_path) == content(tmp_path, "whole")


def test_a_half_written_line_never_counts_even_if_it_is_whole_but_for_its_end(run, tmp_path):
    benchmark = Benchmark(questions_of(2))
    run(benchmark, "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / "answers-part-0000-0000.jsonl").write_text('{"key": "q/0", "answer": "wrong"}')
    run(benchmark)
    assert content(tmp_path) == content(tmp_path, "whole")


def test_processes_that_cannot_talk_take_their_parts(run, tmp_path, monkeypatch, capsys):
    benchmark = Benchmark(questions_of(14))
    run(benchmark, "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    assert run(benchmark) is None
    assert "of 14 questions are not answered yet; the same command answers" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert run(benchmark) is None and benchmark.written is not None
    first, second = (len((tmp_path / f"out/answers-part-000{rank}-0000.jsonl").read_text().splitlines())
                     for rank in (0, 1))
    assert first + second == 14 and min(first, second) >= 4
    monkeypatch.setenv("RANK", "0")
    assert run(benchmark).headline[2] == 0.5
    assert content(tmp_path) == content(tmp_path, "whole")


def test_two_processes_of_torchrun_write_the_files_of_one(tmp_path, capsys):
    data = evals_data.pope(tmp_path, num_images=2)
    flags = ["pope", "--data", str(data), "--images", str(tmp_path / "val2014"), "--template", "plain",
             "--batch-size", "2", "--device", "cpu", "--max-new-tokens", "8", "--out"]
    main([*flags, str(tmp_path / "one")])
    done = subprocess.run([*TORCHRUN, "-m", "harmonkit.evals", *flags, str(tmp_path / "two")], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out and done.stdout.count("## pope") == 1
    for name in ("answers.jsonl", "scores.json", *(f"coco_pope_{part}_answers.jsonl" for part in pope.PARTS)):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert json.loads((tmp_path / "two/manifest.json").read_text())["runs"][0]["processes"] == 2
    assert len({line["answer"] for line in lines(tmp_path, "two")}) > 1


def test_questions_of_one_length_share_a_batch_in_their_order():
    assert answers.batches([3, 40, 33, 32, 64, 1, 2], 2) == [[1, 2], [4], [0, 3], [5, 6]]


def test_pictures_that_cannot_be_read_are_failures_and_not_answers(run, tmp_path, capsys):
    folder = tmp_path / "images"
    for number in range(3):
        evals_data.write_image(folder / f"{number}.jpg", number)
    benchmark = Benchmark(questions_of(9, folder))
    run(benchmark, "whole")
    (folder / "0.jpg").unlink()
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:300])
    benchmark.written = None
    result = run(benchmark)
    failed = {line["key"]: line["failed"] for line in lines(tmp_path) if "failed" in line}
    assert sorted(failed) == ["q/0", "q/1", "q/2", "q/3", "q/5"]
    assert failed["q/0"] == f"{folder / '0.jpg'}: no such file"
    assert failed["q/3"].startswith(f"{folder / '1.jpg'}: not an image that can be read")
    assert result.counts == {"questions": 9, "answered": 4, "failed": 5, "empty": 0}
    assert "5 of 9 questions failed" in result.notes[1]
    assert benchmark.scored["q/0"] is None and benchmark.written is None
    assert "5 questions failed" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/manifest.json").read_text())["numbers"]["failed"] == 5
    # Once the pictures are there, the same command asks again.
    for number in (0, 1):
        evals_data.write_image(folder / f"{number}.jpg", number)
    assert run(benchmark).counts["failed"] == 0
    assert content(tmp_path) == content(tmp_path, "whole") and benchmark.written is not None


def test_pictures_that_are_all_missing_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="0.jpg: no such file, and none of the other pictures is there"):
        run(Benchmark(questions_of(6, tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="give --images"):
        run(Benchmark(questions_of(6)), images=None)
    assert not (tmp_path / "out").exists()


def test_all_questions_failed(run, tmp_path):
    benchmark = Benchmark([Question("a", "What?", b"no picture"), Question("b", "What?", b"")])
    with pytest.raises(ValueError, match="all 2 questions failed; there is nothing to score"):
        run(benchmark)
    assert benchmark.scored is None
    unread = "data: not an image that can be read: it is"
    assert [line["failed"] for line in lines(tmp_path)] == [f"{unread} text", f"{unread} empty (0 bytes)"]


def test_a_question_that_is_too_long_fails_alone(run, tmp_path):
    questions = [*questions_of(2), Question("long", "word " * 33_000), ]
    assert run(Benchmark(questions)).counts["failed"] == 1
    assert "leave no room for an answer" in lines(tmp_path)[2]["failed"]


@pytest.mark.parametrize("line, message", [
    ('{"key": "other", "answer": "x"}', "line 2: 'other' is no question of the data"),
    ('{"key": "q/0", "answer": 3}', "line 2: not an answer"),
    ('{"key": "q/0"}', "line 2: not an answer"),
    ("[]", "line 2: not an answer"),
    ("{", "line 2: not an answer"),
    ('{"key": "q/1", "answer": "another one"}', "line 2: another answer to 'q/1' than before")])
def test_broken_parts_are_refused(run, tmp_path, line, message):
    benchmark = Benchmark(questions_of(2))
    (tmp_path / "out").mkdir()
    part = tmp_path / "out/answers-part-0003-0000.jsonl"
    part.write_text(f'{{"key": "q/1", "answer": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        run(benchmark)
    run(benchmark, overwrite=True)
    assert [row["key"] for row in lines(tmp_path)] == ["q/0", "q/1"] and not part.exists()


def test_a_limit_marks_the_score_and_the_rest_goes_on_from_there(run, tmp_path):
    benchmark = Benchmark(questions_of(9))
    run(benchmark, "whole")
    result = run(benchmark, limit=4)
    assert len(lines(tmp_path)) == 4 and "the first 4 of 9" in result.notes[0]
    assert run(benchmark).counts["questions"] == 9
    assert content(tmp_path) == content(tmp_path, "whole")
    with pytest.raises(ValueError, match="results of all are here"):
        run(benchmark, limit=4)


def test_answers_of_other_settings_are_not_replaced(run, tmp_path):
    benchmark = Benchmark(questions_of(3))
    run(benchmark)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="max_new_tokens is 6 there and 7 here"):
        run(benchmark, max_new_tokens=7, overwrite=True)
    assert content(tmp_path) == before


# ---- files of answers ------------------------------------------------------------------------------------

def write(tmp_path, *rows):
    path = tmp_path / "file.jsonl"
    evals_data.write_lines(path, rows)
    return path


def test_own_answers_in_any_order(tmp_path):
    questions = questions_of(2)
    path = write(tmp_path, {"key": "q/1", "failed": "why"}, {"key": "q/0", "answer": "a"})
    rows = answer_files.answer_rows(path)
    assert answer_files.is_own(rows)
    found = answer_files.own_answers(path, rows, questions)
    assert list(found.items()) == [("q/0", "a"), ("q/1", None)]


@pytest.mark.parametrize("rows, message", [
    ([{"key": "q/0", "answer": "a"}], "1 of 2 questions have no answer, the first of them is 'q/1'; was the"),
    ([{"key": "q/0", "answer": "a"}] * 2, "line 2: a second answer to 'q/0'"),
    ([{"key": "q/7", "answer": "a"}], "line 1: 'q/7' is no question of the data"),
    ([{"key": "q/0", "answer": None}], "line 1: answer is None; a text is expected"),
    ([{"key": "q/0", "answer": "a"}, {"answer": "a"}], "line 2: no field key; there is: answer")])
def test_files_of_answers_that_do_not_fit(tmp_path, rows, message):
    path = write(tmp_path, *rows)
    with pytest.raises(ValueError, match=f"file.jsonl.*{message}"):
        answer_files.own_answers(path, answer_files.answer_rows(path), questions_of(2))


def test_files_that_are_cut_off(tmp_path):
    path = write(tmp_path, {"key": "q/0", "answer": "a"}, {"key": "q/1", "answer": "a"})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="file.jsonl, line 2: not JSON"):
        answer_files.answer_rows(path)
    path.write_text('[{"key": "q/0", "answer": "a"}, {"key"')
    with pytest.raises(ValueError, match="file.jsonl, line 1: not JSON"):
        answer_files.answer_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="file.jsonl: an empty file"):
        answer_files.answer_rows(path)
    with pytest.raises(ValueError, match="a folder; a file of answers is expected"):
        answer_files.answer_rows(Path(tmp_path))
