"""The memory that a plan states is what the compiler holds against a chip's."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from vllama2_jax.parallel.topology import devices, topology
from vllama2_jax.plan.planning import memory_of, refusal_of
from vllama2_jax.plan.result import Memory

V5P = topology("v5p:2x2x1")
GIB = 1 << 30


def compiled(products: int) -> jax.stages.Compiled:
    """A gradient that keeps so many arrays of 1 GiB, and four beside them."""
    there = SingleDeviceSharding(devices(V5P)[0])
    x = jax.ShapeDtypeStruct((1024, 1024, 512), jnp.bfloat16, sharding=there)
    w = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=there)

    def step(x, w):
        def loss(y):
            layer = jax.checkpoint(lambda y, _: (jnp.sin(y @ w), None))
            return jax.lax.scan(layer, y, None, length=products)[0].astype(jnp.float32).sum()

        return x - jax.grad(loss)(x)

    return jax.jit(step, donate_argnums=0).lower(x, w).compile()


def test_a_program_fits_as_long_as_the_compiler_takes_it(libtpu):
    limit = V5P.chip.hbm_bytes
    nearly_full = memory_of(compiled(91), V5P)
    assert nearly_full.fits and limit - GIB < nearly_full.peak <= limit
    # One more array is more than there is, and the compiler says so.
    assert nearly_full.peak + GIB > limit
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compiled(92)


def test_every_array_that_is_kept_counts_once(libtpu):
    fewer, more = memory_of(compiled(6), V5P), memory_of(compiled(8), V5P)
    assert more.peak - fewer.peak == pytest.approx(2 * GIB, rel=0.01)
    assert fewer.arguments == pytest.approx(GIB, rel=0.01)


def test_what_the_compiler_refused_does_not_fit_whatever_its_arguments():
    assert not Memory(arguments=1, temporaries=None, limit=None).fits
    assert Memory(arguments=1, temporaries=2, limit=3).fits
    assert not Memory(arguments=1, temporaries=3, limit=3).fits
    assert Memory(1, 2, None).to_json() == dict(arguments=1, temporaries=2, limit=None, peak=3)


def test_an_error_of_the_compiler_itself_is_one_line_with_a_remedy():
    error = jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (a.cc:1)\nmore")
    with pytest.raises(ValueError, match=r"^the compiler failed \(INTERNAL: .*\); take another"):
        refusal_of(error)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\nmore")
    assert refusal_of(error) == "too large"
