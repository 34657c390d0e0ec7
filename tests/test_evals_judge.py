"""Many questions to a judge: replies in their order, kept on disk, counted; a secret key; the flags."""
import argparse
import json
import signal
import threading
import time

import judge_server
import pytest
from judge_server import Hang, Status, in_turn, judge_at, reply_to_one
from PIL import Image

from harmonkit.evals import judge
from harmonkit.evals.judge import Judge

KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture
def picture(tmp_path):
    """The path of a PNG."""
    return judge_server.write_picture(tmp_path / "picture.png")


# ---- many at once, and the cache -------------------------------------------------------------------

def test_several_at_once_in_a_fixed_order():
    together = threading.Barrier(4, timeout=5)

    def behave(request):
        together.wait()                                     # breaks unless four requests are open at once
        time.sleep(0.02 * (3 - int(request.text) % 4))
        return f"reply {request.text}"
    with judge_server.running(behave) as server:
        replies = judge_at(server, requests=4, retries=0).ask_all([(str(i), None) for i in range(8)])
    assert replies == [f"reply {i}" for i in range(8)]


def test_one_error_ends_all_requests():
    def behave(request):
        return Status(401) if request.text == "2" else Hang(20)
    began = time.monotonic()
    with judge_server.running(behave) as server:
        with pytest.raises(ValueError, match="HTTP 401"):
            judge_at(server, requests=3, timeout=20).ask_all([(str(i), None) for i in range(9)])
        assert time.monotonic() - began < 10 and len(server.requests) <= 3


def test_ctrl_c_waits_for_no_reply():
    def behave(request):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return Hang(20)
    began = time.monotonic()
    with judge_server.running(behave) as server:
        with pytest.raises(KeyboardInterrupt):
            judge_at(server, timeout=20).ask_all([("a", None)])
        assert time.monotonic() - began < 10
        # Python's exit waits for all other threads.
        assert all(thread.daemon for thread in threading.enumerate() if thread != threading.main_thread())


def test_a_killed_scoring_asks_nothing_twice(tmp_path, picture):
    questions = [(str(i), picture) for i in range(6)]
    fails = threading.Event()

    def behave(request):
        return Status(401) if fails.is_set() and request.text == "3" else f"reply {request.text}"
    with judge_server.running(behave) as server:
        fails.set()
        with pytest.raises(ValueError, match="HTTP 401"):
            judge_at(server, tmp_path / "judge", requests=1).ask_all(questions)
        kept = sorted((tmp_path / "judge").iterdir())
        assert len(kept) == 3 and all(file.suffix == ".json" for file in kept)
        fails.clear()
        asked = judge_at(server, tmp_path / "judge")
        assert asked.ask_all(questions) == [f"reply {i}" for i in range(6)]
        assert asked.counts == {"asked": 3, "cached": 3, "failed": 0}
    assert judge_at(server, tmp_path / "judge").ask_all(questions) == [f"reply {i}" for i in range(6)]


def test_another_request_is_not_taken_from_the_cache(tmp_path, picture):
    with judge_server.running(lambda request: f"reply {request.number}") as server:
        one, other = (Judge(server.url, model, tmp_path) for model in ("one", "other"))
        def ask():
            replies = [one.ask("a"), one.ask("b"), one.ask("a", picture), other.ask("a")]
            return [*replies, one.ask("a", attempt=1)]
        assert ask() == ask() == [f"reply {i}" for i in range(5)]
        Image.new("RGB", (8, 8)).save(picture)
        assert one.ask("a", picture) == "reply 5"
        assert len(list(tmp_path.glob("*.json"))) == 6


@pytest.mark.parametrize("content", ["", '{"reply": "ye', "[]", '{"reply": ""}', '{"reply": 1}', "\0"])
def test_a_broken_file_of_the_cache_is_asked_again(tmp_path, content):
    with judge_server.running(in_turn("yes")) as server:
        judge_at(server, tmp_path).ask("a")
        file, = tmp_path.iterdir()
        whole = file.read_text()
        file.write_text(content)
        assert judge_at(server, tmp_path).ask("a") == "yes"
    assert file.read_text() == whole and len(server.requests) == 2


# ---- the key ---------------------------------------------------------------------------------------

def test_the_key_is_neither_written_nor_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echoes = (f"your key is {KEY}", Status(500, body=KEY), Status(401, body=f"no such key: {KEY}"))
    for echo in echoes:
        with judge_server.running(in_turn(echo)) as server:
            asked = judge_at(server, tmp_path, retries=0)
            try:
                assert asked.ask("a", attempt=echoes.index(echo)) == "your key is [key]"
            except (OSError, ValueError) as error:
                assert KEY not in str(error) and "[key]" in str(error)
            assert server.requests[0].key == KEY and KEY not in str(asked.about()) + repr(asked)
    assert KEY not in "".join(capfd.readouterr())
    assert all(KEY not in file.read_text() for file in tmp_path.iterdir())
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nmore")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        judge_at(server)
    assert KEY not in str(error.value)


def test_what_says_nothing_three_times_is_asked_again_by_the_next_run(tmp_path, picture):
    asked = []

    def reply(request):
        asked.append(request)
        return "hm" if len(asked) <= 3 else "yes"
    questions = [("Is it red?", picture)]
    with judge_server.running(reply) as server:
        for expected in ([None], ["yes"]):
            asker = Judge(server.url, "m", tmp_path / "judge")
            found = judge.ask_until_read(asker, questions, lambda text: text if text == "yes" else None)
            assert found == expected
    assert len(asked) == 4


def test_a_placeholder_for_a_key_changes_no_reply(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    reply, requests = reply_to_one(in_turn("Score: 1"))
    assert reply == "Score: 1" and requests[0].key == "1"


# ---- flags -----------------------------------------------------------------------------------------

def parsed(*flags):
    parser = argparse.ArgumentParser()
    judge.add_arguments(parser)
    return parser.parse_args(flags)


def test_flags(tmp_path):
    assert judge.from_args(parsed(), tmp_path) is None
    flags = "--judge-url http://h:1/v1 --judge-model m --judge-timeout 7 --judge-requests 3"
    made = judge.from_args(parsed(*flags.split()), tmp_path)
    assert (made.endpoint.url, made.model) == ("http://h:1/v1/chat/completions", "m")
    assert (made.cache, made.requests, made.endpoint.timeout) == (tmp_path / "judge", 3, 7)


@pytest.mark.parametrize("flags, message", [
    (["--judge-url", "http://h"], "--judge-model is missing"),
    (["--judge-model", "m"], "--judge-url is missing"),
    (["--judge-url", "h", "--judge-model", "m"], "--judge-url: "),
    (["--judge-url", "http://h", "--judge-model", "m", "--judge-timeout", "0"], "--judge-timeout is 0"),
    (["--judge-url", "http://h", "--judge-model", "m", "--judge-timeout", "nan"], "--judge-timeout is nan"),
    (["--judge-url", "http://h", "--judge-model", "m", "--judge-requests", "0"], "--judge-requests is 0")])
def test_flags_that_cannot_work(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        judge.from_args(parsed(*flags), tmp_path)


def test_the_file_of_a_reply_says_what_was_asked(tmp_path):
    with judge_server.running(in_turn("ja, \ud83d")) as server:        # half of an emoji
        judge_at(server, tmp_path).ask("Is it “red”?", attempt=2)
        assert judge_at(server, tmp_path).ask("Is it “red”?", attempt=2) == "ja, \ud83d"
    file, = tmp_path.iterdir()
    assert len(server.requests) == 1 and json.loads(file.read_text(encoding="utf-8")) == {
        "reply": "ja, \ud83d", "url": f"{server.url}/chat/completions", "model": "model",
        "text": "Is it “red”?", "attempt": 2}
