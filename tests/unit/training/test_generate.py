"""tools/generate.py without a model: text that grows by whole characters, and refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_k2.engine.base import Piece, Request
from megatron_k2.training.generate import Terminal, main, parser
from megatron_k2.training.open_model import _found_again, saved_model_arguments
from tests.unit.checkpoint.hf_models import make_folder
from tests.unit.checkpoint.megatron_side import SMALL, there
from tests.unit.engine.scripted_engine import ByteFormat


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


class Scripted:
    """An engine that says the same to everybody."""

    def __init__(self, text: str, eod: int) -> None:
        self.ids, self.asked = (*text.encode(), eod), []

    async def stream(self, request: Request) -> Any:
        self.asked.append(request)
        for one in self.ids:
            reason = "stop" if one in request.sampling.stop_ids else None
            yield Piece((one,), (0.0,), (0,), finish_reason=reason)  # type: ignore[arg-type]


def test_a_continuation_follows_its_prompt_and_leaves_the_end_mark_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = SimpleNamespace(
        eod=0, tokenize=lambda text: list(text.encode()), detokenize=decode
    )  # fmt: skip
    engine: Any = Scripted(" naïve", eod=0)
    args = parser().parse_args(["--load", "x", "--seed", "4", "--temperature", "0"])
    opened: Any = SimpleNamespace(tokenizer=tokenizer)
    asyncio.run(Terminal(engine, opened, args).continue_text("so"))
    assert capsys.readouterr().out == "so naïve\n"
    (request,) = engine.asked
    assert (request.prompt, request.sampling.seed) == (tuple(b"so"), 4)


def test_a_full_context_is_said_and_the_dialogue_goes_on_after_reset(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine: Any = Scripted("ok", eod=0)
    engine.max_context = 40
    args = parser().parse_args(["--load", "x", "--chat"])
    opened: Any = SimpleNamespace(tokenizer=None)
    lines = iter(["hello", "x" * 60, "again", "/reset", "new"])
    asyncio.run(Terminal(engine, opened, args).chat(ByteFormat(), lines))
    printed = capsys.readouterr()
    assert printed.out.count("ok") == len(engine.asked) == 3
    assert "context of 40 tokens is full: /reset" in printed.err
    assert not any(b"xx" in bytes(one.prompt) for one in engine.asked)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x"], "one of --load"),
        (["--load", "/nonexistent", "--prompt", "x"], "no Megatron checkpoint"),
        (["--load", "x", "--chat", "--prompt", "x"], "exclude each other"),
        (["--load", "x", "--temperature", "-1"], "temperature"),
        (["--load", "x", "--threads", "0"], "--threads 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ")


def test_a_run_that_was_moved_still_finds_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "out/tokens").mkdir(parents=True)
    (tmp_path / "out/tokens/tokenizer.model").touch()
    checkpoint = tmp_path / "out/checkpoints"
    for saved in ("out/tokens/tokenizer.model", "/elsewhere/tokens/tokenizer.model"):
        assert Path(_found_again(saved, checkpoint)).is_file()
    assert (
        _found_again("/elsewhere/missing/one.model", checkpoint) == "/elsewhere/missing/one.model"
    )


@pytest.mark.parametrize("positions", [64, 131072])
def test_a_converted_folder_has_a_context_though_no_run_gave_it_one(
    tmp_path: Path, positions: int
) -> None:
    source = make_folder(tmp_path / "hf", False, **SMALL | dict(max_position_embeddings=positions))
    there(source, tmp_path / "m")
    assert saved_model_arguments(tmp_path / "m")["seq_length"] == min(positions, 4096)
