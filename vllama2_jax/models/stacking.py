"""From the scanned form of a decoder's parameters (training) to the unrolled one (inference)."""

import jax

_EXPERT_WEIGHTS = ("gate", "up", "down")


def unstack_layers(params: dict, *, split_experts: bool = False) -> dict:
    """From `layers/...` with a leading layer axis to `layer_0/...`, `layer_1/...`.

    Args:
      params: a decoder's unboxed parameters in the scanned form (leaves are arrays).
      split_experts: also turn `moe/gate` [E, in, out] into `moe/expert_0/gate` [in, out].

    Returns:
      A new tree; the leaves are slices, that is copies, of the old ones.
    """
    out = {name: value for name, value in params.items() if name != "layers"}
    for i in range(len(params["layers"]["input_norm"]["scale"])):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        out[f"layer_{i}"] = _split_experts(layer) if split_experts else layer
    return out


def unstacked_place(
    path: str, index: tuple[int, ...], split_experts: bool = False
) -> tuple[str, tuple[int, ...]]:
    """Where one layer's (and expert's) part of a stacked leaf lies in the unrolled form.

    Args:
      path: of the stacked leaf, "/" between names, e.g. "decoder/layers/moe/gate".
      index: (layer,) or (layer, expert); empty for a leaf that is not of a layer.
      split_experts: as in `unstack_layers`.

    Returns:
      The unrolled leaf's path and the index that is left, e.g. ("decoder/layer_3/moe/gate", (5,)).
    """
    parts = path.split("/")
    if "layers" not in parts:
        return path, index
    layer, *rest = index
    parts[parts.index("layers")] = f"layer_{layer}"
    if split_experts and rest:
        parts.insert(-1, f"expert_{rest.pop()}")
    return "/".join(parts), tuple(rest)


def _split_experts(layer):
    if "moe" not in layer:
        return layer
    moe = {name: value for name, value in layer["moe"].items() if name not in _EXPERT_WEIGHTS}
    for e in range(len(layer["moe"]["gate"])):
        moe[f"expert_{e}"] = {name: layer["moe"][name][e] for name in _EXPERT_WEIGHTS}
    return {**layer, "moe": moe}
