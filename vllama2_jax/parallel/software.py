"""What a process computes with, in words: those that differ in it compile different programs."""

import jax

from vllama2_jax.parallel.program_cache import surroundings
from vllama2_jax.version import __version__, source_digest


def software() -> dict[str, str]:
    """For `hosts.agree`; where hosts differ in it, they wait for ever in their first collective.

    That is this package's code, and what compiled programs depend on: the versions of JAX, jaxlib
    and the compiler (libtpu's build on TPUs), the devices, and the flags of XLA_FLAGS and
    LIBTPU_INIT_ARGS.
    """
    return {
        "code": f"vllama2_jax {__version__}, files {source_digest()}",
        **surroundings(jax.devices()),
    }
