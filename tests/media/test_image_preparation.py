import numpy as np
import pytest
from PIL import Image

from vllama2_jax.media import CLIP_336, SIGLIP_384, normalise, prepare
from vllama2_jax.media.image import pad_to_square

SIZES = [(640, 360), (360, 640), (500, 333), (641, 359), (100, 400), (336, 336), (31, 47), (7, 900)]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processor(spec):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    if spec is CLIP_336:
        size = {"height": spec.size, "width": spec.size}
        return CLIPImageProcessorPil(size={"shortest_edge": spec.size}, crop_size=size)
    return SiglipImageProcessorPil(size={"height": spec.size, "width": spec.size})


@pytest.mark.parametrize("spec", [CLIP_336, SIGLIP_384], ids=["clip", "siglip"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_frames_equal_the_pil_processors_bit_for_bit(spec, size):
    image = noise(*size)
    theirs = processor(spec)
    crop = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")
    whole = theirs(image, return_tensors="np")
    ours = prepare(image, spec, square_pad=False)
    assert ours.dtype == np.uint8 and ours.shape == (spec.size, spec.size, 3)
    assert np.array_equal(ours, crop["pixel_values"][0].transpose(1, 2, 0))
    numbers = normalise(ours, spec)
    assert numbers.dtype == np.float32
    assert np.array_equal(numbers, whole["pixel_values"][0].transpose(1, 2, 0))


def test_normalisation_of_every_byte_equals_the_processor():
    ramp = np.arange(256, dtype=np.uint8).repeat(3 * 16 * 16).reshape(-1, 16, 16, 3)
    ramp = np.concatenate([np.tile(r, (21, 21, 1))[None] for r in ramp])[:, :336, :336]
    theirs = processor(CLIP_336)(list(ramp[::5]), return_tensors="np")["pixel_values"]
    assert np.array_equal(normalise(ramp[::5], CLIP_336), theirs.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("spec", "colour"), [(CLIP_336, (122, 116, 104)), (SIGLIP_384, (127,) * 3)]
)
@pytest.mark.parametrize("size", [(64, 37), (37, 64)])
def test_padding_is_the_mean_colour_around_the_middle(spec, colour, size):
    image = noise(*size)
    square = np.asarray(pad_to_square(Image.fromarray(image), spec.mean))
    expected = np.full((64, 64, 3), colour, np.uint8)
    left, top = (64 - size[0]) // 2, (64 - size[1]) // 2
    expected[top : top + size[1], left : left + size[0]] = image
    assert np.array_equal(square, expected)
    padded = prepare(image, spec, square_pad=True)
    assert np.array_equal(padded, prepare(expected, spec, square_pad=False))


def test_every_mode_becomes_rgb():
    image = Image.fromarray(noise(50, 40))
    for mode in ("L", "RGBA", "P", "1", "CMYK", "LA"):
        expected = np.asarray(image.convert(mode).convert("RGB"))
        ours = prepare(image.convert(mode), SIGLIP_384, False)
        assert np.array_equal(ours, prepare(expected, SIGLIP_384, False))
    grey = noise(50, 40)[..., 0]
    assert np.array_equal(
        prepare(grey, CLIP_336, False), prepare(np.stack([grey] * 3, -1), CLIP_336, False)
    )


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(bad):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]|no pixels"):
        prepare(bad, CLIP_336, False)
