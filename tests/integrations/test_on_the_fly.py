"""Dense models packed by from_pretrained(..., quantization_config=SalrConfig(...))."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from salr.formats.errors import OptionError
from transformers import AutoModelForCausalLM

import salr
from salr.runtime.experts import SalrExperts, packed_modules
from salr.runtime.linear import SalrLinear
from salr.runtime.reference import dense

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("source", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "alternating"])
def test_each_layer_is_what_convert_makes_of_it(source, method, request, tmp_path):
    folder = request.getfixturevalue(source)
    config = salr.SalrConfig(sparsity=0.6, rank=4, method=method)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    none = None if method == "magnitude" else salr.CalibrationOptions("none")
    options = salr.ConvertOptions(salr.ModuleOptions(0.6, 4), method=method, calibration=none)
    salr.convert(folder, tmp_path / "m.salr", options)
    file, packed = salr.open(tmp_path / "m.salr"), dict(packed_modules(model))
    assert len(packed) == len(file.modules)
    direct = salr.load(tmp_path / "m.salr")
    for name, module in packed_modules(direct):
        assert packed[name].entry.nnz == module.entry.nnz and packed[name].entry.error == module.entry.error
        for key, tensor in module.state_dict().items():
            assert torch.equal(packed[name].state_dict()[key].view(torch.uint8), tensor.view(torch.uint8)), key
    torch.testing.assert_close(logits(model), logits(direct))


@pytest.mark.parametrize("source", ["llama", "gpt2", "moe"])
def test_a_model_packed_on_the_fly_is_saved_and_loads_again(source, request, tmp_path):
    folder = request.getfixturevalue(source)
    config = salr.SalrConfig(sparsity=0.5, rank=4, method="magnitude")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {name for name, _ in packed_modules(again)} == {name for name, _ in packed_modules(model)}
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-7)


def test_fused_experts_become_stacks_with_the_numbers_of_single_experts(moe, tmp_path):
    config = salr.SalrConfig(sparsity=0.5, rank=4, method="magnitude")
    model = AutoModelForCausalLM.from_pretrained(moe, quantization_config=config)
    experts = [module for module in model.modules() if isinstance(module, SalrExperts)]
    assert len(experts) == 2
    salr.convert(moe, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude"))
    file = salr.open(tmp_path / "m.salr")
    down = experts[1].get_submodule("down_proj").matrices()
    for expert in range(4):
        expected = file.dense(f"model.layers.1.block_sparse_moe.experts.{expert}.w2", residual=False)
        np.testing.assert_array_equal(dense(down[expert].weight).numpy(), expected)


def test_norms_heads_routers_and_excluded_layers_stay_dense(moe):
    config = salr.SalrConfig(rank=2, method="magnitude", exclude=("*.0.self_attn.*",))
    model = AutoModelForCausalLM.from_pretrained(moe, quantization_config=config)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.model.layers[1].self_attn.q_proj) is SalrLinear
    with pytest.raises(OptionError, match=r"pattern 'nothing\*' matches no module that would be packed"):
        AutoModelForCausalLM.from_pretrained(moe, quantization_config=salr.SalrConfig(exclude=("nothing*",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity 1.5, needed 0 to 0.95"),
        ({"rank": -1}, "rank -1, needed an integer"),
        ({"method": "wanda"}, "method 'wanda', needed one of alternating, magnitude; other methods: `salr convert`"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        salr.SalrConfig(**options)


def test_a_rank_that_does_not_fit_is_told_before_anything_is_packed(llama):
    with pytest.raises(OptionError, match=r"rank 40, needed at most min\(N, K\) = 32"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=salr.SalrConfig(rank=40))


def test_the_saved_config_keeps_nothing_but_the_method():
    assert salr.SalrConfig(sparsity=0.7).to_dict() == {"quant_method": "salr"}
