"""What every request passes before a route sees it: the key, and the limits of its body. ASGI without a framework."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fedmerge.serving.http.metrics import Metrics

BODY_BYTES = 2**20
BODY_SECONDS = 10.0  # until the whole body has arrived
OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # answered without the key

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Refused(Exception):
    """A request that no route sees.

    Args:
        status: of HTTP.
        reason: for the caller.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def guarded(
    app: App,
    key: str | None,
    metrics: Metrics,
    body_bytes: int = BODY_BYTES,
    open_paths: Collection[str] = OPEN_PATHS,
) -> App:
    """Return an application that checks the key, reads the body within its limits, counts, and never raises.

    Args:
        app: the application.
        key: that ``Authorization: Bearer`` must give; None asks for none.
        metrics: count every answer.
        body_bytes: largest body.
        open_paths: answered without the key.
    """

    async def guard(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if key is not None and scope["path"] not in open_paths:
                _check_key(scope, key)
            body = await _read_body(scope, receive, body_bytes)
            await app(scope, _replay(body, receive), counted)
        except Refused as refused:
            await _answer(counted, refused.status, refused.reason)
        except Exception:
            logger.exception("a request failed")
            if status:
                raise
            await _answer(counted, 500, "internal error; the server's log says more")
        finally:
            route = scope.get("route")
            metrics.count_request(getattr(route, "path", "other"), status, time.perf_counter() - start)

    return guard


def _check_key(scope: Message, key: str) -> None:
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, found = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(found.strip(), key.encode()):
        raise Refused(401, "found no valid key, expected the header 'Authorization: Bearer KEY'")


async def _read_body(scope: Message, receive: Receive, limit: int) -> bytes:
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    if stated.isdigit() and int(stated) > limit:
        raise Refused(413, f"found a body of {int(stated):,} bytes, expected at most {limit:,}")
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the connection was closed before the body had arrived")
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > limit:
                    raise Refused(413, f"found a body of more than {limit:,} bytes, expected at most that")
    except TimeoutError:
        raise Refused(408, f"the body had not arrived within {BODY_SECONDS:g} s") from None
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives the body that was read, then what comes after it, which is a disconnection."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] * (status == 401)
    headers += [(b"connection", b"close")] * (status in (408, 413))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
