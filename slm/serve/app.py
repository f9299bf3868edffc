"""The HTTP side: routes, limits, and answers that end when nobody listens. Needs the extra `serve`."""

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slm.errors import SlmError
from slm.evaluation import chat
from slm.evaluation.borders import end_ids, prompt_ids
from slm.models.language_model import LanguageModel
from slm.serve import engine as engines
from slm.serve.engine import Engine, Job, Piece
from slm.serve.protocol import Asked, Form, Kind, Refused, parse

log = logging.getLogger("slm.serve")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body: int = 2**20
    """Bytes of a request."""
    tokens: int = 4096
    """Tokens of an answer."""
    upload: float = 30.0
    """Seconds until the whole request has arrived."""


def make_app(
    model: LanguageModel,
    engine: Engine,
    name: str,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    limits: Limits = Limits(),
) -> Starlette:
    """The ASGI application.

    Args:
      model: what `engine` runs.
      name: what the API calls the model.
      token: bearer token that /v1 wants; None: everybody may ask.
      hosts: names that the Host header may have, against web pages that point a name of theirs at this machine (DNS
        rebinding); None: any.
    """
    served = _Served(model, engine, name, limits)

    async def health(request: Request) -> Response:
        running, waiting = engine.load()
        state = {"status": "ok" if engine.healthy else "failed", "running": running, "waiting": waiting}
        return JSONResponse(state, 200 if engine.healthy else 503)

    async def models(request: Request) -> Response:
        _authorise(request, token)
        one = {"id": name, "object": "model", "created": 0, "owned_by": "slm", "context_length": engine.length}
        return JSONResponse({"object": "list", "data": [one]})

    def completions(kind: Kind):
        async def endpoint(request: Request):
            _authorise(request, token)
            return await served.answer(request, kind)

        return endpoint

    def checked(endpoint):
        async def guarded(request: Request):
            if hosts is not None and _host(request) not in hosts:
                raise Refused(f"this server does not answer to that Host: use {sorted(hosts)[0]}", None, 403)
            return await endpoint(request)

        return guarded

    routes = [
        Route("/health", checked(health), methods=["GET"]),
        Route("/v1/models", checked(models), methods=["GET"]),
        Route("/v1/chat/completions", checked(completions("chat")), methods=["POST"]),
        Route("/v1/completions", checked(completions("text")), methods=["POST"]),
    ]
    handlers = {Refused: _refused, HTTPException: _http_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Served:
    """From a request to its answer."""

    def __init__(self, model: LanguageModel, engine: Engine, name: str, limits: Limits):
        self.model, self.engine, self.name, self.limits = model, engine, name, limits
        self._one = threading.Lock()  # encoding with markers changes the tokenizer while it lasts
        self._ends = {"text": end_ids(model), "chat": chat.reply_ends(model)}

    async def answer(self, request: Request, kind: Kind) -> "_Answer":
        """Queues what is asked. Raises Refused."""
        # Also what keeps other sites' pages out: a browser sends this type across sites only where it is allowed to.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("Content-Type must be application/json", None, 415)
        field = "messages" if kind == "chat" else "prompt"
        asked = parse(await self._body(request), kind, self.name)
        try:
            ids = await asyncio.to_thread(self._encode, asked)
            room = self.engine.length - len(ids)
            if room < 1:
                raise Refused(
                    f"the prompt's {len(ids)} tokens leave no room in this server's context of {self.engine.length}",
                    field,
                    code="context_length_exceeded",
                )
            most = min(room, self.limits.tokens)
            if asked.max_tokens is not None and asked.max_tokens > most:
                raise Refused(
                    f"max_tokens = {asked.max_tokens}: after this prompt at most {most} are served",
                    "max_tokens",
                    code="context_length_exceeded",
                )
            work = engines.Request(
                ids,
                asked.max_tokens or most,
                self._ends[kind],
                asked.sampling,
                secrets.randbits(32) if asked.seed is None else asked.seed,
                asked.stop,
            )
            pieces: asyncio.Queue[Piece] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            job = self.engine.submit(work, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
        except engines.Full as error:
            raise Refused(str(error), None, 429, "queue_full") from error
        except engines.Closed as error:
            raise Refused(str(error), None, 503) from error
        except SlmError as error:
            raise Refused(f"{field}: {error}", field) from error
        return _Answer(asked, job, pieces, Form.new(kind, self.name))

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.upload):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.body:
                        raise Refused(f"the request has more than {self.limits.body} bytes", None, 413)
        except TimeoutError as error:
            raise Refused("the request did not arrive in time", None, 408) from error
        except ClientDisconnect as error:
            raise Refused("the client has gone", None, 400) from error
        return bytes(body)

    def _encode(self, asked: Asked):
        with self._one:
            if isinstance(asked.prompt, str):
                return prompt_ids(self.model, asked.prompt)
            return chat.encode(self.model, asked.prompt)


class _Answer:
    """An ASGI response, as a whole or as server-sent events; a client that leaves cancels the job."""

    def __init__(self, asked: Asked, job: Job, pieces: "asyncio.Queue[Piece]", form: Form):
        self.asked, self.job, self.pieces, self.form = asked, job, pieces, form
        self.prompt_tokens = len(job.request.ids)

    async def __call__(self, scope, receive, send) -> None:
        async def leave():
            while (await receive())["type"] != "http.disconnect":
                pass

        write = self._stream if self.asked.stream else self._whole
        tasks = [asyncio.ensure_future(leave()), asyncio.ensure_future(write(scope, receive, send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[1].done():
                with contextlib.suppress(OSError):  # the connection broke
                    tasks[1].result()
        finally:
            self.job.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _whole(self, scope, receive, send) -> None:
        texts = []
        async for piece in self._pieces():
            texts.append(piece.text)
        if (error := _failure(piece)) is not None:
            response = JSONResponse(error.body, error.status)
        else:
            response = JSONResponse(self.form.whole("".join(texts), piece.finish, self.prompt_tokens, piece.tokens))
        await response(scope, receive, send)

    async def _stream(self, scope, receive, send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(content: dict | str) -> None:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        if self.form.kind == "chat":
            await event(self.form.chunk("", first=True))
        async for piece in self._pieces():
            if piece.text:
                await event(self.form.chunk(piece.text))
        if (error := _failure(piece)) is not None:
            await event(error.body)
        else:
            await event(self.form.chunk("", piece.finish))
            if self.asked.usage:
                await event(self.form.count(self.prompt_tokens, piece.tokens))
            await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self.pieces.get()
            yield piece
            if piece.finish:
                return


def _failure(piece: Piece) -> Refused | None:
    if piece.finish == "late":
        return Refused("the request took longer than this server allows", None, 504, "timeout")
    if piece.finish == "failed":
        return Refused("the server stopped before the answer was complete", None, 503)
    return None


def _host(request: Request) -> str | None:
    # Not request.url, which helps itself to the server's own address where the header is none.
    try:
        return urlsplit("//" + request.headers.get("host", "")).hostname
    except ValueError:
        return None


def _authorise(request: Request, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not right:
        raise Refused("a valid token is needed: Authorization: Bearer TOKEN", None, 401, "invalid_api_key")


async def _refused(request: Request, error: Refused) -> Response:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    refused = Refused(f"{request.method} {request.url.path[:100]}: {error.detail}", None, error.status_code)
    return JSONResponse(refused.body, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so that it is logged with its traceback.
    return JSONResponse(Refused("an error of the server: see its log", None, 500).body, 500)
