"""Runs a server until SIGTERM or SIGINT: then it takes no more, finishes or aborts, and closes."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.engine.server.access import KEY_VARIABLE, check_binding
from megatron_k2.engine.server.app import MAX_BODY_BYTES, make_app
from megatron_k2.engine.server.service import Service

DRAIN_S = 5  # that requests under way have after SIGTERM, before they are aborted
BACKLOG = 1024  # connections that the system keeps for us


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a server, whatever engine it runs on."""
    add = parser.add_argument_group("server").add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to bind; one that others reach needs a token; default 127.0.0.1",
    )
    add("--port", type=int, default=8000, help="0 takes a free one; default 8000")
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE, ""),
        metavar="TOKEN",
        help=f"that requests must show as `Authorization: Bearer TOKEN`; default: the variable "
        f"{KEY_VARIABLE}, which other users of the machine cannot read off the process list",
    )
    add("--served-model-name", default="", metavar="NAME", help="default: the folder's name")
    add("--max-body-bytes", type=int, default=MAX_BODY_BYTES, metavar="N", help="default 32 MiB")
    add("--drain-s", type=int, default=DRAIN_S, metavar="S", help="that requests under way have "
        f"after SIGTERM; default {DRAIN_S}")  # fmt: skip
    add("--quiet", action="store_true", help="no line a request")


def check_serve_flags(args: argparse.Namespace) -> None:
    """Check flags before a model is loaded.

    Raises:
        ValueError: one that cannot be.
    """
    check_binding(args.host, args.api_key)
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port {args.port}: wanted 0 to 65535")
    if args.max_body_bytes < 1 or args.drain_s < 0:
        raise ValueError("--max-body-bytes must be 1 or more, --drain-s 0 or more")


def serve_engine(
    engine: Engine,
    chat_format: ChatFormat,
    model: str,
    args: argparse.Namespace,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> None:
    """Serve an engine until a signal, then close it: where a runner of any kind of model ends.

    Args:
        engine: generates.
        chat_format: of its model.
        model: its name, unless `--served-model-name` gives another.
        args: of `add_serve_flags`, checked.
        wrap: puts something around the application.
    """
    service = Service(engine, chat_format, args.served_model_name or model)
    app = make_app(service, args.api_key, args.max_body_bytes)
    run_app(wrap(app), service.model, args)


def run_app(app: ASGIApp, model: str, args: argparse.Namespace) -> None:
    """Serve an application until a signal.

    Raises:
        ValueError: the address cannot be bound.
    """
    with bound(args.host, args.port) as listening:
        host, port = listening.getsockname()[:2]
        config = uvicorn.Config(
            app,
            log_level="warning" if args.quiet else "info",
            timeout_graceful_shutdown=args.drain_s,
            server_header=False,
            ws="none",
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"[serve] model {model!r} at http://{shown}:{port}/v1, token "
              f"{'needed' if args.api_key else 'not needed'}", flush=True)  # fmt: skip
        # uvicorn raises the signal that stopped it once more; by then all is closed.
        before = {kind: signal.signal(kind, _done) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
        print("[serve] stopped", flush=True)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket.

    Raises:
        ValueError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
        yield listening
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error
    finally:
        listening.close()


def _done(number: int, frame: object) -> None:
    """Take a signal that was acted on."""
