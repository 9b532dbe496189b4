"""What Megatron reads: for each stage a ``--data-args-path`` file, and an index of its documents.

``OUT/stages/STAGE/CORPUS-CRC.idx`` lists the documents that the stage gets, by their place in the
corpus's ``.bin``, which is linked beside it: 20 bytes a document, no token is copied. The CRC-32 of
the index is in its name because ``--data-cache-path`` knows data sets by name alone, and would take
another blend's. Weights are numbers of sequences, see ``allotment``. ``OUT/recipe-scale.toml`` is
for a recipe's end. The folder is written under another name and renamed when it is whole. Local
disks only: an object store has no links.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_k2.data.blend.allotment import Take
from megatron_k2.data.blend.corpora import DTYPES, HEADER, VERSION, Tokens

STAGES = "stages"
SCALE_NAME = "blend"
SPLIT = "100,0,0"
"""--split: the training set is all of each index. Another one would cut it, and read some twice."""


def data_args_name(stage: str) -> str:
    """Return the name of a stage's file for ``--data-args-path``."""
    return f"{stage}.data-args.txt"


def check_output(output: Path) -> None:
    """Refuse a folder that cannot be written.

    Raises:
        ValueError: it is there, or its name has white space, at which upstream splits.
    """
    if output.exists():
        raise ValueError(f"--output {output}: is there already; remove it or name another folder")
    if len(str(output.resolve()).split()) != 1:
        raise ValueError(f"--output {output.resolve()}: --data-args-path splits at white space")


def write_blend(
    output: Path,
    unfinished: Path,
    corpora: Mapping[str, Tokens],
    takes: Sequence[Take],
    scale: str | None,
) -> None:
    """Write the indices and argument files of all stages.

    Args:
        output: the folder's name in the end; paths in the files are below it.
        unfinished: the folder's name for now.
        corpora: by name.
        takes: of all stages.
        scale: of the recipe, None for the recipe as it stands.
    """
    stages = list(dict.fromkeys(take.stage for take in takes))
    name = scale or SCALE_NAME
    lines = [f"# For the end of the recipe: megatron-k2 run-recipe ... --scale {name}"]
    if scale is not None:
        lines.append(
            "# In place of these keys of the scale that is there, which TOML has once only."
        )
    lines += [f"[scale.{name}.arguments]", f'split = "{SPLIT}"', "eval_iters = 0"]
    for stage in stages:
        pairs = []
        folder = unfinished / STAGES / stage
        folder.mkdir(parents=True)
        for take in takes:
            if take.stage != stage:
                continue
            tokens = corpora[take.corpus]
            own = write_slice(folder / take.corpus, tokens, take.documents).name.removesuffix(
                ".idx"
            )
            data = Path(f"{tokens.corpus.prefix}.bin").resolve()
            link = output.resolve() / STAGES / stage
            (folder / f"{own}.bin").symlink_to(os.path.relpath(data, link))
            pairs.append((take.num_samples, str(link / own)))
        words = "".join(f"{weight} {prefix}\n" for weight, prefix in pairs)
        (unfinished / data_args_name(stage)).write_text(words)
        data_key = ", ".join(f"[{weight}, {json.dumps(prefix)}]" for weight, prefix in pairs)
        lines += [f"[scale.{name}.stages.{_key(stage)}]", f"data = [{data_key}]"]
    (unfinished / "recipe-scale.toml").write_text("\n".join(lines) + "\n")


def write_slice(base: Path, tokens: Tokens, documents: np.ndarray) -> Path:
    """Write a Megatron index of some documents of a corpus, in the order given.

    Args:
        base: what the name begins with.
        tokens: the corpus.
        documents: int64 [any]; one may come again.

    Returns:
        The ``.idx``.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    lengths = tokens.lengths[documents].astype(np.int32)
    pointers = tokens.pointers[documents]
    crc = zlib.crc32(pointers.data, zlib.crc32(lengths.data))
    path = base.with_name(f"{base.name}-{crc:08x}.idx")
    with path.open("wb") as file:
        file.write(HEADER + struct.pack("<QB", VERSION, codes[tokens.dtype]))
        file.write(struct.pack("<QQ", len(documents), len(documents) + 1))
        lengths.tofile(file)
        pointers.tofile(file)
        np.arange(len(documents) + 1, dtype=np.int64).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def _key(name: str) -> str:
    """Return a TOML key."""
    return json.dumps(name) if "." in name else name
