"""Engines behind HTTP that reload a version's folder: vLLM and SGLang. Not run.

Their APIs as published: SGLang's ``/update_weights_from_disk``; vLLM's ``/collective_rpc`` with
``reload_weights``, which its development mode (VLLM_SERVER_DEV_MODE=1) has. The folder must have
the same path on the server. A server shows no weights, so that only log-probabilities are compared:
a wrong bit that does not move them is not seen behind the files' own checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import httpx

from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.rl.sync.fingerprint import Fingerprint, SyncRefused
from megatron_k2.rl.sync.probe import engine_top


class ServerReceiver:
    """A server that loads folders; for ``DiskSync``.

    Args:
        engine: connected to the server.
        client: with the server's address without /v1, and its key.
        kind: whose API it speaks.
        vocab_size: of the model.
    """

    def __init__(
        self,
        engine: OpenAIEngine,
        client: httpx.AsyncClient,
        kind: Literal["vllm", "sglang"],
        vocab_size: int,
    ) -> None:
        if kind not in ("vllm", "sglang"):
            raise ValueError(f"kind {kind!r} must be vllm or sglang")
        self.engine, self._client = engine, client
        self._kind, self._vocab_size = kind, vocab_size

    async def take(self, version: int, folder: Path) -> None:
        """Have the server load a folder, with no request between old and new weights.

        Raises:
            SyncRefused: the server says no.
        """
        path = str(folder.resolve())
        if self._kind == "sglang":
            found = await self.post("/update_weights_from_disk", {"model_path": path})
            if found.get("success") is not True:
                raise SyncRefused(f"SGLang did not load {path}: {found.get('message')}")
        else:
            await self.post("/pause", {})
            try:
                asked: dict[str, Any] = {"method": "reload_weights"}
                await self.post("/collective_rpc", asked | {"kwargs": {"weights_path": path}})
                await self.post("/reset_prefix_cache", {})
            finally:
                await self.post("/resume", {})
        self.engine.weight_version = version

    async def fingerprint(self, version: int) -> Fingerprint:
        """Return log-probabilities only; see ``Receiver``."""
        top = await engine_top(self.engine, self._vocab_size, version)
        return Fingerprint(self.engine.weight_version, None, top)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a command; return the answer's object.

        Raises:
            SyncRefused: the server says no.
        """
        return _object(path, await self._client.post(path, json=body))

    async def get(self, path: str) -> dict[str, Any]:
        """Ask for something; see ``post``."""
        return _object(path, await self._client.get(path))


def _object(path: str, answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise SyncRefused(f"{path}: the server answers {answer.status_code}: {answer.text}")
    found = answer.json() if answer.content else {}
    return found if isinstance(found, dict) else {}
