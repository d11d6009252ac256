"""Every connector that the original has a name for, from torch's own state dict to our numbers."""

import jax
import numpy as np
import pytest

from vllama2_jax.convert.huggingface import read_params
from vllama2_jax.models.config import DecoderConfig, ViTConfig, VLlama2Config
from vllama2_jax.models.connector import Connector
from vllama2_jax.models.zoo import connector_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import oracle  # noqa: E402

INTO, OUT, GRID, STEPS = 24, 40, 4, 4
RELEASED = (
    "stc_connector",
    "stc_connector_v35",
    "stp_connector",
    "spatial_conv",
    "spatial_pool",
    "mlp2x_gelu",
    "linear",
)
VISION = ViTConfig(
    image_size=8,
    patch_size=2,
    width=INTO,
    mlp_dim=8,
    num_layers=2,
    num_heads=2,
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
DECODER = DecoderConfig(
    family="mistral",
    vocab_size=16,
    width=OUT,
    mlp_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=20,
    rope_theta=1e6,
    norm_eps=1e-5,
)


class Tensors:
    """A state dict as what `read_params` reads from."""

    def __init__(self, state):
        self._state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def read(self, name):
        return self._state[name].numpy()


@pytest.fixture(scope="module")
def neighbours():
    """The networks that lie in a checkpoint beside the connector."""
    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=INTO,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=2,
        )
    )
    language = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=16,
            hidden_size=OUT,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )
    return vision, language


@pytest.mark.parametrize("kind", RELEASED)
def test_connector_read_from_released_names_equals_torch(kind, neighbours):
    torch.manual_seed(0)
    # Two blocks per stage: the first one of a stage is not like the others.
    theirs = oracle.Connector(kind, INTO, OUT, depth=2).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    blocks = {"depth": 2} if kind.startswith("st") else {}
    config = connector_config(kind, INTO, OUT, **blocks)
    params = read_params(
        Tensors(oracle.released_state(neighbours[0], theirs, neighbours[1])),
        VLlama2Config("test", VISION, config, DECODER, num_frames=STEPS),
        "the test",
        np.float32,
        scan_layers=True,
    )
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, STEPS, GRID * GRID, INTO)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(features)).numpy()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(Connector(config=config).apply)({"params": params["connector"]}, features)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()
