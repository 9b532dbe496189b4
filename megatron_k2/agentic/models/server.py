"""A model behind an OpenAI-compatible address, through the project's client.

The client tries again what can pass by itself, keeps the budgets and writes down what each request
costs (``data/rephrase/client.py``). ``Question.script`` and ``kind`` are not sent.
"""

from __future__ import annotations

from typing import Any

from megatron_k2.agentic.model import Question, Refused, Reply
from megatron_k2.data.rephrase.client import ChunkRefused, Client

FLAGS = ("--key-env", "--model", "--model")  # what the client's errors name: key, model, address


class ServerModel:
    """Asks a server.

    Args:
        client: with its gate and budget; several models may share those.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, question: Question) -> Reply:
        """Return the answer; raises as ``model.Model``."""
        fields: dict[str, Any] = {
            "messages": [dict(message) for message in question.messages],
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            "seed": question.seed,
        }
        if question.tools:
            fields["tools"] = [dict(tool) for tool in question.tools]
        try:
            answer = await self._client.complete(fields)
        except ChunkRefused as error:
            raise Refused(str(error)) from error
        return Reply(
            answer.message,
            answer.prompt_tokens,
            answer.completion_tokens,
            self._client.endpoint.model,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
