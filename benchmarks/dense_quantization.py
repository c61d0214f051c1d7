"""Fair neighbours for benchmarks/pareto.py: dense weights rounded to int8, int4, int3 or nf4, by nearest and by GPTQ.

Plain textbook algorithms, simulated: the model is saved with rounded weights in float32, and its bits are counted as a
packed file would need them (codes, float16 scales, and for asymmetric grids a zero point of the codes' width).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from salr.converter.calibration.sequential import open_block_run
from salr.converter.execution.devices import resolve_device
from salr.converter.execution.packers import Team
from salr.converter.execution.threads import one_thread_each
from salr.converter.options import ConvertOptions
from salr.converter.pipeline import plan_conversion
from salr.formats.values import NF4_CODE_BOOK

_DAMPING = 0.01


@dataclass(frozen=True)
class Grid:
    """A rounding grid with a scale for each ``group`` columns of a row."""

    name: str
    n_bits: int
    group: int
    symmetric: bool = True

    @property
    def bits(self) -> float:
        """Bits a weight, scales and zero points counted."""
        return self.n_bits + (16 + (0 if self.symmetric else self.n_bits)) / self.group

    def parameters(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point (N, 1) for one group of columns (N, g)."""
        if self.symmetric:
            most = 1.0 if self.name == "nf4" else 2.0 ** (self.n_bits - 1) - 1
            return (weight.abs().amax(1, keepdim=True) / most).half().float().clamp_min(1e-8), torch.zeros(1)
        low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / (2**self.n_bits - 1)).half().float().clamp_min(1e-8)
        return scale, (-low / scale).round()

    def rounded(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round weights (N, n) with their scale and zero point."""
        if self.name == "nf4":
            book = torch.from_numpy(NF4_CODE_BOOK).to(weight.device)
            return book[torch.bucketize((weight / scale).contiguous(), (book[1:] + book[:-1]) / 2)] * scale
        if self.symmetric:
            most = 2 ** (self.n_bits - 1) - 1
            return (weight / scale).round().clamp(-most, most) * scale
        return ((weight / scale + zero).round().clamp(0, 2**self.n_bits - 1) - zero) * scale


GRIDS = {
    "int8": Grid("int8", 8, 64),
    "nf4": Grid("nf4", 4, 64),
    "int4 asymmetric": Grid("int4", 4, 64, symmetric=False),
    "int3 asymmetric": Grid("int3", 3, 64, symmetric=False),
}


def nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round a weight (N, K) to the nearest point of the grid."""
    rounded = weight.clone()
    for start in range(0, weight.shape[1], grid.group):
        piece = weight[:, start : start + grid.group]
        scale, zero = grid.parameters(piece)
        rounded[:, start : start + grid.group] = grid.rounded(piece, scale, zero.to(weight.device))
    return rounded


def gptq(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round column after column, later ones making up for it (Frantar et al. 2023); scales as each group is reached."""
    weight, rounded = weight.clone(), torch.empty_like(weight)
    damped = gram + _DAMPING * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, weight.shape[1], grid.group):
        stop = min(start + grid.group, weight.shape[1])
        scale, zero = grid.parameters(weight[:, start:stop])
        errors = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            wanted = weight[:, column : column + 1]
            rounded[:, column : column + 1] = grid.rounded(wanted, scale, zero.to(weight.device))
            errors[:, column - start] = (wanted - rounded[:, column : column + 1])[:, 0] / factor[column, column]
            weight[:, column:stop] -= errors[:, column - start, None] * factor[column, column:stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def write_rounded(source: Path, out: Path, grid: Grid, options: ConvertOptions, *, use_gptq: bool) -> Path:
    """Save ``source`` with every block linear rounded; GPTQ takes Gram matrices of the dense model's inputs."""
    plan, device = plan_conversion(source, options), resolve_device(options.device)
    checkpoint = plan.checkpoint
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    with one_thread_each(2) as pool:
        batches = open_block_run(plan, options, device, Team(pool)).measured() if use_gptq else [plan.modules]
        for batch in batches:
            for item in batch:
                module, gram = (item.module, item.gram) if use_gptq else (item, None)
                name = module.entry.source_tensor
                weight = checkpoint.read(name).to(device).float()
                rounded = nearest(weight, grid) if gram is None else gptq(weight, gram, grid)
                tensors[name] = rounded.cpu()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in checkpoint.assets():
        shutil.copy(path, out / path.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out
