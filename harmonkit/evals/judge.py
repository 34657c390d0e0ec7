"""A vision-language model that judges pictures, behind any OpenAI-compatible endpoint.

    judge = Judge("http://localhost:8000/v1", "Qwen2.5-VL-72B-Instruct", out / "judge")
    judge.ask("Is there a red dog? Answer yes or no.", "dog.png")       # a text; raises Failed
    judge.ask_all([(question, picture), …])                             # texts in that order; None = failed

A request is one user message with a text and at most one picture, at temperature 0. Replies lie on disk, one
file each, so a scoring that was killed asks nothing twice. Failures are not kept: the next run asks again.
"""
import hashlib
import json
import queue
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from harmonkit.checkpoints import write_text
from harmonkit.evals.endpoint import KEY_VARIABLE, Again, Endpoint, Failed, data_url
from harmonkit.images import as_image

LONGEST_PAUSE = 600     # seconds; a Retry-After above it ends the scoring
TRIES = 3               # of a question whose reply says nothing
GIVE_UP_AFTER = 16      # questions in a row without a reply
KEPT = "what was answered is kept, so run the command again later"


class Judge:
    """cache: a folder for replies, or None. requests: how many at once. retries: tries after the first.

    timeout: seconds of silence. backoff: seconds before the first retry, doubled for each further one up to a
    minute. Raises ValueError for a URL that is none.
    """

    def __init__(self, url, model, cache=None, *, retries=5, timeout=120.0, requests=8, backoff=1.0,
                 key_variable=KEY_VARIABLE):
        self.endpoint = Endpoint(url, timeout, key_variable)
        self.model = model
        self.cache = None if cache is None else Path(cache)
        self.retries, self.requests, self.backoff = retries, requests, backoff
        self.counts = {"asked": 0, "cached": 0, "failed": 0}
        self.failed_in_a_row, self.has_said = 0, False
        self.pause_until = 0.0                      # time.monotonic(), for all requests
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def ask(self, text, image=None, attempt=0) -> str:
        """The reply, not empty. image: a path, the bytes of a file, or a PIL image.

        attempt: a caller who asks again, because the reply is no answer to the question, gives another number
        to get another reply than the one on disk. Raises Failed if no try gives a reply, ValueError for
        settings that cannot work or a picture that cannot be read, OSError if nobody answers at the URL.
        """
        body = self.body(text, image)
        file = self.file(body, attempt)
        reply = None if file is None else read_reply(file)
        if reply is not None:
            self.count("cached")
            return reply
        if image is not None:
            as_image(image)                         # raises for a picture that is cut off
        try:
            reply = self.try_often(body)
        except Failed as error:
            self.count("failed", error)
            raise
        if file is not None:
            about = {"reply": reply, "url": self.endpoint.name, "model": self.model, "text": text}
            write_text(file, json.dumps(about | {"attempt": attempt}, indent=1) + "\n")
        self.count("asked")
        return reply

    def ask_all(self, questions, attempt=0, desc=None) -> list:
        """The replies to (text, image) pairs in their order, None where `ask` raises Failed.

        desc: the name of a progress bar. Any other error ends all requests and is raised.
        """
        jobs, results = queue.SimpleQueue(), queue.SimpleQueue()
        for job in enumerate(questions):
            jobs.put(job)
        replies = [None] * jobs.qsize()
        stop = self.stop

        def work():
            while not stop.is_set():
                try:
                    number, question = jobs.get_nowait()
                except queue.Empty:
                    return
                reply = error = None
                try:
                    reply = self.ask(*question, attempt=attempt)
                except Failed:
                    pass
                except Exception as fault:
                    error = fault
                results.put((number, reply, error))
                if error is not None:
                    stop.set()
        for _ in range(min(self.requests, len(replies))):
            threading.Thread(target=work, daemon=True).start()          # Ctrl-C waits for no daemon
        try:
            for _ in tqdm(replies, desc, disable=None if desc else True, leave=False):
                number, reply, error = results.get()
                if error is not None:
                    raise error
                replies[number] = reply
        finally:
            stop.set()
            self.stop = threading.Event()           # for the next questions
        return replies

    def forget(self, text, image):
        """Set the replies to a question aside, as .unread files."""
        for attempt in range(TRIES):
            file = self.file(self.body(text, image), attempt)
            if file is not None and file.exists():
                file.replace(file.with_suffix(".unread"))

    def about(self) -> dict:
        """For the manifest: who was asked, and how many questions were asked, found on disk, and failed."""
        return {"url": self.endpoint.name, "model": self.model, **self.counts}

    # ---- its parts -----------------------------------------------------------------------------------

    def body(self, text, image) -> bytes:
        content = [{"type": "text", "text": text}]
        if image is not None:
            content.append({"type": "image_url", "image_url": {"url": data_url(image)}})
        messages = [{"role": "user", "content": content}]
        return json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()

    def file(self, body, attempt) -> Path | None:
        """Where the reply to a request lies. Another endpoint, model, text or picture has another file."""
        if self.cache is None:
            return None
        digest = hashlib.sha256(f"{self.endpoint.name}\n{attempt}\n".encode() + body)
        return self.cache / f"{digest.hexdigest()}.json"

    def try_often(self, body) -> str:
        wait = self.backoff
        for tries_left in range(self.retries, -1, -1):
            self.sleep(self.pause_until - time.monotonic())
            try:
                return self.endpoint.send(body)
            except Again as error:
                last = error
            if last.wait > LONGEST_PAUSE:
                raise OSError(f"{self.endpoint.name}: {last}; it wants a pause of {last.wait:.0f} s; {KEPT}")
            if last.wait:
                with self.lock:
                    self.pause_until = max(self.pause_until, time.monotonic() + last.wait)
            if tries_left:
                self.say_once(f"{self.endpoint.name}: {last}; trying again")
                self.sleep(wait)
                wait = min(60, 2 * wait)
        failure = f"{self.endpoint.name}: no reply in {self.retries + 1} tries; the last one: {last}"
        raise OSError(f"{failure}; {KEPT}") if last.unreachable else Failed(failure)

    def say_once(self, text):
        """Print the first trouble: later ones are counted."""
        with self.lock:
            if not self.has_said:
                print(text, file=sys.stderr)
            self.has_said = True

    def sleep(self, seconds):
        """Raises OSError when another question ended the scoring."""
        if self.stop.wait(max(0.0, seconds)):
            raise OSError("the requests to the judge were stopped")

    def count(self, what, error=None):
        with self.lock:
            self.counts[what] += 1
            self.failed_in_a_row = self.failed_in_a_row + 1 if what == "failed" else 0
            if self.failed_in_a_row >= GIVE_UP_AFTER:
                failure = f"{GIVE_UP_AFTER} questions in a row got no reply, the last one: {error}"
                raise OSError(f"{failure}; {KEPT}")


def read_reply(file) -> str | None:
    """The reply in a file of the cache, None if it is not there or broken."""
    try:
        reply = json.loads(file.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return reply if isinstance(reply, str) and reply.strip() else None


# ---- the command's flags ---------------------------------------------------------------------------

def ask_until_read(judge, questions, read) -> list:
    """What `read` makes of the judge's replies to (text, image) pairs; None where it never says anything.

    read(reply) -> anything but None, or None to ask again; three times in all. A request that fails is not
    asked again: the Judge has retried it.
    """
    questions = list(questions)
    answers = [None] * len(questions)
    unread = range(len(questions))
    for attempt in range(TRIES):
        if not unread:
            break
        replies = judge.ask_all([questions[i] for i in unread], attempt=attempt)
        answered = [(i, reply) for i, reply in zip(unread, replies, strict=True) if reply is not None]
        for i, reply in answered:
            answers[i] = read(reply)
        unread = [i for i, _ in answered if answers[i] is None]
    for i in unread:                                # the next run asks again
        judge.forget(*questions[i])
    return answers


def add_arguments(parser):
    """Add --judge-url and its companions."""
    flag = parser.add_argument
    flag("--judge-url", help="an OpenAI-compatible endpoint that judges the pictures, for example "
                             f"http://localhost:8000/v1; its key is taken from {KEY_VARIABLE}")
    flag("--judge-model", help="the judge's name at the endpoint")
    flag("--judge-timeout", type=float, default=120, help="seconds of silence before a request is repeated")
    flag("--judge-requests", type=int, default=8, help="requests at once")


def from_args(args, out) -> Judge | None:
    """The Judge that the flags name, with its replies in `out`/judge; None without --judge-url.

    Raises ValueError for flags that cannot work.
    """
    if not args.judge_url:
        if args.judge_model:
            raise ValueError(f"--judge-model {args.judge_model}: --judge-url is missing")
        return None
    if not args.judge_model:
        raise ValueError("--judge-url: --judge-model is missing, the judge's name at the endpoint")
    if not 0 < args.judge_timeout < 1e6:
        raise ValueError(f"--judge-timeout is {args.judge_timeout:g}; seconds above 0 are expected")
    if args.judge_requests < 1:
        raise ValueError(f"--judge-requests is {args.judge_requests}; it must be at least 1")
    cache = None if out is None else Path(out) / "judge"
    return Judge(args.judge_url, args.judge_model, cache, timeout=args.judge_timeout,
                 requests=args.judge_requests)
