"""The `eagle-jax` command: one module a subcommand, each with `add_arguments(parser)` and `run(args)`.

May import everything but bench; nothing imports it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import jax

from eagle_jax.cli import bench, chat, compilation_cache, demo, export, generate, show, train, train_regenerate, tune
from eagle_jax.convert import __main__ as convert
from eagle_jax.version import __version__

TWO_WORDS = ("train regenerate",)
REFUSED = 2  # as argparse has it
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in JAX's messages
LESS_MEMORY = "try a smaller --batch, --context or --max-new-tokens, --dtype bfloat16, or --mesh over several devices"

CONVERT_EXAMPLES = """\
examples:
  eagle-jax convert --target meta-llama/Llama-3.1-8B-Instruct \\
      --draft yuhuili/EAGLE3-LLaMA3.1-Instruct-8B --out llama-8b/
  eagle-jax convert --target vicuna/ --draft EAGLE-Vicuna/ --out vicuna-jax/ --dtype bfloat16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 (ran, but the result is bad), 2 (wrong input), 130 (Ctrl-C).

    argparse itself exits with 2 for arguments that it refuses.
    """
    try:
        args = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
        compilation_cache.keep_programs()
        return args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as in `eagle-jax generate ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return 1
    except (ValueError, OSError) as error:  # also of Unicode and JSON, ConfigError and CheckpointError
        return _refused(str(error))
    except ImportError as error:  # of a package that only some inputs need
        return _refused(f"{error}; a package is missing, or does not fit the others")
    except RecursionError:
        return _refused("the input is nested too deeply (JSON within JSON, or a template that calls itself)")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        return _refused(f"out of memory: {LESS_MEMORY}. {error}")


def _refused(message: str) -> int:
    """Prints an error as one line; returns its exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return REFUSED


def _joined(argv: Sequence[str]) -> list[str]:
    """["train", "regenerate", ...] -> ["train regenerate", ...]: commands of two words are one name to argparse."""
    words = " ".join(argv[:2])
    return [words, *argv[2:]] if words in TWO_WORDS else list(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eagle-jax", description="EAGLE speculative decoding in JAX.")
    parser.add_argument("--version", action="version", version=f"eagle-jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, module, help: str, examples: str) -> None:
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        run: Callable[[argparse.Namespace], int] = module.run
        command.set_defaults(run=run)

    add("convert", convert, "convert official checkpoints to a folder for --model", CONVERT_EXAMPLES)
    add(
        "generate",
        generate,
        "continue a prompt and show the text as it comes, or all prompts of a file",
        generate.EXAMPLES,
    )
    add("chat", chat, "talk with a model that remembers the conversation", chat.EXAMPLES)
    add("bench", bench, "measure plain against speculative decoding on the same prompts", bench.EXAMPLES)
    add("tune", tune, "find the tree that decodes fastest on this machine, and save it", tune.EXAMPLES)
    add("show", show, "draw the draft tree of one cycle, and what was accepted of it", show.EXAMPLES)
    add("export", export, "write an EAGLE head for another engine or trainer", export.EXAMPLES)
    add("train", train, "train a draft head, or a small target", train.EXAMPLES)
    add(
        "train regenerate",
        train_regenerate,
        "let the target write the answers of a training set, which heads learn best from",
        train_regenerate.EXAMPLES,
    )
    add("demo", demo, "convert the embedded pair, generate both ways, compare", demo.EXAMPLES)
    return parser
