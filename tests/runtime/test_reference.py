"""The reference backend decodes what the file's own reader decodes."""

from __future__ import annotations

import numpy as np
import torch
from salr.formats.reader import SalrFile

from salr.runtime import reference
from salr.runtime.packed import PackedWeight


def test_every_2d_module_of_the_golden_file_decodes_as_in_numpy(golden):
    file = SalrFile(golden)
    flat = [name for name, entry in file.modules.items() if len(entry.shape) == 2]
    assert len({file.modules[name].encoding for name in flat}) >= 3
    for name in flat:
        tensors = file.module(name)
        assert np.array_equal(reference.dense(PackedWeight.from_module(tensors)).numpy(), tensors.dense())


def test_the_product_is_that_of_the_dense_matrix(golden):
    file = SalrFile(golden)
    name = next(name for name, entry in file.modules.items() if len(entry.shape) == 2)
    weight = PackedWeight.from_module(file.module(name))
    x = torch.randn(3, weight.n_columns)
    torch.testing.assert_close(reference.linear(x, weight), x @ torch.from_numpy(file.module(name).dense()).T)
