"""The `vllama2` command."""

from vllama2_jax.cli.main import main

__all__ = ["main"]
