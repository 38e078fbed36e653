"""eagle-jax train: trains a head or a target from a settings file."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  eagle-jax train --config run.yaml
  eagle-jax train --config run.yaml optimizer.learning_rate=1e-4 mesh.fsdp=8
  eagle-jax train --config run.yaml --precompute features/ && eagle-jax train --config run.yaml features=features/
  eagle-jax train --config run.yaml --distributed                  # on every host of a TPU pod or a Slurm job
  eagle-jax train --config run.yaml --distributed host0:9000,2,1   # elsewhere: process 1 of 2, and where 0 listens

A run that was ended (SIGTERM saves first) goes on with the same command. The settings are in eagle_jax/train/config.py.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--config", metavar="FILE", required=True, help="settings of the run, YAML")
    parser.add_argument(
        "--precompute",
        metavar="DIR",
        help="write the target's hidden states of all rows to a folder instead, for runs with features=DIR; goes on "
        "with what is there",
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,N,I",
        help="train with the other processes that get this option; they share the output folder. Alone where JAX knows "
        "the cluster (TPU pods, Slurm, Open MPI, Kubernetes); else the first one's address, how many, and which one",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings in place of the file's")


def run(args: argparse.Namespace) -> int:
    """Trains."""
    try:
        import grain  # noqa: F401
        import pydantic  # noqa: F401
        import tensorboardX  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ValueError(f"training needs {error.name}: pip install 'eagle-jax[train]'") from error
    from eagle_jax.train.config import read_settings
    from eagle_jax.train.precompute import precompute
    from eagle_jax.train.run import train

    settings = read_settings(args.config, args.overrides)
    if args.distributed is not None:
        join(args.distributed)
    return train(settings) if args.precompute is None else precompute(settings, Path(args.precompute))


def join(where: str) -> None:
    """Makes this process one of several, before JAX uses any device. where: as --distributed.

    Raises:
      ValueError: for an address that is none, or where JAX knows no cluster.
    """
    import jax

    if not where:
        jax.distributed.initialize()
        return
    address, _, numbers = where.partition(",")
    count, _, index = numbers.partition(",")
    if ":" not in address or not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--distributed is alone, or HOST:PORT,N,I such as host0:9000,2,1; got {where!r}")
    jax.distributed.initialize(address, int(count), int(index))
