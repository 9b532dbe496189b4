"""What a run's environments need, said before it is made: here, or beside Ray's actors.

A plan holds addresses alone and can be pickled; every process makes its own verifiers, sandbox and
judge of it. Tokens are read from the environment of that process: ``K2_SANDBOX_TOKEN``,
``K2_JUDGE_KEY``. The judge is a server, or by the word ``policy`` the weights under training
themselves: nothing watches such a judge but ``[critic] watch``, and it may come to like what the
policy does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.gym.base import Environment
from megatron_k2.gym.judging import EngineJudge, connect
from megatron_k2.gym.sandbox.base import Sandbox, SandboxError
from megatron_k2.gym.sandbox.find import candidates, find_sandbox
from megatron_k2.gym.services import HOW, Judge, Services
from megatron_k2.gym.verifiers import VerifierPool
from megatron_k2.inputs import UsageError

POLICY = "policy"
JUDGE_FLAGS = ("K2_JUDGE_KEY", "--k2-rl-judge-model", "--k2-rl-judge-url")


@dataclass(frozen=True)
class ServicePlan:
    """Services to be made.

    Attributes:
        needs: of all environments together.
        sandbox_url: of a sandbox server; empty: a local backend is looked for.
        judge_url: of an OpenAI-compatible server; ``policy``: the engine itself; empty: no judge.
        judge_model: the server's name of it.
    """

    needs: tuple[str, ...] = ()
    sandbox_url: str = ""
    judge_url: str = ""
    judge_model: str = ""

    def check(self, families: Sequence[type[Environment]]) -> None:
        """See that everything can be had, as far as that is known without trying.

        Raises:
            UsageError: an environment needs what is not there; names it and the flag.
        """
        for family in families:
            missing = [need for need in family.needs if not self._has(need)]
            if missing:
                need = missing[0]
                raise UsageError(f"environment {family.name!r} needs a {need}: {HOW[need]}")

    async def make(
        self, engine: Engine | None = None, chat_format: ChatFormat | None = None
    ) -> Services:
        """Return the services.

        Args:
            engine, chat_format: of the policy, for the judge ``policy``.

        Raises:
            UsageError: no sandbox works, or the judge's address cannot be.
        """
        sandbox: Sandbox | None = None
        if "sandbox" in self.needs:
            token = os.environ.get("K2_SANDBOX_TOKEN", "")
            try:
                kind = "http" if self.sandbox_url else "auto"
                sandbox = await find_sandbox(kind, self.sandbox_url, token)
            except SandboxError as error:
                raise UsageError(f"--k2-rl-sandbox-url {self.sandbox_url}: {error}") from error
        judge: Judge | None = None
        if self.judge_url == POLICY:
            assert engine is not None and chat_format is not None
            judge = EngineJudge(engine, chat_format)
        elif self.judge_url:
            key_env = "K2_JUDGE_KEY" if "K2_JUDGE_KEY" in os.environ else ""
            judge = connect(self.judge_url, self.judge_model, key_env, flags=JUDGE_FLAGS)
        return Services(VerifierPool() if "verifiers" in self.needs else None, sandbox, judge)

    def _has(self, need: str) -> bool:
        if need == "judge":
            return bool(self.judge_url)
        if need == "sandbox":
            return bool(self.sandbox_url or candidates("auto"))
        return True
