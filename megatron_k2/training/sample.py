"""``torchrun --nproc-per-node 1 -m megatron_k2.training.sample ARGS``: text from a checkpoint.

Builds the model that the arguments describe (the run's own --k2-preset, --tokenizer-model and
--load; any parallel layout may have written the checkpoint), loads the weights without optimizer
state into one process and continues a prompt by nucleus sampling (Holtzman et al. 2020). Each
token recomputes its whole context: fine for a look at a model, not an inference engine.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from megatron_k2.inputs import UsageError
from megatron_k2.training.command_line import document_, run_as_command
from megatron_k2.training.job import OUTPUT_MARK


def choose_token(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Sample one token from the smallest set of tokens whose probability reaches `top_p`.

    Args:
        logits: fp32 [vocab], whole.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: in (0, 1]; 1 keeps every token.
        generator: of the logits' device.

    Returns:
        The token's id.
    """
    if temperature == 0:
        return int(logits.argmax())
    probs, ids = torch.softmax(logits.float() / temperature, dim=-1).sort(descending=True)
    before = probs.cumsum(dim=-1) - probs
    probs = torch.where(before < top_p, probs, 0.0)
    return int(ids[torch.multinomial(probs, 1, generator=generator)])


@torch.no_grad()
def continue_tokens(
    model: Any,
    prompt: list[int],
    num_tokens: int,
    max_context: int,
    eod: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[int]:
    """Return up to `num_tokens` tokens after `prompt`, fewer when the model ends the document.

    Args:
        model: one GPTModel chunk that holds the whole model, in eval mode.
        prompt: token ids, at least one.
        max_context: the last this many tokens are what the model sees.
        eod: id that ends a document.
        vocab_size: ids from here on are padding of the vocabulary and never sampled.
        temperature: see `choose_token`.
        top_p: see `choose_token`.
        seed: of the sampler.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-max_context:]], device=device)
        positions = torch.arange(context.shape[1], device=device)[None]
        logits = model(context, positions, None)[0, -1, :vocab_size]
        token = choose_token(logits.float(), temperature, top_p, generator)
        if token == eod:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def add_sample_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the sampler's flags to Megatron's parser."""
    document_(parser, __doc__)
    group = parser.add_argument_group("K2 sampling")
    group.add_argument("--k2-prompt", default="", help="text to continue")
    group.add_argument("--k2-sample-tokens", type=int, default=64, help="tokens to sample")
    group.add_argument("--k2-temperature", type=float, default=0.8, help="0 is greedy")
    group.add_argument("--k2-top-p", type=float, default=0.95, help="nucleus, in (0, 1]")
    return parser


def check_sample_args(args: Any) -> None:
    """Check the sampler's flags.

    Raises:
        UsageError: one is out of its range.
    """
    if args.load is None:
        raise UsageError("no checkpoint: give --load DIR, the --save folder of a run")
    if not 0 < args.k2_top_p <= 1:
        raise UsageError(f"--k2-top-p {args.k2_top_p:g} must be above 0 and at most 1")
    if args.k2_temperature < 0:
        raise UsageError(f"--k2-temperature {args.k2_temperature:g} must be 0 or more")
    if args.k2_sample_tokens < 1:
        raise UsageError(f"--k2-sample-tokens {args.k2_sample_tokens} must be at least 1")


def build_model(args: Any, *hooks: Any) -> Any:
    """Build the model of the parsed arguments in this process.

    Args:
        args: Megatron's validated arguments; the global ones.
        hooks: run on the chunks once they are built, such as ``LoadHF``.

    Returns:
        The chunks, bare.

    Collective: initialises the process groups - every rank must call.
    """
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.initialize import initialize_megatron

    from megatron_k2 import parallel

    config = gpt_config_from_args(args)
    config.post_wrap_hooks.extend(hooks)
    container = pretrain_cfg_container_from_args(args, config)
    initialize_megatron()
    return config.get_builder_cls()(config).build_distributed_models(
        pg_collection=parallel.get_pg_collection(), ddp_config=container.ddp, wrap_with_ddp=False
    )


def load_model(args: Any) -> Any:
    """Build the model of the parsed arguments in this process and load --load's weights.

    Args:
        args: Megatron's validated arguments; the global ones.

    Returns:
        The unwrapped model in eval mode.

    Collective: initialises the process groups - every rank must call.
    """
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import load_checkpoint

    model = build_model(args)
    if not load_checkpoint(model, None, None)[0]:
        raise UsageError(f"--load {args.load}: no checkpoint there to sample from")
    return unwrap_model(model)[0].eval()


def main() -> None:
    """Parse the command line, load the checkpoint, print the continuation as one JSON line."""
    import json

    from megatron.training import get_tokenizer
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(
        add_sample_args, args_defaults={"no_load_optim": True, "no_load_rng": True}
    )
    check_sample_args(args)
    model = load_model(args)
    tokenizer = get_tokenizer()
    prompt = tokenizer.tokenize(args.k2_prompt) or [tokenizer.eod]
    tokens = continue_tokens(
        model,
        prompt,
        args.k2_sample_tokens,
        args.seq_length,
        tokenizer.eod,
        tokenizer.vocab_size,
        args.k2_temperature,
        args.k2_top_p,
        args.seed,
    )
    record = {"prompt": args.k2_prompt, "continuation": tokenizer.detokenize(tokens)}
    print(OUTPUT_MARK + json.dumps(record), flush=True)


def cli() -> int:
    """Register K2 and run ``main``: the command ``megatron-k2 sample``."""
    return run_as_command(main)


if __name__ == "__main__":
    sys.exit(cli())
