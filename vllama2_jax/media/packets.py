"""The packets of a video: which frame each one is, and where decoding must start to get it."""

import numpy as np

# Codecs whose packets are one shown frame each, so that a frame's number follows from the packets
# alone. Others (VP8's hidden frames, packed B-frames of MPEG-4 in AVI) are decoded from the start.
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1", "mjpeg")


class PacketIndex:
    """Times and flags of every packet of a stream, in decoding order.

    Attributes:
      count: shown packets that were found whole.
      complete: whether the stream could be read to its end, without a damaged packet.
    """

    def __init__(self):
        """An empty index; `add` every packet, then `close`."""
        self._pts, self._dts, self._keys, self._shown = [], [], [], []
        self.complete, self.count = True, 0

    def add(self, packet):
        """Take one PyAV packet."""
        if packet.is_corrupt:
            self.complete = False
            return
        self._pts.append(packet.pts)
        self._dts.append(packet.pts if packet.dts is None else packet.dts)
        self._keys.append(packet.is_keyframe)
        # Frames before the start of an edit list are decoded but never shown.
        self._shown.append(not packet.is_discard)
        self.count += not packet.is_discard

    def close(self, codec: str) -> bool:
        """Number the frames; returns whether the packets suffice for that."""
        if codec not in INDEXED_CODECS or None in self._pts or len(set(self._pts)) < len(self._pts):
            return False
        self._pts, self._dts = np.asarray(self._pts), np.asarray(self._dts)
        self._keys = np.flatnonzero(self._keys)
        display = np.argsort(self._pts, kind="stable")
        self._order = display[np.asarray(self._shown)[display]]  # frame number -> packet
        # A stream may open with pictures of a group that was cut off before it: whether they are
        # shown depends on the decoder.
        return bool(len(self._keys)) and self._keys[0] == 0 and display[0] == 0

    def groups(self, numbers: np.ndarray) -> dict[int, dict[int, int]]:
        """Which packet to start from for which frames.

        Args:
          numbers: wanted frame numbers.

        Returns:
          {packet to start from: {presentation time: frame number}}, in order of the frames.
        """
        found: dict[int, dict[int, int]] = {}
        for number in np.unique(numbers).tolist():
            packet = int(self._order[number])
            found.setdefault(self._start_of(packet), {})[int(self._pts[packet])] = number
        return found

    def _start_of(self, packet: int) -> int:
        """The key packet that decoding must start from to give this packet's picture."""
        place = int(np.searchsorted(self._keys, packet, side="right")) - 1
        # Pictures shown before their group's key picture may refer to the group before.
        while place > 0 and self._pts[self._keys[place]] > self._pts[packet]:
            place -= 1
        return int(self._keys[place])

    def times(self, packet: int) -> tuple[int, int]:
        """Presentation and decoding time of a packet."""
        return int(self._pts[packet]), int(self._dts[packet])
