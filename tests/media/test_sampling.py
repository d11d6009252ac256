import numpy as np
import pytest

from vllama2_jax.media import PAPER, REFERENCE
from vllama2_jax.media.sampling import clip_range, every_second, linspace, midpoint, sample


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (100, 8, "6 19 31 43 56 68 80 93"),
        (300, 8, "19 56 93 131 168 206 243 280"),
        (300, 16, "9 28 47 65 84 103 121 140 159 178 196 215 234 252 271 290"),
        (17, 16, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"),
        (16, 16, "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
        (9, 8, "1 2 3 4 5 6 7 8"),
        (8, 8, "0 1 2 3 4 5 6 7"),
        (17, 8, "1 3 5 7 9 11 13 15"),
        (5, 8, "0 1 1 2 2 3 3 4"),
        (4, 8, "0 1 1 1 2 2 2 3"),
        (2, 8, "0 0 0 0 1 1 1 1"),
        (1, 8, "0 0 0 0 0 0 0 0"),
        (100, 16, "3 9 15 22 28 34 40 46 53 59 65 71 77 84 90 96"),
        (1800, 16, "56 169 281 394 506 618 731 843 956 1068 1181 1293 1405 1518 1630 1743"),
    ],
)
def test_midpoint_gives_the_originals_frames(total, num_frames, expected):
    assert midpoint(total, num_frames).tolist() == [int(n) for n in expected.split()]


def test_midpoint_rounds_ties_up_as_floor_of_a_half_more():
    for total in (1, 2, 7, 33, 250, 999, 2999):
        for n in (4, 8, 16, 32):
            centres = (total - 1) / n * (np.arange(n) + 0.5)
            assert midpoint(total, n).tolist() == np.floor(centres + 1e-6 + 0.5).tolist()


def test_linspace_is_the_rule_of_june_2024():
    assert linspace(100, 8).tolist() == [0, 14, 28, 42, 56, 70, 84, 99]


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (300, 30, list(range(15, 286, 30))),
        (300, 29.97, [14, 43, 72, 101, 130, 159, 188, 217, 246, 275]),
        (10, 30, [5]),
        (95, 23.976, [11, 34, 57, 80]),
        (4, 0.5, [0, 1, 2, 3]),
    ],
)
def test_fps_mode_takes_one_frame_a_second(total, fps, expected):
    assert every_second(total, fps).tolist() == expected


@pytest.mark.parametrize(
    ("start", "end", "fps", "total", "expected"),
    [
        (2.0, 5.5, 30, 300, (59, 164)),
        (0, 3, 3, 180, (0, 8)),
        (4, 4, 30, 300, (119, 149)),
        (3, 3, 30, 300, (89, 119)),
        (1.5, 2.25, 29.97, 300, (43, 66)),
        (5, 2, 30, 300, (59, 149)),
        (-4, 2, 30, 300, (0, 59)),
        (2, 99, 30, 300, (59, 299)),
        (2, None, 30, 300, (59, 299)),
        (None, 2, 30, 300, (0, 59)),
        (None, None, 30, 300, (0, 299)),
    ],
)
def test_clip_of_the_reference(start, end, fps, total, expected):
    assert clip_range(total, fps, start, end, REFERENCE) == expected


def test_sampling_starts_at_the_clips_first_frame():
    expected = [65, 76, 87, 98, 110, 121, 132, 143]
    assert sample(300, 30, 8, REFERENCE, 2, 5).tolist() == expected


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(2, 5, (60, 149)), (1 / 3, 2 / 3, (10, 19)), (0.04, 0.05, (1, 1)), (0, 0.3, (0, 8))],
)
def test_clip_of_the_paper_is_the_frames_shown_in_it(start, end, expected):
    assert clip_range(300, 30, start, end, PAPER) == expected


@pytest.mark.parametrize("preset", [REFERENCE, PAPER], ids=lambda p: p.name)
@pytest.mark.parametrize(("start", "end"), [(20, 30), (20, None), (10.5, 11), (None, -1)])
def test_a_clip_outside_the_file_is_an_error(preset, start, end):
    with pytest.raises(ValueError, match=r"no frame lies in the clip .* 300 frames, 10\.00 s"):
        clip_range(300, 30, start, end, preset)


def test_the_originals_crash_on_a_very_short_first_clip_is_an_error():
    with pytest.raises(ValueError, match="no frame lies in the clip"):
        clip_range(100, 3, 0, 0.3, REFERENCE)


def test_the_reference_keeps_the_first_32_and_the_paper_all():
    assert sample(6400, 30, 64, REFERENCE).tolist() == midpoint(6400, 64)[:32].tolist()
    assert len(sample(6400, 30, 64, PAPER)) == 64
