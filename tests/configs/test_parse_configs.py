"""Directives change a recipe as they say, and a typo is one clear line."""

import fiddle as fdl
import pytest

from vllama2_jax.configs import RECIPES, build, parse
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.data.paper_mixtures import PAPER_MIXTURES
from vllama2_jax.train.trainable import Rule
from vllama2_jax.weights import TINY


def made(*directives, **shortcuts):
    return build(resolve(list(directives), Shortcuts(**shortcuts)))


@pytest.mark.parametrize("step", PAPER_MIXTURES)
def test_recipes_read_the_papers_samples(step):
    config, rows = made(f"config:{step}"), PAPER_MIXTURES[step].rows
    sources = config.data.sources[: len(rows)]
    assert [source.name for source in sources] == [row.name for row in rows]
    if config.data.mix == "counts":
        assert [source.share for source in sources] == [row.used for row in rows]


# Steps, learning rates, batches, epochs: the table of the released scripts.
@pytest.mark.parametrize(
    ("recipe", "learning_rate", "rows", "epochs"),
    [
        ("video_pretrain", 1e-3, 256, 1),
        ("video_sft", 2e-5, 128, 1),
        ("audio_pretrain", 1e-3, 1024, 1),
        ("audio_sft", 2e-5, 128, 2),
        ("av_joint", 2e-5, 128, 2),
    ],
)
def test_recipes_step_as_the_released_scripts(recipe, learning_rate, rows, epochs):
    config = made(f"config:{recipe}")
    assert (config.optimizer.learning_rate, config.rows, config.epochs) == (
        learning_rate,
        rows,
        epochs,
    )
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (config.optimizer.warmup_ratio, config.optimizer.weight_decay) == (0.03, 0)
    assert config.optimizer.clip_norm is None and config.data.max_tokens == 2048


def test_directives_apply_in_their_order():
    config = made("config:video_sft", "set:rows=3", "fiddler:quick_start", "set:rows=5")
    assert config.rows == 5
    assert [s.share for s in config.data.sources] == [100_000, 625_000, 40_000]
    assert parse(["config:video_sft", "set:data.buckets=(256, 512)"]).data.buckets == (256, 512)
    assert made("config:video_sft", "set:rules[0].lr_scale=2").rules[0].lr_scale == 2.0
    assert made("config:video_sft", "set:data.packing=true").data.packing is True
    assert made("config:video_sft", "fiddler:data_root('gs://b/d')").data.sources[0].file == (
        "gs://b/d/video_sft/video_captioning.json"
    )


@pytest.mark.parametrize(
    ("directives", "said"),
    [
        (["config:video_sf"], "unknown recipe 'video_sf'; did you mean 'video_sft'?"),
        (["set:rows=3"], "the first --config must name a recipe, config:NAME, not 'set:rows=3'"),
        (["config:video_sft", "config:av_joint"], "there is a recipe already; name one"),
        (["config:video_sft", "config_file:x.json"], "must begin with config, fiddler, set"),
        (["config:video_sft", "config_str:x"], "must begin with config, fiddler, set"),
        (["config:video_sft", "fiddler:quick_stat"], "did you mean 'quick_start'?"),
        (["config:video_sft", "fiddler:base"], "unknown fiddler"),
        (["config:video_sft", "fiddler:data_root"], "missing 1 required positional argument"),
        (["config:tiny_video_sft", "fiddler:data_root('d')"], "clips is made in memory"),
        (["config:video_sft", "set:rows"], "needs a value"),
        (["config:video_sft", "set:rows=abc"], "a string needs quotes, rows='abc'"),
        (["config:video_sft", "set:optimizer.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["config:video_sft", "set:data.sources[9].name='x'"], "[9] is not one of 7"),
        (["config:video_sft", "set:rows.x=1"], "there is nothing in front of 'x'"),
    ],
)
def test_a_typo_is_one_line_that_names_it(directives, said):
    with pytest.raises(ValueError) as caught:
        parse(directives)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("directive", "said"),
    [
        ("set:rows='x'", "rows must be a whole number, not 'x'"),
        ("set:optimizer.learning_rate=None", "optimizer.learning_rate must be a number"),
        ("set:save.every=0", "save.every 0 must be at least 1"),
        ("set:micro_batches=3", "rows 128 cannot be split into 3 equal micro_batches"),
        ("set:average='token'", "unknown average 'token'; known: tokens, micro_batches"),
        ("set:remat='all'", "unknown remat 'all'; known: none"),
        ("set:data.mix='joint'", "with mix 'joint' it must be left out"),
        ("set:data.sources[0].share=0.5", "it must be a whole number of samples"),
        ("set:data.sources[0].name='llava_vqa'", "names must differ"),
        ("set:steps=3", "give one of them"),
        ("set:optimizer.warmup_ratio=2", "warmup_ratio 2.0 must be at least 0 and below 1"),
    ],
)
def test_values_of_another_type_are_refused_by_name(directive, said):
    with pytest.raises(ValueError) as caught:
        made("config:video_sft", directive)
    assert said in str(caught.value)


def test_every_recipe_describes_itself():
    for name, module in RECIPES.items():
        config = parse([f"config:{name}"])
        assert isinstance(config, fdl.Config) and config.name == name
        assert module.endswith(name)


def test_plain_options_stand_in_front_of_directives():
    config = made(
        "config:video_sft", "set:rows=7", batch=4, steps=9, save_every=2, workers=0, seed=1
    )
    assert (config.rows, config.steps, config.epochs, config.save.every) == (7, 9, None, 2)
    assert (config.data.workers, config.seed) == (0, 1)


def test_plain_options_win_over_fiddlers():
    config = made(
        "config:video_sft", "fiddler:released_scripts", data="mine.json", model="my/model"
    )
    assert config.data.sources[0].file == "mine.json" and config.start.model == "my/model"


def test_data_of_ones_own_replaces_the_recipes():
    config = made("config:video_sft", data="a/clips.json", media_root="m", validation="a/v.json")
    (source,) = config.data.sources
    assert (source.name, source.file, source.media_root) == ("clips", "a/clips.json", "m")
    assert source.share is None and config.validation.sources[0].file == "a/v.json"


def test_the_model_decides_the_recipe_where_none_is_named():
    config = made(data="x.json")
    assert (config.name, config.start.model) == ("tiny_av_joint", "tiny")
    assert (config.data.max_length, config.data.buckets) == (None, None)
    assert made(model="tiny", data="x.json").name == "tiny_av_joint"
    assert made(model="2.1-7B-AV", data="x.json").data.mix == "counts"  # of one source
    assert made(model="2.1-7B-16F", data="x.json").name == "video_sft"
    assert made(model="DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", data="x.json").name == "av_joint"
    assert made(model=str(TINY), data="x.json").name == "av_joint"  # a directory tells itself
    assert made(model="nobody/knows", data="x.json").name == "video_sft"


def test_a_model_brings_the_parts_that_pretraining_takes_from_elsewhere():
    start = made("config:video_pretrain", model="2.1-7B-16F").start
    assert start.vision == "google/siglip-so400m-patch14-384"
    assert start.decoder == "Qwen/Qwen2-7B-Instruct" and start.connector == "random"
    start = made("config:video_pretrain", model="DAMO-NLP-SG/VideoLLaMA2-7B").start
    assert start.decoder == "mistralai/Mistral-7B-Instruct-v0.2"
    start = made("config:video_pretrain", model="some/folder").start
    assert (start.vision, start.connector, start.decoder) == ("stored", "random", "stored")


def test_lora_trains_adapters_and_the_whole_connector():
    rules = made("config:video_sft", lora=16).rules
    assert rules[0] == Rule("connector/.*", "train") and rules[-1] == Rule(".*", "freeze")
    assert (rules[1].action, rules[1].rank, rules[1].alpha) == ("lora", 16, 32)
    (rule,) = [
        rule for rule in made("config:video_sft", "fiddler:qlora").rules if rule.action == "lora"
    ]
    assert (rule.rank, rule.alpha, rule.quantize) == (128, 256, "nf4")
    of_both = made("config:av_joint", "fiddler:qlora").rules
    assert [rule.pattern for rule in of_both[:2]] == ["connector/.*", "audio_connector/.*"]
    assert [rule.quantize for rule in of_both] == ["", "", "nf4", ""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1, "epochs": 1}, "give one"),
        ({"media_root": "x"}, "give both"),
        ({"batch": 0}, "--batch 0 must be at least 1"),
        ({"save_every": 0}, "--save-every 0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Shortcuts(**options)
