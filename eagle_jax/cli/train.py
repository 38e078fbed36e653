"""eagle-jax train: trains a head or a target from a settings file."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  eagle-jax train --config run.yaml
  eagle-jax train --config run.yaml optimizer.learning_rate=1e-4 mesh.fsdp=8
  eagle-jax train --config run.yaml --precompute features/ && eagle-jax train --config run.yaml features=features/
  eagle-jax train --config run.yaml --distributed                  # on every host of a TPU pod or a Slurm job
  eagle-jax train --config run.yaml --distributed host0:9000,2,1   # elsewhere: process 1 of 2, and where 0 listens

SIGTERM and Ctrl-C save the step before they end a run, and the same command goes on with it; a second Ctrl-C ends it
at once. Every setting is in eagle_jax/train/config.py. A run may go on with a changed optimizer, length, mesh, dtype or
evaluation, and with changed checkpoints; docs/training.md has the list. Other changes need another output.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--config", metavar="FILE", required=True, help="settings of the run, YAML")
    parser.add_argument(
        "--precompute",
        metavar="DIR",
        help="instead of training, write the target's hidden states of all rows to this folder, for runs with "
        "features=DIR; goes on with what is there",
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,N,I",
        help="train with the other processes that are started with this option; they share the output folder. Needs no "
        "value where JAX knows the cluster (TPU pods, Slurm, Open MPI, Kubernetes); elsewhere: the address of process "
        "0, the number of processes, and the number of this one",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings in place of the file's")


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0, 1 (drafts change the target's text), or 143 or 130 after a signal."""
    try:
        import grain  # noqa: F401
        import pydantic  # noqa: F401
        import tensorboardX  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ValueError(f"training needs {error.name}: pip install 'eagle-jax[train]'") from error
    import jax

    from eagle_jax.train.config import read_settings
    from eagle_jax.train.run.evaluate import NotLossless
    from eagle_jax.train.run.loop import train
    from eagle_jax.train.run.precompute import precompute

    settings = read_settings(args.config, args.overrides)
    if args.distributed is not None:
        join(args.distributed)
    command = again(args)
    try:
        if args.precompute is not None:
            return precompute(settings, Path(args.precompute))
        return train(settings, command=command)
    except KeyboardInterrupt:
        print(f"interrupted; what was written before stays, to go on from there: {command}", file=sys.stderr)
        raise
    except NotLossless as error:
        print(f"error: {error}", file=sys.stderr)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "the device's memory is too small: raise accumulation or mesh.fsdp, lower evaluation.prompts or "
            f"evaluation.new_tokens, or, in a new output, batch_tokens; {' '.join(str(error).split())[:200]}"
        ) from error
    return 1


def again(args: argparse.Namespace) -> str:
    """Returns the command line that resumes this run."""
    words = ["eagle-jax", "train", "--config", args.config, *args.overrides]
    for option in ("precompute", "distributed"):
        value = getattr(args, option)
        if value is not None:
            words += [f"--{option}", *([value] if value else [])]
    return shlex.join(words)


def join(where: str) -> None:
    """Connects this process to the others of a run. Call it before JAX uses a device. where: as --distributed.

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
