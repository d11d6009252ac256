"""Which kernels run on a mesh: a matter of its devices, never of those of this process.

A program may be compiled for chips that are elsewhere, so JAX's default backend has no say.
"""

import importlib.util
import warnings
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AbstractMesh

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config

_ATTENTION = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
_EXPERTS = {"tpu": "megablox", "gpu": "tokamax", "cpu": "blocks"}

# Let gathers of weights travel while products run; without, XLA gathers first and multiplies then.
# What is said of each was seen in compiled layers whose weights are gathered, of 64 v5p, without or
# against it (libtpu 0.0.42). Reduce-scatters stay synchronous on v5p with all that was tried.
_OVERLAP = {
    # Splits a gather into its beginning and its end. Off by default, and nothing travels.
    "xla_enable_async_all_gather": True,
    # Carries what lies between those two inside the products. The default; off, nothing travels.
    "xla_tpu_enable_async_collective_fusion": True,
    # Takes gathers among the collectives that are carried. Off by default, and none is.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    # One gather is carried by several products. The default; off, hardly one travels.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    # Pallas kernels carry gathers, too, as those of experts: `down` inside of `gate` and `up`
    # (docs/decisions/moe-layout.md). Where no such kernel is, it changes nothing.
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    # Products of the tensor core go on while a gather travels. The default; off, nothing travels.
    "xla_tpu_overlap_compute_collective_tc": True,
}


def network_options(
    network: VLlama2Config, layout: Layout | None = None, devices: Iterable[jax.Device] = ()
) -> dict[str, str]:
    """Fields of `VLlama2` that follow from where a program runs: kernels, and how tokens travel.

    Args:
      network: its shapes.
      layout: how it is laid out over several devices. Over the shape of a mesh alone no kernel is
        chosen, since such a program can be traced and not compiled.
      devices: the one device, without a layout; by default JAX's first.

    Raises:
      ValueError: for devices of an unknown platform, or of several.
    """
    options = {"expert_exchange": layout.expert_exchange} if layout else {}
    if layout and isinstance(layout.mesh, AbstractMesh):
        return options
    devices = layout.mesh.devices if layout else devices or jax.devices()[:1]
    options["attention_backend"] = attention_backend(devices)
    if network.decoder.num_experts:
        options["moe_backend"] = moe_backend(devices)
    return options


def compiler_options(devices: Iterable[jax.Device]) -> dict[str, bool]:
    """Options of XLA for a program over several devices, as `jax.jit` takes them."""
    return _OVERLAP if _platform(devices) == "tpu" else {}


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
    platform = _platform(devices)
    if platform not in backends:
        raise ValueError(
            f"a mesh of {platform} devices runs no kernel that is known here; known platforms: "
            f"{', '.join(backends)}"
        )
    return backends[platform]


def _platform(devices) -> str:
    return " and ".join(sorted({device.platform for device in np.asarray(devices).flat}))
