"""Which mesh axes every logical axis is split over: one short table per layout.

Networks name the axes of their arrays (`models/axes.py`); this page says what becomes of them. An
array none of whose axes is split lies whole on every device.
"""

from collections.abc import Mapping

# Axes of a mesh, slowest first: what lies next to each other on a device's links comes last.
MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")

_ROWS = ("data", "fsdp", "expert")

# Of training. Parameters are split over `fsdp` along the axis that their input or output of the
# residual stream has, gathered where they are used, and their gradients scattered likewise.
_COMMON = {
    # Activations.
    "batch": _ROWS,
    "length": ("sequence",),
    "act_embed": (),
    # A tower sees more images than there are rows, and needs no other row: it uses every device.
    "images": (*_ROWS, "sequence", "tensor"),
    "clips": _ROWS,
    # Parameters.
    "embed": ("fsdp", "expert"),
    "expert_embed": ("fsdp",),
    "conv_in": ("fsdp", "expert"),
    "patch_embed": (),
    "conv_out": (),
    "layers": (),
    "norm": (),
    "squeeze": (),
    "conv_group": (),
    "conv_time": (),
    "conv_height": (),
    "conv_width": (),
    "conv_bins": (),
    "colour": (),
    "patches": (),
    "buckets": (),
    "gate": (),
    "router": (),
    "lora_rank": (),
    # Both.
    "expert": ("expert",),
    "heads": (),
    "kv_heads": (),
    "head_dim": (),
    "mlp": (),
    "vocab": (),
}

_TENSOR = {name: ("tensor",) for name in ("heads", "kv_heads", "mlp", "vocab")}

# "2d" is for decoding: nothing is gathered. The residual stream of the few new tokens is split over
# `fsdp` as the parameters are, and products leave sums over it.
_2D = {"batch": ("data",), "clips": ("data",), "act_embed": ("fsdp",), "embed": ("fsdp",)}

LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fsdp": _COMMON,
    "fsdp+tensor": {**_COMMON, **_TENSOR},
    "fsdp+expert": _COMMON,
    "2d": {**_COMMON, **_TENSOR, **_2D},
}
