"""What accelerators are able to do, as their makers state it: the one table of such numbers."""

import dataclasses
import re

import jax.numpy as jnp

# FLOP/s per JAX device, without sparsity. TPU: cloud.google.com/tpu/docs, "peak compute per chip
# (bf16)"; from v4 on, a chip is a device. Float32 products run in one bfloat16 pass there, and as
# TensorFloat-32 on NVIDIA from Ampere on, unless JAX is asked for more (docs.jax.dev, "Matmul
# precision").
_TPU_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

# NVIDIA's datasheets of each card; "with sparsity" is twice what is written here. (16-bit tensor
# cores, float32); Volta and Turing have no bfloat16, and plain float32. Names are whole, since a
# slice of a card ("... MIG 1g.10gb") is not the card.
_GPU_PEAKS = {
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": (312e12, 156e12),
    r"H100 \d+GB HBM\d": (989.5e12, 494.5e12),
    r"H100 PCIe": (756.5e12, 378e12),
    r"H100 NVL": (835.5e12, 417.5e12),
    r"H200": (989.5e12, 494.5e12),
    r"H200 NVL": (835.5e12, 417.5e12),
    r"L4": (121e12, 60e12),
    r"L40S": (362e12, 183e12),
    r"V100-SXM2-\d+GB": (125e12, 15.7e12),
    r"V100-PCIE-\d+GB": (112e12, 14e12),
    r"T4": (65e12, 8.1e12),
}
_WITHOUT_BFLOAT16 = ("V100", "T4")


def peak_flops(device_kind: str, dtype) -> float | None:
    """FLOP/s that the maker states for one device's matrix products.

    Args:
      device_kind: as `jax.devices()[0].device_kind`.
      dtype: of the products' factors: bfloat16, float16 or float32.

    Returns:
      Operations per second, or None where no figure is known, as for a CPU.
    """
    dtype = jnp.dtype(dtype).name
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind] if dtype in ("bfloat16", "float32") else None
    card = re.sub("^(NVIDIA|Tesla) ", "", device_kind)
    for pattern, (narrow, wide) in _GPU_PEAKS.items():
        if re.fullmatch(pattern, card):
            if dtype == "bfloat16" and card.startswith(_WITHOUT_BFLOAT16):
                return None
            return {"bfloat16": narrow, "float16": narrow, "float32": wide}.get(dtype)
    return None


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator that programs are planned for; one JAX device.

    Attributes:
      name: "v5p".
      platform: "tpu", "gpu" or "cpu".
      device_kind: as JAX calls it.
      hbm_bytes: what a program may use of its memory; None: as much as the machine has.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second over one link of the fast network, one way.
      dimensions: of the torus that these links make; 0: a switch joins all chips of a node.
      dcn_bandwidth: bytes per second and chip, one way, between slices or nodes.
      cores: by which the accelerator types of Google's clouds are counted.
      slice_chips: of the largest slice; None where nothing bounds it.
    """

    name: str
    platform: str
    device_kind: str
    hbm_bytes: int | None = None
    hbm_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    dimensions: int = 1
    dcn_bandwidth: float = 0.0
    cores: int = 1
    slice_chips: int | None = None

    def peak_flops(self, dtype: str = "bfloat16") -> float | None:
        """FLOP/s of products of such numbers; None of a CPU."""
        return peak_flops(self.device_kind, dtype)


# Of a GPU's memory, what JAX is given by launch/flags/gpu.env. Without, it takes three quarters.
GPU_FRACTION = 0.9


def _of_gpu(gigabytes: int) -> int:
    return round(gigabytes * 1e9 * GPU_FRACTION)


# TPU, where not said otherwise: the tables of "How to Scale Your Model" (jax-ml.github.io/
# scaling-book/tpus), whose link bandwidths are a tenth below the datasheets' (v5p: 1,200 GB/s of
# six links both ways, cloud.google.com/tpu/docs/v5p). `hbm_bytes` is what libtpu 0.0.42 lets a
# program have ("exceeds available HBM (95.74G)"), of nominally 32, 96, 16 and 32 GB. Between
# slices: v5p 50 Gbps per chip; v5e 6.4 and v6e 25.6 Tbps per pod of 256 (their pages in Google's
# documentation); v4 25 GB/s per host of 4 chips (the scaling book).
#
# GPU: NVIDIA's datasheets (memory and its bandwidth, NVLink both ways by two), and one adapter of
# InfiniBand per card as in DGX A100 (200 Gbps), DGX H100 and H200 (400 Gbps). Of the memory,
# `GPU_FRACTION`.
CHIPS = {
    chip.name: chip
    for chip in (
        # In the order of the attributes.
        Chip("v4", "tpu", "TPU v4", round(30.75 * 2**30), 1.2e12, 4.5e10, 3, 6.25e9, 2, 4096),
        Chip("v5p", "tpu", "TPU v5", round(95.74 * 2**30), 2.8e12, 9e10, 3, 6.25e9, 2, 6144),
        Chip("v5e", "tpu", "TPU v5 lite", round(15.75 * 2**30), 8.1e11, 4.5e10, 2, 3.125e9),
        Chip("v6e", "tpu", "TPU v6 lite", round(31.25 * 2**30), 1.6e12, 9e10, 2, 12.5e9),
        Chip("a100", "gpu", "NVIDIA A100-SXM4-80GB", _of_gpu(80), 2.039e12, 3e11, 0, 25e9),
        Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", _of_gpu(80), 3.35e12, 4.5e11, 0, 50e9),
        Chip("h200", "gpu", "NVIDIA H200", _of_gpu(141), 4.8e12, 4.5e11, 0, 50e9),
        Chip("cpu", "cpu", "cpu"),
    )
}
