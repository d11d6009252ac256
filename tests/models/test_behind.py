"""What simulated devices compute one behind the other."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vllama2_jax.models.axes import Layout, behind, using

LAYOUT = Layout(Mesh(np.array(jax.devices()[:1]), ("data",)), {"batch": ("data",)})


def compiled(layout):
    def pair(x, earlier):
        with using(layout):
            return behind(x, earlier)

    return jax.jit(pair)


def test_a_compiled_program_waits_for_what_is_earlier():
    x, earlier = jnp.arange(6.0).reshape(2, 3), jnp.array([[-2.0, 1.0], [5.0, 3.0]])
    after = compiled(LAYOUT)
    np.testing.assert_array_equal(after(x, earlier), x)
    # Not a number goes through, so that the program does need it.
    assert np.isnan(after(x, earlier * np.nan)).all()


def test_one_device_waits_for_nothing():
    x, earlier = jnp.arange(6.0).reshape(2, 3), jnp.full((2, 2), np.nan)
    np.testing.assert_array_equal(compiled(None)(x, earlier), x)
