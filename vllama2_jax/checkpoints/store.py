"""Write and read a self-describing model directory: card, tokenizer, and arrays through Orbax.

DIR/model_card.json   shapes, media preset, decoding defaults (card.py)
DIR/tokenizer/        the tokenizer's own files
DIR/params/           the arrays, an Orbax checkpoint
"""

import contextlib
import logging
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vllama2_jax.checkpoints.card import CheckpointError, ModelCard, read_card, write_card
from vllama2_jax.data.files import is_remote

PARAMS, TOKENIZER = "params", "tokenizer"
_DTYPES = ("float32", "bfloat16", "float16")


def place(folder: str | os.PathLike) -> epath.Path:
    """A folder by its whole name: local, or of a bucket (`gs://`)."""
    name = os.fspath(folder)
    if re.match(r"\w{2,}:/[^/]", name):  # what pathlib makes of a bucket's name
        raise ValueError(f"{name}: a bucket's name begins with two slashes, as in gs://NAME")
    return epath.Path(name if is_remote(name) else os.path.abspath(name))


def float_dtype(name: str | jnp.dtype) -> jnp.dtype:
    """A dtype that weights may have.

    Raises:
      ValueError: for any other; int8, say, would cut the weights to whole numbers.
    """
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; known: {', '.join(_DTYPES)}")
    return dtype


def is_saved_model(folder: Path) -> bool:
    """Whether a directory looks like one that `save_model` wrote."""
    return (folder / "model_card.json").is_file()


def flatten(tree) -> dict[str, object]:
    """A nested dict of leaves as {"a/b/c": leaf}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def unflatten(flat: dict[str, object]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def check_tree(found: dict, expected: dict, where: str) -> None:
    """Compare two flat dicts of arrays or abstract arrays; every difference goes into one error.

    Precision may differ (float32 for bfloat16), kind may not (float32 for int32).

    Raises:
      CheckpointError: listing every missing, unexpected and misshapen name, and every name whose
        dtype is of another kind.
    """
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    misshapen, mistyped = [], []
    for name in sorted(set(found) & set(expected)):
        ours, theirs = found[name], expected[name]
        if tuple(ours.shape) != tuple(theirs.shape):
            misshapen.append(f"{name} (found {tuple(ours.shape)}, expected {tuple(theirs.shape)})")
        if _kind(ours.dtype) != _kind(theirs.dtype):
            mistyped.append(f"{name} (found {ours.dtype}, expected {theirs.dtype})")
    problems = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("of another kind", mistyped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit its configuration; " + "; ".join(problems))


def _kind(dtype) -> str:
    # NumPy itself takes bfloat16 for bytes without meaning.
    return "float" if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).kind


def save_model(folder: str | Path, params, card: ModelCard, tokenizer_files=()) -> None:
    """Write a model; `folder` must not exist or be empty.

    Args:
      folder: where to.
      params: nested dict of arrays (unboxed), layers stacked.
      card: what describes them.
      tokenizer_files: paths copied into `folder/tokenizer`.
    """
    folder = place(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; choose another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / PARAMS, params)
    copy_files(tokenizer_files, folder / TOKENIZER)
    # The card comes last: a directory without it is an unfinished one.
    write_card(folder, card)


def copy_files(paths, folder: epath.Path) -> None:
    """Copy files into a folder, local or of a bucket, which is made if there are any."""
    for path in map(epath.Path, paths):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())


def load_model(folder: str | Path, expected, dtype=None) -> tuple[dict, ModelCard]:
    """Read a model that `save_model` wrote.

    Args:
      folder: the directory.
      expected: card -> nested dict of `jax.ShapeDtypeStruct`, the parameters that its
        configuration has (shardings, where set, say where the arrays go).
      dtype: of the returned arrays; None keeps the stored one.

    Raises:
      CheckpointError: if anything is missing, unexpected, misshapen, of another kind of dtype or
        unreadable, or if the card's sizes make no network.
    """
    folder = place(folder)
    card = read_card(folder)
    try:
        wanted = expected(card)
    except Exception as error:  # sizes of the right type that do not fit, such as a zero
        raise CheckpointError(
            f"{folder}: the sizes in its model card make no network ({_first_line(error)}); "
            "convert or save the model again"
        ) from error
    hook = _drop_late_callbacks()
    try:
        # Orbax reports a broken store from threads of its own as well; ours is the one clear line.
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            stored = flatten_metadata(checkpointer.metadata(folder / PARAMS).item_metadata.tree)
            check_tree(stored, flatten(wanted), str(folder))
            target = jax.tree.map(
                lambda want, have: jax.ShapeDtypeStruct(
                    want.shape, dtype or have.dtype, sharding=_sharding(want)
                ),
                wanted,
                unflatten(stored),
            )
            params = checkpointer.restore(folder / PARAMS, target)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the arrays cannot be read ({_first_line(error)}); "
            "the copy is incomplete or damaged, fetch or convert it again"
        ) from error
    sys.unraisablehook = hook
    return params, card


@contextlib.contextmanager
def quiet_orbax():
    """Keep Orbax from logging what an error of ours says."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _drop_late_callbacks():
    """Keep quiet about reads that end after the first failed one has closed Orbax's event loop.

    They end in threads of TensorStore, even after the error has reached the user, so on failure
    this stays in place.

    Returns:
      the hook that was there before.
    """
    hook = sys.unraisablehook
    if getattr(hook, "__qualname__", "").startswith(_drop_late_callbacks.__name__):
        return hook

    def drop(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = drop
    return hook


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _sharding(want):
    return getattr(want, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def flatten_metadata(tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Orbax's stored metadata as {"a/b/c": ShapeDtypeStruct}."""
    return {
        path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in flatten(tree).items()
    }
