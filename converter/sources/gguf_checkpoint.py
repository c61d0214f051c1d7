"""GGUF files: one tensor at a time, dequantized and renamed as transformers does it.

Invariant: every parameter of the model class comes from the file, and every tensor of the file is accounted for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ...formats.container import require_fetched
from ...formats.errors import SourceError
from .checkpoint import LICENCES, Asset, Checkpoint, SourceTensor, read_json, refusing_unreadable
from .derived import Changes, Computed, DerivedCheckpoint

_FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
#: what quantized weights are rounded to where they are stored as floats
_DEQUANTIZED = "BF16"
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def gguf_file(path: Path) -> Path | None:
    """Return the .gguf file that ``path`` is, or that is alone in a directory without config.json; else None.

    Raises:
        SourceError: there are several in the directory.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise SourceError(
            f"holds {len(found)} .gguf files", path=path, fix="name one of them; join parts with gguf-split"
        )
    return found[0] if found else None


def open_gguf(path: Path) -> Checkpoint:
    """Open a .gguf file as a checkpoint with the names and shapes of its transformers class.

    Raises:
        SourceError: it is damaged, transformers cannot convert its architecture, or a parameter has no tensor in it.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SourceError(
            "is a GGUF file", path=path, needed="the package gguf", fix="pip install 'salr[gguf]'"
        ) from error
    base = _GgufFile(path)
    with _refusing(path):
        model = base.build()
    weights = _Weights(base, model)
    computed = {name: weights.computed(name) for name in weights.sources}
    left_out = {name: weights.left_out(name) for name in base.tensors}
    missing = [name for name, _ in model.named_parameters() if name not in computed and name not in base.tied(model)]
    if missing:
        raise SourceError(
            f"{type(model).__name__} needs it, and no tensor of the file is known to be it",
            path=path,
            tensor=missing[0],
            fix="convert the Hugging Face directory that the file was made from",
        )
    return DerivedCheckpoint(base, Changes(computed=computed, left_out=left_out))


class _GgufFile(Checkpoint):
    """The tensors of the file under their own names, config and tokenizer as transformers converts them."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path, self.directory = path, path.parent
        with refusing_unreadable(path):
            require_fetched(path)
        with _refusing(path):
            self._reader = GGUFReader(path)
        self._by_name = {tensor.name: tensor for tensor in self._reader.tensors}
        self.tensors = {
            tensor.name: SourceTensor(
                tensor.name, tensor.tensor_type.name, tuple(int(n) for n in tensor.shape[::-1]), path.name
            )
            for tensor in self._reader.tensors
        }
        self._made = TemporaryDirectory(prefix="salr-gguf-")
        with _refusing(path):
            self._convert_config()
        self.config = read_json(self.folder / "config.json", "transformers made it")

    @property
    def location(self) -> Path:
        """The file."""
        return self.path

    @property
    def folder(self) -> Path:
        """Where the converted config and tokenizer lie, as long as this object lives."""
        return Path(self._made.name)

    def _convert_config(self) -> None:
        import transformers
        from transformers.modeling_gguf_pytorch_utils import read_field
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        config = transformers.AutoConfig.from_pretrained(
            self.directory, gguf_file=self.path.name, trust_remote_code=False, local_files_only=True
        )
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        if hasattr(config, "moe_intermediate_size"):  # transformers leaves it at the class's default
            key = f"{read_field(self._reader, 'general.architecture')[0]}.expert_feed_forward_length"
            config.moe_intermediate_size = (read_field(self._reader, key) or [config.moe_intermediate_size])[0]
        dtypes = {stored_dtype(t.dtype) for t in self.tensors.values() if len(t.shape) > 1}
        config.dtype = _DTYPE_NAMES[_DEQUANTIZED if len(dtypes) != 1 else dtypes.pop()]
        config.save_pretrained(self.folder)
        if "tokenizer.ggml.model" in self._reader.fields:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.directory, gguf_file=self.path.name, trust_remote_code=False, local_files_only=True
            )
            tokenizer.save_pretrained(self.folder)

    def build(self) -> Any:
        """Return the model class on the meta device."""
        import transformers

        from .architecture import model_config

        with torch.device("meta"):
            return getattr(transformers, str(self.architecture))(model_config(self))

    def tied(self, model: Any) -> set[str]:
        """Return parameters that are others of the model."""
        return set(getattr(model, "all_tied_weights_keys", None) or {})

    def dequantize(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return one tensor, or rows of it, in float32."""
        from gguf import dequantize

        tensor = self._by_name[name]
        return np.asarray(dequantize(tensor.data[start:stop], tensor.tensor_type), np.float32)

    def weight_paths(self) -> list[Path]:
        """Return the file."""
        return [self.path]

    def source_paths(self) -> list[Path]:
        """Return the file, which holds config and tokenizer too."""
        return [self.path]

    def assets(self) -> list[Asset]:
        """Return config and tokenizer as transformers converts them, and the licence files beside the file."""
        made = sorted(path for path in self.folder.iterdir() if path.is_file())
        beside = sorted({path for pattern in LICENCES for path in self.directory.glob(pattern) if path.is_file()})
        return [Asset(path.name, path) for path in [*made, *beside]]


class _Weights:
    """Which tensors of the file each parameter of the model is made of, and how."""

    def __init__(self, file: _GgufFile, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            read_field,
        )

        self._file = file
        architecture = read_field(file._reader, "general.architecture")[0]
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=file.config)
        with _refusing(file.path):
            self._map = get_gguf_hf_weights_map(model, self._processor)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        #: parameter -> tensors of the file
        self.sources: dict[str, list[str]] = {}
        for name in file.tensors:
            parameter = self._parameter(name)
            if parameter in self._shapes:
                self.sources.setdefault(str(parameter), []).append(name)
        self._cached = lru_cache(maxsize=1)(self._whole)

    def _parameter(self, name: str) -> str | None:
        found = self._map.get(name) or self._map.get(name.removesuffix(".weight"))
        return None if found is None else str(found)

    def left_out(self, name: str) -> tuple[str, str]:
        """Return what becomes of a tensor of the file that gives no parameter its own name."""
        parameter = self._parameter(name)
        if parameter in self.sources:
            return "folded", f"a part of {parameter}"
        return "dropped", f"{self._file.architecture} computes it, and has no parameter for it"

    def computed(self, parameter: str) -> Computed:
        """Return how a parameter is computed."""
        sources = self.sources[parameter]
        kind, shape = self._file.tensors[sources[0]].dtype, self._shapes[parameter]
        remark = f"{kind} of GGUF" if kind in _FLOATS else f"dequantized from {kind}"
        return Computed(stored_dtype(kind), shape, sources[0], remark, self._rows(parameter))

    def _rows(self, parameter: str) -> Callable[[int, int], torch.Tensor]:
        n_rows = self._shapes[parameter][0]

        def rows(start: int, stop: int) -> torch.Tensor:
            if stop - start == n_rows:
                return self._part(parameter, 0, n_rows)
            return (
                self._part(parameter, start, stop)
                if self._is_in_rows(parameter)
                else self._cached(parameter)[start:stop]
            )

        return rows

    def _whole(self, parameter: str) -> torch.Tensor:
        return self._part(parameter, 0, self._shapes[parameter][0])

    def _is_in_rows(self, parameter: str) -> bool:
        """Tell of the largest tensors that a part of the file's rows is a part of the model's."""
        names = self.sources[parameter]
        return names in (["token_embd.weight"], ["output.weight"]) or all("_exps." in name for name in names)

    def _part(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a parameter; all of them where the file has them in another order."""
        made: dict[str, Any] = {"tensors": {}, "config": self._file.config}
        weights: Any = None
        for name in self.sources[parameter]:
            part = (
                self._file.dequantize(name, start, stop) if self._is_in_rows(parameter) else self._file.dequantize(name)
            )
            weights = self._processor.process(
                weights=part, name=name, tensor_key_mapping=self._map, parsed_parameters=made
            ).weights
        weights = made["tensors"].get(parameter, weights)
        found = weights if isinstance(weights, torch.Tensor) else torch.from_numpy(np.array(weights, np.float32))
        needed = (stop - start, *self._shapes[parameter][1:])
        if tuple(found.shape) != needed:
            raise SourceError(
                f"shape {list(found.shape)}",
                path=self._file.path,
                tensor=self.sources[parameter][0],
                needed=f"{list(needed)} for {parameter}",
            )
        return found


def stored_dtype(kind: str) -> str:
    """Return the dtype in which weights of a GGUF type are stored where no other is asked for."""
    return _FLOATS.get(kind, _DEQUANTIZED)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn whatever gguf and transformers raise (many types) into one line."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise SourceError(
            f"cannot be read as GGUF ({reason})", path=path, fix="convert the Hugging Face directory it was made from"
        ) from error
