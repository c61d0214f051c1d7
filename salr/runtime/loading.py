"""Whole models from one .salr file.

Invariant: a model is returned only when every digest of its file is checked, beside its building, and no kernel is
given a module before its structure is; weights stay in the file's memory map, packed, unless they go to another device;
every weight of the model comes from the file.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..formats.checking import IntegrityCheck
from ..formats.container import TensorSpec
from ..formats.errors import OptionError, SalrError
from ..formats.reader import SalrFile
from . import backends, graph_decoding, memory
from .devices import usable_device
from .errors import LoadError
from .experts import packed_modules
from .layout import buffer_name
from .linear import SalrLinear
from .mapped import decoded, mapped_tensor
from .quiet import quiet_transformers
from .skeleton import Skeleton, plan_skeleton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UPGRADE = "upgrade transformers, or make a dense directory with `salr unpack` for another tool"
_MODEL_FILES = ("config.json", "generation_config.json")


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Any:
    """Return the model of a .salr file as a transformers model in evaluation mode, ready for ``generate()``.

    Packed layers stay packed, trained adapters are active at the scale they were trained with (``model.set_adapters``
    changes it), and nothing else than the file is read.

    Args:
        device: where the model goes.
        dtype: of activations and of the tensors kept dense: ``auto`` for the config's, bf16, fp16, fp32 or a torch
            dtype. Packed values keep theirs.
        device_map: as in ``from_pretrained``, instead of ``device``; needs accelerate.
        backend: what computes packed products (see ``salr doctor``); None for the device's own.

    Raises:
        FormatError: the file is damaged, or needs a newer salr (VersionError).
        LoadError: this transformers has no such model, or memory does not suffice.
        BackendError: ``backend`` is unknown or cannot be used here.
        OptionError: ``device`` is not there.
    """
    chosen, target = _dtype(dtype), usable_device(device)
    if backend is not None:
        backends.usable(backend)
    file = SalrFile(path)
    file.require_whole("loading")
    with IntegrityCheck(file) as check, asset_folder(file, _MODEL_FILES) as folder, quiet_transformers():
        config = read_config(file, folder)
        model_class = _model_class(file, config)
        skeleton = _plan(file, model_class, config)
        _check_memory(file, skeleton, target if device_map is None else None, chosen or config.dtype)
        with check.awaited():
            model = _from_pretrained(file, model_class, config, skeleton, folder, chosen, device_map)
            for _, module in packed_modules(model):
                module.backend = backend
            if device_map is None:
                model.to(target)
            else:
                _keep_on_host(file, model, skeleton)
            check.require_modules()
            _make_ready(model)
    model.name_or_path = model.config.name_or_path = str(path)
    model.generate = types.MethodType(graph_decoding.generate, model)
    return model


def _keep_on_host(file: SalrFile, model: Any, skeleton: Skeleton) -> None:
    """Give back the device's copies of packed tensors where the backend lays them out anyway."""
    for name, home in skeleton.homes.items():
        module = model.get_submodule(home)
        device = module.compute_device
        is_offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        if device.type in ("cpu", "meta") or is_offloaded:
            continue
        if backends.keeps_packed_on_host(device.type, module.backend):
            tensors = skeleton.layouts[name].tensors
            module.keep_on_host({buffer_name(t.name): mapped_tensor(file, f"{name}.{t.name}") for t in tensors})


def _make_ready(model: Any) -> None:
    """Lay the weights out now where a backend keeps a layout of its own, so that no first call has to."""
    packed = [module for _, module in packed_modules(model) if isinstance(module, SalrLinear)]
    laid_out = [m for m in packed if m.compute_device != m.values.device]
    if not laid_out or graph_decoding.decoder_of(model) is not None:
        return
    with torch.no_grad():
        for module in laid_out:
            module(torch.zeros(1, module.in_features, dtype=module.compute_dtype, device=module.compute_device))


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer that a .salr file carries.

    Raises:
        FormatError: the file is damaged.
        LoadError: it carries none, or transformers cannot load it.
    """
    import transformers

    file = SalrFile(path)
    fix = "copy the model's tokenizer files beside its weights and convert again"
    with asset_folder(file) as folder, quiet_transformers(), refusing(file, "no usable tokenizer", fix):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokenizer.name_or_path = str(path)
    return tokenizer


def check_integrity(file: SalrFile) -> None:
    """Check every digest and every module of a file.

    Raises:
        FormatError: the first thing that is wrong.
    """
    with IntegrityCheck(file) as check:
        check.require_all()


@contextmanager
def asset_folder(file: SalrFile, names: tuple[str, ...] | None = None) -> Iterator[Path]:
    """Yield a temporary folder with the files that ``file`` carries, or those of ``names`` among them."""
    with TemporaryDirectory(prefix="salr-assets-") as folder:
        for name in file.assets:
            if names is None or name in names:
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(file.asset(name))
        yield Path(folder)


@contextmanager
def refusing(file: SalrFile, found: str, fix: str | None = None) -> Iterator[None]:
    """Turn whatever transformers raises (many types) into one line."""
    try:
        yield
    except SalrError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise LoadError(f"{found} ({reason})", path=file.path, fix=fix) from error


def read_config(file: SalrFile, folder: Path) -> Any:
    """Return the transformers config that a file carries."""
    import transformers

    if "config.json" not in file.assets:
        raise LoadError("it carries no config.json", path=file.path, fix="convert the model again from its directory")
    with refusing(file, f"transformers {transformers.__version__} cannot read its config", UPGRADE):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _model_class(file: SalrFile, config: Any) -> Any:
    import transformers

    name = (getattr(config, "architectures", None) or ["no model class"])[0]
    found = getattr(transformers, str(name), None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise LoadError(
            f"config.json names {name}, which transformers {transformers.__version__} does not have",
            path=file.path,
            fix=UPGRADE,
        )
    return found


def _plan(file: SalrFile, model_class: Any, config: Any) -> Skeleton:
    with refusing(file, f"transformers cannot build {model_class.__name__}", UPGRADE), torch.device("meta"):
        model = model_class(config)
    specs: Mapping[str, TensorSpec] = file.tensors
    return plan_skeleton(model, file.manifest, specs)


def _check_memory(file: SalrFile, skeleton: Skeleton, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Count what must be allocated: what is decoded or changes its dtype, and on other devices the file itself."""
    width = (dtype or torch.float32).itemsize
    needed = sum(skeleton.layouts[module].entry.n_weights * width for module in skeleton.dense)
    for name in file.dense_tensors():
        stored = file.tensors[name]
        if stored.dtype in ("BF16", "F16", "F32") and mapped_tensor(file, name).dtype != dtype:
            needed += mapped_tensor(file, name).numel() * width
    if device is not None:
        memory.check_fits(needed + (0 if device.type == "cpu" else file.n_bytes), device, file.path)


def _from_pretrained(
    file: SalrFile,
    model_class: Any,
    config: Any,
    skeleton: Skeleton,
    folder: Path,
    dtype: torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
) -> Any:
    """Let transformers fill the skeleton, as it fills a model from a directory, from the mapped tensors."""
    import transformers

    config.quantization_config = {"quant_method": "salr", "skeleton": skeleton}
    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": device_map, "output_loading_info": True}
    if (folder / "generation_config.json").is_file():
        options["generation_config"] = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    with refusing(file, f"transformers cannot load {model_class.__name__}"):
        state = _state(file, skeleton)
        model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    _check_loaded(file, skeleton, info, model_class.__name__)
    return model


def _state(file: SalrFile, skeleton: Skeleton) -> dict[str, Any]:
    """Return every tensor of the file under the name that the model knows, none of them read yet."""
    state: dict[str, Any] = {name: mapped_tensor(file, name) for name in file.dense_tensors()}
    lock = threading.Lock()
    for module, layout in skeleton.layouts.items():
        if module in skeleton.dense:
            state[layout.entry.source_tensor] = decoded(file, module, lock)
            continue
        for spec in layout.tensors:
            state[f"{skeleton.homes[module]}.{buffer_name(spec.name)}"] = mapped_tensor(file, f"{module}.{spec.name}")
    return state


def _check_loaded(file: SalrFile, skeleton: Skeleton, info: Mapping[str, Any], class_name: str) -> None:
    """Refuse a model with a weight that is not the file's, or that lacks a packed weight of the file."""
    unused = [name for name in info["unexpected_keys"] if name.rpartition(".")[0] in set(skeleton.homes.values())]
    for names, found in (
        (info["missing_keys"], "is missing from the file"),
        (info["mismatched_keys"], "has another shape in the file"),
        (info.get("error_msgs") or [], "could not be loaded"),
        (unused, f"has no place in {class_name}"),
    ):
        if names:
            name = sorted(str(item[0] if isinstance(item, tuple) else item) for item in names)[0]
            raise LoadError(found, path=file.path, tensor=name, needed=f"every weight of {class_name}")


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r}", needed="auto, " + ", ".join(DTYPES))
    return DTYPES.get(dtype)
