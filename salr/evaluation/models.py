"""Models to evaluate: a dense Hugging Face directory or a .salr file, as a transformers model in memory.

Invariant: every weight comes from the checkpoint (none is left at random), no code from a checkpoint runs, and nothing
is fetched. A .salr file is filled one packed module at a time, through the same renaming and fusing that transformers
does for a directory, so its logits are those of the unpacked model.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..converter.report import size_report
from ..converter.sources.checkpoint import Checkpoint
from ..formats.dtypes import tensor_bytes
from ..formats.reader import SalrFile
from ..formats.sharding import INDEX_NAME
from ..runtime.errors import LoadError
from ..runtime.mapped import decoded, mapped_tensor
from ..runtime.quiet import quiet_transformers
from .errors import EvaluationError


class ModelSource(ABC):
    """A model on disk; ``folder`` holds its config and its tokenizer.

    ``n_bytes`` is the size of its weight files; ``bits_per_weight`` counts adapters.
    """

    n_bytes: int
    bits_per_weight: float

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.config = self._read_config()
        self.architecture = str((getattr(self.config, "architectures", None) or ["no model class"])[0])

    def _read_config(self) -> Any:
        import transformers

        if not (self.folder / "config.json").is_file():
            raise EvaluationError("it has no config.json", path=self.path, fix="convert or save the model again")
        with quiet_transformers(), self._refusing("transformers cannot read its config"):
            return transformers.AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            ).get_text_config()

    def tokenizer(self) -> Any:
        """Return the model's own tokenizer.

        Raises:
            EvaluationError: there is none, or transformers cannot load it.
        """
        import transformers

        fix = "copy the model's tokenizer files beside its weights, and convert again where it is a .salr file"
        with quiet_transformers(), self._refusing("no usable tokenizer", fix):
            return transformers.AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )

    def model_class(self) -> Any:
        """Return the transformers class that config.json names.

        Raises:
            EvaluationError: transformers has no such class.
        """
        import transformers

        found = getattr(transformers, self.architecture, None)
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            raise EvaluationError(
                f"config.json names {self.architecture}", path=self.path, needed="a model class of transformers"
            )
        return found

    def load(self, device: str | torch.device, dtype: torch.dtype) -> Any:
        """Return the model in evaluation mode on ``device``, its float weights in ``dtype``.

        Raises:
            EvaluationError: transformers cannot load it, or a weight is missing.
        """
        with quiet_transformers(), self._refusing(f"transformers cannot load {self.architecture}"):
            model, info = self._from_pretrained(dtype=dtype, output_loading_info=True)
        for names, found in (
            (info["missing_keys"], "is missing from the checkpoint"),
            (info["mismatched_keys"], "has another shape in the checkpoint"),
        ):
            if names:
                name = sorted(str(item[0] if isinstance(item, tuple) else item) for item in names)[0]
                raise EvaluationError(found, path=self.path, tensor=name, needed=f"every weight of {self.architecture}")
        return model.to(device).eval()

    @abstractmethod
    def _from_pretrained(self, **options: Any) -> Any: ...

    @contextmanager
    def _refusing(self, found: str, fix: str | None = None) -> Iterator[None]:
        """Turn whatever transformers raises (many types) into one line."""
        try:
            yield
        except (EvaluationError, LoadError):
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
            raise EvaluationError(f"{found} ({reason})", path=self.path, fix=fix) from error


class DenseModel(ModelSource):
    """A Hugging Face directory."""

    def __init__(self, path: Path) -> None:
        checkpoint = Checkpoint(path)
        super().__init__(path, path)
        self.n_bytes = sum(file.stat().st_size for file in checkpoint.weight_paths())
        stored = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values())
        self.bits_per_weight = 8 * stored / sum(_n_elements(t.shape) for t in checkpoint.tensors.values())

    def _from_pretrained(self, **options: Any) -> Any:
        return self.model_class().from_pretrained(self.path, local_files_only=True, **options)


class PackedModel(ModelSource):
    """A .salr file, its assets copied to ``folder``."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.file = SalrFile(path)
        for name in self.file.assets:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.file.asset(name))
        super().__init__(path, folder)
        self.n_bytes = self.file.n_bytes
        self.bits_per_weight = size_report(self.file).bits_per_weight if self.file.modules else 0.0

    def _from_pretrained(self, **options: Any) -> Any:
        with self.file.checked():
            config, state = self._own_config(), self._state()
            return self.model_class().from_pretrained(None, config=config, state_dict=state, **options)

    def _own_config(self) -> Any:
        import transformers

        return transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)

    def _state(self) -> dict[str, Any]:
        """Return the source's tensors by name; a packed one is decoded when it is read, one at a time."""
        lock, state = threading.Lock(), {name: mapped_tensor(self.file, name) for name in self.file.dense_tensors()}
        packed = {entry.source_tensor: decoded(self.file, name, lock) for name, entry in self.file.modules.items()}
        return {**state, **packed}


@contextmanager
def open_model(path: str | Path) -> Iterator[ModelSource]:
    """Open a model directory or a .salr file; what it needs on disk lives as long as the block.

    Raises:
        SalrError: it is neither, or is damaged.
    """
    path = Path(path)
    if path.is_dir() and not (path / INDEX_NAME).is_file():
        yield DenseModel(path)
        return
    if not path.exists():
        raise EvaluationError("no such file or directory", path=path, needed="a model directory or a .salr file")
    with TemporaryDirectory(prefix="salr-assets-") as folder:
        yield PackedModel(path, Path(folder))


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a model directory or a .salr file, adapters merged.

    Raises:
        SalrError: it cannot be read, or transformers cannot run it.
    """
    with open_model(path) as source:
        tokenizer = source.tokenizer()
        return source.load(device, dtype), tokenizer


def _n_elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
