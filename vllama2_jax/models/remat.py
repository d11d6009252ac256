"""What the backward pass keeps of a network's block; everything else is computed again."""

import flax.linen as nn
import jax

REMAT_POLICIES = {
    "none": None,  # no rematerialisation
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
    policy = REMAT_POLICIES[name]
    return block if policy is None else nn.remat(block, policy=policy, prevent_cse=not scanned)
