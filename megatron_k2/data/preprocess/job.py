"""What one run of the tool is to do; workers read it from the unfinished output's folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_k2.data.preprocess.encoders import Encoder, build_encoder
from megatron_k2.data.preprocess.records import Options
from megatron_k2.data.preprocess.sources import Source, group_sources

_FILE = "job.json"
DEDUP = ("none", "exact", "minhash")


@dataclass(frozen=True)
class Job:
    """Input, tokenizer and what becomes of documents."""

    sources: tuple[Source, ...]
    options: Options
    tokenizer_type: str
    tokenizer_model: str
    engine: str = "auto"
    control_tokens: str = "text"
    add_special_tokens: bool = True
    append_eod: bool = False
    split_sentences: bool = False
    dedup: str = "none"

    def encoder(self) -> Encoder:
        """Return the tokenizer; a ``ValueError`` names the flag."""
        return build_encoder(
            self.tokenizer_type,
            self.tokenizer_model,
            self.engine,
            self.control_tokens,
            self.add_special_tokens,
        )

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """Return the numbers of sources that are read together."""
        return group_sources(self.sources, self.options.block_bytes, self.options.text_documents)

    @property
    def level(self) -> str:
        """Return the last word of the output's name, as stock Megatron has it."""
        return "sentence" if self.split_sentences else "document"

    def settings(self, encoder: Encoder) -> dict[str, Any]:
        """Return all that changes the output's bytes, as JSON values; places of files do not."""
        return {
            "json_keys": list(self.options.json_keys),
            "text_documents": self.options.text_documents,
            "skip_bad_records": self.options.skip_bad_records,
            "tokenizer_type": self.tokenizer_type,
            "tokenizer_digest": encoder.digest,
            "vocab_size": encoder.vocab_size,
            "control_tokens": self.control_tokens,
            "append_eod": self.append_eod,
            "split_sentences": self.split_sentences,
            "dedup": self.dedup,
        }

    def fingerprint(self, encoder: Encoder) -> str:
        """Return a hash of the settings, the size of blocks and the state of every source.

        Without ``skip_bad_records``, which may be given once a bad record stopped the run.
        """
        states = [[s.path, s.format, s.compression, s.num_bytes, s.mtime_ns] for s in self.sources]
        settings = self.settings(encoder)
        del settings["skip_bad_records"]
        content = [settings, self.options.block_bytes, states]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it for the workers."""
        (folder / _FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read what ``save`` wrote."""
        content = json.loads((folder / _FILE).read_text())
        options = content["options"] | {"json_keys": tuple(content["options"]["json_keys"])}
        sources = tuple(Source(**source) for source in content["sources"])
        return cls(**content | {"options": Options(**options), "sources": sources})
