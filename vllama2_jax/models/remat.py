"""What the backward pass keeps of a network's block; everything else is computed again."""

import flax.linen as nn
import jax

from vllama2_jax.models.axes import GATHERED, layout_in_force

REMAT_POLICIES = {
    # No rematerialisation; what was gathered from other devices is gathered again.
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(block: type[nn.Module], name: str, *, scanned: bool) -> type[nn.Module]:
    """`block` under the policy `name`, with the same parameters.

    Args:
      block: a module class.
      name: a key of `REMAT_POLICIES`.
      scanned: whether the block is the body of `nn.scan`, which by itself keeps XLA from merging
        the second computation with the first.

    Raises:
      ValueError: for an unknown name, listing the known ones.
    """
    if name not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {name!r}; known: {', '.join(REMAT_POLICIES)}")
    if name == "none" and layout_in_force() is None:
        return block
    return nn.remat(block, policy=REMAT_POLICIES[name], prevent_cse=not scanned)
