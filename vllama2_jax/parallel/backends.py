"""Which kernels run on a mesh: a matter of its devices, never of those of this process.

A program may be compiled for chips that are elsewhere, so JAX's default backend has no say.
"""

import importlib.util
import warnings
from collections.abc import Iterable

import jax
import numpy as np

_ATTENTION = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
_EXPERTS = {"tpu": "megablox", "gpu": "tokamax", "cpu": "blocks"}


def attention_backend(devices: Iterable[jax.Device]) -> str:
    """For `VLlama2(attention_backend=...)`, by the platform of a mesh's devices.

    Raises:
      ValueError: for devices of an unknown platform, or of several.
    """
    return _of_platform(_ATTENTION, devices)


def moe_backend(devices: Iterable[jax.Device]) -> str:
    """For `VLlama2(moe_backend=...)`, likewise.

    On GPUs "tokamax" where that package is installed, else "ragged_dot", with a warning.

    Raises:
      ValueError: for devices of an unknown platform, or of several.
    """
    backend = _of_platform(_EXPERTS, devices)
    if backend != "tokamax" or importlib.util.find_spec("tokamax"):
        return backend
    warnings.warn(
        "tokamax is not installed: experts multiply by XLA's ragged_dot, which multiplies every "
        "token by every expert; pip install 'vllama2_jax[tokamax]'",
        stacklevel=2,
    )
    return "ragged_dot"


def _of_platform(backends, devices):
    platforms = {device.platform for device in np.asarray(devices).flat}
    if len(platforms) != 1 or not platforms <= set(backends):
        raise ValueError(
            f"a mesh of {' and '.join(sorted(platforms))} devices runs no kernel that is known "
            f"here; known platforms: {', '.join(backends)}"
        )
    return backends[platforms.pop()]
