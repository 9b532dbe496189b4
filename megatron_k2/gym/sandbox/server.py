"""Serves a local sandbox over HTTP, one such process a machine of a cluster.

Examples:
    python -m megatron_k2.gym.sandbox.server --port 8700 --token-file token
    python -m megatron_k2.gym.sandbox.server --host 0.0.0.0 --token-file token --num-parallel 32

It speaks plain HTTP: put it into a private network, or behind a proxy with TLS.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_k2.gym.sandbox.base import Sandbox, SandboxError
from megatron_k2.gym.sandbox.find import KINDS, find_sandbox
from megatron_k2.gym.sandbox.http import BACKEND, RUN, answer, command_of
from megatron_k2.gym.sandbox.local import check

MAX_BODY_BYTES = 256 << 20
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def make_app(sandbox: Sandbox, token: str) -> Starlette:
    """Return the application; an empty token lets everybody in."""

    def refused(request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            return PlainTextResponse("wrong token", 401)
        if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
            return PlainTextResponse(f"at most {MAX_BODY_BYTES} bytes", 413)
        return None

    async def backend(request: Request) -> Response:
        return refused(request) or JSONResponse({"backend": sandbox.backend})

    async def run(request: Request) -> Response:
        if (reply := refused(request)) is not None:
            return reply
        try:
            command = command_of(await request.body())
            check(command)
        except ValueError as error:
            return PlainTextResponse(str(error), 422)
        work = asyncio.ensure_future(sandbox.run(command))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return PlainTextResponse("the client has gone", 499)
            return Response(answer(work.result()), media_type="application/octet-stream")
        except SandboxError as error:
            return PlainTextResponse(str(error), 503)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait((work, gone))

    return Starlette(routes=[Route(RUN, run, methods=["POST"]), Route(BACKEND, backend)])


async def _gone(request: Request) -> None:
    """Wait until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def main() -> None:
    """Find a sandbox and serve it until stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--token-file", type=Path, help="clients must send its content")
    local = [kind for kind in KINDS if kind != "http"]
    parser.add_argument("--kind", choices=local, default="auto", help="of sandbox")
    parser.add_argument("--num-parallel", type=int, help="programs at a time; default one a core")
    parser.add_argument("--readable", nargs="*", default=[], help="more paths programs may read")
    options = parser.parse_args()
    if options.token_file is None and options.host not in _LOOPBACK:
        parser.error(f"--host {options.host} is reached from elsewhere: give --token-file")
    token = options.token_file.read_text().strip() if options.token_file else ""
    if options.token_file and not token:
        parser.error(f"--token-file {options.token_file} is empty")
    asyncio.run(_serve(options, token))


async def _serve(options: argparse.Namespace, token: str) -> None:
    import uvicorn

    sandbox = await find_sandbox(
        options.kind, readable=options.readable, num_parallel=options.num_parallel
    )
    print(f"sandbox: {sandbox.backend}, at http://{options.host}:{options.port}", flush=True)
    try:
        app = make_app(sandbox, token)
        config = uvicorn.Config(app, options.host, options.port, log_level="warning")
        await uvicorn.Server(config).serve()
    finally:
        await sandbox.close()


if __name__ == "__main__":
    main()
