"""The `vllama2` command. Heavy imports wait until a subcommand needs them."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from vllama2_jax.accelerators import leave_out_tpus_that_are_not_there
from vllama2_jax.cli.ask import add_ask, add_chat
from vllama2_jax.cli.convert import add_convert
from vllama2_jax.cli.data import add_data
from vllama2_jax.cli.plan import add_plan
from vllama2_jax.cli.train import add_train
from vllama2_jax.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done; 1: done, but something is not as it should be (`data check` has quarantined records,
    `doctor` has found a fault); 2: bad input; 130: interrupted.
    """
    # Quiet by default: XLA's and TensorStore's notes are for their developers.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    leave_out_tpus_that_are_not_there()
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _note
        return _run(options)


def _note(message, *where) -> None:
    """A warning as one line, without the place in the code that gave it."""
    print(f"note: {message}", file=sys.stderr)


def _run(options) -> int:
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); that is its right.
        sys.stdout = open(os.devnull, "w")
        return 0
    except Exception as error:
        if options.debug:
            raise
        line = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)) or not line:
            # Not foreseen, so its words alone may not say what happened.
            line = f"{type(error).__name__}: {line} (--debug shows the traceback)"
        print(f"vllama2 {options.command}: {line}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllama2",
        description="VideoLLaMA 2 in JAX: ask videos, convert and train models.",
    )
    parser.add_argument("--version", action="version", version=f"vllama2 {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, under=commands, **options):
        """A new subcommand's parser; `run` takes the parsed options and returns the exit code."""
        child = under.add_parser(name, help=text, description=text, parents=[shared], **options)
        child.set_defaults(run=run)
        return child

    add_ask(command)
    add_chat(command)
    add_train(command)
    add_plan(command)
    add_convert(command)
    add_data(command)
    command("doctor", _doctor, "check this machine: versions, devices, a known answer")
    return parser


def _doctor(options) -> int:
    from vllama2_jax.doctor import report

    return report()
