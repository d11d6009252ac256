"""Files of data, local or in a bucket (`gs://`)."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from etils import epath

from vllama2_jax.data.records import Media
from vllama2_jax.media import MediaError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is one of a bucket."""
    return "://" in os.fspath(path)


def read_bytes(path: str) -> bytes:
    """A file's content, local or of a bucket.

    Raises:
      ValueError: if it cannot be read.
    """
    return _with_client(path, lambda: epath.Path(path).read_bytes())


def _exists(path: str) -> bool:
    return _with_client(path, lambda: epath.Path(path).exists())


def _with_client(path: str, ask):
    try:
        return ask()
    except ImportError as error:
        raise ValueError(
            f"{path}: the bucket's client is missing ({error}); `pip install gcsfs` for gs://"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        if not is_remote(path):
            raise
        # A client has its own errors: of credentials, of the network.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: cannot be read ({reason})") from None


@contextlib.contextmanager
def local_media(
    source, number: int, media: Media, media_root: str | os.PathLike
) -> Iterator[list[str]]:
    """Local paths of a record's media, in the order of `Media.paths`.

    What lies in the source or in a bucket is put into temporary files, gone afterwards; errors
    about them name the file as the record does.

    Args:
      source: a `sources.Source`.
      number: of the record.
      media: of the record.
      media_root: folder that paths are relative to, local or of a bucket; a source that holds its
        media does not need it.

    Raises:
      MediaError: for a file of a bucket that is not there; and whatever the body raises.
      ValueError: if the bucket's client is missing.
    """
    held, root = source.media_bytes(number), os.fspath(media_root)
    if held is None and not is_remote(root):
        yield [os.path.join(root, path) for path in media.paths]
        return
    given = [p if held is not None else f"{root.rstrip('/')}/{p}" for p in media.paths]
    with tempfile.TemporaryDirectory() as folder:
        places: dict[str, str] = {}  # a frame that a list names twice is one file, and encoded once
        for i, path in enumerate(given):
            if path in places:
                continue
            if held is None and not _exists(path):
                raise MediaError(path, "no such file", "check the path")
            places[path] = os.path.join(folder, f"{i}{os.path.splitext(path)[1]}")
            with open(places[path], "wb") as file:
                file.write(read_bytes(path) if held is None else held[i])
        try:
            yield [places[path] for path in given]
        except MediaError as error:
            names = {place: path for path, place in places.items()}
            if error.path not in names:
                raise
            raise MediaError(names[error.path], error.cause, error.remedy) from None
