"""Running a transformers model one block at a time, so that a model of any size can be calibrated.

Invariant: at any moment at most one block holds weights; everything else is on the meta device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...formats.errors import CalibrationError
from ..sources.architecture import Architecture, model_config, name_of_blocks
from ..sources.checkpoint import FLOAT_TORCH_DTYPES, Checkpoint


@dataclass(frozen=True)
class BlockCall:
    """The arguments besides the hidden states that the model passes to one block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


#: from hidden states (1, length, width) to inputs by tensor name, and the block's output
Capture = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


class _StopForward(Exception):
    """Raised inside a forward pass when nothing after this point is needed."""


class BlockModel:
    """A checkpoint's model class without weights, and its blocks by number.

    Raises:
        CalibrationError: transformers has no class for it, it has no list of blocks, or its blocks need tensors that
            the checkpoint holds under other names (experts that transformers fuses).
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> None:
        self._checkpoint, self._architecture, self._device = checkpoint, architecture, device
        self._model = _build_without_weights(checkpoint)
        self.prefix, self.blocks = _find_blocks(self._model, checkpoint)
        self._calls: list[BlockCall] = []
        missing = [
            name for name, _ in self.blocks.named_parameters() if self._tensor_of(f"{self.prefix}.{name}") is None
        ]
        if missing:
            raise CalibrationError(
                f"{checkpoint.architecture} cannot be run block by block: the checkpoint has no {missing[0]!r}",
                path=checkpoint.directory,
                fix="convert it without --calibration",
            )

    def _tensor_of(self, parameter: str) -> str | None:
        """Return the checkpoint's name of a parameter of the model class."""
        return next((n for n in self._architecture.spellings(parameter) if n in self._checkpoint.tensors), None)

    def block_of(self, tensor: str) -> int | None:
        """Return the number of the block that a checkpoint tensor belongs to, None if it is in none."""
        for name in self._architecture.spellings(tensor):
            if name.startswith(self.prefix + "."):
                number = name[len(self.prefix) + 1 :].split(".", 1)[0]
                return int(number) if number.isdigit() else None
        return None

    def embed(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return the hidden states (1, length, width) entering block 0 for each row of ``tokens`` (samples, length)."""
        with self._weights_outside_blocks(), self._recording():
            return [self._enter(sample[None].to(self._device)) for sample in tokens]

    def _enter(self, sample: torch.Tensor) -> torch.Tensor:
        self._calls = []
        try:
            self._model(input_ids=sample, use_cache=False)
        except _StopForward as stop:
            hidden: torch.Tensor = stop.args[0]
            return hidden
        except Exception as error:  # whatever a model class raises, the user needs to know which one
            raise self._cannot_run(error) from error
        raise self._cannot_run(RuntimeError("its blocks were not called"))

    def _cannot_run(self, error: Exception) -> CalibrationError:
        return CalibrationError(
            f"transformers cannot run {self._checkpoint.architecture} ({str(error).splitlines()[0][:160]})",
            path=self._checkpoint.directory,
            fix="convert it without --calibration",
        )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Let each block pass its input through and note its other arguments; stop after the last."""
        for number, block in enumerate(self.blocks):
            block.forward = self._recorder(number == len(self.blocks) - 1)
        try:
            with torch.no_grad():
                yield
        finally:
            for block in self.blocks:
                del block.forward

    def _recorder(self, is_last: bool) -> Callable[..., torch.Tensor]:
        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._calls.append(BlockCall(args, kwargs))
            if is_last:
                raise _StopForward(hidden_states)
            return hidden_states

        return record

    @contextmanager
    def _weights_outside_blocks(self) -> Iterator[None]:
        outside = [n for n, _ in self._model.named_parameters() if not n.startswith(self.prefix + ".")]
        loaded = [name for name in outside if (tensor := self._tensor_of(name)) and self._is_float(tensor)]
        for name in loaded:
            _set_parameter(self._model, name, self._load(name))
        try:
            yield
        finally:
            for name in loaded:
                _set_parameter(self._model, name, self._model.get_parameter(name).to("meta"))

    def _is_float(self, tensor: str) -> bool:
        return self._checkpoint.tensors[tensor].dtype in FLOAT_TORCH_DTYPES

    def _load(self, parameter: str) -> torch.Tensor:
        tensor = self._tensor_of(parameter)
        assert tensor is not None  # checked when the model was opened
        stored = self._checkpoint.read(tensor).to(self._device, copy=True)  # narrow over the bus, widened there
        return stored.to(torch.float32)

    @contextmanager
    def loaded(self, number: int) -> Iterator[Block]:
        """Yield block ``number`` with the source's weights in float32."""
        module, prefix = self.blocks[number], f"{self.prefix}.{number}"
        names = [name for name, _ in module.named_parameters()]
        for name in names:
            _set_parameter(module, name, self._load(f"{prefix}.{name}"))
        try:
            yield Block(
                module, self._calls[number], {self._tensor_of(f"{prefix}.{name}") or "": name for name in names}
            )
        finally:
            for name in names:
                _set_parameter(module, name, module.get_parameter(name).to("meta"))


class Block:
    """One block with weights; ``parameters`` maps the checkpoint's tensor names to the block's own."""

    def __init__(self, module: torch.nn.Module, call: BlockCall, parameters: Mapping[str, str]) -> None:
        self._module, self._call, self.parameters = module, call, parameters

    def weight(self, tensor: str) -> torch.Tensor:
        """Return the current weight that stands for checkpoint tensor ``tensor``."""
        return self._module.get_parameter(self.parameters[tensor]).data

    def set_weight(self, tensor: str, weight: torch.Tensor) -> None:
        """Replace the weight that stands for checkpoint tensor ``tensor``."""
        _set_parameter(self._module, self.parameters[tensor], weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's output for one sample."""
        with torch.no_grad():
            out = self._module(hidden, *self._call.args, **self._call.kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def input_groups(self, hidden: torch.Tensor, tensors: list[str]) -> list[list[str]]:
        """Return ``tensors`` grouped by shared input (q, k and v; gate and up), in the order they are used."""
        seen: dict[int, list[str]] = {}
        alive: list[torch.Tensor] = []  # keeps every input alive, so that no address is used twice

        def note(tensor: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                alive.append(args[0])
                seen.setdefault(args[0].data_ptr(), []).append(tensor)

            return hook

        with self._hooks({tensor: note(tensor) for tensor in tensors}):
            self.forward(hidden)
        return list(seen.values())

    @contextmanager
    def capturing(self, tensors: list[str]) -> Iterator[Capture]:
        """Yield a function from one sample's hidden states to the inputs (length, K) of the layers, and the output.

        It is safe from several threads at once.
        """
        local = threading.local()

        def note(tensor: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                local.found[tensor] = args[0].reshape(-1, args[0].shape[-1])

            return hook

        def capture(hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            local.found = {}
            output = self.forward(hidden)
            return local.found, output

        with self._hooks({tensor: note(tensor) for tensor in tensors}):
            yield capture

    @contextmanager
    def _hooks(self, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
        handles = []
        for tensor, hook in hooks.items():
            owner = self._module.get_submodule(self.parameters[tensor].rpartition(".")[0])
            handles.append(owner.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _set_parameter(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter that is registered on the meta device; buffers stay real, since no file holds them."""
    original = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


def _build_without_weights(checkpoint: Checkpoint) -> torch.nn.Module:
    import transformers

    model_class = getattr(transformers, checkpoint.architecture or "", None)
    if model_class is None:
        raise CalibrationError(
            f"transformers has no class {checkpoint.architecture!r} to run",
            path=checkpoint.directory,
            fix="convert it without --calibration",
        )
    with _parameters_on_meta():
        model: torch.nn.Module = model_class(model_config(checkpoint))
    return model.eval()


def _find_blocks(model: torch.nn.Module, checkpoint: Checkpoint) -> tuple[str, torch.nn.ModuleList]:
    """Return name and list of the blocks: the module list with the most parameters."""
    found = name_of_blocks(model)
    if found is None:
        raise CalibrationError(
            f"{checkpoint.architecture} has no list of blocks",
            path=checkpoint.directory,
            fix="convert without --calibration",
        )
    blocks = model.get_submodule(found[0])
    assert isinstance(blocks, torch.nn.ModuleList)
    return found[0], blocks
