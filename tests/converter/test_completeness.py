"""A checkpoint that lacks weights of its class is refused before anything is computed; what may be missing is not."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from salr.converter.pipeline import plan_conversion
from salr.converter.sources.architecture import Architecture
from salr.converter.sources.checkpoint import Checkpoint
from salr.converter.sources.completeness import missing_weights
from salr.formats.errors import SourceError

import salr

OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def meta_model(source):
    return Architecture(Checkpoint(source)).model


def names_in(source):
    return list(load_file(source / "model.safetensors"))


@pytest.mark.parametrize(
    ("model", "without", "config", "found"),
    [
        ("llama", None, {"num_hidden_layers": 3}, "lacks model.layers.2.self_attn.q_proj.weight, model.layers.2."),
        ("llama", "1.self_attn.q_proj", {}, f"lacks {Q_PROJ}, needed"),
        ("llama", "model.norm", {}, "lacks model.norm.weight, needed"),
        ("tied_llama", "embed_tokens", {}, "lacks model.embed_tokens.weight, needed"),
        ("gpt2", r"h.0.mlp.c_fc.bias", {}, "lacks transformer.h.0.mlp.c_fc.bias, needed"),
        ("moe", r"layers.0.*experts.2.w1", {}, "lacks model.layers.0.block_sparse_moe.experts.2.w1.weight, needed"),
        ("stacked_moe", r"layers.0.*experts.down", {}, "lacks model.layers.0.block_sparse_moe.experts.0.w2.weight, "),
    ],
)  # fmt: skip
def test_missing_weights_are_named_before_there_is_any_output(
    model, without, config, found, request, edited_model, tmp_path
):
    source = edited_model(request.getfixturevalue(model), without, **config)
    with pytest.raises(SourceError) as error:
        salr.convert(source, tmp_path / "out.salr", OPTIONS)
    assert str(error.value).startswith(f"{source}: {found}") and "\n" not in str(error.value)
    assert "needed every weight of the " in str(error.value) and "download or save" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_of_many_missing_weights_three_are_named_and_the_rest_counted(llama, edited_model):
    with pytest.raises(SourceError, match=r"lacks (model\.layers\.\d\.[a-z_.]+(, )?){3} and 15 more, needed every"):
        plan_conversion(edited_model(llama, num_hidden_layers=4), OPTIONS)


@pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2", "moe", "stacked_moe", "llava"])
def test_what_is_missing_is_what_transformers_would_make_up(model, request):
    source = request.getfixturevalue(model)
    names, ours, config = names_in(source), meta_model(source), transformers.AutoConfig.from_pretrained(source)
    assert missing_weights(ours, names) == []
    shapes = {name: tensor.to("meta") for name, tensor in load_file(source / "model.safetensors").items()}
    for name in names[:: max(1, len(names) // 6)]:
        rest = {other: tensor for other, tensor in shapes.items() if other != name}
        try:
            theirs = type(ours).from_pretrained(
                None, config=config, state_dict=rest, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )[1]  # fmt: skip
            assert theirs["missing_keys"] or theirs["mismatched_keys"]
        except RuntimeError as error:
            assert "automatic conversion of the weights" in str(error)  # experts that cannot be stacked
        assert missing_weights(ours, rest)


def test_of_tied_weights_either_is_enough(tied_llama):
    model, names = meta_model(tied_llama), names_in(tied_llama)
    others = [name for name in names if name != "model.embed_tokens.weight"]
    assert "lm_head.weight" not in names
    assert missing_weights(model, others) == ["model.embed_tokens.weight"]
    assert missing_weights(model, [*others, "lm_head.weight"]) == []


def test_a_checkpoint_may_lack_buffers_and_what_its_class_says_may_be_missing(llama):
    model, names = meta_model(llama), names_in(llama)
    assert "model.rotary_emb.inv_freq" in dict(model.named_buffers())
    model.model.norm.register_buffer("scale", torch.ones(1, device="meta"))
    assert "model.norm.scale" in model.state_dict() and missing_weights(model, names) == []
    assert missing_weights(model, [name for name in names if "norm" not in name])
    model._keys_to_ignore_on_load_missing = {"norm.weight$", "layernorm"}
    assert missing_weights(model, [name for name in names if "norm" not in name]) == []


def test_names_without_the_base_models_prefix_are_known(gpt2):
    names = [name.removeprefix("transformer.") for name in names_in(gpt2)]
    assert missing_weights(meta_model(gpt2), [*names, "h.0.attn.bias", "h.0.attn.masked_bias"]) == []
    assert missing_weights(meta_model(gpt2), names[1:]) == [f"transformer.{names[0]}"]


@pytest.mark.parametrize("architectures", [None, ["NobodysModel"]])
def test_without_a_known_class_nothing_is_asked_for(llama, edited_model, tmp_path, architectures):
    source = edited_model(llama, "q_proj", architectures=architectures, num_hidden_layers=5)
    salr.convert(source, tmp_path / "out.salr", OPTIONS)
    assert len(salr.open(tmp_path / "out.salr").modules) == 12
