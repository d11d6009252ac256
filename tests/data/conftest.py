"""What the tests of the data pipeline share."""

from importlib import resources

import numpy as np
import pytest
from feeding import Setting, record, write
from PIL import Image

from vllama2_jax.data.toybox.files import write_video
from vllama2_jax.text import load_tokenizer


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return load_tokenizer(resources.files("vllama2_jax") / "assets" / "tiny" / "tokenizer")


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory):
    """Pictures of one colour each, told by their first channel, and a video of four shades."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(8):
        picture = np.full((20, 20, 3), (20 * number, 90, 200), np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
    shades = (
        np.full((16, 32, 32, 3), 60, np.uint8)
        + 10 * np.arange(16, dtype=np.uint8)[:, None, None, None]
    )
    write_video(folder / "shades.mp4", shades)
    (folder / "broken.mp4").write_bytes((folder / "shades.mp4").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def mixed_sources(media_folder):
    seen = [record(f"image-{i}", "image", f"{i}.png", turns=1 + i % 3) for i in range(8)]
    seen.append(record("shades", "video", "shades.mp4"))
    told = [record(f"text-{i}", answer="Red. " * (1 + i), dataset="words") for i in range(10)]
    return write(media_folder / "seen.json", seen), write(media_folder / "told.json", told)


@pytest.fixture(scope="module")
def setting(tiny_tokenizer, media_folder, mixed_sources):
    return Setting(tiny_tokenizer, media_folder, mixed_sources)
