"""The loss of each step, as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SMOOTHING = 0.1


def draw_loss_curve(path: Path, losses: Sequence[tuple[int, float]], title: str) -> str | None:
    """Write a PNG of (step, loss), with an exponential mean; where that cannot be, return why."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "pip install 'salr[plot]' draws one"
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    smooth, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean += _SMOOTHING * (value - mean)
        smooth.append(mean / (1 - (1 - _SMOOTHING) ** count))  # else the mean would begin at 0
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    try:
        axes.plot(steps, values, color="#9db4c0", linewidth=1, label="each step")
        axes.plot(steps, smooth, color="#253237", linewidth=2, label="smoothed")
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path)
    except OSError as error:
        if path.is_file():
            path.unlink()
        return f"{path} cannot be written ({error.strerror})"
    finally:
        pyplot.close(figure)
    return None
