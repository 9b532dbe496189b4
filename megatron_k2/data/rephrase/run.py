"""A run put together from its flags: prompts, models, checks, budgets, and what tells it apart.

`identity` holds everything that the output depends on; a folder with another identity is refused.
Left out of it are the server's address, concurrency, retries and budgets, which may change between
starts. Both the local mode and each of Ray's workers build their rewriter here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_k2.data.rephrase.client import Client, Endpoint, key_from
from megatron_k2.data.rephrase.fidelity import Fidelity, Thresholds
from megatron_k2.data.rephrase.flag_checks import settings_of, token_counter
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.judges import endpoint_judge, load_entailment
from megatron_k2.data.rephrase.parts import JOURNALS, RECORDS, write_json
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.provenance import Chunk
from megatron_k2.data.rephrase.rewriter import Rewriter
from megatron_k2.data.rephrase.similarity import (
    Embed,
    embed_locally,
    endpoint_embedder,
    transformers_embedder,
)
from megatron_k2.data.rephrase.sources import identity as input_identity

RUN = "run.json"
FORMAT = 2  # of the journal; raised where an older one cannot be gone on from


@dataclass
class Run:
    """A rewriter with what it holds open."""

    rewriter: Rewriter
    budget: Budget
    clients: list[Client]

    async def close(self) -> None:
        """Close the connections, and end the processes of checks."""
        self.rewriter.fidelity.close()
        for client in self.clients:
            await client.close()


def build_run(
    args: argparse.Namespace,
    workers: int = 1,
    budget: Budget | None = None,
    on_chunk: Callable[[Chunk, float], None] = lambda chunk, share: None,
) -> Run:
    """Put a run together; must be called where its event loop runs.

    Args:
        args: of the command line.
        workers: how many share the concurrency.
        budget: that it may spend; that of the flags if None.
        on_chunk: told of each chunk and its share of a document.

    Raises:
        ValueError: a flag that cannot be.
    """
    gate = Gate(max(1, args.concurrency // workers))
    budget = budget or Budget(args.max_requests, args.max_tokens)

    def client_of(url: str, model: str, key_env: str) -> Client:
        extra = json.loads(args.extra_body) if url == args.server and model == args.model else {}
        endpoint = Endpoint(url, model, key_from(key_env), args.timeout_s, extra)
        clients.append(Client(endpoint, gate, budget, args.max_tries))
        return clients[-1]

    clients: list[Client] = []
    client = client_of(args.server, args.model, args.api_key_env)
    fidelity = fidelity_of(args, client_of)
    library = Library(args.prompts)
    rewriter = Rewriter(
        client, library, fidelity, settings_of(args), token_counter(args.tokenizer_model), on_chunk
    )
    return Run(rewriter, budget, clients)


def fidelity_of(args: argparse.Namespace, client_of: Callable[[str, str, str], Client]) -> Fidelity:
    """Return the checks that the flags name.

    Args:
        args: of the command line.
        client_of: makes a client of an address, a model and the name of a key's variable.
    """
    least = Thresholds(
        args.min_similarity, args.min_sentence_similarity, args.min_entailment, args.min_judge
    )
    entail = load_entailment(args.entailment) if args.entailment else None
    ask = None
    if "judge" in args.checks and args.judge_model:
        server = args.judge_server or args.server
        ask = endpoint_judge(client_of(server, args.judge_model, args.api_key_env))
    executor = None
    if args.check_processes:
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(args.check_processes, mp_context=context)
    return Fidelity(args.checks, least, _embedder(args, client_of), entail, ask, executor)


def identity_of(args: argparse.Namespace, paths: Sequence[Path]) -> dict[str, Any]:
    """Return what the output depends on, by flag."""
    settings = asdict(settings_of(args))
    judged_by = {
        "--checks": sorted(args.checks),
        "--embedder": [args.embedder, args.embedding_model],
        "--entailment": args.entailment,
        "--judge-model": args.judge_model,
        "--min-...": [
            *(args.min_similarity, args.min_sentence_similarity),
            *(args.min_entailment, args.min_judge),
        ],
    }
    return json.loads(
        json.dumps(
            {
                "format of the journal": FORMAT,
                "--input": input_identity(paths),
                "--skip-bad-records": args.skip_bad_records,
                "--text-field": args.text_field,
                "--limit": args.limit,
                "--documents-per-part": args.documents_per_part,
                "--model": args.model,
                "--extra-body": json.loads(args.extra_body),
                "--prompts": Library(args.prompts).hash,
                "--tokenizer-model": _digest(args.tokenizer_model),
                **{f"--{name.replace('_', '-')}": value for name, value in settings.items()},
                **judged_by,
            }
        )
    )


def claim(output: Path, identity: dict[str, Any]) -> str:
    """Return the run's name, having written its identity into the folder or found it there.

    Raises:
        ValueError: the folder holds another run, or cannot be written.
    """
    path = output / RUN
    try:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        changed = [key for key in identity if there.get(key) != identity[key]]
        if changed and ((output / JOURNALS).exists() or (output / RECORDS).exists()):
            raise ValueError(
                f"--output {output}: holds a run with other {', '.join(changed)}; give another "
                "--output, or remove the folder to begin again"
            )
        write_json(path, identity)
    except json.JSONDecodeError as error:
        raise ValueError(f"--output {output}: {RUN} is damaged ({error})") from error
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from error
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _embedder(args: argparse.Namespace, client_of: Callable[[str, str, str], Client]) -> Embed:
    if args.embedder == "hashed-ngrams":
        return embed_locally
    if args.embedder.startswith("hf:"):
        return transformers_embedder(args.embedder.removeprefix("hf:"))
    if args.embedder == "endpoint":
        if not args.embedding_model:
            raise ValueError("--embedder endpoint: name the model with --embedding-model")
        url = args.embedding_server or args.server
        return endpoint_embedder(client_of(url, args.embedding_model, args.api_key_env))
    raise ValueError(f"--embedder {args.embedder}: wanted hashed-ngrams, hf:FOLDER or endpoint")


def _digest(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None if path is None else str(path.name)
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
