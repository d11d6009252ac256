"""Compiled programs on disk, which are taken again where the same would be compiled.

A folder of them is JAX's persistent compilation cache. JAX names a program by a hash of its code,
of the versions of jaxlib and of the compiler (libtpu's build), of the compiler's flags, and of the
topology, so that only what would have been compiled is taken. What it does not say is why nothing
was taken; for that, a note beside each planned program says what it was made for. Programs are
XLA's own serialisation, not pickle, but they are machine code: take them only from folders that
nobody else can write to.
"""

import contextlib
import importlib.util
import json
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

_HIT = "/jax/compilation_cache/cache_hits"
_PROGRAM, _NOTE = "-cache", "-cache.json"
# What JAX leaves out of a program's name: they change no program.
_NO_MATTER = ("--xla_force_host_platform_device_count", "--xla_dump_")


class Compiling(NamedTuple):
    """A program that has been compiled, or taken from disk.

    Attributes:
      compiled: it.
      seconds: how long that took.
      taken: whether it came from disk.
    """

    compiled: jax.stages.Compiled
    seconds: float
    taken: bool


def compile_program(lowered: jax.stages.Lowered) -> Compiling:
    """Compile, or take what the folder in use (`using_folder`) holds."""
    taken, here = [], threading.get_ident()

    def hear(event: str, **_):
        if event == _HIT and threading.get_ident() == here:
            taken.append(event)

    jax.monitoring.register_event_listener(hear)
    try:
        began = time.perf_counter()
        compiled = lowered.compile()
        return Compiling(compiled, time.perf_counter() - began, bool(taken))
    finally:
        jax.monitoring.unregister_event_listener(hear)


def open_folder(folder: epath.Path) -> list[str]:
    """Make a folder of programs where it is missing, and drop what is damaged in it.

    JAX would not write where a damaged file lies.

    Returns:
      Names of the files that were dropped.

    Raises:
      ValueError: if it cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no folder for programs ({error}); name another") from None
    if "://" in os.fspath(folder):  # a bucket shows a file when it is whole
        return []
    damaged = [file for file in folder.glob(f"*{_PROGRAM}") if not _is_whole(file)]
    for file in damaged:
        file.unlink()
    return [file.name for file in damaged]


def _is_whole(file: epath.Path) -> bool:
    """Whether a file can be unpacked; true where that cannot be told."""
    unpack = zlib.decompressobj()
    with file.open("rb") as stream:
        piece = stream.read(1 << 20)
        if piece[:1] != b"\x78":  # of another packer
            return True
        try:
            while piece:
                unpack.decompress(piece)
                piece = stream.read(1 << 20)
        except zlib.error:
            return False
    return unpack.eof


@contextlib.contextmanager
def using_folder(folder: str | os.PathLike | None) -> Iterator[None]:
    """Take programs from a folder, and keep there what takes a second or more to compile.

    Of several processes the first one keeps; all of them take, so that all must see the folder.

    Args:
      folder: of `open_folder`. None changes nothing.
    """
    if folder is None:
        yield
        return
    wanted = {
        "jax_compilation_cache_dir": os.fspath(folder),
        "jax_enable_compilation_cache": True,
        # XLA's own caches would write the folder's path into the names of programs.
        "jax_persistent_cache_enable_xla_caches": "",
    }
    with contextlib.ExitStack() as stack:
        stack.callback(compilation_cache.reset_cache)  # last, when settings are as they were
        stack.enter_context(_settings(wanted))
        compilation_cache.reset_cache()  # it is otherwise opened once in a process
        yield


def keep_program(
    lowered: jax.stages.Lowered, folder: epath.Path, devices: Sequence[jax.Device], about: dict
) -> Compiling:
    """Compile a program for devices that need not be here, and keep it with a note.

    Args:
      lowered: of the program.
      folder: where to, of `open_folder`.
      devices: that it is for.
      about: the program, in plain JSON types, for `reason`.

    Raises:
      ValueError: if JAX keeps no programs for these devices.
    """
    # Through a folder of its own: JAX would first try to load what is in the given one, which it
    # cannot without the devices.
    all_of_them = {"jax_persistent_cache_min_compile_time_secs": 0}
    with tempfile.TemporaryDirectory() as new, using_folder(new), _settings(all_of_them):
        made = compile_program(lowered)
        files = list(Path(new).glob(f"*{_PROGRAM}"))
        if not files:
            raise ValueError(f"JAX keeps no programs for {devices[0].platform} devices")
        note = json.dumps({"for": surroundings(devices), "program": about}, indent=1)
        for file in files:
            _write(folder / file.name, file.read_bytes())
            _write(folder / f"{file.name}.json", note.encode())
    return made


def _write(path: epath.Path, data: bytes) -> None:
    """Whole or not at all."""
    part = path.parent / f".{path.name}.part"
    part.write_bytes(data)
    part.replace(path)


def surroundings(devices: Sequence[jax.Device]) -> dict[str, str]:
    """What a program depends on beside itself, in words."""
    first = devices[0]
    places = [getattr(device, "coords", None) for device in devices]
    shape = ""
    if all(places):
        shape = " in " + "x".join(str(max(axis) + 1) for axis in zip(*places, strict=True))
    flags = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    return {
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "compiler": " ".join(first.client.platform_version.split()),
        "devices": f"{len(devices)} {first.device_kind}{shape}",
        "flags": " ".join(sorted(f for f in flags.split() if not f.startswith(_NO_MATTER))),
        "packed by": "zstandard" if importlib.util.find_spec("zstandard") else "zlib",
    }


def reason(folder: epath.Path, devices: Sequence[jax.Device], about: dict) -> str:
    """Why a folder's planned programs were not taken for this one; "" where it holds none.

    Args:
      folder: as of `keep_program`.
      devices: that the program runs on.
      about: the program, as in `keep_program`.
    """
    here = {"for": surroundings(devices), "program": about}
    found = []
    for file in folder.glob(f"*{_NOTE}"):
        try:
            note = json.loads(file.read_text())
            found.append([_differences(note[part], here[part]) for part in here])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # an explanation is no reason to fail
    if not found:
        return ""
    # The nearest one: for the same machine first, and then of the fewest differences.
    nearest = min(found, key=lambda parts: (len(parts[0]), len(parts[1])))
    return "; ".join([*nearest[0], *nearest[1]]) or "the code that makes it has changed"


def _differences(there: dict, here: dict) -> list[str]:
    return [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name)
    ]


@contextlib.contextmanager
def _settings(wanted: dict[str, object]) -> Iterator[None]:
    """JAX's configuration, for a while; also of other threads."""
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
