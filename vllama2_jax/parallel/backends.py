"""Which kernels a program uses: those of the devices that it is compiled for, wherever that is."""

import importlib.util
import warnings

import numpy as np


def moe_backend(devices) -> str:
    """The backend of `models.grouped_matmul` for devices, for example those of a mesh.

    "megablox" on TPUs, "blocks" on CPUs. On GPUs "tokamax" where that package is installed, else
    "ragged_dot", with a warning.
    """
    platform = np.asarray(devices).flat[0].platform
    if platform in ("tpu", "cpu"):
        return {"tpu": "megablox", "cpu": "blocks"}[platform]
    if importlib.util.find_spec("tokamax"):
        return "tokamax"
    warnings.warn(
        "tokamax is not installed: experts multiply by XLA's ragged_dot, which multiplies every "
        "token by every expert; pip install 'vllama2_jax[tokamax]'",
        stacklevel=2,
    )
    return "ragged_dot"
