"""Which matrix products run in FP8: ``--k2-fp8-scope``.

``experts`` (the default) are the routed experts and the shared one: 99 % of Kimi K2's weights and
the products that gain most. ``linear`` adds every projection of the transformer layers, attention's
and the dense layer's, which is what Megatron's ``--fp8-format`` means by itself. ``all`` adds
attention's own products. Router, embedding, norms and output layer stay as they are, always.
"""

from __future__ import annotations

SCOPES = ("experts", "linear", "all")


def is_in_scope(name: str, scope: str) -> bool:
    """Tell whether a linear layer computes in FP8.

    Args:
        name: of the module, below a layer or from the model's top.
        scope: one of ``SCOPES``, or empty for none.
    """
    if scope == "experts":
        return ".experts." in f".{name}" or ".shared_experts." in f".{name}"
    return bool(scope)


def check_emulated(fp8_format: str, recipe: str, scope: str, is_special: bool = False) -> None:
    """Check that layers without Transformer Engine can compute so.

    Args:
        fp8_format: ``--fp8-format``.
        recipe: ``--fp8-recipe``.
        scope: ``--k2-fp8-scope``.
        is_special: parameters are gathered in FP8, or weight gradients are not in FP8.

    Raises:
        ValueError: they cannot; names the flag.
    """
    refused = {
        f"--fp8-recipe {recipe}": recipe != "blockwise",
        f"--fp8-format {fp8_format}": fp8_format != "e4m3",
        f"--k2-fp8-scope {scope}": scope == "all",
        "--fp8-param-gather or --no-fp8-wgrad": is_special,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"{what} needs --transformer-impl transformer_engine and a GPU; layers without it "
                "have --fp8-format e4m3 --fp8-recipe blockwise --k2-fp8-scope experts or linear"
            )
