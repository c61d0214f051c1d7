"""Hidden states at a block's border on disk, so that an interrupted calibrated conversion goes on at that block.

Invariant: the file is durable before a note of it is journaled, and is read back only if it matches the note's digest;
float32 as it was in memory, so that the conversion goes on with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ...formats.dtypes import byte_view
from ...formats.errors import OutputError

#: hidden states (1, length, width) of each sample
Hidden = list[torch.Tensor]
#: through the source's weights, and through the packed ones; the same object where they are the same
Streams = tuple[Hidden, Hidden]


class HiddenSpool:
    """Keeps the streams that enter a block in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, number: int, streams: Streams) -> dict[str, Any]:
        """Write the streams entering block ``number``, and return the note that leads back to them.

        Raises:
            OutputError: the disk is full or failing.
        """
        distinct = streams[:1] if streams[0] is streams[1] else streams
        path, state = self._path(number), xxhash.xxh3_128()
        try:
            with path.open("wb") as file:
                for sample in (sample for stream in distinct for sample in stream):
                    piece = byte_view(sample.detach().cpu().numpy())
                    state.update(piece)
                    file.write(piece)
                file.flush()
                os.fdatasync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"writing failed ({error.strerror})", path=path, fix="free disk space and run the command again"
            ) from error
        shapes = [list(sample.shape) for sample in streams[0]]
        return {"block": number, "streams": len(distinct), "shapes": shapes, "digest": state.hexdigest()}

    def load(self, note: Mapping[str, Any], device: torch.device) -> Streams | None:
        """Return the streams of a note on ``device``, None where the file is gone or differs from it."""
        try:
            data = np.fromfile(self._path(note["block"]), np.uint8)
        except OSError:
            return None
        if xxhash.xxh3_128_hexdigest(byte_view(data)) != note["digest"]:
            return None
        samples = self._samples(data.view(np.float32), [tuple(shape) for shape in note["shapes"]], device)
        streams = [[next(samples) for _ in note["shapes"]] for _ in range(note["streams"])]
        return streams[0], streams[-1]

    @staticmethod
    def _samples(
        data: np.ndarray[Any, Any], shapes: list[tuple[int, ...]], device: torch.device
    ) -> Iterator[torch.Tensor]:
        position = 0
        while True:
            for shape in shapes:
                size = int(np.prod(shape))
                yield torch.from_numpy(data[position : position + size].reshape(shape).copy()).to(device)
                position += size

    def drop(self, number: int) -> None:
        """Remove the streams that entered block ``number``."""
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"hidden-{number}"
