"""The optimizer against torch's AdamW and Hugging Face's rule of what decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert.huggingface import read_params
from vllama2_jax.models.config import DecoderConfig, ViTConfig, VLlama2Config
from vllama2_jax.models.zoo import connector_config
from vllama2_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from vllama2_jax.train.trainable import Rule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import oracle  # noqa: E402


def test_first_step_has_learning_rate_zero_and_schedule_is_a_half_cosine():
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_ratio=0.0901), 110)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(1.0)
    for step in (10, 35, 60, 110):
        wanted = 2.0 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 100))
        assert float(schedule(step)) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="warmup_ratio"):
        OptimizerConfig(learning_rate=1.0, warmup_ratio=1.0)


@pytest.mark.parametrize("steps", [2, 7, 100, 5474])
def test_schedule_equals_transformers(steps):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0), steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = transformers.get_cosine_schedule_with_warmup(
        optimizer, math.ceil(0.03 * steps), steps
    )
    for step in range(min(steps, 200)):
        assert float(schedule(step)) == pytest.approx(reference.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        reference.step()


def test_a_run_too_short_to_warm_up_still_learns():
    assert float(learning_rate(OptimizerConfig(1.0), 1)(0)) == 1.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_optimizer_equals_torch_adamw(weight_decay):
    rng = np.random.default_rng(2)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    config = OptimizerConfig(0.1, warmup_ratio=0, weight_decay=weight_decay)
    assigned = {"a/kernel": Rule(".*", "train"), "b/kernel": Rule(".*", "train", 0.0)}
    optimizer = make_optimizer(config, 1000, assigned)
    ours = {"a/kernel": jnp.array(start), "b/kernel": jnp.array(start)}
    state = optimizer.init(ours)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=weight_decay, eps=1e-8)
    for step in range(5):
        gradient = rng.normal(size=(3, 4)).astype(np.float32)
        for group in reference.param_groups:
            group["lr"] = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 1000))
        theirs.grad = torch.tensor(gradient)
        reference.step()
        updates, state = optimizer.update(dict.fromkeys(ours, jnp.array(gradient)), state, ours)
        ours = {path: ours[path] + updates[path] for path in ours}
    np.testing.assert_allclose(ours["a/kernel"], theirs.detach().numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(ours["b/kernel"], start)


CONFIG = VLlama2Config(
    name="test",
    vision=ViTConfig(
        image_size=4,
        patch_size=2,
        width=8,
        mlp_dim=12,
        num_layers=2,
        num_heads=2,
        activation="quick_gelu",
        norm_eps=1e-5,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    connector=connector_config("stc_connector", 8, 16, depth=1),
    decoder=DecoderConfig(
        family="mixtral",
        vocab_size=20,
        width=16,
        mlp_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=1e6,
        norm_eps=1e-5,
        num_experts=4,
    ),
    num_frames=2,
)


class Original(torch.nn.Module):
    """The three networks of `CONFIG` from transformers and timm."""

    def __init__(self):
        super().__init__()
        self.vision = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=4,
                patch_size=2,
            )
        )
        self.connector = oracle.Connector("stc_connector", 8, 16, depth=1)
        self.language = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=20,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
                tie_word_embeddings=False,
            )
        )


class Tensors:
    """A state dict as what `read_params` reads from."""

    def __init__(self, state):
        self._state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def read(self, name):
        return self._state[name].numpy()


def decays_in_hugging_face():
    """{our path: whether Hugging Face's Trainer decays it}, without a name of ours written here.

    Every weight of the original becomes 1 if it decays and 0 if not, and is then imported.
    """
    model = Original()
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float(name in decayed))
    state = oracle.released_state(model.vision, model.connector, model.language)
    params = read_params(Tensors(state), CONFIG, "the test", np.float32, scan_layers=True)
    return {
        path: {0.0: False, 1.0: True}[float(leaf.mean())] for path, leaf in flatten(params).items()
    }


def decays_here(paths):
    """{path: whether a parameter shrinks that gets no gradient}."""
    config = OptimizerConfig(0.1, warmup_ratio=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10, dict.fromkeys(paths, Rule(".*", "train")))
    params = {path: jnp.ones(()) for path in paths}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    for update in updates.values():
        assert float(update) in (0.0, pytest.approx(-0.05))
    return {path: bool(update) for path, update in updates.items()}


def test_all_decays_but_biases_and_norms_as_in_hugging_face():
    wanted = decays_in_hugging_face()
    ours = decays_here(wanted)
    assert {p for p in wanted if wanted[p] != ours[p]} == set()
    experts = [f"decoder/layers/moe/{name}" for name in ("gate", "up", "down")]
    for path in (*experts, "decoder/embed_tokens/embedding", "connector/sampler/kernel"):
        assert ours[path], path
    for path in ("decoder/final_norm/scale", "connector/sampler/bias", "vision/pre_norm/scale"):
        assert not ours[path], path


def test_experts_with_arrays_of_their_own_decay_too():
    assert all(decays_here(["layer_0/moe/expert_0/gate", "layer_0/moe/router/kernel"]).values())
