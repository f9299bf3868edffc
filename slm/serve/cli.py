"""The command line of the server."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slm.errors import ConfigError, SlmError, exit_code

MOST_CONNECTIONS = 512
DESCRIPTION = """Serve a model over HTTP, as OpenAI's API: POST /v1/chat/completions and /v1/completions (stream or not,
max_tokens, temperature, top_p, stop, seed; also top_k and min_p), GET /v1/models, GET /health. Any client of that API
can talk to it at http://HOST:PORT/v1. For example: curl http://127.0.0.1:8000/v1/completions -H
'Content-Type: application/json' -d '{"prompt": "Once upon", "max_tokens": 20}'
"""


@dataclass(frozen=True)
class Arguments:
    """What the server was asked to do."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a run, such as runs/quickstart; or a Hugging Face folder, or a .gguf file. Chats need one whose
    tokenizer_config.json has a chat template."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which of a run's checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen on. The default serves this machine only; 0.0.0.0 serves everybody who can reach it: use
    --token-env then, and a proxy that speaks TLS."""
    port: int = 8000
    """Port to listen on."""
    name: str | None = None
    """What the API calls the model; None: the name of its folder."""
    slots: int = 4
    """Answers written at the same time. More share the weights' way through the processor, and each needs a cache."""
    length: int | None = None
    """Most tokens of a prompt and its answer together; the cache grows with slots x length. None: what the model was
    made for, 2048 at most."""
    max_tokens: int = 4096
    """Most tokens of an answer."""
    chunk: int = 128
    """Tokens of a prompt read at once; others wait that long for their next token."""
    quantize: Literal["int8", "int4", "int3", "int2", "nf4", "ternary", "fp8"] | None = None
    """Round the weights to this grid once they are loaded, the embedding to 8 bits. On a CPU, with int8 and --slots 1
    answers come somewhat sooner."""
    group_size: int | None = None
    """Inputs that share a scale, for --quantize; None: all of an output."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Of cached keys and values; each is about half of the one before. None: that of computation."""
    queue: int = 32
    """Requests that may wait for a slot; more are told to come back later (429)."""
    timeout: float = 600.0
    """Seconds a request may take, waiting included."""
    max_body: int = 2**20
    """Most bytes of a request."""
    token_env: str | None = None
    """Name of an environment variable that holds a token, which clients must send (Authorization: Bearer TOKEN;
    OpenAI's clients call it api_key). The token itself never stands in a command line or a log."""


def serve_command(arguments: Sequence[str]) -> int:
    """Runs `python -m slm.serve ARGUMENTS` until Ctrl-C or SIGTERM and returns its exit code: 0, or 2 for an error that
    the user can fix, printed in one line on stderr. Raises SystemExit for --help and ill-typed arguments."""
    return exit_code(lambda: run(tyro.cli(Arguments, prog="slm.serve", description=DESCRIPTION, args=list(arguments))))


def run(arguments: Arguments) -> None:
    """Loads, compiles, listens. Raises SlmError."""
    token = read_token(arguments.token_env)
    try:
        import uvicorn

        from slm.serve.app import Limits, make_app
    except ImportError as error:
        raise SlmError(f"the server needs {error.name}: pip install 'slm[serve]'") from error
    from slm.compress.quantize import quantize
    from slm.data.cache import cache_folder
    from slm.evaluation.opening import open_model
    from slm.serve.engine import Engine
    from slm.training.compilation import enable_compilation_cache

    with listen(arguments.host, arguments.port) as door:
        model = open_model(arguments.model, arguments.checkpoint)
        if arguments.quantize is not None:
            model = quantize(model, arguments.quantize, group_size=arguments.group_size, embedding=True)
        enable_compilation_cache(cache_folder(model.config.data.cache) / "xla")
        engine = Engine(
            model,
            arguments.slots,
            arguments.length or default_length(model),
            arguments.queue,
            arguments.timeout,
            arguments.chunk,
            arguments.cache_dtype,
        )
        try:
            print(model, "compiling ...", sep="\n", flush=True)
            engine.warm_up()
            local = is_loopback(arguments.host)
            if not local and token is None:
                print("warning: everybody who can reach this address can use the model; see --token-env")
            name = arguments.name or Path(arguments.model).resolve().name
            hosts = {"127.0.0.1", "localhost", "::1", arguments.host} if local else None
            app = make_app(model, engine, name, token, hosts, Limits(arguments.max_body, arguments.max_tokens))
            host, port = door.getsockname()[:2]
            print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
            # Its own logging settings would first close the handlers of others, and absl's closes stderr with it.
            quiet = {"log_config": None, "log_level": "warning", "server_header": False}
            config = uvicorn.Config(app, timeout_graceful_shutdown=5, limit_concurrency=MOST_CONNECTIONS, **quiet)
            uvicorn.Server(config).run(sockets=[door])
        finally:
            engine.close()


def read_token(variable: str | None) -> str | None:
    """The token in an environment variable. Raises ConfigError if it is not set, or too short to protect anything."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if len(token) < 8:
        raise ConfigError(
            f"--token-env {variable}: that environment variable must hold a token of 8 characters or more"
        )
    return token


def default_length(model) -> int:
    """Tokens of context that the model says it was made for, 2048 at most."""
    stored = model.origin.config.get("max_position_embeddings") if model.origin else None
    known = model.config.model.max_length or stored or max(model.config.data.sequence_length, 1024)
    return min(int(known), 2048)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SlmError if the address cannot be had."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"cannot listen on port {port}: choose a --port from 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, protocol)
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
            door.listen(128)
        except BaseException:
            door.close()
            raise
    except OSError as error:
        raise SlmError(f"cannot listen on {host} port {port}: {error}; choose another --port or --host") from error
    return door
