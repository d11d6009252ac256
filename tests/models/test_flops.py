"""FLOPs by formula against PyTorch's own count of what transformers and timm run, and by hand."""

import dataclasses
import re

import pytest
from miniature import SEEING_TINY

from vllama2_jax.convert.hf_config import model_from_json, read_json
from vllama2_jax.models.flops import forward_flops
from vllama2_jax.models.zoo import CONNECTOR_KINDS, ZOO, connector_config

ROWS, LENGTH, CLIPS, STEPS = 2, 24, 3, 4
SHAPE = dict(rows=ROWS, length=LENGTH, frames=CLIPS * STEPS, clips=CLIPS)
MINIATURES = [
    ("mistral", "clip", "stc_connector"),
    ("qwen2", "siglip", "stc_connector_v35"),
    ("mixtral", "clip", "mlp2x_gelu"),
]


def counted(module, *args, **kwargs):
    """{module's path: FLOPs} of a forward pass, as `torch.utils.flop_counter` sees it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False, depth=20) as counter:
        module(*args, **kwargs)
    name = type(module).__name__
    return {
        path.removeprefix(f"{name}."): sum(counts.values())
        for path, counts in counter.get_flop_counts().items()
    }


def total(counts, pattern):
    return sum(flops for path, flops in counts.items() if re.fullmatch(pattern, path))


@pytest.fixture(scope="module", params=MINIATURES, ids=lambda names: "-".join(names))
def miniature(request, tmp_path_factory):
    """(oracle, its configuration)."""
    pytest.importorskip("torch")
    import oracle

    folder = tmp_path_factory.mktemp("miniature")
    model = oracle.write_miniature(folder, *request.param, num_frames=STEPS)
    return model, model_from_json(read_json(folder / "config.json"), "test")


def test_tower_takes_what_pytorch_counts_in_its_used_blocks(miniature):
    import torch

    model, config = miniature
    flops = forward_flops(config, **SHAPE)
    size, blocks = config.vision.image_size, rf"encoder\.layers\.[0-{config.vision.num_layers - 2}]"
    counts = counted(model.tower, torch.zeros(ROWS * CLIPS * STEPS, 3, size, size))
    projections = total(counts, rf"{blocks}\.self_attn\.(q|k|v|out)_proj")
    expected = {
        "vision/patch_embed": counts["embeddings.patch_embedding"],
        "vision/attention/projections": projections,
        "vision/attention/scores": total(counts, rf"{blocks}\.self_attn") - projections,
        "vision/mlp/fc1": total(counts, rf"{blocks}\.mlp\.fc1"),
        "vision/mlp/fc2": total(counts, rf"{blocks}\.mlp\.fc2"),
    }
    assert {name: n for name, n in flops.items() if name.startswith("vision")} == expected


def test_decoder_takes_what_pytorch_counts_but_half_of_the_square_of_scores(miniature):
    import torch

    model, config = miniature
    flops = forward_flops(config, **SHAPE)
    model.language.config._experts_implementation = "eager"  # plain products, which torch counts
    counts = counted(model.language, inputs_embeds=torch.randn(ROWS, LENGTH, config.decoder.width))
    layer = r"model\.layers\.\d+"
    projections = total(counts, rf"{layer}\.self_attn\.[qkvo]_proj")
    scores = total(counts, rf"{layer}\.self_attn") - projections
    assert flops["decoder/attention/projections"] == projections
    assert 2 * flops["decoder/attention/scores"] == scores
    assert flops["decoder/lm_head"] == counts["lm_head"]
    mlp = {name: n for name, n in flops.items() if re.match("decoder/(mlp|moe)", name)}
    assert sum(mlp.values()) == total(counts, rf"{layer}\.mlp")
    assert mlp.get("decoder/moe/router", 0) == total(counts, rf"{layer}\.mlp\.gate") * (
        config.decoder.num_experts > 0
    )


@pytest.mark.parametrize(
    "kind", ["stc_connector", "stc_connector_v35", "stp_connector", "mlp2x_gelu", "linear"]
)
@pytest.mark.parametrize("into", [24, 40])
def test_connector_takes_what_pytorch_counts(kind, into):
    torch = pytest.importorskip("torch")
    import oracle

    config = dataclasses.replace(
        SEEING_TINY,
        connector=connector_config(kind, into, 40, depth=3),
        vision=dataclasses.replace(SEEING_TINY.vision, image_size=40, width=into),
        decoder=dataclasses.replace(SEEING_TINY.decoder, width=40),
    )
    flops = forward_flops(config, **SHAPE, steps=STEPS)
    module = oracle.Connector(kind, into, 40, depth=3)
    counts = counted(module, torch.zeros(ROWS * CLIPS, STEPS, 5 * 5, into))
    ours = {name: n for name, n in flops.items() if name.startswith("connector")}
    assert sum(ours.values()) == counts["Global"]
    for name, path in (("stage1", "s1"), ("sampler", "sampler"), ("stage2", "s2")):
        assert ours.get(f"connector/{name}", 0) == counts.get(path, 0)


@pytest.mark.parametrize("kind", ["spatial_conv", "spatial_pool"])
def test_connector_without_stages_takes_what_pytorch_counts(kind):
    torch = pytest.importorskip("torch")
    import oracle

    config = dataclasses.replace(
        SEEING_TINY,  # equal widths, as the original's classes need
        connector=connector_config(kind, 24, 24),
        vision=dataclasses.replace(SEEING_TINY.vision, image_size=40, width=24),
        decoder=dataclasses.replace(SEEING_TINY.decoder, width=24),
    )
    flops = forward_flops(config, **SHAPE, steps=STEPS)
    counts = counted(oracle.Connector(kind, 24, 24), torch.zeros(ROWS * CLIPS, STEPS, 5 * 5, 24))
    assert sum(n for name, n in flops.items() if name.startswith("connector")) == counts["Global"]


def test_2_7b_on_eight_frames_equals_the_sum_by_hand():
    frames, length = 8, 2048
    tokens = 577  # 24 x 24 patches and the class token
    vision = {
        "patch_embed": frames * 576 * (2 * 14 * 14 * 3 * 1024),
        "attention/projections": frames * 23 * tokens * 4 * (2 * 1024 * 1024),
        "attention/scores": frames * 23 * 2 * (2 * tokens * tokens * 1024),
        "mlp/fc1": frames * 23 * tokens * (2 * 1024 * 4096),
        "mlp/fc2": frames * 23 * tokens * (2 * 4096 * 1024),
    }
    # 1x1, depthwise 3x3, squeeze to a quarter and back, 1x1; the first block widens 1024 to 4096
    # with a shortcut. Before the sampler 8 x 24 x 24, behind it 5 x 13 x 13 = 845.
    wide, depthwise = 2 * 4096 * 4096, 2 * 9 * 4096
    first = frames * 576 * (2 * (2 * 1024 * 4096) + depthwise + wide)
    first += frames * 2 * (2 * 4096 * 256)
    other = frames * 576 * (wide + depthwise + wide) + frames * 2 * (2 * 4096 * 1024)
    after = 845 * (wide + depthwise + wide) + 5 * 2 * (2 * 4096 * 1024)
    connector = {
        "stage1": first + 3 * other,
        "sampler": 845 * 8 * wide,
        "stage2": 4 * after,
        "readout": 845 * 2 * wide,
    }
    decoder = {
        "attention/projections": 32 * length * (2 * 4096 * (4096 + 1024 + 1024 + 4096)),
        "attention/scores": 32 * 2 * (2 * length * length * 4096) // 2,
        "mlp/gate_up": 32 * length * 2 * (2 * 4096 * 14336),
        "mlp/down": 32 * length * (2 * 14336 * 4096),
        "lm_head": length * (2 * 4096 * 32000),
    }
    parts = {"vision": vision, "connector": connector, "decoder": decoder}
    by_hand = {f"{part}/{name}": n for part, names in parts.items() for name, n in names.items()}
    flops = forward_flops(ZOO["2-7B"], rows=1, length=length, frames=frames, clips=1)
    assert flops == by_hand
    # The rule of thumb, 2 FLOPs per parameter and token: 7.11 billion without the embedding.
    dense = sum(decoder.values()) - decoder["attention/scores"]
    assert dense == pytest.approx(2 * 7.11e9 * length, rel=1e-3)


def test_a_mixture_runs_its_chosen_experts_and_a_router():
    shape = dict(rows=1, length=2048, frames=8, clips=1)
    dense, mixture = (forward_flops(ZOO[name], **shape) for name in ("2-7B", "2-8x7B"))
    for name in ("gate_up", "down"):
        assert mixture[f"decoder/moe/{name}"] == 2 * dense[f"decoder/mlp/{name}"]
    assert mixture["decoder/moe/router"] == 32 * 2048 * 2 * 4096 * 8


def test_a_sliding_window_leaves_out_the_pairs_beyond_it():
    def scores(window, length=512):
        decoder = dataclasses.replace(SEEING_TINY.decoder, sliding_window=window)
        config = dataclasses.replace(SEEING_TINY, decoder=decoder)
        shape = dict(rows=1, length=length, frames=0, clips=0)
        return forward_flops(config, **shape)["decoder/attention/scores"]

    assert scores(512) == scores(4096) == scores(None)
    # Half of a square of 512 without half of a square of 384.
    assert scores(128) == scores(None) - scores(None, length=384)


def test_text_alone_runs_the_decoder_alone():
    flops = forward_flops(SEEING_TINY, rows=2, length=64, frames=0, clips=0)
    assert {name.split("/")[0] for name in flops} == {"decoder"}


@pytest.mark.parametrize("kind", CONNECTOR_KINDS)
def test_twice_the_rows_take_twice_the_flops(kind):
    tiny = SEEING_TINY
    connector = connector_config(kind, tiny.vision.width, tiny.decoder.width)
    config = dataclasses.replace(tiny, connector=connector)
    one, two = (forward_flops(config, rows=rows, length=640, frames=16, clips=2) for rows in (1, 2))
    assert two == {name: 2 * n for name, n in one.items()}
