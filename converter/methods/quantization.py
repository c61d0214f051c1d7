"""Quantizing kept values: scales by search, codes by error compensation, both under a Gram matrix.

Invariant: a pruned place stays 0 whatever is compensated; scales are rounded to float16, as they are stored, before any
code is chosen against them; an all-zero group has scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...formats.values import NF4_CODE_BOOK, QUANTIZED_BITS

_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
_COLUMNS = 64
_LARGEST_SCALE = torch.finfo(torch.float16).max
_LEAST_SCALE = 2.0**-16


@dataclass(frozen=True)
class Quantizer:
    """An encoding of values, int8 or nf4, with one scale for each ``group_size`` columns of a row."""

    encoding: str
    group_size: int

    def __post_init__(self) -> None:
        assert self.encoding in QUANTIZED_BITS

    @property
    def _peak(self) -> float:
        """The largest code's distance from 0."""
        return 127.0 if self.encoding == "int8" else 1.0

    def fits(self, weight: torch.Tensor) -> bool:
        """Tell whether float16 holds scales for the largest weights of a matrix, with at least 8 bits of precision."""
        largest = float(weight.abs().max()) / self._peak if weight.numel() else 0.0
        return largest == 0 or _LEAST_SCALE <= largest <= _LARGEST_SCALE

    def scales(self, weight: torch.Tensor, mask: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return scales (N, G), float16 values in float32, that round the kept weights (N, K) with the least error.

        The best of nine shrunken maxima, each column's squared error weighed by ``importance`` (K,).
        """
        grouped = self._grouped(weight.masked_fill(~mask, 0))
        peak = (grouped.abs().amax(-1) / self._peak).clamp_max(_LARGEST_SCALE)
        weights = None if importance is None else self._grouped(importance[None])
        best, least = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
        for share in _SHRINK if self.encoding == "nf4" else _SHRINK[:3]:
            candidate = (peak * share).half().float()
            error = (self._rounded(grouped, candidate[..., None]) - grouped).square()
            total = (error if weights is None else error * weights).sum(-1)
            better = total < least
            best, least = torch.where(better, candidate, best), torch.where(better, total, least)
        return best

    def each(self, scales: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return the scale of each weight (N, K)."""
        return scales.repeat_interleave(min(self.group_size, n_columns), dim=1)[:, :n_columns]

    def codes(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes, uint8, of weights with a scale each: two's complement, or indices of the book."""
        unit = torch.where(scale > 0, weight / scale, 0.0)
        if self.encoding == "int8":
            return unit.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        book = _book(weight.device)
        return torch.bucketize(unit, (book[1:] + book[:-1]) / 2).to(torch.uint8)

    def decoded(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the float32 values of codes with a scale each."""
        unit = codes.view(torch.int8).float() if self.encoding == "int8" else _book(codes.device)[codes.int()]
        return unit * scale

    def _rounded(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.decoded(self.codes(weight, scale), scale)

    def _grouped(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return (N, G, group size), zeros past the last column."""
        size = min(self.group_size, matrix.shape[1])
        missing = -matrix.shape[1] % size
        return torch.nn.functional.pad(matrix, (0, missing)).view(matrix.shape[0], -1, size)


@dataclass(frozen=True)
class Quantized:
    """Codes (N, K) uint8 and scales (N, G) of a matrix; codes outside the mask mean nothing."""

    quantizer: Quantizer
    codes: torch.Tensor
    scales: torch.Tensor

    def to_cpu(self) -> Quantized:
        """Return the same in this machine's memory."""
        return Quantized(self.quantizer, self.codes.cpu(), self.scales.cpu())

    def values(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the decoded weights (N, K) in float32, 0 outside the mask."""
        decoded = self.quantizer.decoded(self.codes, self.quantizer.each(self.scales, mask.shape[1]))
        return decoded.masked_fill_(~mask, 0)


def nearest(
    weight: torch.Tensor, mask: torch.Tensor, quantizer: Quantizer, importance: torch.Tensor | None = None
) -> Quantized:
    """Round each kept weight (N, K) to the nearest code."""
    scales = quantizer.scales(weight, mask, importance)
    return Quantized(quantizer, quantizer.codes(weight, quantizer.each(scales, weight.shape[1])), scales)


def compensated(weight: torch.Tensor, mask: torch.Tensor, quantizer: Quantizer, gram: torch.Tensor) -> Quantized:
    """Quantize column after column, the columns still to come making up for each error: GPTQ (Frantar et al. 2023).

    ``weight`` (N, K) is fitted to its mask under ``gram`` (K, K), damped. Columns go in falling order of diag H. What
    compensation puts on a pruned place is an error in its turn, and is passed on: so pruned places stay 0.
    """
    importance = gram.diagonal()
    scales = quantizer.scales(weight, mask, importance)
    order = torch.argsort(importance, descending=True, stable=True)
    scale = quantizer.each(scales, weight.shape[1])[:, order]
    kept, rest = mask[:, order], weight[:, order].contiguous()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, rest.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, rest.shape[1])
        piece, errors = rest[:, start:stop], torch.empty_like(rest[:, start:stop])
        local = factor[start:stop, start:stop]
        for column in range(stop - start):
            wanted, at = piece[:, column], start + column
            codes[:, at] = quantizer.codes(wanted, scale[:, at])
            rounded = quantizer.decoded(codes[:, at], scale[:, at]).mul_(kept[:, at])
            errors[:, column] = (wanted - rounded) / local[column, column]
            piece[:, column:] -= errors[:, column, None] * local[column, column:]
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return Quantized(quantizer, codes[:, torch.argsort(order)].contiguous(), scales)


def descended(target: torch.Tensor, mask: torch.Tensor, start: Quantized, gram: torch.Tensor, sweeps: int) -> Quantized:
    """Improve codes by coordinate descent on tr((T - Q) H (T - Q)^T): QuantEase (Behdin et al. 2023), masked.

    Each sweep sets one column after the other to its best codes given all others: the error never grows.
    """
    quantizer, codes = start.quantizer, start.codes.clone()
    n_columns = target.shape[1]
    scale, values = quantizer.each(start.scales, n_columns), start.values(mask)
    pull = (target - values) @ gram
    for _ in range(sweeps):
        for begin in range(0, n_columns, _COLUMNS):
            piece = slice(begin, min(begin + _COLUMNS, n_columns))
            local, moved = pull[:, piece].clone(), torch.zeros_like(values[:, piece])
            block = gram[piece, piece]
            for column in range(local.shape[1]):
                at = begin + column
                wanted = values[:, at] + local[:, column] / block[column, column]
                codes[:, at] = quantizer.codes(wanted, scale[:, at])
                rounded = quantizer.decoded(codes[:, at], scale[:, at]).mul_(mask[:, at])
                moved[:, column] = rounded - values[:, at]
                local -= moved[:, column, None] * block[column]
                values[:, at] = rounded
            pull -= moved @ gram[piece]
    return Quantized(quantizer, codes, start.scales)


def rescaled(target: torch.Tensor, mask: torch.Tensor, quantized: Quantized, gram: torch.Tensor) -> Quantized:
    """Fit scales to their codes by least squares, one group of columns after the other."""
    quantizer, scales = quantized.quantizer, quantized.scales.clone()
    unit = quantizer.decoded(quantized.codes, mask.float())
    pull = (target - quantized.values(mask)) @ gram
    for group in range(scales.shape[1]):
        piece = slice(group * quantizer.group_size, min((group + 1) * quantizer.group_size, target.shape[1]))
        codes = unit[:, piece]
        energy = ((codes @ gram[piece, piece]) * codes).sum(1)
        step = torch.where(energy > 0, (pull[:, piece] * codes).sum(1) / energy, 0.0)
        fitted = (scales[:, group] + step).clamp(0, _LARGEST_SCALE).half().float()
        pull -= ((fitted - scales[:, group])[:, None] * codes) @ gram[piece]
        scales[:, group] = fitted
    return Quantized(quantizer, quantized.codes, scales)


@cache
def _book(device: torch.device) -> torch.Tensor:
    """Return the code book on a device; copied there once, since each copy would wait for the GPU."""
    return torch.from_numpy(NF4_CODE_BOOK).to(device)
