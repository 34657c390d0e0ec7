"""One request to an OpenAI-compatible endpoint, POST …/v1/chat/completions, by the standard library alone.

`Endpoint.send` returns the text of the reply, or tells by its exception what to do next: `Again` (the next
try may go well), `Failed` (this question gets no reply), ValueError (no request can go well).
"""
import base64
import email.utils
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from harmonkit.images import as_image

KEY_VARIABLE = "OPENAI_API_KEY"
SECRET_LENGTH = 16      # characters; shorter keys are placeholders that local servers want, such as EMPTY
TRY_AGAIN = (408, 409, 425, 429, *range(500, 600))
SETTINGS_ARE_WRONG = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405)
CONNECTION_ERRORS = (OSError, http.client.HTTPException)                # a timeout is an OSError
CUT_CONNECTION = (TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


class Failed(OSError):
    """A question gets no reply."""


class Again(Exception):
    """A try that failed. wait: seconds that the server asks for. unreachable: nobody answers at the URL."""

    def __init__(self, reason, wait=0.0, unreachable=False):
        super().__init__(reason)
        self.wait = wait
        self.unreachable = unreachable


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another server."""

    def redirect_request(self, *_):
        return None


class Endpoint:
    """url: with or without /v1/chat/completions. timeout: seconds of silence.

    The key is read from an environment variable. It goes into the header of requests and nowhere else.
    Raises ValueError for a URL or a key that cannot be sent.
    """

    def __init__(self, url, timeout=120.0, key_variable=KEY_VARIABLE):
        self.url = address(url)
        self.name = self.url.partition("?")[0]      # for messages and files: a query may hold a secret
        self.timeout = timeout
        self.key_variable = key_variable
        self.key = os.environ.get(key_variable, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(f"the variable {key_variable}: a key of printable ASCII characters is expected")
        self.opener = urllib.request.build_opener(NoRedirect)

    def send(self, body) -> str:
        """body: bytes of JSON -> the text of the reply, not empty."""
        headers = {"Content-Type": "application/json", "User-Agent": "harmon-evals"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            request = urllib.request.Request(self.url, body, headers)
            with self.opener.open(request, timeout=self.timeout) as response:
                reply = response.read()
        except urllib.error.HTTPError as error:
            raise self.refusal(error) from None
        except CONNECTION_ERRORS as error:
            reason = getattr(error, "reason", error)
            is_cut = not isinstance(error, urllib.error.URLError) or isinstance(reason, CUT_CONNECTION)
            message = self.without_key(str(reason) or type(reason).__name__)
            raise Again(message, unreachable=not is_cut) from None
        return self.without_key(text_of(reply))

    def refusal(self, error) -> Exception:
        """The exception for an HTTP status that is no success."""
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        except CONNECTION_ERRORS:
            said = ""
        message = self.without_key(f"HTTP {error.code} {said}".strip())
        if error.code in TRY_AGAIN:
            return Again(message, seconds_of(error.headers.get("Retry-After")))
        if error.code in SETTINGS_ARE_WRONG:
            key = "was sent" if self.key else "is not set"
            return ValueError(f"{self.name}: {message} (the key in {self.key_variable} {key})")
        return Failed(f"{self.name}: {message}")

    def without_key(self, text) -> str:
        """A text of the server, in which the key must not come back."""
        return text.replace(self.key, "[key]") if len(self.key) >= SECRET_LENGTH else text


def address(url) -> str:
    """The URL of the requests: /v1/chat/completions is added to a URL that ends before it."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:                                                  # a port or host that is none
        is_url = False
    if not is_url or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("--judge-url: http://host:port/v1 or https://… is expected")
    if "@" in parts.netloc:
        raise ValueError(f"--judge-url: a password stands in the URL of {parts.hostname}; keys are taken "
                         "from an environment variable only")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))


def data_url(image) -> str:
    """A path, bytes or a PIL image as a data URL. PNG and JPEG files are sent as they are, others as PNG."""
    data = b""
    if isinstance(image, (str, os.PathLike)) and Path(image).is_file():
        data = Path(image).read_bytes()
    elif isinstance(image, bytes):
        data = image
    kind = "jpeg" if data.startswith(b"\xff\xd8\xff") else "png"
    if kind == "png" and not data.startswith(b"\x89PNG"):
        file = io.BytesIO()
        as_image(image).save(file, "PNG")
        data = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def text_of(reply) -> str:
    """The text in the bytes of a reply. Raises Again for bytes that are no reply of this API, and no text."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (ValueError, TypeError, LookupError, RecursionError):
        raise Again("the reply is not JSON as this API gives it") from None
    if not isinstance(content, str) or not content.strip():
        raise Again("the reply has no text")
    return content


def seconds_of(retry_after) -> float:
    """A Retry-After header gives seconds or a date. 0 if there is none or it cannot be read."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
