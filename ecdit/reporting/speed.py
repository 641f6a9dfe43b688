"""Measures how fast a run steps: images/s, model FLOP/s, waits for data, share of the devices' peak."""

import dataclasses
import time

import jax

from ecdit.chips import limits

WINDOW = 100  # steps over which printed values are averaged


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of training, as a mean over some steps."""

    step_seconds: float
    data_seconds: float  # time that a step waits for its batch
    images_per_second: float
    model_flops_per_second: float  # sum over all devices
    peak_share: float | None  # share of the devices' peak; None if the peak is unknown


class Stopwatch:
    """Times steps by when their metrics arrive. A first step is not timed, because it compiles."""

    def __init__(self, images: int, flops: float, peak: float | None):
        """Takes a step's images and model FLOPs, and the peak FLOP/s of all devices together."""
        self.images, self.flops, self.peak = images, flops, peak
        self.last_time: float | None = None
        self.steps: list[tuple[float, float]] = []  # seconds of a step, and seconds of waiting for data

    def tick(self, data_seconds: float) -> Speed | None:
        """Ends a step, and returns its speed, or None for a first step."""
        now, before = time.monotonic(), self.last_time
        self.last_time = now
        if before is None:
            return None
        self.steps = [*self.steps[1 - WINDOW :], (now - before, data_seconds)]
        return self._speed(*self.steps[-1])

    def pause(self) -> None:
        """Excludes the time until the next step from the statistics."""
        self.last_time = None

    def recent(self) -> Speed | None:
        """Returns the mean over the last WINDOW steps, or None if no step was timed."""
        if not self.steps:
            return None
        seconds, waits = zip(*self.steps, strict=True)
        return self._speed(sum(seconds) / len(seconds), sum(waits) / len(waits))

    def _speed(self, seconds: float, waits: float) -> Speed:
        rate = self.flops / seconds
        return Speed(seconds, waits, self.images / seconds, rate, rate / self.peak if self.peak else None)


def stopwatch(images: int, flops_per_image: float) -> Stopwatch:
    """Returns a stopwatch for steps of so many images on all devices."""
    kind = limits(jax.devices()[0].device_kind)
    peak = kind.peak_flops * jax.device_count() if kind else None
    return Stopwatch(images, images * flops_per_image, peak)


def flops_text(flops_per_second: float) -> str:
    """Returns a rate with the unit that leaves up to four digits: GFLOP/s, TFLOP/s or PFLOP/s."""
    for unit, size in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12)):
        if flops_per_second >= size:
            return f"{flops_per_second / size:.1f} {unit}"
    return f"{flops_per_second / 1e9:.1f} GFLOP/s"
