"""OpenAI's requests and answers as values: what is asked, checked; what is answered, as JSON objects.

A field that would change the answer and is not served is refused, never ignored.
"""

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

from slm.errors import ConfigError
from slm.evaluation.sampling import Sampling, make_sampling
from slm.evaluation.text_stream import stop_strings

Kind = Literal["chat", "text"]
_SAME = {
    "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "best_of": 1, "echo": False, "logprobs": (False, 0),
    "logit_bias": {}, "suffix": "", "top_logprobs": 0, "tools": [], "tool_choice": ("none", "auto"), "functions": [],
    "response_format": {"type": "text"}, "modalities": ["text"], "repetition_penalty": 1,
}  # fmt: skip
_HARMLESS = {
    "user", "metadata", "store", "safety_identifier", "service_tier", "parallel_tool_calls", "prompt_cache_key",
    "function_call", "reasoning_effort", "verbosity",
}  # fmt: skip
_OURS = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "stream", "stream_options"}
_MOST_STOPS, _LONGEST_STOP = 16, 256


class Refused(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    prompt: str | list[dict]
    """A text to continue, or the messages of a chat."""
    max_tokens: int | None
    """None: as many as fit."""
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a stream ends with a count of tokens."""


def parse(body: bytes, kind: Kind, served: str) -> Asked:
    """The request in a body. `served`: the name of the model. Raises Refused, naming the field."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused("the body must be a JSON object")
    # A null is as good as nothing, as in OpenAI's schema.
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_known(fields, kind)
    if (model := fields.get("model", served)) != served:
        raise Refused(
            f"no model {str(model)[:100]!r} here: this server has {served!r}", "model", 404, "model_not_found"
        )
    limits = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    most = [_number(fields, name, int, 1) for name in limits]
    try:
        top_k = _number(fields, "top_k", int)
        sampling = make_sampling(
            _number(fields, "temperature", float, default=1.0),
            None if top_k in (0, -1) else top_k,  # as vLLM says "off"
            _number(fields, "top_p", float),
            _number(fields, "min_p", float),
        )
        stop = stop_strings(fields.get("stop", ()))
    except ConfigError as error:
        raise Refused(str(error), str(error).split(" ")[0]) from error
    except TypeError as error:
        raise Refused("stop must be a text or a list of texts", "stop") from error
    if len(stop) > _MOST_STOPS or any(len(one) > _LONGEST_STOP for one in stop):
        raise Refused(f"stop: at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters", "stop")
    stream, options = fields.get("stream", False), fields.get("stream_options", {})
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise Refused("stream must be true or false, stream_options an object", "stream")
    return Asked(
        _messages(fields) if kind == "chat" else _prompt(fields),
        min(most) if most else None,
        sampling,
        _number(fields, "seed", int),
        stop,
        stream,
        options.get("include_usage") is True,
    )


def _check_known(fields: dict, kind: Kind) -> None:
    own = {"messages", "max_completion_tokens"} if kind == "chat" else {"prompt"}
    for name, value in fields.items():
        if name in _SAME:
            same = _SAME[name]
            # 0 == False, so that logprobs may be switched off as in either of OpenAI's interfaces.
            if value not in (same if isinstance(same, tuple) else (same,)):
                raise Refused(f"{name} = {json.dumps(value)[:100]} is not served: leave it out", name)
        elif name not in _OURS | own | _HARMLESS:
            raise Refused(f"{name[:100]!r} is not served: leave it out", name[:100])


def _number(fields: dict, name: str, kind: type, least: float | None = None, default: Any = None) -> Any:
    value = fields.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise Refused(
            f"{name} = {json.dumps(value)[:100]}: must be a {'number' if kind is float else 'whole number'}", name
        )
    if abs(value) >= 2**63 or (least is not None and value < least):
        raise Refused(f"{name} = {str(value)[:30]}: must be at least {least if least is not None else -(2**63)}", name)
    return value


def _messages(fields: dict) -> list[dict]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of objects with role and content, and not empty", "messages")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f"messages[{i}] must be an object with role and content", f"messages[{i}]")
        content = message.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise Refused(f"messages[{i}].content: only parts of type text are served", f"messages[{i}].content")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refused(f"messages[{i}].content must be a text", f"messages[{i}].content")
        found.append(message | {"content": content})
    return found


def _prompt(fields: dict) -> str:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Refused("prompt must be a text: one prompt a request, not as token ids", "prompt")
    return prompt


@dataclass(frozen=True)
class Form:
    """How answers to one request are written."""

    kind: Kind
    id: str
    model: str
    created: int

    @classmethod
    def new(cls, kind: Kind, model: str) -> "Form":
        import secrets

        return cls(kind, ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12), model, int(time.time()))

    def whole(self, text: str, finish: str, prompt_tokens: int, tokens: int) -> dict:
        """The answer to a request without `stream`."""
        if self.kind == "chat":
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
        else:
            choice = {"index": 0, "text": text, "logprobs": None}
        head = self._head("chat.completion" if self.kind == "chat" else "text_completion")
        return head | {"choices": [choice | {"finish_reason": finish}], "usage": usage(prompt_tokens, tokens)}

    def chunk(self, text: str, finish: str | None = None, first: bool = False) -> dict:
        """One piece of a stream."""
        if self.kind == "chat":
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        else:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return self._chunk_head() | {"choices": [choice]}

    def count(self, prompt_tokens: int, tokens: int) -> dict:
        """The last piece of a stream that was asked for its usage."""
        return self._chunk_head() | {"choices": [], "usage": usage(prompt_tokens, tokens)}

    def _chunk_head(self) -> dict:
        return self._head("chat.completion.chunk" if self.kind == "chat" else "text_completion")

    def _head(self, name: str) -> dict:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, tokens: int) -> dict:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
