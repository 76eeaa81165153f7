"""How events become frames: cut by number, time or duration, and counted.

A recording is a list of events (t in microseconds, x, y, polarity p). It becomes T frames of event counts
[T, 2, H, W], channel 0 off (p = 0) and channel 1 on (p = 1), as SpikingJelly integrates them. SpikingJelly's modules
are imported only where they are used: they take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikezoo.data.events.readers import read_events

FRAMES_BY = ("number", "time", "duration")


@dataclass(frozen=True)
class Framing:
    """How events become frames."""

    T: int
    frames_by: str
    duration_us: int  # 0 unless frames_by is duration
    sensor: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the frames of a recording."""
        return self.T, 2, *self.sensor

    @property
    def key(self) -> str:
        """Name of the cache of such frames."""
        each = f"{self.duration_us}us" if self.duration_us else self.frames_by
        return f"T{self.T}-{each}-{self.sensor[0]}x{self.sensor[1]}"

    def edges(self, t: np.ndarray) -> np.ndarray:
        """Indices between which the events of each frame lie; fewer than T + 1 for a recording that ends before."""
        if self.frames_by == "number":
            edges = len(t) // self.T * np.arange(self.T + 1)
        elif self.frames_by == "time":
            edges = np.searchsorted(t, t[0] + (t[-1] - t[0]) // self.T * np.arange(self.T + 1))
        else:
            needed = max(1, -int((t[0] - t[-1]) // self.duration_us))  # rounded up
            edges = np.searchsorted(t, t[0] + self.duration_us * np.arange(min(self.T, needed) + 1))
            if needed > self.T:
                return edges  # what comes later is left out
        edges[-1] = len(t)  # the last frame takes what the division leaves
        return edges

    def integrate(self, path: Path) -> np.ndarray:
        """Count the events of a recording into [T, 2, H, W] of the smallest unsigned type that holds them."""
        from spikingjelly.datasets.utils import integrate_events_segment_to_frame

        events = read_events(path, self.sensor)
        frames = np.zeros(self.shape, np.uint32)
        edges = self.edges(events["t"])
        for frame, left, right in zip(frames, edges[:-1], edges[1:], strict=False):
            frame[:] = integrate_events_segment_to_frame(
                events["x"], events["y"], events["p"], *self.sensor, left, right
            )
        return frames.astype(np.min_scalar_type(frames.max()))
