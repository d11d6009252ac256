"""`python -m vllama2_jax.cli` is `vllama2`."""

import sys

from vllama2_jax.cli.main import main

if __name__ == "__main__":  # processes that decode import this module, too
    sys.exit(main())
