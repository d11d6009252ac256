"""The dense layer of the decoder, whose kernel may be adapted and quantised."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from vllama2_jax.models.axes import (
    constrain,
    divisible,
    gather,
    layout_in_force,
    per_device,
    sum_of_shares,
)
from vllama2_jax.models.lora import low_rank
from vllama2_jax.models.matmul import dense_dot
from vllama2_jax.models.quantized import multiply_quantized, quantized_parts

_ROWS = ("batch", "length")  # the first axes of what the decoder's layers transform


class Linear(nn.Module):
    """x W + bias: the same parameters and numbers as `nn.Dense` and `nn.DenseGeneral`.

    Where the parameters hold adapters of the kernel (`lora.py`) or parts in its stead
    (`quantized.py`), the layer uses them; `init` makes neither.

    Attributes:
      features: sizes of the output's axes.
      names: logical names of the kernel's axes, inputs first.
      dtype: of the product.
      param_dtype: of the parameters.
      num_inputs: how many of the last axes of x are contracted.
      use_bias: whether there is one.
      dot_general: the product, called like `jax.lax.dot_general`.
    """

    features: tuple[int, ...]
    names: tuple[str, ...]
    dtype: Any
    param_dtype: Any
    num_inputs: int = 1
    use_bias: bool = False
    dot_general: Callable = dense_dot

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform `x` [..., *in] to [..., *features] in `dtype`."""
        x = x.astype(self.dtype)
        shape = (*x.shape[-self.num_inputs :], *self.features)
        parts = quantized_parts(self, "kernel")
        if parts is None:
            init = nn.initializers.normal(0.02)
            out = self._gathered_product(x, self._param("kernel", init, self.names, shape))
        else:
            out = multiply_quantized(self._product, x, parts, shape, self.dtype)
        adapter = low_rank(self, "kernel", self.dtype)
        if adapter is not None:
            a, b = adapter
            out += self._product(self._product(x, a), b, num_inputs=1)
        if self.use_bias:
            names = self.names[self.num_inputs :]
            out += self._param("bias", nn.initializers.zeros, names, self.features)
        return out

    def _product(self, x, kernel, num_inputs=None):
        num_inputs = num_inputs or self.num_inputs
        axes = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
        return self.dot_general(x, kernel, (axes, ((), ())))

    def _gathered_product(self, x, kernel):
        """The product, for which each device gathers the kernel itself where rows share its axes.

        Left to XLA, gradients of kernels that are split along three dimensions of a TPU's torus
        are summed up whole on every device before they are cut, which sends twice as much.
        """
        layout = layout_in_force()
        if layout is None or x.ndim != self.num_inputs + 2:
            return self._product(x, kernel)
        rows = tuple(map(divisible, _ROWS, x.shape[:2]))
        names = tuple(map(divisible, self.names, kernel.shape))
        taken = {axis for name in rows for axis in layout.axes(name)}
        gathered = {name for name in names if taken & {*layout.axes(name)}}
        kept = tuple(None if name in gathered else name for name in names)
        inputs, outputs = kept[: self.num_inputs], kept[self.num_inputs :]
        shares = tuple(axis for name in inputs for axis in layout.axes(name))
        used = {axis for axis, size in layout.mesh.shape.items() if size > 1}
        # Over other axes gradients of x would be summed up here, once for each of several layers
        # that share it; XLA adds them first.
        if not gathered or used - taken - {*shares}:
            return self._product(x, kernel)

        def local(x, kernel):
            out = self._product(x, gather(kernel, names, layout, kept))
            return sum_of_shares(out, shares) if shares else out

        return per_device(local, ((*rows, *inputs), names), (*rows, *outputs))(x, kernel)

    def _param(self, name, init, names, shape):
        boxed = nn.with_logical_partitioning(init, names)
        leaf = self.param(name, boxed, shape, self.param_dtype).astype(self.dtype)
        # Split as it is stored, so that its gradient is scattered where it arises, layer by layer.
        return constrain(leaf, *names)
