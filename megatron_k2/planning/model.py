"""A preset as a plan sees it: what its layers are, traced pieces, built stages, whole commands.

Traces and builds are kept, so that a search asks as often as it likes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.hf.folder import model_config
from megatron_k2.planning.estimate import stage_kinds
from megatron_k2.planning.finalist import BuiltStage, build_stages
from megatron_k2.planning.pieces import Piece, trace_pieces
from megatron_k2.planning.settings import Candidate
from megatron_k2.planning.workers import Mapper
from megatron_k2.presets import load_preset

Progress = Callable[[str], None]

FEW_TOKENS = 64
"""Of a trace that is asked for what a GPU holds."""


class Model:
    """A preset as the search sees it.

    Args:
        preset: its name.
        flags: further flags of every command.
        mapper: of ``workers``; by default everything happens in this process.
    """

    def __init__(self, preset: str, flags: Sequence[str] = (), mapper: Mapper = map) -> None:
        self.preset, self.flags, self._map = preset, tuple(flags), mapper
        self._values = preset_values(preset)
        value = self.value
        self.num_layers, self.hidden_size = int(value("num_layers")), int(value("hidden_size"))
        self.shape: dict[str, Any] = {
            name: int(value(name, 0) or 0)
            for name in ("num_layers", "num_attention_heads", "num_experts", "moe_ffn_hidden_size")
        }
        self.kv_rank = int(value("kv_lora_rank", 0) or 0)
        rope = int(value("qk_pos_emb_head_dim", 0) or 0)
        self.latent_dim = self.kv_rank + rope if value("multi_latent_attention") else 0
        self._pieces: dict[tuple[Any, ...], dict[str, Piece]] = {}
        if self.shape["num_experts"] and "moe_token_dispatcher_type" not in self._values:
            self.flags += ("--moe-token-dispatcher-type", "alltoall")  # a config.json has none

    def value(self, name: str, default: Any = None) -> Any:
        """Return one of Megatron's arguments as the preset sets it, or ``default``."""
        return self._values.get(name, default)

    @cached_property
    def layer_kinds(self) -> list[str]:
        """Return dense or moe for every layer."""
        frequency = self.value("moe_layer_freq")
        return _layer_kinds(1 if frequency is None else frequency, self.shape)

    def num_weights(self) -> tuple[int, int]:
        """Return the weights of the model, each once: all, and those with a gradient."""
        whole = Candidate(1, seq_length=FEW_TOKENS, memory="keep")
        pieces = self.pieces(whole, backward=False)
        numbers = [
            (count * (one.dense_numel + one.expert_numel), count * sum(one.trained_numel))
            for one, count in ((pieces[kind], count) for kind, count in self.counts().items())
        ]
        return sum(every for every, _ in numbers), sum(trained for _, trained in numbers)

    def counts(self) -> dict[str, int]:
        """Return how many pieces of each kind the model has."""
        return {"embedding": 1, **Counter(self.layer_kinds), "head": 1}

    def command(self, candidate: Candidate) -> list[str]:
        """Return a candidate's whole command line but for data, tokenizer and length."""
        return [
            "--k2-preset", self.preset, *self.flags, *candidate.flags(self.num_layers),
        ]  # fmt: skip

    def pieces(self, candidate: Candidate, *, backward: bool = True) -> dict[str, Piece]:
        """Return the traced pieces of a candidate's own sizes; the same trace serves its likes."""
        self.trace([candidate], backward=backward)
        return self._pieces[*traced_by(candidate), backward]

    def trace(
        self,
        candidates: Iterable[Candidate],
        progress: Progress = lambda _: None,
        *,
        backward: bool = True,
    ) -> None:
        """Trace the pieces of all candidates, each kind of candidate once.

        Args:
            candidates: what ``pieces`` will be asked for.
            progress: is told how many are done.
            backward: the backward pass too; without, nothing is kept for it, as in inference.
        """
        wanted = {(*traced_by(one), backward): one for one in candidates}
        wanted = {key: one for key, one in wanted.items() if key not in self._pieces}
        commands = [self._small_command(one) for one in wanted.values()]
        ranks = [one.tp * one.cp * one.ep * one.etp for one in wanted.values()]
        trace = partial(trace_pieces, backward=backward)
        for at, pieces in enumerate(self._map(trace, commands, ranks)):
            self._pieces[list(wanted)[at]] = pieces
            progress(f"{at + 1} of {len(wanted)} settings traced")

    def _small_command(self, candidate: Candidate) -> list[str]:
        """Return a candidate's command for one layer of each kind."""
        kinds = sorted(set(self.layer_kinds))
        small = ["--num-layers", str(len(kinds)), "--global-batch-size", "1024"]
        small += ["--train-iters", "1"]
        if self.shape["num_experts"]:
            freq = ",".join(str(int(kind == "moe")) for kind in kinds)
            small += ["--moe-layer-freq", f"[{freq}]"]
        return ["--k2-preset", self.preset, *self.flags, *candidate.model_flags(), *small]

    def build(self, candidate: Candidate) -> list[BuiltStage]:
        """Build each stage of a candidate that differs from the others.

        Raises:
            ValueError: Megatron or K2 refuse the command.
        """
        command = [*self.command(candidate), "--train-iters", "1"]
        if self.value("lr") is None:
            command += ["--lr", "1e-3"]  # Megatron wants one; no byte depends on it
        stages = stage_kinds(candidate, self.layer_kinds)
        return build_stages(command, candidate.world_size, stages, self._map)


def preset_values(preset: str) -> dict[str, Any]:
    """Return Megatron's arguments of a preset, or of a folder's config.json.

    Raises:
        ValueError: there is no such preset, or the file cannot be read.
    """
    if not Path(preset).is_dir():
        try:
            return {name: field.value for name, field in load_preset(preset).fields.items()}
        except KeyError as error:
            raise ValueError(f"--k2-preset: {error.args[0]}") from error
    try:
        return arguments_from_config(model_config(preset))
    except ConversionRefused as error:
        raise ValueError(f"--k2-preset {preset}: {error}") from error


def traced_by(candidate: Candidate) -> tuple[Any, ...]:
    """Return all of a candidate that its pieces depend on."""
    return (
        candidate.tp, candidate.cp, candidate.ep, candidate.etp, candidate.memory,
        candidate.fp8, candidate.micro_batch_size, candidate.seq_length,
    )  # fmt: skip


def _layer_kinds(frequency: Any, shape: Mapping[str, Any]) -> list[str]:
    """Return dense or moe for every layer (Megatron's ``--moe-layer-freq``)."""
    from megatron.training.arguments import moe_freq_type

    count = shape["num_layers"]
    if not shape["num_experts"]:
        return ["dense"] * count
    parsed = frequency if isinstance(frequency, list) else moe_freq_type(str(frequency))
    pattern = parsed if isinstance(parsed, list) else [int(i % parsed == 0) for i in range(count)]
    return ["moe" if one else "dense" for one in pattern]
