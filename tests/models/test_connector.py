"""The connectors against timm's RegStage and torch's Conv3d, put together here."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.models import zoo
from vllama2_jax.models.connector import Connector
from vllama2_jax.models.zoo import connector_config

torch = pytest.importorskip("torch")


@dataclasses.dataclass(frozen=True)
class Design:
    """What a connector is made of, said here again and apart from the package's own table."""

    sampler: str  # "Conv3d", "AvgPool3d" or "mean"
    window: tuple[int, int, int] | None = None  # kernel and stride over time, height, width
    padding: tuple[int, int, int] = (0, 0, 0)
    blocks: int = 0  # of each RegStage
    readout: int = 2  # linear layers


# The original's classes (model/projector.py).
RELEASED = {
    "stc_connector": Design("Conv3d", (2, 2, 2), padding=(1, 1, 1), blocks=4),
    "stc_connector_v35": Design("Conv3d", (2, 2, 2), blocks=4),
    "stp_connector": Design("AvgPool3d", (2, 2, 2), blocks=4),
    "spatial_conv": Design("Conv3d", (1, 2, 2), padding=(1, 1, 1)),
    "spatial_pool": Design("AvgPool3d", (1, 2, 2)),
    "mlp2x_gelu": Design("mean"),
    "linear": Design("mean", readout=1),
}
# The paper's Table 1, row by row: 2D or 3D, pooled or convolved, without and with RegStages.
TABLE_1 = {
    "table1_row1": Design("AvgPool3d", (1, 2, 2)),
    "table1_row2": Design("Conv3d", (1, 2, 2)),
    "table1_row3": Design("mean"),
    "table1_row4": Design("AvgPool3d", (2, 2, 2)),
    "table1_row5": Design("Conv3d", (2, 2, 2)),
    "table1_row6": Design("AvgPool3d", (1, 2, 2), blocks=4),
    "table1_row7": Design("Conv3d", (1, 2, 2), blocks=4),
    "table1_row8": Design("AvgPool3d", (2, 2, 2), blocks=4),
    "table1_row9": Design("Conv3d", (2, 2, 2), blocks=4),
}
DESIGNS = RELEASED | TABLE_1


def oracle(design: Design, into: int, out: int):
    """The same connector from timm's and torch's own layers, channels first."""
    regnet = pytest.importorskip("timm.models.regnet")
    from timm.layers import LayerNorm2d

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            width = into
            if design.blocks:
                common = dict(
                    depth=design.blocks,
                    out_chs=out,
                    stride=1,
                    dilation=1,
                    act_layer=torch.nn.SiLU,
                    norm_layer=LayerNorm2d,
                )
                self.s1 = regnet.RegStage(in_chs=into, **common)
                self.s2 = regnet.RegStage(in_chs=out, **common)
                width = out
            if design.sampler == "Conv3d":
                self.sampler = torch.nn.Conv3d(
                    width, out, design.window, design.window, design.padding
                )
                width = out
            elif design.sampler == "AvgPool3d":
                self.sampler = torch.nn.AvgPool3d(design.window)
            self.readout = torch.nn.ModuleList(
                torch.nn.Linear(width if index == 0 else out, out)
                for index in range(design.readout)
            )

        def forward(self, x):
            batch, steps, patches, width = x.shape
            grid = math.isqrt(patches)
            if design.sampler == "mean":
                x = x.mean(1)
            else:
                x = x.reshape(batch * steps, grid, grid, width).permute(0, 3, 1, 2)
                x = self.s1(x) if design.blocks else x
                x = x.reshape(batch, steps, -1, grid, grid).transpose(1, 2)
                x = torch.nn.functional.silu(self.sampler(x))
                count = x.shape[2]
                x = x.transpose(1, 2).flatten(0, 1)
                x = self.s2(x) if design.blocks else x
                x = x.reshape(batch, count, *x.shape[1:]).permute(0, 1, 3, 4, 2)
                x = x.reshape(batch, -1, x.shape[-1])
            x = self.readout[0](x)
            for dense in list(self.readout)[1:]:
                x = dense(torch.nn.functional.gelu(x))
            return x

    torch.manual_seed(0)
    model = Oracle().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Every bias and scale away from its initial 0 or 1.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def to_ours(model):
    """The oracle's state_dict as our tree."""
    blocks = {
        "conv1.conv": "conv1",
        "conv1.bn": "norm1",
        "conv2.conv": "conv2",
        "conv2.bn": "norm2",
        "se.fc1": "squeeze/reduce",
        "se.fc2": "squeeze/expand",
        "conv3.conv": "conv3",
        "conv3.bn": "norm3",
        "downsample.conv": "shortcut",
        "downsample.bn": "shortcut_norm",
    }
    params = {}
    for key, value in model.state_dict().items():
        value = value.numpy()
        module, leaf = key.rsplit(".", 1)
        parts = module.split(".", 2)
        if parts[0] in ("s1", "s2"):
            path = f"stage{parts[0][1]}/block_{int(parts[1][1:]) - 1}/{blocks[parts[2]]}"
        else:
            path = module.replace(".", "_")
        if leaf == "weight":
            if value.ndim == 1:
                leaf = "scale"
            else:
                leaf = "kernel"
                value = value.transpose(*range(2, value.ndim), 1, 0)
                if value.ndim == 4 and value.shape[:2] == (1, 1):
                    value = value[0, 0]
        node = params
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node[leaf] = value
    return {"params": params}


def compare(kind, into, out, steps, grid, batch=2):
    config, model = connector_config(kind, into, out), oracle(DESIGNS[kind], into, out)
    features = np.random.default_rng(0).standard_normal(
        (batch, steps, grid * grid, into), dtype=np.float32
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(features)).numpy()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(Connector(config=config).apply)(to_ours(model), features)
    assert ours.shape == expected.shape == (batch, config.num_tokens(steps, grid), out)
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


def test_every_connector_has_a_design_here():
    assert set(zoo.CONNECTOR_KINDS) == set(DESIGNS)


@pytest.mark.parametrize("kind", DESIGNS)
def test_connector_matches_timm_regstage_and_torch_conv3d(kind):
    compare(kind, 24, 40, steps=8, grid=6)


@pytest.mark.parametrize("kind", ["stc_connector", "spatial_conv", "spatial_pool", "mlp2x_gelu"])
def test_connector_of_equal_widths_matches(kind):
    compare(kind, 40, 40, steps=8, grid=6)


@pytest.mark.parametrize(
    ("kind", "steps", "grid"),
    [
        ("stc_connector", 16, 7),
        ("stc_connector", 8, 24),
        ("stc_connector_v35", 5, 7),
        ("stc_connector_v35", 16, 7),
        ("stp_connector", 5, 7),
    ],
)
def test_connector_matches_at_odd_and_full_grids(kind, steps, grid):
    compare(kind, 24, 40, steps, grid, batch=1)


# (frames, patches along one side); the counts were read off the original's modules.
SIZES = [(8, 24), (16, 24), (8, 27), (16, 27), (32, 24), (32, 27)]
TOKENS = {
    "stc_connector": [845, 1521, 980, 1764, 2873, 3332],
    "stc_connector_v35": [576, 1152, 676, 1352, 2304, 2704],
    "stp_connector": [576, 1152, 676, 1352, 2304, 2704],
    "spatial_conv": [1690, 3042, 1960, 3528, 5746, 6664],
    "spatial_pool": [1152, 2304, 1352, 2704, 4608, 5408],
    "mlp2x_gelu": [576, 576, 729, 729, 576, 729],
    "linear": [576, 576, 729, 729, 576, 729],
}
# The column of the paper's Table 1: 8 frames of CLIP's 24 x 24 patches.
TABLE_1_TOKENS = [1152, 1152, 576, 576, 576, 1152, 1152, 576, 576]


@pytest.mark.parametrize("kind", RELEASED)
def test_token_counts_are_the_originals(kind):
    config = connector_config(kind, 1024, 4096)
    assert [config.num_tokens(frames, grid) for frames, grid in SIZES] == TOKENS[kind]


def test_token_counts_of_table_1_are_the_papers():
    configs = [connector_config(f"table1_row{row}", 1024, 4096) for row in range(1, 10)]
    assert [config.num_tokens(8, 24) for config in configs] == TABLE_1_TOKENS


def test_squeeze_width_comes_from_block_input_rounded_half_to_even():
    params = jax.eval_shape(
        Connector(config=connector_config("stc_connector", 10, 40)).init,
        jax.random.key(0),
        jnp.zeros((1, 2, 4, 10)),
    )["params"]
    stage = nn.unbox(params["stage1"])
    assert stage["block_0"]["squeeze"]["reduce"]["kernel"].shape == (40, 2)
    assert stage["block_1"]["squeeze"]["reduce"]["kernel"].shape == (40, 10)


@pytest.mark.parametrize(
    ("model", "count"),
    [("2-7B", 489_188_608), ("2-72B", 1_934_678_272), ("2.1-7B-16F", 376_889_248)],
)
def test_published_connectors_have_the_published_parameter_count(model, count):
    config = zoo.model_config(model)
    features = jnp.zeros((1, 8, config.vision.num_patches, config.vision.width))
    shapes = jax.eval_shape(Connector(config=config.connector).init, jax.random.key(0), features)
    leaves = jax.tree.leaves(nn.unbox(shapes))
    assert sum(leaf.size for leaf in leaves) == count
    assert len(leaves) == 113


@pytest.mark.parametrize("kind", DESIGNS)
def test_every_connector_parameter_names_all_its_axes(kind):
    module = Connector(config=connector_config(kind, 24, 40))
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 36, 24)))["params"]
    names = jax.tree.leaves(
        nn.get_partition_spec(params),
        is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
    )
    shapes = jax.tree.leaves(nn.unbox(params))
    assert len(names) == len(shapes)
    for spec, leaf in zip(names, shapes, strict=True):
        assert len(spec) == leaf.ndim and None not in spec and len(set(spec)) == len(spec)


def test_initial_values_follow_pytorch_defaults():
    module = one_block_deep()
    features = jnp.zeros((1, 8, 36, 24))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), features))["params"]
    design = dataclasses.replace(RELEASED["stc_connector"], blocks=1)
    theirs = to_ours(oracle_without_noise(design, 24, 40))["params"]
    assert jax.tree.structure(params) == jax.tree.structure(theirs)
    for (path, ours), reference in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(theirs), strict=True
    ):
        assert ours.shape == reference.shape, path
        if ours.size < 1000 or ours.ndim == 1:
            continue
        assert np.abs(ours).max() == pytest.approx(np.abs(reference).max(), rel=0.02), path
        assert np.std(ours) == pytest.approx(np.std(reference), rel=0.1), path
    bound = (8 * 40) ** -0.5
    bias = np.abs(params["sampler"]["bias"])
    assert bound * 0.8 < bias.max() <= bound
    assert np.all(params["stage1"]["block_0"]["norm1"]["scale"] == 1)


def oracle_without_noise(design, into, out):
    """Fresh layers of torch's own initialisation, with RegStage's own initialisation undone."""
    model = oracle(design, into, out)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)):
            module.reset_parameters()
    return model


def test_too_few_frames_is_one_clear_error():
    module = Connector(config=connector_config("stc_connector_v35", 24, 40))
    with pytest.raises(ValueError, match=r"stc_connector_v35 cannot take 1 frame"):
        module.init(jax.random.key(0), jnp.zeros((1, 1, 36, 24)))


def test_patches_that_form_no_square_are_refused():
    module = Connector(config=connector_config("linear", 24, 40))
    with pytest.raises(ValueError, match="square grid of patches, got 37"):
        module.init(jax.random.key(0), jnp.zeros((1, 8, 37, 24)))


def one_block_deep():
    config = dataclasses.replace(connector_config("stc_connector", 24, 40), depth=1)
    return Connector(config=config)


def test_gradients_reach_every_parameter():
    module = one_block_deep()
    features = jax.random.normal(jax.random.key(1), (1, 4, 16, 24))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), features))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, features) ** 2)))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


def test_bfloat16_connector_stays_near_float32():
    module = one_block_deep()
    features = jax.random.normal(jax.random.key(1), (1, 4, 16, 24))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), features))
    exact = jax.jit(module.apply)(params, features)
    low = Connector(config=module.config, dtype=jnp.bfloat16)
    ours = jax.jit(low.apply)(params, features)
    assert ours.dtype == jnp.bfloat16
    assert np.abs(ours.astype(jnp.float32) - exact).max() <= 0.05 * np.abs(exact).max()
