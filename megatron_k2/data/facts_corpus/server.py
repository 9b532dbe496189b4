"""Serves the rule-based rewriter as language models are served: the OpenAI protocol over HTTP.

Of it: POST /v1/chat/completions with messages and a seed, whole answers. For one machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_k2.data.facts_corpus.rewriter import RuleRewriter


@contextmanager
def serving(rewriter: RuleRewriter) -> Iterator[str]:
    """Serve a rewriter from threads of this process; yields the address, with /v1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                request = json.loads(body)
                text = rewriter.answer(request["messages"], int(request.get("seed") or 0))
                self._send(200, _completion(text, request["messages"]))
            except (ValueError, KeyError, TypeError) as error:
                self._send(400, {"error": {"message": f"{error}"}})

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

        def _send(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _completion(text: str, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return an answer as servers of the OpenAI protocol give it; tokens are counted as words."""
    asked = sum(len(message["content"].split()) for message in messages)
    told = len(text.split())
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": told,
            "total_tokens": asked + told,
        },
    }
