"""``--optimizer muonclip`` where Megatron builds its optimizer and the optimizer's configuration.

Upstream's own registry (``core/optimizer/emerging_optimizers.py``) cannot serve a distributed
optimizer: every name but adam and sgd loses ZeRO-1 (``core/optimizer/__init__.py:1038``). Two
patches: the builder sends the name to ours, and the training loop's configuration becomes
``MuonClipConfig``, filled from the same arguments. Any other name goes to the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _with_muonclip(original: Callable[..., Any]) -> Any:
    def get_megatron_optimizer(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        """Build MuonClip for its name, upstream's optimizer for any other."""
        from megatron_k2.optimizer.config import NAME

        if config.optimizer != NAME:
            return original(config, model_chunks, *args, **kwargs)
        from megatron_k2.optimizer.build import get_muonclip_optimizer

        bound = inspect.signature(original).bind(config, model_chunks, *args, **kwargs)
        if bound.arguments.pop("dump_param_to_param_group_map", None) is not None:
            raise ValueError("--dump-param-to-param-group-map is not supported by muonclip")
        return get_muonclip_optimizer(**bound.arguments)

    return get_megatron_optimizer


def _with_muonclip_config(original: Callable[..., Any]) -> Any:
    def get_megatron_optimizer_config(args: Any) -> Any:
        """Return upstream's configuration; for muonclip with its own fields."""
        config, overrides = original(args)
        from megatron_k2.optimizer.config import NAME, MuonClipConfig

        if args.optimizer == NAME:
            config = MuonClipConfig.from_args(config, args)
        return config, overrides

    return get_megatron_optimizer_config


def _names_are_fixed() -> bool:
    """Upstream still sends every name but two to a path without the distributed optimizer."""
    return "config.optimizer not in ('adam', 'sgd')" in inspect.getsource(PATCHES[0].original())


def _config_class_is_fixed() -> bool:
    """Upstream still builds exactly ``OptimizerConfig``."""
    return "config = OptimizerConfig(**kwargs)" in inspect.getsource(PATCHES[1].original())


_RANGE = {"distribution": "megatron-core", "min_version": "0.19.0", "max_version": "0.19.2"}

PATCHES = (
    Patch(
        id="muonclip-optimizer",
        target="megatron.core.optimizer:get_megatron_optimizer",
        replacement=_with_muonclip,
        fingerprint="b473223298c4",
        why="a registered optimizer cannot be the distributed optimizer's inner one",
        upstream="megatron/core/optimizer/__init__.py:1038",
        remove_when="the registry of emerging optimizers serves DistributedOptimizer",
        still_needed=_names_are_fixed,
        importers=("megatron.training.training",),
        **_RANGE,
    ),
    Patch(
        id="muonclip-config",
        target="megatron.training.training:get_megatron_optimizer_config",
        replacement=_with_muonclip_config,
        fingerprint="33a90b275ae9",
        why="the optimizer's configuration has no place for fields of an optimizer's own",
        upstream="megatron/training/training.py:1962",
        remove_when="the configuration class can be chosen",
        still_needed=_config_class_is_fixed,
        **_RANGE,
    ),
)
