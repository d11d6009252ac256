"""Independent hearing: torchaudio's filter bank and speechbrain's BEATs, each its one file.

Neither package can be imported whole beside CPU torch: torchaudio's wheel wants CUDA's libraries,
speechbrain wants torchaudio. Both lie in `.venv/oracle_files` (see the Makefile), where nothing is
imported from; what their files import and do not use is given an empty stand-in.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch


def _stand_in(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return module


def _load(name: str, stand_ins: dict):
    """The module in a file of `.venv/oracle_files`, with stand-ins while it is imported."""
    path = Path(sys.prefix) / "oracle_files" / name
    before = {key: sys.modules.get(key) for key in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location(f"oracle_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        for key, value in before.items():
            if value is None:
                del sys.modules[key]
            else:
                sys.modules[key] = value


def torchaudio_kaldi():
    """torchaudio's `compliance/kaldi.py`."""
    stand_in = _stand_in("torchaudio", functional=None)
    return _load("torchaudio/compliance/kaldi.py", {"torchaudio": stand_in})


def kaldi_bank(samples: np.ndarray) -> np.ndarray:
    """The original's filter bank of samples [n] at 16 kHz, in their dtype: [frames, 128]."""
    scaled = torch.from_numpy(samples)[None] * 2**15
    options = dict(sample_frequency=16000, frame_length=25, frame_shift=10)
    return torchaudio_kaldi().fbank(scaled, num_mel_bins=128, **options).numpy()


def speechbrain_beats(config, seed: int = 0, std: float = 0.1) -> torch.nn.Module:
    """speechbrain's BEATs with the shapes of a `BeatsConfig` and random weights."""
    kaldi = _stand_in("torchaudio.compliance.kaldi", fbank=None)
    dataio = _stand_in("speechbrain.dataio.dataio", length_to_mask=None)
    compliance = _stand_in("torchaudio.compliance", kaldi=kaldi)
    module = _load(
        "speechbrain/lobes/models/beats.py",
        {
            "torchaudio": _stand_in("torchaudio", compliance=compliance),
            "torchaudio.compliance": compliance,
            "torchaudio.compliance.kaldi": kaldi,
            "speechbrain": _stand_in("speechbrain"),
            "speechbrain.dataio": _stand_in("speechbrain.dataio", dataio=dataio),
            "speechbrain.dataio.dataio": dataio,
        },
    )
    settings = module.BEATsConfig(
        {
            "input_patch_size": config.patch_size,
            "embed_dim": config.patch_width,
            "encoder_layers": config.num_layers,
            "encoder_embed_dim": config.width,
            "encoder_ffn_embed_dim": config.mlp_dim,
            "encoder_attention_heads": config.num_heads,
            "conv_pos": config.conv_window,
            "conv_pos_groups": config.conv_groups,
            "num_buckets": config.num_buckets,
            "max_distance": config.max_distance,
            "deep_norm": config.deep_norm,
            "relative_position_embedding": True,
            "gru_rel_pos": True,
            "conv_bias": config.patch_bias,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "layer_wise_gradient_decay_ratio": config.gradient_decay,
        }
    )
    module.BEATsConfig = lambda _: settings
    network = module.BEATs().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator) * std
            is_scale = "norm.weight" in name or name.endswith(("grep_a", "original0"))
            tensor.copy_(noise + 1 if is_scale else noise)
    return network


def run_beats(network: torch.nn.Module, bank: np.ndarray) -> torch.Tensor:
    """Its last hidden states of normalised filter banks [N, frames, 128], without a mask."""
    x = network.patch_embedding(torch.from_numpy(bank)[:, None])
    x = network.layer_norm(x.flatten(2).transpose(1, 2))
    if network.post_extract_proj is not None:
        x = network.post_extract_proj(x)
    return network.encoder(x, padding_mask=None)[0]


def released_names(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its weights under the names of the released files."""
    renamed = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    out = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        out[name] = tensor.detach().numpy().copy()
    return out
