"""Where a mesh lies on the links between chips, and how long they take for a collective.

Formulas: "How to Scale Your Model", jax-ml.github.io/scaling-book/sharding.
"""

import dataclasses

import numpy as np

from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.topology import Topology


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh on a topology.

    Attributes:
      topology: its chips.
      places: int [devices, 1 + dimensions], in the order of the mesh: the slice or node, and the
        place in its torus.
    """

    topology: Topology
    places: np.ndarray

    @classmethod
    def of_devices(cls, topology: Topology, devices: np.ndarray) -> "Placement":
        """Of TPU devices as they stand in a mesh, `mesh.devices`."""
        dimensions = len(topology.shape)
        places = [(getattr(d, "slice_index", 0), *d.coords[:dimensions]) for d in devices.flat]
        return cls(topology, np.array(places))

    @classmethod
    def in_order(cls, topology: Topology) -> "Placement":
        """Of a mesh that fills the topology row by row, slice after slice."""
        shape = (topology.num_slices, *topology.shape)
        return cls(topology, np.indices(shape).reshape(len(shape), -1).T)

    def seconds(self, collective: Collective) -> tuple[float, float]:
        """How long a step's runs of a collective take: (within slices, between slices).

        What spans slices is done within each, and then between them on what is left to each chip.
        """
        chip, kind = self.topology.chip, collective.kind
        places = self.places[list(collective.group)]
        slices = len(np.unique(places[:, 0]))
        within = places[places[:, 0] == places[0, 0]][:, 1:]
        n, size = len(within), collective.bytes * collective.count
        if kind == "collective-permute":
            between = slices > 1
            return (
                (0.0, size / chip.dcn_bandwidth) if between else (size / chip.link_bandwidth, 0.0)
            )
        if kind in ("all-to-all", "ragged-all-to-all"):
            return size * self._exchange(within), size * (1 - 1 / slices) / chip.dcn_bandwidth
        whole = size * len(places) if kind == "reduce-scatter" else size
        whole *= 2 if kind == "all-reduce" else 1
        inside = whole * (1 - 1 / n) / self.bandwidth(within) if n > 1 else 0.0
        return inside, whole / n * (1 - 1 / slices) / chip.dcn_bandwidth

    def bandwidth(self, within: np.ndarray) -> float:
        """Bytes per second that reach a chip from the others of its group.

        A ring brings them over two links, a line over one; a group that fills a box of the torus
        uses the links of all of its dimensions. Where a group leaves out chips, others share its
        links.

        Args:
          within: int [chips, dimensions], their places in one slice.
        """
        link = self.topology.chip.link_bandwidth
        if not self.topology.chip.dimensions:
            return link
        return sum(
            link * (2 if ring else 1) / stride for _, ring, stride in self._dimensions(within)
        )

    def _exchange(self, within) -> float:
        """Seconds per byte of the result of an all-to-all; half of it crosses the middle."""
        n, link = len(within), self.topology.chip.link_bandwidth
        if n == 1:
            return 0.0
        if not self.topology.chip.dimensions:
            return (n - 1) / n / link
        return max(
            extent * stride / (8 if ring else 4) / link
            for extent, ring, stride in self._dimensions(within)
        )

    def _dimensions(self, within):
        """(chips, whether they are a ring, their distance) of each dimension that a group spans."""
        for places, size, closed in zip(
            within.T, self.topology.shape, self.topology.rings, strict=True
        ):
            apart = np.unique(places)
            if len(apart) > 1:
                yield len(apart), closed and len(apart) == size, int(np.diff(apart).min())
