"""The files of a checkpoint: checksums as they are written, and failures that all ranks learn of.

Three writers of a torch_dist save, each replaced by one that notes instead of raising where only
one rank would raise: the shards (the cause of a failed write is lost in an ``assert`` upstream),
``.metadata`` and ``metadata.json`` (rank 0 raises, the others wait in a barrier for ever). Once all
files are there the manifest is published, see ``megatron_k2.checkpoint.intact``.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from megatron_k2.checkpoint import save_outcome
from megatron_k2.patches.patch import Patch


def _noting_writer(original: type) -> Any:
    class NotingFileSystemWriter(original):  # type: ignore[misc, valid-type]
        """Upstream's writer, which tells ``save_outcome`` about every file."""

        @staticmethod
        def write_preloaded_data(
            transform_list: list,
            local_proc_idx: int,
            write_bucket: tuple,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            """Write one shard file and note its checksum or its failure."""
            output = original.write_preloaded_data(  # type: ignore[attr-defined]
                transform_list, local_proc_idx, write_bucket, *args, **kwargs
            )
            if isinstance(output[1], Exception):
                save_outcome.note_failure(write_bucket[0], output[1])
            else:
                save_outcome.note_file(write_bucket[0])
            return output

        def finish(self, metadata: Any, results: list) -> None:
            """Write ``.metadata`` or note why not; rank 0 only."""
            try:
                super().finish(metadata, results)
            except OSError as error:
                save_outcome.note_failure(os.path.join(self.checkpoint_dir, ".metadata"), error)

    return NotingFileSystemWriter


def _noting_config(original: Callable[[Any, str], None]) -> Any:
    def save_config(config: Any, checkpoint_dir: str) -> None:
        """Write ``metadata.json`` or note why not; rank 0 only."""
        try:
            original(config, checkpoint_dir)
        except OSError as error:
            save_outcome.note_failure(os.path.join(checkpoint_dir, "metadata.json"), error)

    return save_config


def _publishing_save(original: Callable[..., Any]) -> Any:
    def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Save, then publish the manifest: at once, or when the asynchronous save is final."""
        request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if request is None:
            save_outcome.publish(os.fspath(checkpoint_dir))
        else:
            request.finalize_fns.append(
                functools.partial(save_outcome.publish, os.fspath(checkpoint_dir))
            )
        return request

    return save


def _loses_the_cause() -> bool:
    """Upstream still asserts on the type of a failed writer's result."""
    source = inspect.getsource(PATCHES[0].original().write_preloaded_data_multithread)
    return "assert isinstance(local_results_or_exc, list)" in source


def _raises_on_rank_0() -> bool:
    """Upstream still lets rank 0 fail alone before a barrier."""
    source = inspect.getsource(inspect.unwrap(PATCHES[2].original()))
    return "save_config(" in source and "try:" not in source


_RANGE = {"distribution": "megatron-core", "min_version": "0.19.0", "max_version": "0.19.2"}

PATCHES = (
    Patch(
        id="save-files",
        target="megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync",
        replacement=_noting_writer,
        fingerprint="d69398504aee",
        why="a failed write is reported as an assertion about types, without path or cause",
        upstream="megatron/core/dist_checkpointing/strategies/filesystem_async.py:307",
        remove_when="upstream reports the OSError and hashes files as it writes them",
        still_needed=_loses_the_cause,
        **_RANGE,
    ),
    Patch(
        id="save-config",
        target="megatron.core.dist_checkpointing.serialization:save_config",
        replacement=_noting_config,
        fingerprint="59b94753bbab",
        why="when metadata.json cannot be written, rank 0 raises and the others wait for ever",
        upstream="megatron/core/dist_checkpointing/serialization.py:441",
        remove_when="upstream's metadata_finalize_fn reports a failure to all ranks",
        still_needed=_raises_on_rank_0,
        importers=None,
        **_RANGE,
    ),
    Patch(
        id="save-manifest",
        target="megatron.core.dist_checkpointing.serialization:save",
        replacement=_publishing_save,
        fingerprint="e9626ecdf679",
        why="nothing tells a whole checkpoint from a truncated or bit-flipped one",
        upstream="megatron/core/dist_checkpointing/validation.py:512",
        remove_when="upstream publishes an integrity manifest by default, before the tracker file",
        still_needed=_raises_on_rank_0,
        importers=("megatron.core.dist_checkpointing",),
        **_RANGE,
    ),
)
