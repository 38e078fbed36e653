"""eagle-jax train: trains a head or a target from a settings file."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  eagle-jax train --config run.yaml
  eagle-jax train --config run.yaml optimizer.learning_rate=1e-4 mesh.fsdp=8
  eagle-jax train --config run.yaml --precompute features/ && eagle-jax train --config run.yaml features=features/

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
    return train(settings) if args.precompute is None else precompute(settings, Path(args.precompute))
