"""How tokens are chosen: the options that the commands share, and the SamplingConfig and key they make."""

from __future__ import annotations

import argparse
import dataclasses
import math

import jax
import numpy as np

from eagle_jax.sampling import SamplingConfig


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --temperature and what else shapes the distribution, --coupled and --seed."""
    group = parser.add_argument_group("sampling", "how tokens are chosen; greedily by default")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0: all (default)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the likeliest tokens that have probability P together; 1: all (default)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens at least P times as likely as the likeliest; 0: all (default)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens that occurred less likely, with R above 1 (default: 1)",
    )
    group.add_argument(
        "--logit-bias",
        type=parse_bias,
        action="append",
        default=[],
        metavar="ID=VALUE",
        help="add VALUE to a token's logit; -inf forbids it; repeatable",
    )
    group.add_argument(
        "--coupled",
        action="store_true",
        help="draft with the target's own random numbers: the same distribution, more draft tokens accepted",
    )
    group.add_argument("--seed", type=parse_seed, default=0, metavar="N", help="of the random numbers (default: 0)")


def parse_bias(text: str) -> tuple[int, float]:
    """A token id and its bias from "13=-inf"; the type of an argparse option."""
    id, _, value = text.partition("=")
    try:
        bias = float(value)
    except ValueError:
        bias = math.nan
    if not id.isdecimal() or math.isnan(bias) or bias == math.inf:
        raise argparse.ArgumentTypeError(f"must be ID=VALUE, a token id and a finite number or -inf; got {text!r}")
    return int(id), bias


def parse_seed(text: str) -> int:
    """A seed; the type of an argparse option."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer, 0 to {2**32 - 1}; got {text!r}")
    return int(text)


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """What the options say, but for --logit-bias, which needs the vocabulary. Raises ValueError for a bad number."""
    return SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        coupled=args.coupled,
    )


def with_logit_bias(sampling: SamplingConfig, args: argparse.Namespace, vocab_size: int) -> SamplingConfig:
    """The same with --logit-bias. Raises ValueError for an id outside the vocabulary."""
    if not args.logit_bias:
        return sampling
    bias = np.zeros(vocab_size, np.float32)
    for id, value in args.logit_bias:
        if id >= vocab_size:
            raise ValueError(f"--logit-bias {id}={value:g}: the vocabulary's ids are 0 to {vocab_size - 1}")
        bias[id] = value
    return dataclasses.replace(sampling, logit_bias=bias)


def random_key(args: argparse.Namespace) -> jax.Array:
    """The typed key of --seed."""
    return jax.random.key(args.seed)
