"""Tables 2, 3 and 4 of the VideoLLaMA 2 paper: what its models were trained on.

Counts are as printed, so of the precision that is printed ("2.8M"). Table 2's rows add up to
10.85M samples, not to the 12.2M of its last row; both are kept as they are.
"""

import dataclasses

VIDEO, IMAGE, AUDIO, AUDIO_VIDEO = "video-text", "image-text", "audio-text", "audio-video"


@dataclasses.dataclass(frozen=True)
class MixtureRow:
    """One row of a table.

    Attributes:
      datasets: their names; Tables 3 and 4 count several together.
      modality: `VIDEO`, `IMAGE`, `AUDIO` or `AUDIO_VIDEO`.
      task: "captioning", "classification", "vqa", "instruction", or "mixed" where the paper does
        not part them.
      used: samples trained on.
      original: samples of the whole dataset; None where the paper does not say.
      ratio: percent used, as printed; None where the paper does not say.
    """

    datasets: tuple[str, ...]
    modality: str
    task: str
    used: int
    original: int | None = None
    ratio: float | None = None

    @property
    def name(self) -> str:
        """What to call the row: its dataset, or, of several counted together, what they are."""
        if len(self.datasets) > 1:
            return f"{self.modality.removesuffix('-text').replace('-', '_')}_{self.task}"
        name = self.datasets[0].lower().replace("-", "_")
        return name if self.task == "captioning" else f"{name}_{self.task}"


@dataclasses.dataclass(frozen=True)
class PaperMixture:
    """The data of one training step.

    Attributes:
      table: where it stands in the paper.
      rows: its rows.
      printed_used, printed_original, printed_ratio: of the table's row of totals; None where there
        is none for this step alone.
    """

    table: str
    rows: tuple[MixtureRow, ...]
    printed_used: int | None = None
    printed_original: int | None = None
    printed_ratio: float | None = None

    @property
    def used(self) -> int:
        """Samples of all rows together."""
        return sum(row.used for row in self.rows)


VIDEO_PRETRAIN = PaperMixture(
    "Table 2",
    (
        MixtureRow(("Panda-70M",), VIDEO, "captioning", 2_800_000, 70_000_000, 4.0),
        MixtureRow(("WebVid-10M",), VIDEO, "captioning", 4_000_000, 10_000_000, 40.0),
        MixtureRow(("VIDAL-10M",), VIDEO, "captioning", 2_800_000, 10_000_000, 28.0),
        MixtureRow(("InternVid-10M",), VIDEO, "captioning", 650_000, 10_000_000, 6.5),
        MixtureRow(("CC-3M",), IMAGE, "captioning", 595_000, 3_000_000, 19.8),
        MixtureRow(("DCI",), IMAGE, "captioning", 7_800, 7_800, 100.0),
    ),
    printed_used=12_200_000,
    printed_original=103_000_000,
    printed_ratio=11.8,
)
VIDEO_SFT = PaperMixture(
    "Table 3",
    (
        MixtureRow(("VideoChat", "In-house data"), VIDEO, "captioning", 23_000),
        MixtureRow(("Kinetics-710", "SthSthv2"), VIDEO, "classification", 79_000),
        MixtureRow(
            ("NExTQA", "CLEVRER", "EgoQA", "Tgif", "WebVidQA", "RealworldQA", "Hm3d"),
            VIDEO,
            "vqa",
            161_000,
        ),
        MixtureRow(
            ("Valley", "VideoChatGPT", "VideoChat", "VTimeLLM", "VideoChat2"),
            VIDEO,
            "instruction",
            225_000,
        ),
        MixtureRow(("ShareGPT4V",), IMAGE, "captioning", 82_000),
        MixtureRow(("LLaVA",), IMAGE, "vqa", 198_000),
        MixtureRow(("LLaVA",), IMAGE, "instruction", 466_000),
    ),
)
AUDIO_PRETRAIN = PaperMixture(
    "Table 4, pre-training", (MixtureRow(("WavCaps",), AUDIO, "captioning", 400_000),)
)
AUDIO_SFT = PaperMixture(
    "Table 4, instruction tuning",
    (
        MixtureRow(
            (
                "ClothoAQA",
                "WavCaps",
                "AudioCaps",
                "Clotho",
                "MusicCaps",
                "VGGSound",
                "UrbanSound8K",
                "ESC50",
                "TUT2017",
                "VocalSound",
            ),
            AUDIO,
            "mixed",
            702_000,
        ),
    ),
)
AV_JOINT = PaperMixture(
    "Table 4, audio-video joint training",
    (
        MixtureRow(
            ("AVQA", "AVQA-music", "AVSD", "VGGSound", "VideoInstruct-100K", "WebVid"),
            AUDIO_VIDEO,
            "mixed",
            692_000,
        ),
    ),
)
# The last row of Table 4, over its three steps.
AUDIO_PRINTED_USED = 1_800_000
PAPER_MIXTURES = {
    "video_pretrain": VIDEO_PRETRAIN,
    "video_sft": VIDEO_SFT,
    "audio_pretrain": AUDIO_PRETRAIN,
    "audio_sft": AUDIO_SFT,
    "av_joint": AV_JOINT,
}
