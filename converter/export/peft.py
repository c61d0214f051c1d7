"""A .salr file as directories that PEFT and today's servers run: the pruned base, its residual, each trained adapter.

Invariant: base + residual + adapters compute what the file computes. Float factors keep their bits and their scaling;
int8 ones become float32 with one rounding an entry. A layer that PEFT cannot adapt (an expert, an embedding) has its
residual added to its dense weight, and no trained adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...formats import naming
from ...formats.container import TensorSpec, plan_layout
from ...formats.dtypes import F32Array, byte_view, to_float32
from ...formats.errors import AdapterError, FormatError, OutputError
from ...formats.manifest import RESIDUAL, AdapterEntry
from ...formats.output_directory import output_directory
from ...formats.output_file import OutputFile
from ...formats.reader import SalrFile
from ..adapters.settings import CONFIG_NAME
from ..sources.architecture import Architecture
from ..sources.checkpoint import architecture_of, read_json
from .peft_config import PeftModule, adapter_config
from .unpack import METADATA, wanted_dtype, write_assets, write_weights

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PeftExport:
    """The directories written, adapters by name; ``folded`` lists the modules whose residual is in the base."""

    base: Path
    adapters: dict[str, Path]
    folded: tuple[str, ...]


@dataclass(frozen=True)
class _Folder:
    """The base's directory while only its config is there."""

    directory: Path
    config: dict[str, Any]

    @property
    def architecture(self) -> str | None:
        return architecture_of(self.config)


@dataclass(frozen=True)
class _Model:
    """The file, and the name of each adaptable module in the transformers model."""

    file: SalrFile
    layers: dict[str, str]
    base: str
    is_causal_lm: bool


def export_peft(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str = "source",
    with_residual: bool = False,
    progress: Progress = lambda done, total: None,
) -> PeftExport:
    """Write ``out/base`` (a dense Hugging Face directory without residual) and ``out/adapters/<name>`` (PEFT).

    Args:
        dtype: ``source``, or ``bf16``, ``fp16``, ``fp32`` for the base's float tensors. int8 and nf4 values are exact
            in fp32 only.
        with_residual: put the residual into each trained adapter's directory too, for servers that apply one adapter
            a request.

    Raises:
        AdapterError: a trained adapter stands where PEFT cannot adapt.
        SalrError: the file is damaged, or the output exists or cannot be written.
    """
    wanted, file = wanted_dtype(dtype), SalrFile(path)
    file.require_whole("salr export peft")
    with output_directory(out) as partial, file.checked():
        base = partial / "base"
        base.mkdir()
        write_assets(file, base, wanted)
        model = _model(file, base, str(Path(out) / "base"))
        write_weights(file, base, wanted, lambda module: module not in model.layers, progress=progress)
        names = sorted({adapter.name for entry in file.modules.values() for adapter in entry.adapters})
        written = [name for name in names if _write_adapter(model, name, partial / "adapters" / name, with_residual)]
    folded = [module for module in _with_residual(file) if module not in model.layers]
    adapters = {name: Path(out) / "adapters" / name for name in written}
    return PeftExport(Path(out) / "base", adapters, tuple(folded))


def _model(file: SalrFile, base: Path, name: str) -> _Model:
    if not (base / "config.json").is_file():
        raise FormatError("holds no config.json", path=file.path, needed="a model that transformers knows")
    architecture = Architecture(_Folder(base, read_json(base / "config.json", "the file carries it")))
    found = {m: architecture.linear_layer(e.source_tensor) for m, e in file.modules.items() if len(e.shape) == 2}
    layers = {module: layer for module, layer in found.items() if layer is not None}
    for module, entry in file.modules.items():
        trained = [adapter.name for adapter in entry.adapters if adapter.name != RESIDUAL]
        if trained and module not in layers:
            raise AdapterError(
                f"adapter '{trained[0]}' stands on what is no linear layer of {architecture.class_name}",
                path=file.path,
                tensor=module,
                needed="layers that PEFT adapts",
                fix="use unpack --merge",
            )
    return _Model(file, layers, name, _is_causal_lm(architecture.class_name))


def _is_causal_lm(class_name: str | None) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _with_residual(file: SalrFile) -> list[str]:
    return [m for m, entry in file.modules.items() if any(adapter.name == RESIDUAL for adapter in entry.adapters)]


def _write_adapter(model: _Model, name: str, folder: Path, with_residual: bool) -> bool:
    """Write one PEFT directory; return False where PEFT can adapt none of its modules."""
    wanted = (RESIDUAL, name) if with_residual else (name,)
    parts = {
        module: _Part(model.file, module, chosen)
        for module in model.layers
        if (chosen := [a for a in model.file.modules[module].adapters if a.name in wanted])
    }
    if not parts:
        return False
    folder.mkdir(parents=True)
    config = adapter_config(
        {model.layers[module]: part.settings for module, part in parts.items()},
        base=model.base,
        is_causal_lm=model.is_causal_lm,
        fan_in_fan_out=any(model.file.modules[module].transposed for module in parts),
    )
    try:
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"writing failed ({error.strerror})", path=folder, fix="free disk space") from error
    _write_factors(folder / "adapter_model.safetensors", [(model.layers[m], part) for m, part in parts.items()])
    return True


def _write_factors(path: Path, parts: Iterable[tuple[str, _Part]]) -> None:
    makers: dict[str, tuple[TensorSpec, Callable[[], memoryview]]] = {}
    for layer, part in parts:
        for factor, make in (("lora_A", part.lora_A), ("lora_B", part.lora_B)):
            name = f"base_model.model.{layer}.{factor}.weight"
            makers[name] = TensorSpec(name, part.dtype, part.shapes[factor]), make
    layout = plan_layout([spec for spec, _ in makers.values()], METADATA)
    with OutputFile(path, layout.last_begin) as output:
        for name, place in layout.tensors.items():
            output.write(place.begin, makers[name][1]())
        output.write(0, layout.prefix() + layout.header(METADATA))
        output.commit()


class _Part:
    """One module's factors as PEFT stores them.

    One float adapter keeps its bits, dtype, scaling and alpha. int8 factors and several adapters become float32; of
    several, each lora_B is multiplied by its scaling, and the scaling is 1.
    """

    def __init__(self, file: SalrFile, module: str, adapters: list[AdapterEntry]) -> None:
        self._file, self._module, self._adapters = file, module, adapters
        dtypes = [file.tensors[naming.lora_a_name(module, adapter.name)].dtype for adapter in adapters]
        self._is_stored = len(adapters) == 1 and dtypes[0] != "I8"
        self.dtype = dtypes[0] if self._is_stored else "F32"
        rank = sum(adapter.rank for adapter in adapters)
        only = adapters[0] if len(adapters) == 1 else None
        self.settings = PeftModule(rank, 1.0) if only is None else PeftModule(rank, only.scaling, only.alpha)
        shape_a, shape_b = naming.adapter_shapes(file.modules[module], rank)
        self.shapes = {"lora_A": shape_a, "lora_B": shape_b}

    def lora_A(self) -> memoryview:
        """Return the bytes of lora_A (r, K)."""
        if self._is_stored:
            return self._file.raw(naming.lora_a_name(self._module, self._adapters[0].name))
        return byte_view(np.concatenate([self._floats(adapter)[0] for adapter in self._adapters]))

    def lora_B(self) -> memoryview:
        """Return the bytes of lora_B (N, r)."""
        if self._is_stored:
            return self._file.raw(naming.lora_b_name(self._module, self._adapters[0].name))
        factors = [self._floats(adapter)[1] for adapter in self._adapters]
        if len(factors) > 1:
            scaled = [b.astype(np.float64) * a.scaling for a, b in zip(self._adapters, factors, strict=True)]
            factors = [factor.astype(np.float32) for factor in scaled]
        return byte_view(np.concatenate(factors, 1))

    def _floats(self, adapter: AdapterEntry) -> tuple[F32Array, F32Array]:
        """Return an adapter's factors in float32; of int8 ones, each rank's scale is split between both."""
        name_a, name_b = naming.lora_a_name(self._module, adapter.name), naming.lora_b_name(self._module, adapter.name)
        dtype = self._file.tensors[name_a].dtype
        lora_a = to_float32(self._file.tensor(name_a), dtype)
        lora_b = to_float32(self._file.tensor(name_b), dtype)
        if dtype != "I8":
            return lora_a, lora_b
        scales: F32Array = self._file.tensor(naming.rank_scales_name(self._module, adapter.name))
        power = np.round(np.frexp(scales)[1] / 2).astype(np.int32)
        half: F32Array = np.ldexp(np.float32(1), power).astype(np.float32)  # a power of two: no rounding in lora_A
        rest: F32Array = scales / half
        return lora_a * half[:, None], lora_b * rest
