"""The server: what it writes is what slm.generate writes, whatever runs beside it; limits hold; errors are OpenAI's."""

import asyncio
import contextlib
import json
import queue
import socket
import threading
import time

import httpx
import pytest
from tiny_talker import random_talker, write_talker

import slm
from slm.config import MixerConfig
from slm.errors import ConfigError
from slm.evaluation import chat
from slm.evaluation.borders import end_ids, prompt_ids
from slm.evaluation.generate import generate
from slm.evaluation.sampling import make_sampling
from slm.serve import cli, slots
from slm.serve.app import Limits, make_app
from slm.serve.engine import Closed, Engine, Full, Request
from slm.serve.slots import Slots

WAIT = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return slm.from_pretrained(write_talker(tmp_path_factory.mktemp("models") / "talker"))


@contextlib.contextmanager
def running(model, **how):
    engine = Engine(model, **{"slots": 3, "length": 96, "chunk": 8} | how)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(model):
    with running(model) as engine:
        yield engine


class Listener:
    """Collects the pieces of a job."""

    def __init__(self):
        self.pieces = queue.Queue()

    def __call__(self, piece):
        self.pieces.put(piece)

    def result(self):
        """(text, tokens, finish)."""
        text = ""
        while True:
            piece = self.pieces.get(timeout=WAIT)
            text += piece.text
            if piece.finish:
                return text, piece.tokens, piece.finish


def submit(engine, request):
    listener = Listener()
    listener.job = engine.submit(request, listener)
    return listener


def ask(model, text, max_tokens=12, seed=0, stop=(), **sampling):
    return Request(prompt_ids(model, text), max_tokens, end_ids(model), make_sampling(**sampling), seed, stop)


def crowd(model):
    """Requests of many lengths and settings."""
    settings = [{}, {"temperature": 0}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 40}, {"min_p": 0.1}, {"seed": 9}]
    prompts = ["a", "The quick brown fox jumps.", "x" * 50, "né", "hello there", "12345678"]
    return [
        ask(model, text, **{"max_tokens": 5 + 7 * i, "seed": i} | how)
        for i, (text, how) in enumerate(zip(prompts, settings))
    ]


def test_a_text_does_not_depend_on_what_runs_beside_it(model, engine):
    requests = crowd(model)
    alone = [submit(engine, request).result() for request in requests]
    for order in (requests, requests[::-1]):
        together = [submit(engine, request) for request in order]
        found = [listener.result() for listener in together]
        assert found == (alone if order is requests else alone[::-1])
    assert len(set(alone)) == len(alone)
    again = submit(engine, ask(model, "a", max_tokens=5, seed=1)).result()
    assert again != alone[0]  # another seed


def test_what_is_served_is_what_generate_writes(model, engine):
    for request in crowd(model):
        text = model.tokenizer.decode(request.ids)
        how = dict(zip(("temperature", "top_k", "top_p", "min_p"), request.sampling))
        want = generate(
            model, text, max_new_tokens=request.max_tokens, seed=request.seed, **how | {"top_k": how["top_k"] or None}
        )
        served, tokens, finish = submit(engine, request).result()
        assert served == want
        assert finish == ("length" if tokens == request.max_tokens else "stop")


@pytest.mark.parametrize(
    ("attention", "mixer"),
    [
        (("window", "softmax"), MixerConfig(window=5)),
        (("gated_delta", "streaming"), MixerConfig(window=5)),
        (("mamba2",), MixerConfig()),
        (("mla",), MixerConfig()),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "",
)
def test_every_kind_of_cache_is_filled_in_chunks_and_cleared(attention, mixer):
    made = random_talker(attention=attention, mixer=mixer, layers=2)
    with running(made, slots=2, chunk=4, length=64) as engine:
        requests = [ask(made, text, max_tokens=9, temperature=0) for text in ("abcdefghijk", "xy", "12345", "abc")]
        for _ in range(2):  # the second time slots have been used
            found = [listener.result()[0] for listener in [submit(engine, request) for request in requests]]
            texts = [made.tokenizer.decode(request.ids) for request in requests]
            assert found == [generate(made, text, max_new_tokens=9, temperature=0) for text in texts]
    assert len(set(found)) > 2


def test_two_programs_serve_everything(model, engine):
    submit(engine, ask(model, "warm")).result()
    sizes = slots._fill._cache_size(), slots._step._cache_size()
    for listener in [submit(engine, request) for request in crowd(model)]:
        listener.result()
    assert (slots._fill._cache_size(), slots._step._cache_size()) == sizes


def test_stop_strings_end_a_text_and_free_the_slot(model, engine):
    whole, tokens, _ = submit(engine, ask(model, "ab", max_tokens=40, seed=4)).result()
    stop = whole[8:10]
    text, fewer, finish = submit(engine, ask(model, "ab", max_tokens=40, seed=4, stop=(stop,))).result()
    assert (text, finish) == (whole[: whole.index(stop)], "stop")
    assert fewer < tokens
    wait_until(lambda: engine.load() == (0, 0))


def test_ending_ids_end_a_text(model, engine):
    request = ask(model, "ab", max_tokens=40, seed=4)
    # Bytes of a random model: some id that it draws on its way.
    drawn = model.tokenizer.encode(submit(engine, request).result()[0])
    end = int(next(i for i in drawn if i < 128))
    text, tokens, finish = submit(engine, Request(request.ids, 40, (end,), request.sampling, 4)).result()
    assert finish == "stop"
    assert chr(end) not in text
    assert tokens < 40


def wait_until(true):
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Gate:
    """Holds an engine's steps until it is opened, so that tests do not race with them."""

    def __init__(self, monkeypatch):
        self.open, self.waiting, step, self.steps = threading.Event(), threading.Event(), Slots.step, 0

        def gated(slots):
            self.waiting.set()
            assert self.open.wait(WAIT)
            self.steps += 1
            return step(slots)

        monkeypatch.setattr(Slots, "step", gated)


def test_the_queue_is_bounded_and_a_cancelled_request_gives_its_place_away(model, monkeypatch):
    gate = Gate(monkeypatch)
    with running(model, slots=1, queue=1) as engine:
        first = submit(engine, ask(model, "a", max_tokens=80))
        assert gate.waiting.wait(WAIT)
        second = submit(engine, ask(model, "b"))
        with pytest.raises(Full, match="1 requests are waiting"):
            submit(engine, ask(model, "c"))
        first.job.cancel()
        gate.open.set()
        assert second.result()[2] == "length"
        assert first.pieces.qsize() < 5  # told nothing more
        assert submit(engine, ask(model, "c")).result()[2] == "length"


def test_prompts_are_read_first_come_first_served_a_chunk_between_steps(model, monkeypatch):
    gate, read, fill = Gate(monkeypatch), [], Slots.fill

    def seen(slots, slot, ids, start, *rest):
        read.append((len(ids), start, gate.steps))
        return fill(slots, slot, ids, start, *rest)

    monkeypatch.setattr(Slots, "fill", seen)
    with running(model, slots=3, chunk=8) as engine:
        first = submit(engine, ask(model, "a", max_tokens=30))
        assert gate.waiting.wait(WAIT)
        others = [submit(engine, ask(model, text)) for text in ("b" * 20, "c" * 10)]
        gate.open.set()
        assert [listener.result()[2] for listener in (first, *others)] == ["length"] * 3
    assert [one[:2] for one in read] == [(1, 0), (20, 0), (20, 8), (20, 16), (10, 0), (10, 8)]
    assert [one[2] for one in read] == [0, 1, 2, 3, 4, 5]  # who writes already goes on


def test_late_requests_end_whether_they_run_or_wait(model, monkeypatch):
    gate = Gate(monkeypatch)
    with running(model, slots=1, timeout=0.3) as engine:
        runs = submit(engine, ask(model, "a", max_tokens=90))
        assert gate.waiting.wait(WAIT)
        waits = submit(engine, ask(model, "b"))
        time.sleep(0.5)
        gate.open.set()
        assert runs.result()[2] == waits.result()[2] == "late"
        engine.timeout = WAIT
        assert submit(engine, ask(model, "c")).result()[2] == "length"


def test_a_failing_device_fails_all_and_is_told(model, monkeypatch):
    def broken(slots):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Slots, "step", broken)
    with running(model) as engine:
        assert [submit(engine, ask(model, "a")).result()[2] for _ in range(1)] == ["failed"]
        wait_until(lambda: not engine.healthy)
        with pytest.raises(Closed, match="device failed"):
            submit(engine, ask(model, "a"))


def test_closing_ends_what_runs(model, monkeypatch):
    gate = Gate(monkeypatch)
    engine = Engine(model, slots=1, length=96)
    listeners = [submit(engine, ask(model, text, max_tokens=90)) for text in "ab"]
    assert gate.waiting.wait(WAIT)
    threading.Timer(0.2, gate.open.set).start()
    engine.close()
    assert [listener.result()[2] for listener in listeners] == ["failed", "failed"]
    with pytest.raises(Closed, match="shutting down"):
        submit(engine, ask(model, "a"))


def test_a_listener_that_fails_harms_nobody(model, engine):
    def gone(piece):
        raise RuntimeError("Event loop is closed")

    engine.submit(ask(model, "a", max_tokens=60), gone)
    assert submit(engine, ask(model, "b")).result()[2] == "length"
    wait_until(lambda: engine.load() == (0, 0))


@pytest.mark.parametrize(
    ("how", "message"),
    [({"slots": 0}, "slots = 0"), ({"length": 1}, "length = 1"), ({"chunk": 0}, "chunk = 0")],
)
def test_bad_sizes_are_named(model, how, message):
    with pytest.raises(ConfigError, match=message):
        Engine(model, **how)


def test_learned_positions_bound_the_length():
    with pytest.raises(ConfigError, match="length = 33: this model has 32"):
        Engine(random_talker(position="learned", max_length=32), length=33)


def test_requests_that_do_not_fit_are_refused(model, engine):
    with pytest.raises(ConfigError, match="exceed this server's context of 96"):
        submit(engine, ask(model, "a" * 90, max_tokens=7))
    with pytest.raises(ConfigError, match="at least 1"):
        submit(engine, ask(model, "a", max_tokens=0))


# HTTP


def http(app, *requests, headers=None, base="http://127.0.0.1:8000"):
    """Answers to (method, path, JSON or bytes or None), sent at the same time."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base, headers=headers, timeout=WAIT) as client:

            def send(method, path, content=None):
                how = {"json": content} if isinstance(content, dict) else {"content": content}
                if isinstance(content, bytes):
                    how["headers"] = {"content-type": "application/json"}
                return client.request(method, path, **how)

            return await asyncio.gather(*(send(*request) for request in requests))

    answers = asyncio.run(run())
    return answers[0] if len(answers) == 1 else answers


def events(answer):
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.fixture(scope="module")
def app(model, engine):
    return make_app(model, engine, "toy")


COMPLETION = {"model": "toy", "prompt": "ab", "max_tokens": 20, "seed": 3, "temperature": 0.8, "top_p": 0.9}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 3, "temperature": 0.8}


def test_a_completion(app, model):
    answer = http(app, ("POST", "/v1/completions", COMPLETION))
    assert answer.status_code == 200
    body = answer.json()
    want = generate(model, "ab", max_new_tokens=20, seed=3, temperature=0.8, top_p=0.9)
    assert body["choices"] == [{"index": 0, "text": want, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 20, "total_tokens": 22}
    assert (body["object"], body["model"]) == ("text_completion", "toy")
    assert body["id"].startswith("cmpl-")


def test_a_chat(app, model):
    body = http(app, ("POST", "/v1/chat/completions", CHAT)).json()
    want = "".join(chat.reply(model, CHAT["messages"], max_new_tokens=20, seed=3, temperature=0.8))
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": want}
    assert choice["finish_reason"] in ("length", "stop")
    assert body["object"] == "chat.completion"
    assert body["usage"]["prompt_tokens"] == len(chat.encode(model, CHAT["messages"]))
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    again = CHAT | {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 20, "user": "me"}
    assert http(app, ("POST", "/v1/chat/completions", again)).json()["choices"] == body["choices"]


@pytest.mark.parametrize(("path", "asked"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_stream_gives_the_same_in_pieces(app, path, asked):
    whole = http(app, ("POST", path, asked)).json()
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events(http(app, ("POST", path, streamed)))
    chunks = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert len(chunks) > 5
    last = chunks.pop()
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    if "chat" in path:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1]["delta"] == {}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_many_at_once_get_what_each_would_get_alone(app):
    asked = [("POST", "/v1/completions", COMPLETION | {"seed": i, "prompt": "p" * (i + 1)}) for i in range(8)]
    alone = [http(app, one).json()["choices"] for one in asked]
    assert [answer.json()["choices"] for answer in http(app, *asked)] == alone
    unseeded = {name: value for name, value in COMPLETION.items() if name != "seed"}
    drawn = http(app, *[("POST", "/v1/completions", unseeded)] * 3)
    assert len({answer.json()["choices"][0]["text"] for answer in drawn}) == 3


def test_models_and_health(app):
    (one,) = http(app, ("GET", "/v1/models")).json()["data"]
    assert (one["id"], one["object"]) == ("toy", "model")
    assert http(app, ("GET", "/health")).json() == {"status": "ok", "running": 0, "waiting": 0}


BAD = [
    ({"prompt": 3}, "prompt", 400),
    ({"prompt": ["a", "b"]}, "prompt", 400),
    ({"prompt": "\ud800"}, "prompt", 400),
    ({"model": "gpt-4"}, "model", 404),
    ({"max_tokens": 0}, "max_tokens", 400),
    ({"max_tokens": 1.5}, "max_tokens", 400),
    ({"max_tokens": True}, "max_tokens", 400),
    ({"max_tokens": 95}, "max_tokens", 400),
    ({"max_tokens": 10**30}, "max_tokens", 400),
    ({"prompt": "a" * 96}, "prompt", 400),
    ({"temperature": -1}, "temperature", 400),
    ({"temperature": "hot"}, "temperature", 400),
    ({"top_p": 0}, "top_p", 400),
    ({"min_p": 7}, "min_p", 400),
    ({"seed": "x"}, "seed", 400),
    ({"stop": 3}, "stop", 400),
    ({"stop": [""]}, "stop", 400),
    ({"stop": [1]}, "stop", 400),
    ({"stop": ["a"] * 99}, "stop", 400),
    ({"stream": "yes"}, "stream", 400),
    ({"n": 2}, "n", 400),
    ({"logprobs": 5}, "logprobs", 400),
    ({"tempreature": 1}, "tempreature", 400),
]


@pytest.mark.parametrize(("change", "param", "status"), BAD, ids=lambda x: str(x)[:30])
def test_bad_fields_are_refused_in_openais_form(app, change, param, status):
    answer = http(app, ("POST", "/v1/completions", json.dumps(COMPLETION | change).encode()))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hi", "messages"),
        ([{"content": "Hi"}], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "robot", "content": "Hi"}], "messages"),
    ],
)
def test_bad_messages_are_refused(app, messages, param):
    error = http(app, ("POST", "/v1/chat/completions", CHAT | {"messages": messages})).json()["error"]
    assert error["param"] == param
    if messages and messages[0] == {"role": "robot", "content": "Hi"}:
        assert "no robots" in error["message"]  # the template's own words


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"{", "not JSON"), (b"[]", "JSON object"), (b"\xff", "not JSON"), (b"[" * 99999, "not JSON")],
)
def test_bad_bodies_are_refused(app, body, message):
    answer = http(app, ("POST", "/v1/completions", body))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_other_types_paths_and_methods_are_refused(app):
    for request, status in [
        (("POST", "/v1/embeddings", {}), 404),
        (("GET", "/v1/completions"), 405),
        (("DELETE", "/health"), 405),
        (("POST", "/v1/completions", None), 415),
    ]:
        answer = http(app, request)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    plain = http(app, ("POST", "/v1/completions", json.dumps(COMPLETION)), headers={"content-type": "text/plain"})
    assert plain.status_code == 415  # what a page of another site could send


def test_large_and_slow_requests_are_refused(model, engine):
    app = make_app(model, engine, "toy", limits=Limits(body=1000, tokens=10, upload=0.2))
    answer = http(app, ("POST", "/v1/completions", b" " * 1001))
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["error"]["message"]
    assert http(app, ("POST", "/v1/completions", COMPLETION | {"max_tokens": 11})).status_code == 400
    unbound = {name: value for name, value in COMPLETION.items() if name != "max_tokens"}
    assert http(app, ("POST", "/v1/completions", unbound)).json()["usage"]["completion_tokens"] == 10

    class Slow(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b"{"
            await asyncio.sleep(5)

    async def trickle():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=Slow(), headers=headers)

    assert asyncio.run(trickle()).status_code == 408


def test_a_token_is_wanted(model, engine, caplog):
    app = make_app(model, engine, "toy", token="correct horse")
    asked = [("GET", "/v1/models"), ("POST", "/v1/completions", COMPLETION), ("POST", "/v1/chat/completions", CHAT)]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct horse"},
                    {"authorization": "correct horse"}, {"authorization": "Bearer correct horses"}):  # fmt: skip
        for answer in http(app, *asked, headers=headers):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    for answer in http(app, *asked, headers={"authorization": "Bearer correct horse"}):
        assert answer.status_code == 200
    assert http(app, ("GET", "/health")).status_code == 200
    assert "horse" not in caplog.text


def test_other_hosts_are_refused(model, engine):
    app = make_app(model, engine, "toy", hosts={"127.0.0.1", "localhost", "::1"})
    for base, status in [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost", 200),
        ("http://[::1]:8000", 200),
        ("http://evil.example:8000", 403),
    ]:
        assert http(app, ("GET", "/v1/models"), base=base).status_code == status
    assert http(app, ("GET", "/v1/models"), headers={"host": "[::1"}).status_code == 403


def test_a_full_queue_and_a_late_answer_have_their_status(model, monkeypatch):
    gate = Gate(monkeypatch)
    with running(model, slots=1, queue=0, timeout=0.5) as engine:
        app = make_app(model, engine, "toy")
        held = submit(engine, ask(model, "a", max_tokens=90))
        assert gate.waiting.wait(WAIT)
        answer = http(app, ("POST", "/v1/completions", COMPLETION))
        assert answer.status_code == 429
        assert "retry-after" in answer.headers
        held.job.cancel()
        wait_until(lambda: not gate.open.set() and engine.load() == (0, 0))
        gate.open.clear()
        threading.Timer(1.0, gate.open.set).start()
        late = http(app, ("POST", "/v1/completions", COMPLETION))
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        gate.open.clear()
        threading.Timer(1.0, gate.open.set).start()
        *_, last = events(http(app, ("POST", "/v1/completions", COMPLETION | {"stream": True})))
        assert json.loads(last)["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(model, monkeypatch, stream):
    gate = Gate(monkeypatch)
    with running(model, slots=1) as engine:
        app = make_app(model, engine, "toy")
        body = json.dumps(COMPLETION | {"max_tokens": 90, "stream": stream}).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "query_string": b"",
            "path": "/v1/completions", "raw_path": b"", "root_path": "", "scheme": "http", "server": ("x", 80),
            "headers": [(b"content-type", b"application/json"), (b"host", b"x")], "client": ("x", 1),
        }  # fmt: skip
        sent = []

        async def visit():
            arrived = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive():
                if (message := next(arrived, None)) is not None:
                    return message
                await asyncio.to_thread(gate.waiting.wait, WAIT)
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            await asyncio.wait_for(app(scope, receive, send), WAIT)
            assert engine.load()[0] == 1  # still held at the gate
            gate.open.set()
            # While the loop lives: a closed one would end the job too.
            await asyncio.to_thread(wait_until, lambda: engine.load() == (0, 0))

        asyncio.run(visit())
        assert gate.steps < 5  # not the 90 that were asked for
        assert not any(message.get("body", b"").startswith(b"data: [DONE]") for message in sent)
        assert submit(engine, ask(model, "b")).result()[2] == "length"


# The command


def test_the_command_serves_until_it_is_stopped(tmp_path, monkeypatch, capsys):
    import uvicorn

    folder = write_talker(tmp_path / "talker")
    monkeypatch.setattr("slm.training.compilation.enable_compilation_cache", lambda folder: None)
    monkeypatch.setenv("SLM_TOKEN", "correct horse")
    answers, serve = [], uvicorn.Server.run
    before = len([one for one in threading.enumerate() if one.name == "slm-serve"])  # those of other fixtures

    def visited(server, sockets):
        port = sockets[0].getsockname()[1]

        def visit():
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT) as client:
                wait_until(lambda: server.started)
                answers.append(client.get("/health"))
                answers.append(client.get("/v1/models"))
                headers = {"authorization": "Bearer correct horse"}
                answers.append(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers=headers))
                with client.stream(
                    "POST", "/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers
                ) as stream:
                    answers.append([*stream.iter_lines()][-2])
            server.should_exit = True

        thread = threading.Thread(target=visit)
        thread.start()
        serve(server, sockets)
        thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", visited)
    code = cli.serve_command([str(folder), "--port", "0", "--length", "64", "--token-env", "SLM_TOKEN"])
    assert code == 0
    health, models, completion, last = answers
    assert (health.status_code, models.status_code, completion.status_code) == (200, 401, 200)
    assert completion.json()["model"] == "talker"
    assert last == "data: [DONE]"
    out, err = capsys.readouterr()
    assert "serving talker at http://127.0.0.1:" in out
    assert "horse" not in out + err
    assert len([one for one in threading.enumerate() if one.name == "slm-serve"]) == before


def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHORT", "abc")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in [
            ([str(tmp_path), "--port", "0"], "is not a run"),
            ([str(tmp_path), "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            ([str(tmp_path), "--port", "99999"], "cannot listen"),
            ([str(tmp_path), "--token-env", "SLM_NOT_SET"], "SLM_NOT_SET"),
            ([str(tmp_path), "--token-env", "SHORT"], "8 characters"),
        ]:
            assert cli.serve_command(arguments) == 2
            err = capsys.readouterr().err
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            assert message in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.serve_command(["--help"])
    out = capsys.readouterr().out
    for word in ("--slots", "--token-env", "/v1/chat/completions", "curl", "127.0.0.1"):
        assert word in out


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.2.3", False)],
)
def test_who_can_reach_an_address(host, local):
    assert cli.is_loopback(host) == local
