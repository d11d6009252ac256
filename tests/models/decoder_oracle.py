"""Random tiny decoders in both libraries with the same weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from vllama2_jax.models.config import DecoderConfig

TINY = DecoderConfig(
    family="mistral",
    vocab_size=97,
    width=48,
    mlp_dim=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e6,
    norm_eps=1e-5,
)
FAMILIES = {
    "mistral": TINY,
    "mistral_window": dataclasses.replace(TINY, sliding_window=5),
    "mixtral": dataclasses.replace(TINY, family="mixtral", num_experts=4),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, norm_eps=1e-6),
    "qwen2_tied": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "llama": dataclasses.replace(TINY, family="llama", num_kv_heads=6, rope_theta=1e4),
}


def hf_config(config: DecoderConfig):
    """The transformers config of the same shapes, every default that matters spelled out."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
    if config.family == "qwen2":
        return transformers.Qwen2Config(**common, use_sliding_window=False)
    common["head_dim"] = config.head_dim
    if config.family == "llama":
        return transformers.LlamaConfig(**common)
    common["sliding_window"] = config.sliding_window
    if config.family == "mistral":
        return transformers.MistralConfig(**common)
    return transformers.MixtralConfig(
        **common, num_local_experts=config.num_experts, num_experts_per_tok=config.top_k
    )


def hf_model(config: DecoderConfig, seed: int = 0):
    """A transformers causal LM in float32 with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    return model


def params_from_hf(model, config: DecoderConfig) -> dict:
    """Our unrolled parameters of a transformers model; written apart from `convert/`."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    params = {
        "embed_tokens": {"embedding": state["model.embed_tokens.weight"]},
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": state["lm_head.weight"].T}
    for i in range(config.num_layers):
        layer = {k.split(".", 3)[3]: v for k, v in state.items() if f"model.layers.{i}." in k}
        attention = {}
        for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
            weight = layer[f"self_attn.{short}_proj.weight"]
            shape = (heads[short], config.head_dim)
            attention[name] = {"kernel": weight.T.reshape(-1, *shape)}
            if config.qkv_bias:
                attention[name]["bias"] = layer[f"self_attn.{short}_proj.bias"].reshape(shape)
        out = layer["self_attn.o_proj.weight"].T
        attention["out"] = {"kernel": out.reshape(config.num_heads, config.head_dim, -1)}
        params[f"layer_{i}"] = {
            "input_norm": {"scale": layer["input_layernorm.weight"]},
            "post_norm": {"scale": layer["post_attention_layernorm.weight"]},
            "attention": attention,
        }
        if config.num_experts:  # transformers 5 fuses the checkpoint's w1 (gate) and w3 (up)
            gate_up = layer["mlp.experts.gate_up_proj"]
            params[f"layer_{i}"]["moe"] = {
                "router": {"kernel": layer["mlp.gate.weight"].T},
                "gate": gate_up[:, : config.mlp_dim].swapaxes(1, 2),
                "up": gate_up[:, config.mlp_dim :].swapaxes(1, 2),
                "down": layer["mlp.experts.down_proj"].swapaxes(1, 2),
            }
        else:
            params[f"layer_{i}"]["mlp"] = {
                n: {"kernel": layer[f"mlp.{n}_proj.weight"].T} for n in ("gate", "up", "down")
            }
    return jnp_tree(params)


def jnp_tree(tree):
    """NumPy leaves to JAX arrays."""
    if isinstance(tree, dict):
        return {k: jnp_tree(v) for k, v in tree.items()}
    return jnp.array(np.ascontiguousarray(tree))


def relative_error(ours, reference) -> float:
    """max|ours - reference| / max|reference|."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
