"""Prefill, decode and vision + connector on CPU, beside PyTorch on the same random weights.

    python benchmarks/model_cpu.py [--repeats 5] [--only vision|language]

Real widths: the 7B model's decoder with 2 layers, the whole CLIP tower and `stc_connector` on 8
frames. float32, the same number of threads, PyTorch with SDPA. The two sides take turns in one run;
a ratio is PyTorch's median over ours, above 1 where we are faster.
"""

import argparse
import dataclasses
import gc
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import conftest  # noqa: F401  (makes timm importable beside CPU torch)
import jax
import jax.numpy as jnp
import numpy as np
import torch
from oracle import Connector, released_state
from rich.console import Console
from rich.table import Table

from vllama2_jax.convert.huggingface import read_params
from vllama2_jax.infer.generate import Generator, Request
from vllama2_jax.infer.programs import Programs
from vllama2_jax.infer.sampling import Sampling
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import Spliced

LAYERS = 2


class InMemory:
    """A torch state dict as a source of tensors, under the released names."""

    def __init__(self, state):
        self._state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def read(self, name):
        return self._state[name].numpy()


def small(vision_layers, decoder_layers):
    """The 7B model with fewer layers in the parts that a run does not look at."""
    config = ZOO["2-7B"]
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=vision_layers),
        decoder=dataclasses.replace(config.decoder, num_layers=decoder_layers),
    )


def torch_tower(layers):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=layers,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            attn_implementation="sdpa",
        )
    ).eval()


def torch_language(layers):
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            num_hidden_layers=layers,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-5,
            sliding_window=None,
            attn_implementation="sdpa",
        )
    ).eval()


def take_turns(sides, repeats):
    """Median seconds of each side; one warm-up, then the sides alternate."""
    for side in sides.values():
        side()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def report(console, title, results, ours, unit=1.0, label="s"):
    table = Table("side", f"median {label}", "min", "max", "PyTorch / ours", title=title)
    for name, (median, low, high) in results.items():
        ratio = "" if name == ours else f"{median / results[ours][0]:.2f}"
        table.add_row(name, *(f"{v * unit:.3f}" for v in (median, low, high)), ratio)
    console.print(table)


@torch.no_grad()
def vision(console, repeats):
    frames = np.random.default_rng(0).integers(0, 256, (8, 336, 336, 3), np.uint8)
    tower, connector = torch_tower(24), Connector("stc_connector", 1024, 4096).eval()
    config = small(24, 1)
    # The one decoder layer is never run here; its weights are zeros of the right shape.
    language = torch_language(1)
    state = released_state(tower, connector, language)
    del language
    params = read_params(InMemory(state), config, "memory", np.float32, scan_layers=False)
    del params["decoder"], state
    gc.collect()
    mean = torch.tensor(config.vision.image_mean).view(3, 1, 1)
    std = torch.tensor(config.vision.image_std).view(3, 1, 1)
    pixels = (torch.tensor(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std
    programs = Programs(config, jnp.float32)
    clip_frames = jnp.arange(8, dtype=jnp.int32)[None, None]

    def theirs():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return connector(hidden[None]).numpy()

    def ours():
        return np.asarray(programs.encode(params, frames[None], clip_frames))

    wanted = theirs()
    error = np.abs(ours() - wanted).max() / np.abs(wanted).max()
    if not error < 1e-4:
        sys.exit(f"the two sides differ by {error:.1e} of their scale: the times compare nothing")
    results = take_turns({"PyTorch": theirs, "ours": ours}, repeats)
    report(console, f"vision + connector, 8 frames (relative error {error:.1e})", results, "ours")


@torch.no_grad()
def language(console, repeats, lengths, new_tokens):
    torch_model = torch_language(LAYERS)
    config = small(2, LAYERS)
    # A tower of two layers and the connector come along unused; only the decoder is kept.
    tower, connector = torch_tower(2), Connector("linear", 1024, 4096)
    config = dataclasses.replace(
        config,
        connector=dataclasses.replace(
            config.connector, kind="linear", sampler="mean", depth=0, mlp_depth=1
        ),
    )
    state = released_state(tower, connector, torch_model)
    params = read_params(InMemory(state), config, "memory", np.float32, scan_layers=False)
    params = {"decoder": params["decoder"]}
    del state, tower, connector
    gc.collect()
    generator = Generator(Programs(config, jnp.float32), params)
    for length in lengths:
        ids = np.random.default_rng(1).integers(3, 32000, length).astype(np.int32)
        request = Request(Spliced(ids, np.full(length, -1, np.int32)))
        row = torch.tensor(ids.astype(np.int64))[None]

        def begin(request=request):
            run = generator.begin([request], Sampling(), (), new_tokens + 1)
            jax.block_until_ready(run.state)
            return run

        def prefill_all(row=row):
            return torch_model(row, use_cache=True)

        def prefill_last(row=row):
            return torch_model(row, use_cache=True, logits_to_keep=1)

        results = take_turns(
            {
                "PyTorch, all logits": prefill_all,
                "PyTorch, last logits": prefill_last,
                "ours": begin,
            },
            repeats,
        )
        report(console, f"prefill, {length} tokens, {LAYERS} layers", results, "ours")

        # Only the loop over new tokens is timed: each side starts from a prefill of its own.
        rows = {"PyTorch": [], "ours": []}
        for number in range(repeats + 1):
            out = prefill_last()
            token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            theirs = [int(token)]
            start = time.perf_counter()
            for _ in range(new_tokens):
                out = torch_model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                theirs.append(int(token))
            spent = {"PyTorch": time.perf_counter() - start}
            run = begin()
            start = time.perf_counter()
            run.advance()
            spent["ours"] = time.perf_counter() - start
            if run.tokens()[0] != theirs:
                sys.exit("the two sides generated different tokens: the times compare nothing")
            if number:  # the first round warms up
                for name, value in spent.items():
                    rows[name].append(value / new_tokens)
        results = {k: (statistics.median(v), min(v), max(v)) for k, v in rows.items()}
        title = f"decode behind {length} tokens, ms per token"
        report(console, title, results, "ours", 1e3, "ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 1536])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--only", choices=("vision", "language"))
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    console = Console()
    console.print(f"{threads} threads; torch {torch.__version__}, jax {jax.__version__}; float32")
    if options.only != "language":
        vision(console, options.repeats)
        gc.collect()
    if options.only != "vision":
        language(console, options.repeats, options.lengths, options.new_tokens)


if __name__ == "__main__":
    main()
