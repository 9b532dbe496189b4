"""The models of a run, from ``--model``, ``--model-for``, ``--replay`` and ``--record``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

from megatron_k2.agentic.model import Model
from megatron_k2.agentic.models.recorded import Answers, read_recordings
from megatron_k2.agentic.models.routed import RoutedModel
from megatron_k2.agentic.models.scripted import NAME, ROLES, ScriptedModel
from megatron_k2.agentic.models.server import FLAGS, ServerModel
from megatron_k2.agentic.stages.desk import Bench
from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.run_engine import ENGINE, engine_name, engine_spec
from megatron_k2.data.rephrase.client import Client, Endpoint, key_from
from megatron_k2.data.rephrase.gate import Budget, Gate

REPLAYED = "replay"


def name_of(spec: str) -> str:
    """Return the name of the model of ``scripted``, ``URL,NAME`` or ``engine:PATH``.

    Raises:
        ValueError: it is none of them.
    """
    if spec == NAME:
        return NAME
    if spec.startswith(ENGINE):
        return engine_name(spec)
    url, _, name = spec.rpartition(",")
    if not url.startswith(("http://", "https://")) or not name:
        raise ValueError(
            f"--model or --model-for {spec}: wanted scripted, or URL,NAME with the version in the "
            "address, such as http://localhost:8000/v1,Kimi-K2"
        )
    return name


def models_for(args: argparse.Namespace) -> dict[str, str]:
    """Return role -> model of ``--model-for``; a second one of judge is ``judge-2``, and so on.

    Fewer judges than ``--judge-passes`` are made up by the first one: its later passes are other
    judges, with questions and seeds of their own.

    Raises:
        ValueError: one is no ``ROLE=MODEL``, or a role but judge has two.
    """
    found: dict[str, str] = {}
    for given in args.model_for:
        role, _, spec = given.partition("=")
        if role not in ROLES or not spec:
            raise ValueError(
                f"--model-for {given}: wanted ROLE=scripted or ROLE=URL,NAME, a role of "
                f"{', '.join(ROLES)}"
            )
        if spec.startswith(ENGINE) and role != "policy":
            raise ValueError(
                f"--model-for {given}: {ENGINE} plays the policy alone; megatron-k2 serve makes "
                "a server of the same folder"
            )
        name_of(spec)
        if role in found and role != "judge":
            raise ValueError(f"--model-for {role} is given twice; only judge may have several")
        number = 1 + sum(one.partition("-")[0] == role for one in found)
        found[role if number == 1 else f"{role}-{number}"] = spec
    if args.model is not None and args.judging != "rules":
        given = sum(one.partition("-")[0] == "judge" for one in found)
        for number in range(max(1, given) + 1, args.judge_passes + 1):
            found[f"judge-{number}"] = found.get("judge", args.model)
    return found


def names_of_models(args: argparse.Namespace, roles: Sequence[str]) -> dict[str, str]:
    """Return the name of the model of each role, and of more judges; for a stage's identity."""
    default = REPLAYED if args.model is None else name_of(args.model)
    named = {role: name_of(spec) for role, spec in models_for(args).items()}
    if args.model is None:  # who answered then, so that a replay is the same run
        named = {**args.replayed, **named}
    found = {role: named.get(role, default) for role in roles}
    more = {role: name for role, name in named.items() if role.startswith("judge-")}
    return found | (more if "judge" in roles else {})


def num_judges(args: argparse.Namespace) -> int:
    """Return how many judges a run has, a model's later passes counted."""
    return len(names_of_models(args, ("judge",)))


def build_bench(
    args: argparse.Namespace,
    layout: Layout,
    budget: Budget,
    workers: int = 1,
    known: Answers | None = None,
) -> Bench:
    """Return what the units of a process share; must be called where its event loop runs.

    Args:
        args: of the command line.
        layout: of the run's folder.
        budget: that may be spent.
        workers: how many processes share the concurrency.
        known: answers of ``--replay``, read here if None.

    Raises:
        ValueError: a flag that cannot be.
    """
    gate = Gate(max(1, args.concurrency // workers))
    made: dict[tuple[str, str], Model] = {}

    def model_of(spec: str, role: str = "") -> Model:
        name = "" if spec == NAME else _key_name(args, spec, role)
        if (spec, name) not in made:
            scripted = spec == NAME
            model = ScriptedModel(budget) if scripted else _server(spec, name, args, gate, budget)
            made[spec, name] = model
        return made[spec, name]

    chosen = models_for(args)
    asked: Model | None = None
    if args.model is not None:
        by_role = {
            role: model_of(spec, role)
            for role, spec in chosen.items()
            if not spec.startswith(ENGINE)
        }
        asked = RoutedModel(model_of(args.model), by_role)
    asks = engine_spec(args) or any(spec != NAME for spec, _ in made)
    return Bench(
        args,
        layout,
        asked,
        budget,
        read_recordings(args.replay) if known is None else known,
        bool(asks) if args.record is None else args.record,
        num_judges(args),
        2 * gate.most,
    )


def _server(
    spec: str, key_name: str, args: argparse.Namespace, gate: Gate, budget: Budget
) -> Model:
    url, _, name = spec.rpartition(",")
    key = key_from(key_name) if key_name else ""
    if key_name and not key:
        raise ValueError(f"--key-env {key_name}: this environment variable is not set")
    extra = json.loads(args.extra_body)
    endpoint = Endpoint(url, name, key, args.timeout_s, extra, FLAGS)
    return ServerModel(Client(endpoint, gate, budget, args.max_tries))


def _key_name(args: argparse.Namespace, spec: str, role: str) -> str:
    """Return the variable that holds the key of a server, "" for none.

    A role's own key, else that of ``--model`` if the address is the same: no other one sees it.
    """
    names = dict(given.rpartition("=")[::2] for given in args.key_env)
    own = names.get(role.partition("-")[0], "") if role else ""
    same = args.model is not None and _host(spec) == _host(args.model)
    return own or (names.get("", "") if same else "")


def _host(spec: str) -> str:
    return urlsplit(spec.rpartition(",")[0]).netloc
