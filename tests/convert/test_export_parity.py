"""An exported model in PyTorch, from its files alone: transformers, timm and our logits."""

import json

import jax
import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax.convert.export import export_huggingface
from vllama2_jax.text import render

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import oracle  # noqa: E402
from small_models import small_model, tensors_of, tiny_model  # noqa: E402

MESSAGES = [
    {"role": "user", "content": "What is shown in the video?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And then?"},
]
_HEARING = ("model.audio_tower.", "model.mm_projector_a.")


class Words:
    """Our tokenizer and template behind the two methods of transformers that the oracle uses."""

    def __init__(self, model):
        self._model = model

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return render(messages, self._model.template, add_generation_prompt=add_generation_prompt)

    def __call__(self, text, add_special_tokens):
        return transformers.BatchEncoding({"input_ids": self._model.tokenizer.encode(text)})


def pytorch_model(folder, depth=4):
    """What transformers and timm make of an exported directory, every tensor in its place."""
    data = json.loads((folder / "config.json").read_text())
    sizes, state = data["vision_config"], tensors_of(folder)
    kind = {"clip_vision_model": "CLIPVision", "siglip_vision_model": "SiglipVision"}
    kind = kind[sizes["model_type"]]
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    tower = getattr(transformers, f"{kind}Model")(config)
    connector = oracle.Connector(
        data["mm_projector_type"], data["mm_hidden_size"], data["hidden_size"], depth
    )
    for module, prefix, dropped in (
        (tower, "model.vision_tower.vision_tower.vision_model.", "vision_model."),
        (connector, "model.mm_projector.", "mlp."),
    ):
        names = {name: prefix + name.removeprefix(dropped) for name in module.state_dict()}
        module.load_state_dict({own: state.pop(name) for own, name in names.items()})
        module.eval()
    # What hears is compared in tests/test_av_parity.py.
    state = {name: x for name, x in state.items() if not name.startswith(_HEARING)}
    cls = getattr(transformers, data["architectures"][0].removeprefix("Videollama2"))
    # By its own type transformers 5 knows how to join Mixtral's experts.
    data["model_type"] = cls.config_class.model_type
    language, report = cls.from_pretrained(
        folder,
        config=cls.config_class.from_dict(data),
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert not report["unexpected_keys"] & set(state)
    size = sizes["image_size"]
    processor = (
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        if kind == "CLIPVision"
        else transformers.SiglipImageProcessorPil(size={"height": size, "width": size})
    )
    return oracle.Miniature(folder, tower, connector, language.eval(), processor, None)


def assert_equal_logits(model, reference):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (model.config.num_frames, 45, 60, 3), np.uint8)
    with jax.default_matmul_precision("highest"):
        ours = model.logits(frames, MESSAGES)
    theirs = reference.logits(frames, MESSAGES)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("name", "connector"),
    [("2-7B", "stc_connector"), ("2-8x7B", "mlp2x_gelu"), ("2.1-7B-16F", "linear")],
)
def test_an_exported_model_has_our_logits_in_pytorch(name, connector, tmp_path):
    model = small_model(tmp_path / "tokenizers", name, connector)
    out = tmp_path / "out"
    export_huggingface(out, *model, dtype="float32", max_shard_bytes=100_000)
    reference = pytorch_model(out)
    reference.tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert_equal_logits(vl.load(out, dtype="float32"), reference)


def test_tiny_has_our_logits_in_pytorch(tmp_path):
    """Its connector is `stc_connector_v35`, with a single block in each stage."""
    export_huggingface(tmp_path, *tiny_model(), dtype="float32")
    model = vl.load("tiny", dtype="float32")
    reference = pytorch_model(tmp_path, depth=1)
    reference.tokenizer = Words(model)
    assert_equal_logits(model, reference)
