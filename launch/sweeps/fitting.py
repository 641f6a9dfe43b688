"""Fits power laws to a few points by least squares in logarithms, with standard errors."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MIN_SIZES = 3  # two sizes determine a line exactly, so its error would be unknown
MIN_RATIO = 1.1  # least ratio of sizes that count as different; an exponent from nearly equal sizes would be noise
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; more degrees use the last, which is wider.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The power law y = a x^-b without an offset: ln y = ln a - b ln x + an error with the same spread everywhere."""

    a: float
    b: float
    b_error: float  # standard error
    points: int
    spread: float  # standard deviation of ln y around the line, with points - 2 degrees of freedom
    mean_log_x: float
    sum_squares: float  # sum of squares of ln x around its mean

    @property
    def b_interval(self) -> float:
        """Returns half the width of b's 95 % interval."""
        return T_95[min(self.points - 2, len(T_95)) - 1] * self.b_error

    def at(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Returns y on the line."""
        return self.a * x**-self.b

    def log_error(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Returns the standard error of ln y on the line."""
        return self.spread * np.sqrt(1 / self.points + (np.log(x) - self.mean_log_x) ** 2 / self.sum_squares)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Returns the power law of (x, y), all above 0, or None for fewer than MIN_SIZES different x (see MIN_RATIO)."""
    sizes: list[float] = []
    for size in sorted(x):
        if not sizes or size >= MIN_RATIO * sizes[-1]:
            sizes.append(size)
    if len(sizes) < MIN_SIZES:
        return None
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    mean_x, mean_y = log_x.mean(), log_y.mean()
    sum_squares = ((log_x - mean_x) ** 2).sum()
    slope = ((log_x - mean_x) * (log_y - mean_y)).sum() / sum_squares
    residuals = log_y - mean_y - slope * (log_x - mean_x)
    spread = np.sqrt((residuals**2).sum() / (len(x) - 2))
    return PowerLaw(
        a=float(np.exp(mean_y - slope * mean_x)),
        b=float(-slope),
        b_error=float(spread / np.sqrt(sum_squares)),
        points=len(x),
        spread=float(spread),
        mean_log_x=float(mean_x),
        sum_squares=float(sum_squares),
    )
