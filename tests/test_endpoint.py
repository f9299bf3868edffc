"""A teacher behind an OpenAI-compatible endpoint, played by a server on this machine."""

import http.server
import json
import threading
import time

import pytest

from slm.errors import ConfigError, DataError
from slm.interop.endpoint import Endpoint

KEY = "sk-secret-1234"


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen, self.times = answers, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        self.server.times.append(time.monotonic())
        code, answer, headers = self.server.answers(len(self.server.seen), body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def echo(number, body):
    tops = [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}]
    choice = {"message": {"content": "re: " + body["messages"][-1]["content"]}, "finish_reason": "stop"}
    return 200, {"choices": [choice | ({"logprobs": {"content": tops}} if body.get("logprobs") else {})]}, {}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(answers=echo):
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asks(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def endpoint(server, folder, **settings):
    return Endpoint(
        server.url, "m", folder / "cache.jsonl", **{"requests_per_minute": 1e6, "first_pause": 0.01} | settings
    )


def test_answers_come_in_order_with_log_probabilities_and_are_asked_for_once(serve, tmp_path):
    server = serve()
    teacher = endpoint(server, tmp_path)
    replies = teacher.chat(asks(*"abcdef"), max_tokens=5, top_logprobs=1)
    assert [reply.text for reply in replies] == [f"re: {x}" for x in "abcdef"]
    assert replies[0].finish == "stop"
    assert replies[0].top_logprobs == ({"a": -0.5},)
    path, body, authorization = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "m"
    assert body["max_tokens"] == 5
    assert authorization == f"Bearer {KEY}"
    assert endpoint(server, tmp_path).chat(asks(*"abcdef"), max_tokens=5, top_logprobs=1) == replies
    assert len(server.seen) == 6
    assert endpoint(server, tmp_path).chat(asks("a"), max_tokens=6)[0].top_logprobs is None
    assert len(server.seen) == 7
    assert KEY not in (tmp_path / "cache.jsonl").read_text()


def test_what_came_before_a_refusal_is_kept(serve, tmp_path):
    def answers(number, body):
        bad = body["messages"][0]["content"] == "bad"
        return (400, {"error": f"no, {KEY}"}, {}) if bad else echo(number, body)

    server = serve(answers)
    with pytest.raises(DataError, match=r"refused a request: 400") as error:
        endpoint(server, tmp_path, workers=1).chat(asks("a", "b", "bad", "c"))
    assert KEY not in str(error.value)
    asked = len(server.seen)
    assert asked <= 4
    endpoint(server, tmp_path).chat(asks("a", "b"))
    assert len(server.seen) == asked


def test_busy_servers_are_asked_again_and_not_for_ever(serve, tmp_path):
    server = serve(lambda number, body: echo(number, body) if number > 2 else (429, {}, {"Retry-After": "0.05"}))
    assert endpoint(server, tmp_path).chat(asks("a"))[0].text == "re: a"
    assert len(server.seen) == 3
    dead = serve(lambda number, body: (503, {}, {}))
    with pytest.raises(DataError, match="did not answer after 3 tries: 503"):
        endpoint(dead, tmp_path, retries=2).chat(asks("b"))
    assert len(dead.seen) == 3


def test_nonsense_is_neither_taken_nor_kept(serve, tmp_path):
    server = serve(lambda number, body: (200, {"choices": []}, {}))
    with pytest.raises(DataError, match="not the form of a chat completion"):
        endpoint(server, tmp_path).chat(asks("a"))
    assert not (tmp_path / "cache.jsonl").exists()
    server = serve(lambda number, body: (200, b"<html>", {}))
    with pytest.raises(DataError, match="no JSON came back"):
        endpoint(server, tmp_path, retries=1).chat(asks("a"))


def test_redirects_are_not_followed(serve, tmp_path):
    elsewhere = serve()
    server = serve(lambda number, body: (307, {}, {"Location": elsewhere.url + "/chat/completions"}))
    with pytest.raises(DataError, match="refused a request: 307"):
        endpoint(server, tmp_path).chat(asks("a"))
    assert not elsewhere.seen


def test_the_rate_is_kept(serve, tmp_path):
    server = serve()
    endpoint(server, tmp_path, requests_per_minute=600, workers=4).chat(asks(*"abcd"))
    assert server.times[-1] - server.times[0] > 0.25  # four starts, a tenth of a second apart


def test_a_torn_cache_goes_on_and_a_damaged_one_says_where(serve, tmp_path):
    server, cache = serve(), tmp_path / "cache.jsonl"
    endpoint(server, tmp_path, workers=1).chat(asks("a", "b"))
    cache.write_bytes(cache.read_bytes()[:-20])
    assert endpoint(server, tmp_path).chat(asks("a", "b"))[1].text == "re: b"
    assert len(server.seen) == 3
    cache.write_text("{oops\n" + cache.read_text())
    with pytest.raises(DataError, match="line 1 of the cache"):
        endpoint(server, tmp_path)


def test_keys_are_not_sent_in_the_clear(serve, tmp_path):
    with pytest.raises(ConfigError, match="in the clear"):
        Endpoint("http://example.org/v1", "m", tmp_path / "cache.jsonl")
    with pytest.raises(ConfigError, match="give an address"):
        Endpoint("example.org", "m", tmp_path / "cache.jsonl")
    assert KEY not in repr(Endpoint("https://example.org/v1", "m", tmp_path / "cache.jsonl"))
