"""What a plan of answering says."""

import dataclasses

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import Communication
from vllama2_jax.parallel.roofline import Roofline
from vllama2_jax.parallel.topology import Topology
from vllama2_jax.plan.result import Memory, sent_to_json
from vllama2_jax.train.flops import StepFlops


@dataclasses.dataclass(frozen=True)
class Serving:
    """What is planned.

    Attributes:
      program: "prefill", a batch of prompts, or "decode", a new token of every row.
      rows: that are answered together.
      length: slots of a prompt, a bucket of `infer.buckets`.
      room: for new tokens, as inference makes it.
    """

    program: str
    rows: int
    length: int
    room: int

    @property
    def capacity(self) -> int:
        """Slots of a row's cache."""
        return self.length + self.room


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """What one of the programs takes on a topology; a step is one run, or one new token.

    Attributes:
      serving, network, topology, layout: what was asked for.
      mesh: sizes of its axes.
      memory: of each chip.
      cache: bytes of keys and values of each chip, which are among the arguments; and of all rows.
      flops: of a step, on all chips.
      compile_seconds: tracing and compiling.
      sent: collectives of a step, and kernels; None where it does not fit.
      roofline: None likewise, and for chips without a stated peak.
      refusal: the compiler's word on a program that does not fit.
      hlo: where the program's text was kept.
    """

    serving: Serving
    network: VLlama2Config
    topology: Topology
    layout: str
    mesh: dict[str, int]
    memory: Memory
    cache: tuple[int, int]
    flops: StepFlops
    compile_seconds: float | None = None
    sent: Communication | None = None
    roofline: Roofline | None = None
    refusal: str | None = None
    hlo: str | None = None

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.memory.fits

    @property
    def tokens_per_second(self) -> float | None:
        """Of prompts that are read, or of answers that are written, all rows together."""
        each = self.serving.length if self.serving.program == "prefill" else 1
        return self.roofline and self.serving.rows * each / self.roofline.step_seconds

    def to_json(self) -> dict:
        """The plan in plain JSON types; keys as of `result.Plan`."""
        serving = self.serving
        return {
            "fits": self.fits,
            "refusal": self.refusal,
            "program": serving.program,
            "chips": self.topology.num_chips,
            "topology": self.topology.name,
            "model": self.network.name,
            "mesh": self.mesh,
            "layout": self.layout,
            "batch": {"rows": serving.rows, "length": serving.length, "room": serving.room},
            "compile_seconds": self.compile_seconds,
            "hbm_bytes_per_chip": {**self.memory.to_json(), "cache": self.cache[0]},
            "model_flops_per_step": self.flops.model,
            "hardware_flops_per_step": self.flops.hardware,
            **sent_to_json(self.sent),
            "hlo": self.hlo,
            "roofline": self.roofline and dataclasses.asdict(self.roofline),
            "tokens_per_second": self.tokens_per_second,
            "stage": None,
        }
