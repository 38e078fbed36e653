"""Options of sampling, shared by the commands, and the SamplingConfig and key made of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax.convert import converted
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.read import folder_of, read_json
from eagle_jax.sampling import RANGES, SamplingConfig

GENERATION_CONFIG = "generation_config.json"
TRANSFORMERS_TOP_K = 50  # what `generate` of transformers samples with, where the config has no top_k
MOST = 2**31 - 1  # the largest int32: as a top_k it keeps all tokens


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --temperature and what else shapes the distribution, --sampling-from-model, --coupled and --seed.

    The numbers are None where they are not given; `sampling_config` fills them in.
    """
    group = parser.add_argument_group("sampling", "how tokens are chosen; greedily by default")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0: all (default)")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the likeliest tokens that have probability P together; 1: all (default)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="keep tokens at least P times as likely as the likeliest; 0: all (default)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="make tokens that occurred less likely, with R above 1 (default: 1)",
    )
    group.add_argument(
        "--sampling-from-model",
        action="store_true",
        help=f"take the five options above, where they are not given, from the model's {GENERATION_CONFIG}, as "
        "`generate` of transformers does",
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
    group.add_argument(
        "--seed", type=parse_seed, default=0, metavar="N", help="seed of the random numbers (default: 0)"
    )


def parse_bias(text: str) -> tuple[int, float]:
    """Parses a token id and its bias, such as "13=-inf"; the type of an argparse option."""
    id, _, value = text.partition("=")
    try:
        bias = float(value)
    except ValueError:
        bias = math.nan
    if not id.isdecimal() or math.isnan(bias) or bias == math.inf:
        raise argparse.ArgumentTypeError(f"must be ID=VALUE, a token id and a finite number or -inf; got {text!r}")
    return int(id), bias


def parse_seed(text: str) -> int:
    """Parses a seed; the type of an argparse option."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer, 0 to {2**32 - 1}; got {text!r}")
    return int(text)


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """Makes the SamplingConfig of the options, without --logit-bias, which needs the vocabulary. Fills in defaults.

    Says on stderr what --sampling-from-model took.

    Raises:
      ValueError: for a number outside its range, or a model's generation_config.json that cannot be used.
    """
    given = {name: value for name in RANGES if (value := getattr(args, name)) is not None}
    off = {field: getattr(SamplingConfig, field) for field in RANGES}
    of_model = _model_sampling(args) if args.sampling_from_model else {}
    chosen = off | of_model | given
    args.greedy_by_default = "temperature" not in given and not args.sampling_from_model
    for name, value in chosen.items():
        setattr(args, name, value)
    sampling = SamplingConfig(**(chosen | {"top_k": min(chosen["top_k"], MOST)}), coupled=args.coupled)
    if args.sampling_from_model:
        said = {name: value for name, value in chosen.items() if name == "temperature" or value != off[name]}
        print(f"sampling with {_options(said)}, by the model's {GENERATION_CONFIG} and the options", file=sys.stderr)
    return sampling


def model_asks(args: argparse.Namespace) -> str | None:
    """Returns a note if the model's config asks for sampling and no sampling option was given; else None."""
    if not args.greedy_by_default:
        return None
    with contextlib.suppress(ValueError):  # there is no such file
        if (asked := _model_sampling(args)).get("temperature"):
            return f"greedy decoding; the model asks for {_options(asked)} (--sampling-from-model decodes with it)"
    return None


def _model_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the sampling that the model's generation_config.json asks for, as `generate` of transformers reads it.

    Without "do_sample" that is greedy decoding; with it, what is left out has the defaults of transformers.

    Returns:
      {field of SamplingConfig: its value}.
    Raises:
      ValueError: if the file is not there, or holds a value that cannot be.
    """
    if args.model is None and args.target is None:
        raise ValueError("--sampling-from-model needs a model: --model or --target")
    if args.model is not None:
        path = Path(args.model) / converted.TARGET / GENERATION_CONFIG
    else:  # from a hub's folder it is downloaded only if it is asked for
        hub = Hub(args.revision, local_files_only=not args.sampling_from_model)
        path = folder_of(args.target, hub, weights=False) / GENERATION_CONFIG
    if not path.is_file():
        raise ValueError(f"--sampling-from-model: {path} is not there; give --temperature and the like")
    config = read_json(path)
    values = {name: config[name] for name in RANGES if config.get(name) is not None}
    if config.get("do_sample") is True:
        values = {"temperature": 1.0, "top_k": TRANSFORMERS_TOP_K} | values
    else:
        values = {name: value for name, value in values.items() if name == "repetition_penalty"}
    for name, value in values.items():
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number; got {json.dumps(value)}")
            SamplingConfig(**{name: value})  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return values


def _options(values: Mapping[str, Any]) -> str:
    """Formats values as options: "--temperature 0.6 --top-p 0.9"."""
    return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in values.items())


def with_logit_bias(sampling: SamplingConfig, args: argparse.Namespace, vocab_size: int) -> SamplingConfig:
    """Adds --logit-bias to a SamplingConfig. Raises ValueError for an id outside the vocabulary."""
    if not args.logit_bias:
        return sampling
    bias = np.zeros(vocab_size, np.float32)
    for id, value in args.logit_bias:
        if id >= vocab_size:
            raise ValueError(f"--logit-bias {id}={value:g}: the vocabulary's ids are 0 to {vocab_size - 1}")
        bias[id] = value
    return dataclasses.replace(sampling, logit_bias=bias)


def random_key(args: argparse.Namespace) -> jax.Array:
    """Returns the typed key of --seed."""
    return jax.random.key(args.seed)
