"""How released checkpoints saw their media, quirk by quirk, and what the paper says instead."""

import dataclasses

PIECE_SECONDS = 2  # of a video's track that is heard in pieces


@dataclasses.dataclass(frozen=True)
class SoundPreset:
    """The numeric choices of hearing.

    Attributes:
      reader: of sound by itself. "librosa": the first channel, filled with silence to the tower's
        length at its own rate, then resampled through its spectrum. "ffmpeg": all channels mixed
        and resampled by FFmpeg, as the tracks of videos always are.
      random_crop: of sound longer than the tower's length, a stretch at random is heard, at
        inference too; otherwise its first.
      joint_pieces: a video's track, heard beside its pictures, is so many pieces of two seconds
        which cover it evenly, one after the other; 0 means that it is heard like other sound.
      joint_ignores_times: those pieces cover the whole track, whatever part of the video is seen.
      bfloat16: filter banks are rounded to bfloat16.
    """

    reader: str
    random_crop: bool
    joint_pieces: int
    joint_ignores_times: bool
    bfloat16: bool

    def __post_init__(self):
        if self.reader not in ("librosa", "ffmpeg"):
            raise ValueError(f"unknown reader {self.reader!r}; known: librosa, ffmpeg")
        if self.joint_pieces < 0:
            raise ValueError(f"joint_pieces is {self.joint_pieces}; it is 0 or more")

    @property
    def joint_seconds(self) -> float:
        """Sound that the pieces of a video's track make."""
        return self.joint_pieces * PIECE_SECONDS


REFERENCE_SOUND = SoundPreset(
    reader="librosa",
    random_crop=True,
    joint_pieces=8,
    joint_ignores_times=True,
    bfloat16=True,
)
PAPER_SOUND = SoundPreset(
    reader="ffmpeg",
    random_crop=False,
    joint_pieces=0,
    joint_ignores_times=False,
    bfloat16=False,
)


@dataclasses.dataclass(frozen=True)
class MediaPreset:
    """The numeric choices of reading media; plain JSON types, stored in a model card.

    Attributes:
      name: "reference", "paper", or your own.
      square_pad: pad frames to a square in the tower's mean colour before resizing. The original
        trains with it (SFT) but does not pad in inference, where CLIP cuts the long sides and
        SigLIP squashes them.
      sampling: "midpoint" takes the middle of each of `num_frames` equal segments; "linspace" is
        the rule of June 2024, evenly spaced from first to last frame, truncated.
      clip_end_minus_one: a clip from s to e seconds is the frames max(int(s*fps) - 1, 0) to
        int(e*fps) - 1; otherwise every frame n with s <= n/fps < e, and one at least.
      gif_drops_repeats: frames of a GIF are picked by membership in the set of sampled numbers, so
        a short one gives fewer, and black frames fill the rest.
      gif_fps: frames per second that a GIF is taken to have; 0 means its own average.
      folder_fps: frames per second of a folder of images.
      black_frames_transposed: a black filler frame has the width and height of the frame before it
        swapped (visible only together with `square_pad`).
      max_frames: a clip is cut to its first so many frames, not sampled again; 0 means no cut.
      exif_rotation: turn image files as their EXIF orientation says.
      sound: how sound is read.
    """

    name: str
    square_pad: bool
    sampling: str
    clip_end_minus_one: bool
    gif_drops_repeats: bool
    gif_fps: float
    folder_fps: float
    black_frames_transposed: bool
    max_frames: int
    exif_rotation: bool
    sound: SoundPreset | None = None  # as in older cards: that of the preset's name

    def __post_init__(self):
        if self.sound is None:
            sound = PAPER_SOUND if self.name == "paper" else REFERENCE_SOUND
            object.__setattr__(self, "sound", sound)
        if self.sampling not in ("midpoint", "linspace"):
            raise ValueError(f"unknown sampling {self.sampling!r}; known: midpoint, linspace")


REFERENCE = MediaPreset(
    name="reference",
    square_pad=False,
    sampling="midpoint",
    clip_end_minus_one=True,
    gif_drops_repeats=True,
    gif_fps=25.0,
    folder_fps=3.0,
    black_frames_transposed=True,
    max_frames=32,
    exif_rotation=False,
)
PAPER = MediaPreset(
    name="paper",
    square_pad=True,
    sampling="midpoint",
    clip_end_minus_one=False,
    gif_drops_repeats=False,
    gif_fps=0.0,
    folder_fps=3.0,
    black_frames_transposed=False,
    max_frames=0,
    exif_rotation=True,
    sound=PAPER_SOUND,
)
PRESETS = {preset.name: preset for preset in (REFERENCE, PAPER)}
