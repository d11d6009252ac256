"""Which accelerators this machine has, as far as that can be told before JAX looks for them."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path


def has_tpus() -> bool:
    """Whether the chips of a Cloud TPU are attached to this machine."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def leave_out_tpus_that_are_not_there() -> None:
    """Keep JAX from looking for TPUs where libtpu is installed as a compiler alone.

    It would complain on stderr, and ask a metadata server that may not be there. Does nothing where
    JAX_PLATFORMS is set, or a plugin for other devices, such as GPUs, is installed. Must come
    before JAX is used.
    """
    compiler_alone = importlib.util.find_spec("libtpu") is not None and not has_tpus()
    others = importlib.metadata.entry_points(group="jax_plugins")
    if compiler_alone and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
