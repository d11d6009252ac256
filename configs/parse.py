"""From `--config` directives to a run: Fiddle's own flag, with typos told in one line.

--config=config:video_sft --config=fiddler:quick_start --config=set:optimizer.learning_rate=1e-5
"""

import ast
import dataclasses
import difflib
import importlib
import re
import types
from collections.abc import Callable, Sequence

import fiddle as fdl
from absl import flags
from fiddle import absl_flags

from vllama2_jax.configs import fiddlers
from vllama2_jax.models.config import config_from_dict
from vllama2_jax.train.config import TrainConfig

# Recipe -> its module here.
RECIPES = {
    name: f"{__package__}.{name}"
    for name in (
        "video_pretrain",
        "video_sft",
        "audio_pretrain",
        "audio_sft",
        "av_joint",
        "tiny_video_pretrain",
        "tiny_video_sft",
        "tiny_audio_pretrain",
        "tiny_audio_sft",
        "tiny_av_joint",
        "decoder_only",
    )
}
_KINDS = ("config", "fiddler", "set")


def build(config: fdl.Config[TrainConfig]) -> TrainConfig:
    """The run that a configuration describes.

    Raises:
      ValueError: naming every value that is missing or of another type.
    """
    return config_from_dict(TrainConfig, _plain(config))


def _plain(value):
    """Plain JSON types of a configuration's own arguments; nothing is built, so nothing fails."""
    if isinstance(value, fdl.Config):
        return {name: _plain(item) for name, item in fdl.ordered_arguments(value).items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def parse(
    directives: Sequence[str], then: Callable[[fdl.Config], None] = lambda config: None
) -> fdl.Config[TrainConfig]:
    """The recipe of the first directive, changed by the others in their order.

    Args:
      directives: "config:RECIPE" first, then "fiddler:NAME", "fiddler:NAME(argument, ...)" or
        "set:path.to.field=value".
      then: changes the recipe behind the last fiddler.

    Raises:
      ValueError: for what is not known, naming what is.
    """
    if not directives:
        raise ValueError("a run needs a recipe, --config=config:NAME")
    kind, _, name = directives[0].partition(":")
    if kind != "config":
        raise ValueError(
            f"the first --config must name a recipe, config:NAME, not {directives[0]!r}; "
            f"known: {', '.join(RECIPES)}"
        )
    recipe = name.split("(")[0]
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}{_meant(recipe, RECIPES)}")
    known = _namespace(recipe)
    for directive in directives[1:]:
        _check(directive, known)
    flag = absl_flags.FiddleFlag(
        name="config",
        default=None,
        default_module=types.SimpleNamespace(**known),
        parser=flags.ArgumentParser(),
        serializer=None,
        help_string="",
    )
    config = None
    last = max(i for i, directive in enumerate(directives) if not directive.startswith("set:"))
    # One by one, so that an error can name its directive.
    for number, directive in enumerate(directives):
        if directive.startswith("set:"):
            _check_assignment(config, directive)
        flag.parse([directive])
        try:
            config = flag.value
        except (ValueError, TypeError, AttributeError, SyntaxError, IndexError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--config={directive}: {reason}") from None
        if number == last:
            then(config)
    return config


def _namespace(recipe: str) -> dict[str, object]:
    """The recipe and the fiddlers that it knows, its own and those for all."""
    own = vars(importlib.import_module(RECIPES[recipe]))
    module = {
        name: value
        for names in (vars(fiddlers), own)
        for name, value in names.items()
        if isinstance(value, types.FunctionType) and value.__module__.startswith(__package__)
    }
    base = vars(importlib.import_module(f"{__package__}.base"))
    return {name: value for name, value in module.items() if name not in base}


def _check(directive: str, known: dict[str, object]) -> None:
    kind, colon, rest = directive.partition(":")
    if kind not in _KINDS or not colon:
        raise ValueError(f"--config={directive}: must begin with {', '.join(_KINDS)} and a colon")
    if kind == "config":
        raise ValueError(f"--config={directive}: there is a recipe already; name one")
    name = rest.split("(")[0]
    if kind == "fiddler" and (name not in known or name in RECIPES):
        names = [name for name in known if name not in RECIPES]
        raise ValueError(f"--config={directive}: unknown fiddler{_meant(name, names)}")
    if kind == "set" and "=" not in rest:
        raise ValueError(f"--config={directive}: needs a value, set:path.to.field=value")


def _check_assignment(config: fdl.Config, directive: str) -> None:
    """Say what is wrong with a `set:`, where Fiddle would say that it could not."""
    path, _, value = directive.removeprefix("set:").partition("=")
    for name in re.findall(r"[^.\[\]]+", path):
        if isinstance(config, tuple | list):
            if not name.isdigit() or int(name) >= len(config):
                raise ValueError(f"--config={directive}: [{name}] is not one of {len(config)}")
            config = config[int(name)]
            continue
        if not isinstance(config, fdl.Config):
            raise ValueError(f"--config={directive}: there is nothing in front of {name!r}")
        fields = [field.name for field in dataclasses.fields(fdl.get_callable(config))]
        if name not in fields:
            raise ValueError(f"--config={directive}: no field {name!r}{_meant(name, fields)}")
        config = getattr(config, name, None)
    if value.lower() not in ("true", "false"):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"--config={directive}: {value!r} is not a value; a string needs quotes, "
                f"{path}={value!r}"
            ) from None


def _meant(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"
