"""A server that speaks OpenAI's interface: one client for the teachers and for the samplers that stand behind it.

A request is repeated, after longer and longer waits, only where it may then succeed: the server refuses or breaks the
connection, or says that it is busy. An answer that does not come in time, and any other status, ends it at once.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from logitless.training.errors import InputError

WAITS = (1.0, 2.0, 4.0)  # seconds before a request is repeated
TIMEOUT = 600.0  # seconds for one answer
BUSY = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
_LONGEST_WAIT = 8.0
_MOST_WORDS = 500  # characters of a server's message that an error quotes


class ServerError(InputError):
    """What a server answered, or that it did not.

    Args:
        message: the whole message.
        status: of HTTP; None where there was no usable answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class OpenAIServer:
    """The address of a server, and how it is asked.

    Args:
        url: with or without `/v1`.
        option: the option that gave the address, for errors.
        timeout: seconds for one answer.
        busy: statuses after which a request is repeated.

    Raises:
        InputError: no address of a server.
    """

    url: str
    option: str = "server"
    timeout: float = TIMEOUT
    busy: tuple[int, ...] = BUSY

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(
                f"{self.option}: expected an address that begins with http:// or https://, got {self.url!r}"
            )

    def address(self, path: str) -> str:
        """The whole address of a path, such as `v1/models`."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/{path}"

    def models(self, waits: Iterable[float] = WAITS) -> list[dict[str, Any]]:
        """What the server lists as its models, adapters among them; each has an `id`.

        Raises:
            InputError: there is no answer, or it lists none.
        """
        answer = self.ask("v1/models", None, self.option, waits)
        found = answer.get("data") if isinstance(answer, dict) else None
        named = isinstance(found, list) and all(isinstance(card, dict) and "id" in card for card in found)
        if not found or not named:
            raise InputError(f"{self.option}: {self.address('v1/models')} lists no model")
        return list(found)

    def ask(self, path: str, body: Any, origin: str, waits: Iterable[float] = WAITS) -> Any:
        """The server's answer, which is JSON, to a body that is posted, or to a question where `body` is None.

        Args:
            origin: what the request is about, for errors.
            waits: seconds before each repetition.

        Raises:
            ServerError: a status that repeating does not change, no answer in time or after all repetitions, or an
                answer that is not JSON.
        """
        content = self.read(path, body, origin, waits)
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(f"{origin}: {self.address(path)}: the answer is not JSON: {error}") from error

    def read(self, path: str, body: Any, origin: str, waits: Iterable[float] = WAITS) -> bytes:
        """The server's answer as it came, which may be empty; otherwise as `ask`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address(path), data, {"Content-Type": "application/json"})
        rest = iter(waits)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    content: bytes = response.read()
                    return content
            except urllib.error.HTTPError as error:
                status, again = error.code, error.code in self.busy
                reason = f"status {status}: {_message(error.read())}"
            except (OSError, http.client.HTTPException) as error:
                status, again = None, not _is_late(error)
                reason = f"no answer: {error}" if again else f"no answer within {self.timeout:g} seconds"
            wait = next(rest, None) if again else None
            if wait is None:
                raise ServerError(f"{origin}: {self.address(path)}: {reason}", status)
            time.sleep(wait)


def waits_within(seconds: float) -> Iterator[float]:
    """Waits of 1, 2, 4, 8, 8, ... seconds that sum to `seconds`."""
    wait = 1.0
    while seconds > 0:
        yield min(wait, seconds)
        seconds -= wait
        wait = min(2 * wait, _LONGEST_WAIT)


def _is_late(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)


def _message(content: bytes) -> str:
    """The server's own words in the body of an error: vLLM's `error.message`, FastAPI's `detail`, or all of it."""
    text = content.decode(errors="replace").strip()
    try:
        found = json.loads(text)
    except ValueError:
        return text[:_MOST_WORDS]
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return (found if isinstance(found, str) else json.dumps(found))[:_MOST_WORDS]
