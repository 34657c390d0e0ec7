"""Requests to a judge as the API has them, faults that pass and are retried, faults that stay."""
import io
import socket
import struct
import threading
import time

import judge_server
import numpy as np
import pytest
from judge_server import Cut, Hang, Raw, Status, completion, in_turn, judge_at, reply_to_one
from PIL import Image

from harmonkit.evals import endpoint
from harmonkit.evals.judge import Failed, Judge


@pytest.fixture
def picture(tmp_path):
    """The path of a PNG."""
    return judge_server.write_picture(tmp_path / "picture.png")


# ---- requests --------------------------------------------------------------------------------------

def test_a_request_as_the_api_has_it(picture, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    with judge_server.running(in_turn("yes")) as server:
        assert judge_at(server).ask("Is it red?", picture) == "yes"
        assert judge_at(server).ask("Is it blue?") == "yes"
    seen, blind = server.requests
    data = "data:image/png;base64," + endpoint.data_url(picture).partition(",")[2]
    assert seen.body == {"model": "model", "temperature": 0, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "Is it red?"}, {"type": "image_url", "image_url": {"url": data}}]}]}
    assert seen.image == picture.read_bytes() and seen.path == "/v1/chat/completions" and seen.key == "a key"
    assert blind.image is None and len(blind.body["messages"][0]["content"]) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_png_and_jpeg_go_as_they_are(picture, kind):
    file = io.BytesIO()
    Image.open(picture).save(file, kind)
    head, _, data = endpoint.data_url(file.getvalue()).partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    assert endpoint.base64.b64decode(data) == file.getvalue()


def test_other_pictures_become_png(picture, tmp_path):
    original = Image.open(picture)
    original.save(tmp_path / "picture.webp", lossless=True)
    for image in (original, tmp_path / "picture.webp", (tmp_path / "picture.webp").read_bytes()):
        data = endpoint.base64.b64decode(endpoint.data_url(image).removeprefix("data:image/png;base64,"))
        assert (np.asarray(Image.open(io.BytesIO(data))) == np.asarray(original)).all()


def test_a_picture_that_cannot_be_read_is_named_and_not_sent(picture, tmp_path):
    picture.write_bytes(picture.read_bytes()[:200])
    with judge_server.running(in_turn("yes")) as server:
        with pytest.raises(ValueError, match="picture.png: .*cut off"):
            judge_at(server).ask_all([("Is it red?", picture)])
        with pytest.raises(FileNotFoundError, match="none.png: no such file"):
            judge_at(server).ask("Is it red?", tmp_path / "none.png")
    assert server.requests == []


@pytest.mark.parametrize("url, path", [
    ("http://h:1", "http://h:1/v1/chat/completions"), ("http://h:1/", "http://h:1/v1/chat/completions"),
    ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
    ("https://h/openai/v1/chat/completions", "https://h/openai/v1/chat/completions"),
    ("https://h/d/m?api-version=1#x", "https://h/d/m/chat/completions?api-version=1")])
def test_addresses(url, path):
    assert endpoint.address(url) == path


@pytest.mark.parametrize("url", ["h:1/v1", "ftp://h/v1", "http://", "http://h:port/", "http://h/a b",
                                 "http://[", "file:///a", "http://h/\n", "http://user:secret@h/v1"])
def test_no_address(url):
    with pytest.raises(ValueError, match="^--judge-url: ") as error:
        Judge(url, "model")
    assert "secret" not in str(error.value)


# ---- faults that pass ------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", [
    Status(500), Status(502, body="<html>Bad gateway</html>"), Status(503), Status(429), Status(408),
    Cut(), Cut(b""), Raw(b"<html>nonsense</html>"), Raw(b""), Raw(b"[]"), Raw(b"\xff\xfe"),
    Raw(b'{"choices": []}'), Raw(b'{"choices": [{"message": {"content": 1}}]}'), Raw(b"[" * 100_000),
    Raw(completion(None)), "", " \n"])
def test_a_fault_that_comes_twice(fault):
    reply, requests = reply_to_one(in_turn(fault, fault, "yes"), retries=2)
    assert reply == "yes" and len(requests) == 3
    assert requests[0].body == requests[2].body


def test_a_hang_ends_after_the_timeout():
    began = time.monotonic()
    reply, requests = reply_to_one(in_turn(Hang(20), "yes"), timeout=0.1)
    assert reply == "yes" and len(requests) == 2 and time.monotonic() - began < 10


def test_a_connection_that_is_cut_while_the_picture_is_sent(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        def reset():
            for _ in range(2):
                connection, _ = server.accept()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
        thread = threading.Thread(target=reset)
        thread.start()
        asked = Judge(f"http://127.0.0.1:{server.getsockname()[1]}", "model", retries=1, backoff=0.001)
        with pytest.raises(Failed, match="no reply in 2 tries"):
            asked.ask("a" * 8_000_000)
        thread.join()


def test_content_in_parts():
    parts = [{"type": "text", "text": "ye"}, {"type": "reasoning"}, {"type": "text", "text": "s"}]
    assert reply_to_one(in_turn(Raw(completion(parts))))[0] == "yes"


def test_pauses_double():
    times = []

    def behave(request):
        times.append(time.monotonic())
        return Status(500)
    reply_to_one(behave, retries=3, backoff=0.05)
    pauses = [later - earlier for earlier, later in zip(times, times[1:])]
    assert len(pauses) == 3
    assert all(pause >= wanted for pause, wanted in zip(pauses, (0.05, 0.1, 0.2)))


def test_retry_after_holds_up_all_requests():
    times = []

    def behave(request):
        times.append(time.monotonic())
        return Status(429, {"Retry-After": "0.3"}) if request.number == 0 else "yes"
    with judge_server.running(behave) as server:
        asked = judge_at(server, requests=1)
        assert asked.ask_all([("a", None), ("b", None)]) == ["yes", "yes"]
        assert times[1] - times[0] >= 0.3
        times.clear()
        asked.pause_until = time.monotonic() + 0.2
        began = time.monotonic()
        asked.ask("c")
        assert times[0] - began >= 0.19


def test_retry_after_in_words():
    now = time.time()
    assert endpoint.seconds_of(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now + 60))) > 55
    assert [endpoint.seconds_of(text) for text in (None, "7", "soon", "-3", "nan")] == [0, 7, 0, 0, 0]


def test_a_long_pause_ends_the_scoring():
    error, requests = reply_to_one(in_turn(Status(429, {"Retry-After": "3600"})))
    assert len(requests) == 1 and "a pause of 3600 s" in str(error)
    assert isinstance(error, OSError) and not isinstance(error, Failed)


# ---- faults that stay ------------------------------------------------------------------------------

@pytest.mark.parametrize("fault, said", [
    (Status(500, body="out of memory"), "HTTP 500 out of memory"), ("", "the reply has no text"),
    (Raw(b"nonsense"), "the reply is not JSON as this API gives it")])
def test_a_question_without_reply_fails(fault, said):
    error, requests = reply_to_one(in_turn(fault), retries=3)
    assert isinstance(error, Failed) and len(requests) == 4
    assert str(error).endswith(f"no reply in 4 tries; the last one: {said}")


def test_a_refused_question_is_not_asked_again():
    error, requests = reply_to_one(in_turn(Status(400, body="content policy")))
    assert isinstance(error, Failed) and len(requests) == 1 and "HTTP 400 content policy" in str(error)


@pytest.mark.parametrize("code", [301, 307, 401, 403, 404])
def test_wrong_settings_end_the_scoring(code, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judge_server.running(in_turn("yes")) as elsewhere:
        to = {"Location": f"{elsewhere.url}/chat/completions"}
        error, requests = reply_to_one(in_turn(Status(code, to, "unknown model")))
    assert isinstance(error, ValueError) and len(requests) == 1 and elsewhere.requests == []
    assert f"HTTP {code} unknown model (the key in OPENAI_API_KEY is not set)" in str(error)


def test_nobody_at_the_url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        asked = Judge(f"http://127.0.0.1:{unused.getsockname()[1]}", "model", retries=1, backoff=0.001)
        with pytest.raises(OSError, match="refused; what was answered is kept") as error:
            asked.ask_all([("a", None)] * 20)
    assert not isinstance(error.value, Failed)


def test_failures_are_none_in_their_place_and_counted(tmp_path):
    def behave(request):
        return Status(500) if request.text in ("2", "5") else f"reply {request.text}"
    with judge_server.running(behave) as server:
        asked = judge_at(server, tmp_path, retries=1, requests=3)
        replies = asked.ask_all([(str(i), None) for i in range(7)])
        assert replies == ["reply 0", "reply 1", None, "reply 3", "reply 4", None, "reply 6"]
        assert asked.about() == {"url": f"{server.url}/chat/completions", "model": "model", "asked": 5,
                                 "cached": 0, "failed": 2}
        assert len(server.requests) == 9
        again = judge_at(server, tmp_path, retries=0)
        assert again.ask_all([(str(i), None) for i in range(7)]) == replies
    assert (again.counts, len(server.requests)) == ({"asked": 0, "cached": 5, "failed": 2}, 11)


def test_sixteen_failures_in_a_row_end_the_scoring(tmp_path):
    with judge_server.running(in_turn(Status(500))) as server:
        asked = judge_at(server, retries=0, requests=1)
        with pytest.raises(OSError, match="16 questions in a row got no reply, the last one: .*HTTP"):
            asked.ask_all([(str(i), None) for i in range(40)])
    assert 16 <= len(server.requests) <= 17
    with judge_server.running(lambda request: "yes" if request.number % 16 == 15 else Status(500)) as server:
        assert judge_at(server, retries=0, requests=1).ask_all([("a", None)] * 40).count("yes") == 2
