"""An independent VideoLLaMA 2 in PyTorch (transformers + timm), and miniatures of released files.

Nothing here uses the package under test. Key names are those of transformers 4.40, in which the
released checkpoints were written.
"""

import dataclasses
import json
from pathlib import Path

import audio_oracle
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "(system if loop.first else '') + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Connector(nn.Module):
    """The original's connectors from timm's RegStage and PyTorch's own layers."""

    def __init__(self, kind: str, into: int, out: int, depth: int = 4):
        super().__init__()
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage

        self.kind = kind
        if kind in ("mlp2x_gelu", "linear"):
            self.mlp = nn.Linear(into, out)
            if kind == "mlp2x_gelu":
                self.mlp = nn.Sequential(self.mlp, nn.GELU(), nn.Linear(out, out))
            return

        def stage(wide):
            return RegStage(
                depth=depth,
                in_chs=wide,
                out_chs=out,
                stride=1,
                dilation=1,
                act_layer=nn.SiLU,
                norm_layer=LayerNorm2d,
            )

        staged = kind in ("stc_connector", "stc_connector_v35", "stp_connector")
        self.s1, self.s2 = (stage(into), stage(out)) if staged else (nn.Identity(), nn.Identity())
        wide = out if staged else into
        step = (1, 2, 2) if kind.startswith("spatial") else (2, 2, 2)
        if kind in ("stp_connector", "spatial_pool"):
            self.sampler = nn.Sequential(nn.AvgPool3d(step), nn.SiLU())
        else:
            padding = 0 if kind == "stc_connector_v35" else 1
            self.sampler = nn.Sequential(
                nn.Conv3d(wide, out, step, stride=step, padding=padding, bias=True), nn.SiLU()
            )
            wide = out
        self.readout = nn.Sequential(nn.Linear(wide, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, x):
        """[B, T, N, D] -> [B, tokens, out]."""
        batch, frames, patches, width = x.shape
        if hasattr(self, "mlp"):
            return self.mlp(x.mean(1))
        grid = int(patches**0.5)
        x = x.reshape(batch * frames, grid, grid, width).permute(0, 3, 1, 2)
        x = self.s1(x)
        x = x.reshape(batch, frames, *x.shape[1:]).transpose(1, 2)
        x = self.sampler(x)
        steps = x.shape[2]
        x = self.s2(x.transpose(1, 2).flatten(0, 1))
        x = x.reshape(batch, steps, *x.shape[1:]).permute(0, 1, 3, 4, 2).flatten(1, 3)
        return self.readout(x)


@dataclasses.dataclass
class Miniature:
    """A small model with random weights, on disk in the released layout and in PyTorch."""

    folder: Path
    tower: nn.Module
    connector: Connector
    language: nn.Module
    processor: object
    tokenizer: object
    tag = "<video>"  # of its media in a prompt

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All of them, as `released_state` takes them."""
        return self.tower, self.connector, self.language

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [T, H, W, 3] -> [tokens, width]."""
        from PIL import Image

        images = [Image.fromarray(frame) for frame in frames]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        if type(self.tower).__name__.startswith("CLIP"):
            hidden = hidden[:, 1:]  # the class token
        return self.connector(hidden[None])[0]

    @torch.no_grad()
    def embed(self, frames, messages) -> torch.Tensor:
        """The spliced prompt's embeddings [1, L, W]."""
        messages = [dict(message) for message in messages]
        if frames is not None:
            first = next(m for m in messages if m["role"] == "user")
            first["content"] = f"{self.tag}\n" + first["content"]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        table = self.language.get_input_embeddings()
        parts = []
        for number, piece in enumerate(text.split(self.tag)):
            if number:
                parts.append(self.encode(frames))
            ids = self.tokenizer(piece, add_special_tokens=False).input_ids
            parts.append(table(torch.tensor(ids, dtype=torch.long)))
        return torch.cat(parts)[None]

    @torch.no_grad()
    def logits(self, frames, messages) -> np.ndarray:
        """float32 [L, V]."""
        return self.language(inputs_embeds=self.embed(frames, messages)).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, frames, messages, count: int) -> list[int]:
        """`count` ids by plain recomputation of the whole row at every step."""
        row, ids = self.embed(frames, messages), []
        for _ in range(count):
            ids.append(int(self.language(inputs_embeds=row).logits[0, -1].argmax()))
            new = self.language.get_input_embeddings()(torch.tensor([[ids[-1]]]))
            row = torch.cat([row, new], dim=1)
        return ids


def write_miniature(
    folder: Path,
    family: str,
    tower: str,
    connector: str,
    *,
    seed: int = 0,
    shards: int = 2,
    num_frames: int = 4,
) -> Miniature:
    """Build random networks and write them as a released checkpoint would lie on disk."""
    networks, sizes, processor, tokenizer = _build(folder, family, tower, connector, seed)
    tower_name, vision_config, language_config = sizes
    config = {
        **language_config,
        "model_type": f"videollama2_{family}",
        "vision_config": vision_config,
        **_connector_config(tower_name, vision_config, connector, num_frames),
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_generation(folder, tokenizer)
    write_shards(folder, released_state(*networks), shards)
    vision, projector, language = networks
    return Miniature(folder, vision, projector, language, processor, tokenizer)


def write_base_miniature(
    root: Path,
    family: str,
    tower: str,
    connector: str,
    *,
    seed: int = 0,
    num_frames: int = 4,
    old_tower: bool = False,
) -> Miniature:
    """A Base repository `root/base`, with the plain `root/language` and `root/tower` it names.

    Returned is the model as the original assembles it: the connector's weights, float32 in
    `mm_projector.bin`, went through float16.

    Args:
      root: where the three directories go.
      family, tower, connector, seed, num_frames: as in `write_miniature`.
      old_tower: write the tower as transformers 4 wrote a whole CLIP or SigLIP (its image half
        under `vision_model.`, beside text tensors), instead of a tower alone as version 5 does.
    """
    base, language_folder, tower_folder = root / "base", root / "language", root / "tower"
    base.mkdir(parents=True, exist_ok=True)
    networks, sizes, processor, tokenizer = _build(language_folder, family, tower, connector, seed)
    vision, projector, language = networks
    _, vision_config, language_config = sizes

    plain = {**language_config, "model_type": family}
    (language_folder / "config.json").write_text(json.dumps(plain))
    _write_generation(language_folder, tokenizer)
    write_shards(language_folder, released_state(nn.Module(), nn.Module(), language), 1)

    vision.save_pretrained(tower_folder)
    if old_tower:
        (tower_folder / "config.json").write_text(
            json.dumps(
                {"model_type": tower, "vision_config": {**vision_config, "model_type": tower}}
            )
        )
        state = {f"vision_model.{name}": tensor for name, tensor in vision.state_dict().items()}
        state |= {"text_model.final_layer_norm.bias": torch.ones(3), "logit_scale": torch.ones(1)}
        save_file(state, tower_folder / "model.safetensors", metadata={"format": "pt"})

    config = {
        # A Base repository repeats the language model's fields; these are wrong on purpose.
        **{name: 1 for name in ("hidden_size", "num_hidden_layers", "vocab_size")},
        "model_type": f"videollama2_{family}",
        "_name_or_path": "language",
        "tune_mm_mlp_adapter": True,
        **_connector_config("tower", vision_config, connector, num_frames),
    }
    (base / "config.json").write_text(json.dumps(config))
    state = released_state(nn.Module(), projector, nn.Module())
    torch.save(state, base / "mm_projector.bin")
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(parameter.half().float())
    return Miniature(base, vision, projector, language, processor, tokenizer)


def _build(folder: Path, family: str, tower: str, connector: str, seed: int):
    """The three random networks, their sizes, the processor, and the tokenizer in `folder`."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, family)
    vision, vision_config, processor = _tower(tower)
    language, language_config = _language(family, len(tokenizer))
    projector = Connector(connector, vision_config["hidden_size"], language_config["hidden_size"])
    for module in (vision, language, projector):
        _randomise(module)
        module.eval().float()
    name = vision_config.pop("_name")
    sizes = (name, vision_config, language_config)
    return (vision, projector, language), sizes, processor, tokenizer


def _connector_config(tower_name: str, vision_config: dict, kind: str, num_frames: int) -> dict:
    return {
        "mm_vision_tower": tower_name,
        "mm_hidden_size": vision_config["hidden_size"],
        "mm_projector_type": kind,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "num_frames": num_frames,
    }


def _write_generation(folder: Path, tokenizer) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id, "do_sample": False})
    )


def released_state(
    vision, projector, language, audio=None, audio_connector=None
) -> dict[str, torch.Tensor]:
    """The networks' tensors under the names of a released checkpoint."""
    state = {}
    if audio is not None:
        for name, tensor in audio_oracle.released_names(audio).items():
            state[f"model.audio_tower.{name}"] = torch.from_numpy(tensor)
        for name, tensor in audio_connector.state_dict().items():
            state[f"model.mm_projector_a.{name}"] = tensor
    for name, tensor in vision.state_dict().items():
        if not name.startswith("vision_model."):
            name = f"vision_model.{name}"
        state[f"model.vision_tower.vision_tower.{name}"] = tensor
    for name, tensor in projector.state_dict().items():
        state[f"model.mm_projector.{name.removeprefix('mlp.')}"] = tensor
    for name, tensor in language.state_dict().items():
        if ".mlp.experts.gate_up_proj" in name:
            for expert, both in enumerate(tensor):
                stem = name.split(".mlp.")[0] + f".block_sparse_moe.experts.{expert}"
                w1, w3 = both.chunk(2)
                state[f"{stem}.w1.weight"], state[f"{stem}.w3.weight"] = w1, w3
        elif ".mlp.experts.down_proj" in name:
            for expert, w2 in enumerate(tensor):
                stem = name.split(".mlp.")[0] + f".block_sparse_moe.experts.{expert}"
                state[f"{stem}.w2.weight"] = w2
        elif ".mlp.gate.weight" in name:
            state[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
        else:
            state[name] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def write_shards(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    """Safetensors files and their index."""
    names = sorted(state)
    weight_map = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_tokenizer(folder: Path, family: str):
    """A small byte-level BPE with the family's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    chatml = family == "qwen2"
    specials = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chatml else ["<unk>", "<s>", "</s>"]
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["What is shown in the video? user assistant system helpful"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=specials[2],
        pad_token=specials[0],
        **({} if chatml else {"bos_token": "<s>", "unk_token": "<unk>"}),
        additional_special_tokens=specials[1:2],
    )
    fast.chat_template = CHATML_TEMPLATE if chatml else SYSTEM_TEMPLATE
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _tower(kind: str):
    if kind == "clip":
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

        sizes = dict(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            hidden_act="quick_gelu",
        )
        module = CLIPVisionModel(CLIPVisionConfig(**sizes, attn_implementation="eager"))
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
        return module, {**sizes, "_name": "openai/clip-miniature"}, processor
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    sizes = dict(
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=31,
        patch_size=7,
        hidden_act="gelu_pytorch_tanh",
    )
    module = SiglipVisionModel(SiglipVisionConfig(**sizes, attn_implementation="eager"))
    processor = SiglipImageProcessorPil(size={"height": 31, "width": 31})
    return module, {**sizes, "_name": "google/siglip-miniature"}, processor


def _language(family: str, vocab: int):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(
        vocab_size=vocab,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6 if family == "qwen2" else 1e-5,
        rope_theta=1e6,
        max_position_embeddings=4096,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    if family == "mixtral":
        fields |= dict(num_local_experts=8, num_experts_per_tok=2)
    kwargs = {k: v for k, v in fields.items() if k != "rope_theta"}
    config = AutoConfig.for_model(
        family, **kwargs, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config), fields


def _randomise(module: nn.Module) -> None:
    """Weights large enough that every part matters, unlike a small-variance initialisation."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 / max(parameter[0].numel(), 1) ** 0.25)
        elif "weight" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1)
