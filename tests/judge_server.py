"""A local server in the place of a judge, which behaves as a test says.

    with judge_server.running(lambda request: "yes") as server:
        Judge(server.url, "some-model").ask("Is it red?")
    server.requests[0].text, .image (bytes or None), .model, .key, .body

The function gets a Request and returns the reply's text, or one of the faults below. `in_turn` makes one that
goes through a list, and stays with the last.
"""
import base64
import json
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import numpy as np
from PIL import Image

from harmonkit.evals.judge import Judge


@dataclass(frozen=True)
class Status:
    """An HTTP status in place of a reply."""
    code: int
    headers: dict = field(default_factory=dict)
    body: str = "{}"


@dataclass(frozen=True)
class Raw:
    """These bytes with status 200."""
    data: bytes


@dataclass(frozen=True)
class Hang:
    """Nothing for so many seconds, then a cut connection."""
    seconds: float


@dataclass(frozen=True)
class Cut:
    """The connection ends in the middle of the reply, or before its first byte."""
    after: bytes = b'{"choices": [{"mess'


@dataclass(frozen=True)
class Request:
    number: int                 # 0 for the first
    path: str
    key: str | None             # of the header Authorization: Bearer
    body: dict

    @property
    def model(self) -> str:
        return self.body["model"]

    @property
    def text(self) -> str:
        return self.part("text")

    @property
    def image(self) -> bytes | None:
        url = self.part("image_url")
        return None if url is None else base64.b64decode(url["url"].partition(",")[2])

    def part(self, kind):
        parts = self.body["messages"][0]["content"]
        return next((part[kind] for part in parts if part["type"] == kind), None)


def in_turn(*behaviours):
    """A function for `running` that gives each of these once, and then the last for ever."""
    return lambda request: behaviours[min(request.number, len(behaviours) - 1)]


def completion(text) -> bytes:
    """A reply of the API."""
    message = {"role": "assistant", "content": text}
    return json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        with server.lock:
            request = Request(len(server.requests), self.path, key, body)
            server.requests.append(request)
        does = server.behave(request)
        if isinstance(does, Status):
            self.reply(does.code, does.body.encode(), does.headers)
        elif isinstance(does, Raw):
            self.reply(200, does.data)
        elif isinstance(does, Hang):
            server.ended.wait(does.seconds)
        elif isinstance(does, Cut):
            self.reply(200, does.after, {"Content-Length": 1000} if does.after else None, bool(does.after))
        else:
            self.reply(200, completion(does))
        self.close_connection = True

    def reply(self, code, data, headers=None, with_headers=True):
        if with_headers:
            self.send_response(code)
            for name, value in ({"Content-Length": len(data)} | (headers or {})).items():
                self.send_header(name, str(value))
            self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.requests, self.lock, self.ended = [], threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def running(behave):
    """A Server on a free port of this machine, which ends with the block."""
    server = Server(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        with mock.patch.dict(os.environ, NO_PROXY="127.0.0.1"):
            yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


# ---- for tests of the judge itself ---------------------------------------------------------------------

def judge_at(server, cache=None, **settings) -> Judge:
    """A Judge that loses no time."""
    return Judge(server.url, "model", cache, **{"backoff": 0.001, "timeout": 5, **settings})


def reply_to_one(behave, **settings):
    """(the reply or the exception, the server's requests)"""
    with running(behave) as server:
        try:
            return judge_at(server, **settings).ask("question"), server.requests
        except (OSError, ValueError) as error:
            return error, server.requests


def write_picture(path):
    """A small PNG of noise. Returns its path."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
