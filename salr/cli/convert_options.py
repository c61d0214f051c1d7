"""The options of `salr convert`: what each is called and says of itself, and what their texts mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..formats.errors import OptionError

if TYPE_CHECKING:
    from ..converter.options import CalibrationOptions

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="Directory or hub id of a model or a PEFT LoRA, or a .gguf file.")
]
Output = Annotated[Path, typer.Argument(metavar="OUT.salr", help="The file to make.")]

Sparsity = Annotated[float | None, typer.Option(help="Fraction removed, 0 to 0.95.", show_default="0.5")]
Rank = Annotated[int | None, typer.Option(help="Rank of the residual adapter, 0 for none.", show_default="64")]
Method = Annotated[
    str | None,
    typer.Option(
        help="magnitude (the paper), alternating, wanda, sparsegpt or joint.",
        show_default="alternating; joint with a text",
    ),
]
Values = Annotated[
    str | None, typer.Option(help="Of kept weights: source, bf16, fp16, fp32, int8 or nf4.", show_default="source")
]
GroupSize = Annotated[
    int | None, typer.Option(help="Columns that share a scale, for int8 and nf4.", show_default="128")
]
AdapterValues = Annotated[
    str | None, typer.Option(help="The residual's storage: source or int8.", show_default="source")
]
Preset = Annotated[
    str | None,
    typer.Option(help="exact, balanced or small: a measured recipe; single options override it."),
]
Scope = Annotated[
    str | None,
    typer.Option(help="Where weights compete: layer, row or global.", show_default="the method's own"),
]
Pattern = Annotated[str, typer.Option(help="unstructured or 2:4.")]
Rounds = Annotated[int, typer.Option(help="Rounds of alternating and joint.")]

Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A .txt or .jsonl text; 'synthetic' for random tokens; 'none' for weights alone.",
        show_default="synthetic for alternating",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--calibration-samples", help="Windows of text.", show_default="64; 16 if synthetic")
]
Length = Annotated[int | None, typer.Option("--calibration-length", help="Tokens a window.", show_default="1024")]
Seed = Annotated[int | None, typer.Option(help="Of the choice of windows.", show_default="0")]

Adapter = Annotated[
    list[str], typer.Option(metavar="[NAME=]DIR", help="LoRA kept exact, directory or hub id; repeatable.")
]
Base = Annotated[Path | None, typer.Option(help="The base model of a LoRA: directory or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default="main")]
Include = Annotated[list[str], typer.Option(help="Glob or re: pattern of modules to pack besides.")]
Exclude = Annotated[list[str], typer.Option(help="Glob or re: pattern of modules to keep dense.")]
TargetBits = Annotated[
    float | None,
    typer.Option(
        help="Mean bits per packed weight, adapters counted; chooses sparsity, rank and, without --values, what values"
        " are rounded to, for each module."
    ),
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="'PAT k=v,...'", help="Override options per module; repeatable.")
]
Recipe = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Options and overrides from a file.")]

DryRun = Annotated[bool, typer.Option(help="Show the plan and each choice's reason; write nothing.")]
Force = Annotated[bool, typer.Option(help="Replace an existing output.")]
Fresh = Annotated[bool, typer.Option(help="Discard what an interrupted run left.")]
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="As 5GB: OUT becomes a directory of shards, with an index.")
]
Part = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Make the I-th of N shards into the directory OUT; salr join joins them."),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Keeps decisions about the whole model, made once for all parts."),
]

Device = Annotated[str, typer.Option(help="cpu, cuda (all GPUs) or cuda:i,...")]
Workers = Annotated[int | None, typer.Option(help="Modules converted at once.", show_default="one a core")]
Executor = Annotated[str, typer.Option(help="Who converts: local, or ray (a Ray cluster).")]


def parse_size(text: str) -> int:
    """Return the bytes of a size like 5GB or 300MB (powers of ten).

    Raises:
        OptionError: it is no size; or has no unit: of bytes and gigabytes, which are meant would be a guess.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)B|([KMGT]))\s*", text, re.IGNORECASE)
    if found is None:
        raise OptionError(f"size {text!r}", needed="a number with KB, MB, GB or TB, as 5GB")
    return int(float(found[1]) * _UNITS[(found[2] or found[3] or "").upper()])


def parse_part(text: str) -> tuple[int, int]:
    """Parse I/N."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None:
        raise OptionError(f"--part {text!r}", needed="I/N, as 3/8")
    return int(found[1]), int(found[2])


def parse_adapters(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Parse [NAME=]DIR; without a name the directory's own is used."""
    parsed = []
    for text in texts:
        name, equals, directory = text.partition("=")
        path = Path(directory if equals else text)
        parsed.append((name if equals else path.resolve().name, path))
    return tuple(parsed)


def calibration_options(
    text: str | None, samples: int | None, length: int | None, seed: int | None
) -> CalibrationOptions | None:
    """Return the calibration asked for; None leaves the choice to the method.

    Raises:
        OptionError: a number makes no sense, or there is no text that it is about.
    """
    from ..converter.options import NO_DATA, SYNTHETIC, SYNTHETIC_SAMPLES, CalibrationOptions

    numbers = {"samples": samples, "length": length, "seed": seed}
    given = {name: number for name, number in numbers.items() if number is not None}
    if given and text in (None, NO_DATA):
        found = f"{', '.join(given)} of calibration without a text"
        raise OptionError(found, needed="--calibration FILE, or --calibration synthetic")
    if text is None:
        return None
    usual = {"samples": SYNTHETIC_SAMPLES} if text == SYNTHETIC else {}
    return CalibrationOptions(text, **usual | given)
