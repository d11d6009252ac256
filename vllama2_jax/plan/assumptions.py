"""What plans take for granted, one sentence each; those of the roofline stand beside it."""

FLOPS = (
    "FLOPs: products and convolutions at the batch's shape, causal attention halved, frozen parts "
    "as they run; `model` without and `hardware` with what is computed again. Padding counts as "
    "work; how much of the rows it is, --data tells.",
)

ESTIMATES = (
    "Nothing was compiled. Arguments are exact; temporaries are the sum of gradients, a copy of "
    "what trains in the dtype of products, saved inputs of layers, a layer's gathered weights and "
    "its activations, the head with its logits, and the towers' activations.",
    "Layers' weights are gathered for the forward and the backward pass, hidden behind products; "
    "their gradients are scattered, and sums of activations made, with nothing to hide them.",
)

SERVING = (
    "The language model alone: towers and connectors run before, once a clip; their parameters "
    "count as memory.",
    "FLOPs: products at the shape of the batch, causal attention halved, logits of a row's last "
    "slot. A new token sees a full cache. `hardware` has what few tokens multiply with experts "
    "that other tokens chose, and slots of the cache beyond a window.",
)

SERVING_ESTIMATES = (
    "Nothing was compiled. Arguments are exact; temporaries are the activations and the gathered "
    "weights of one layer, the logits, and for a new token the cache once more.",
    "Weights that are gathered are hidden behind products; sums of activations are exposed.",
)

# What passes between a chip and its memory when it answers, in words (`serving_work`).
SERVING_TRAFFIC = (
    "a chip's share of the weights (of experts, of those that are chosen at most), what is "
    "gathered of them (written and read), and its share of the cache"
)
