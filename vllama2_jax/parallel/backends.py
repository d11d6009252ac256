"""Which kernels run on a mesh: a matter of its devices, never of those of this process.

A program may be compiled for chips that are elsewhere, so JAX's default backend has no say.
"""

from collections.abc import Iterable

import jax

_ATTENTION = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}


def attention_backend(devices: Iterable[jax.Device]) -> str:
    """For `VLlama2(attention_backend=...)`, by the platform of a mesh's devices.

    Raises:
      ValueError: for devices of an unknown platform, or of several.
    """
    return _of_platform(_ATTENTION, devices)


def _of_platform(backends, devices):
    platforms = {device.platform for device in devices}
    if len(platforms) != 1 or not platforms <= set(backends):
        raise ValueError(
            f"a mesh of {' and '.join(sorted(platforms))} devices runs no kernel that is known "
            f"here; known platforms: {', '.join(backends)}"
        )
    return backends[platforms.pop()]
