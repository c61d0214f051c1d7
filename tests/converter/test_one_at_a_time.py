"""Memory about one matrix: experts of a stack are written one by one, dense tensors in pieces, and no two at once."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from salr.converter.execution import packing
from salr.converter.sources.checkpoint import Checkpoint
from salr.formats.writer import TensorStream

import salr

EXPERTS = 5


@pytest.fixture(params=["source", "int8", "nf4"])
def values(request):
    return request.param


@pytest.fixture
def stack(tmp_path):
    """Return a checkpoint of one stack of experts with an odd number of kept weights each, and the same one by one."""
    folder, apart = tmp_path / "stack", tmp_path / "apart"
    weight = torch.randn(EXPERTS, 9, 15, generator=torch.Generator().manual_seed(3)).bfloat16()
    for path, tensors in (
        (folder, {"blocks.0.experts.up": weight}),
        (apart, {f"blocks.0.experts.{e}.up": weight[e].clone() for e in range(EXPERTS)}),
    ):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text("{}")
    return folder, apart


def options(values: str) -> salr.ConvertOptions:
    module = salr.ModuleOptions(0.3, 2, values=values, group_size=8)
    return salr.ConvertOptions(module, method="magnitude", include=("re:.*up",), workers=1)


def test_a_stack_holds_what_its_experts_give_one_by_one(stack, tmp_path, values):
    folder, apart = stack
    salr.convert(folder, tmp_path / "stack.salr", options(values))
    salr.convert(apart, tmp_path / "apart.salr", options(values))
    whole, single = salr.open(tmp_path / "stack.salr"), salr.open(tmp_path / "apart.salr")
    assert whole.modules["blocks.0.experts.up"].nnz % 2 == 1 and [p for _, p in whole.check_all() if p] == []
    dense = whole.dense("blocks.0.experts.up")
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(dense[expert], single.dense(f"blocks.0.experts.{expert}.up"))
    errors = [single.modules[f"blocks.0.experts.{e}.up"].error for e in range(EXPERTS)]
    found = whole.modules["blocks.0.experts.up"].error
    assert found.energy == pytest.approx(sum(e.energy for e in errors))
    assert found.residual * found.energy == pytest.approx(sum(e.residual * e.energy for e in errors))


def test_an_expert_is_written_and_gone_before_the_next_one_is_packed(stack, tmp_path, monkeypatch):
    events, alive = [], []
    pack, write = packing._pack_matrix, TensorStream.write

    def packed(*arguments):
        gc.collect()
        events.append(("pack", sum(reference() is not None for reference in alive)))
        matrix = pack(*arguments)
        alive.append(weakref.ref(matrix.mask))
        return matrix

    def written(self, piece):
        events.append(("write", 0))
        write(self, piece)

    monkeypatch.setattr(packing, "_pack_matrix", packed)
    monkeypatch.setattr(TensorStream, "write", written)
    salr.convert(stack[0], tmp_path / "m.salr", options("source"))
    places = [index for index, (kind, _) in enumerate(events) if kind == "pack"]
    assert len(places) == EXPERTS and all(b - a >= 4 for a, b in itertools.pairwise(places))
    assert max(count for kind, count in events if kind == "pack") <= 1


def test_a_tensor_kept_dense_is_copied_in_pieces_of_16_megabytes(tmp_path, monkeypatch):
    folder, pieces = tmp_path / "model", []
    folder.mkdir()
    tensors = {"embed.weight": torch.zeros(20_000_001, dtype=torch.uint8), "blocks.0.up.weight": torch.ones(4, 4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    original = Checkpoint.pieces

    def noted(self, name):
        for piece in original(self, name):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(Checkpoint, "pieces", noted)
    salr.convert(folder, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 1), method="magnitude"))
    assert pieces == [2**24, 20_000_001 - 2**24]
