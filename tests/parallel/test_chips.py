"""What makers state of their chips."""

import jax.numpy as jnp
import pytest

from vllama2_jax.parallel.chips import CHIPS, peak_flops


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", jnp.bfloat16, 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU v6e", "float32", 918),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA L4", "bfloat16", 121),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla T4", "float32", 8.1),
    ],
)
def test_peaks_are_those_of_the_datasheets_without_sparsity(kind, dtype, teraflops):
    assert peak_flops(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA GeForce GTX 1080", "float32"),
        ("NVIDIA A10", "bfloat16"),  # not an A100
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("TPU v5p", "float64"),
    ],
)
def test_a_device_without_a_stated_peak_has_none(kind, dtype):
    assert peak_flops(kind, dtype) is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_every_chip_that_one_may_plan_for_has_a_peak_but_the_cpu(chip):
    assert (chip.peak_flops() is None) == (chip.platform == "cpu")
