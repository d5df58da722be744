"""Debiased linear CKA of chosen layer pairs, exact in one pass over any number of rows.

HSIC_1 of Song et al. 2012 written with sums over features instead of a Gram matrix (the form of
Kornblith's `feature_space_linear_cka`, debiased), everything in float64. Memory is the product of the two
widths for each pair: a reference for a few pairs, and for rows that are independent, such as the mean
state of each text. Tokens of one text count as pairs here, which `hsic_sums.py` leaves out.

Axes: N rows, D and E widths of a pair's layers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """What one layer pair needs of its rows; `shift` of either side keeps sums small and changes nothing."""

    shift_x: Tensor
    shift_y: Tensor
    rows: int = 0

    def __post_init__(self) -> None:
        d, e = len(self.shift_x), len(self.shift_y)
        sizes = {"c": (d, e), "cx": (d, d), "cy": (e, e), "sx": d, "sy": e}
        self._sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self._weighted = {
            name: torch.zeros(size, dtype=torch.float64)
            for name, size in {"x_y": d, "y_x": e, "x_x": d, "y_y": e}.items()
        }
        self._norms = {"xx": 0.0, "yy": 0.0, "xy": 0.0, "x": 0.0, "y": 0.0}

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        x, y = x_ND.double() - self.shift_x, y_NE.double() - self.shift_y
        xx_N, yy_N = x.square().sum(1), y.square().sum(1)
        self.rows += len(x)
        for name, value in {
            "c": x.T @ y,
            "cx": x.T @ x,
            "cy": y.T @ y,
            "sx": x.sum(0),
            "sy": y.sum(0),
        }.items():
            self._sums[name] += value
        for name, value in {"x_y": yy_N @ x, "y_x": xx_N @ y, "x_x": xx_N @ x, "y_y": yy_N @ y}.items():
            self._weighted[name] += value
        parts = {"xx": xx_N @ xx_N, "yy": yy_N @ yy_N, "xy": xx_N @ yy_N, "x": xx_N.sum(), "y": yy_N.sum()}
        for name, value in parts.items():
            self._norms[name] += float(value)

    def cka(self) -> float:
        """NaN where a self-product is not positive.

        Raises:
            ValueError: fewer than 4 rows.
        """
        if self.rows < 4:
            raise ValueError("Debiased CKA needs at least 4 rows.")
        s, w, n = self._sums, self._weighted, self._norms
        xy = self._hsic(s["c"], s["sx"], s["sy"], w["x_y"], w["y_x"], (n["xy"], n["x"], n["y"]))
        xx = self._hsic(s["cx"], s["sx"], s["sx"], w["x_x"], w["x_x"], (n["xx"], n["x"], n["x"]))
        yy = self._hsic(s["cy"], s["sy"], s["sy"], w["y_y"], w["y_y"], (n["yy"], n["y"], n["y"]))
        return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan

    def _hsic(
        self,
        c: Tensor,
        sum_x: Tensor,
        sum_y: Tensor,
        x_by_y: Tensor,
        y_by_x: Tensor,
        norms: tuple[float, float, float],
    ) -> float:
        """[tr K̃L̃ + 1'K̃1 1'L̃1 / ((n-1)(n-2)) - 2/(n-2) 1'K̃L̃1] / (n(n-3)), diagonals of K and L zero."""
        rows, (both, one, other) = self.rows, norms
        trace = float(c.square().sum()) - both
        total_x, total_y = float(sum_x @ sum_x) - one, float(sum_y @ sum_y) - other
        cross = float(sum_x @ c @ sum_y - sum_x @ x_by_y - sum_y @ y_by_x) + both
        value = trace + total_x * total_y / ((rows - 1) * (rows - 2)) - 2 / (rows - 2) * cross
        return value / (rows * (rows - 3))
