"""A checkpoint that lacks weights of its class, or has them in other shapes, is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from salr.converter.pipeline import plan_conversion
from salr.converter.sources.architecture import Architecture
from salr.converter.sources.checkpoint import Checkpoint
from salr.converter.sources.completeness import WeightComparison
from salr.formats.errors import SourceError

import salr

OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def meta_model(source):
    return Architecture(Checkpoint(source)).model


def shapes_in(source):
    return {name: tuple(tensor.shape) for name, tensor in load_file(source / "model.safetensors").items()}


def missing(model, shapes):
    return WeightComparison(model, shapes).missing()


def without(shapes, *words):
    return {name: shape for name, shape in shapes.items() if not any(word in name for word in words)}


def loading_info(model, config, shapes):
    """Return what transformers says of loading tensors of these shapes; None where it cannot even put them together."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        return type(model).from_pretrained(
            None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )[1]  # fmt: skip
    except RuntimeError as error:
        assert "automatic conversion of the weights" in str(error)  # experts that cannot be stacked
        return None


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
def test_what_is_missing_or_misshapen_is_what_transformers_finds(model, request):
    source = request.getfixturevalue(model)
    shapes, ours, config = shapes_in(source), meta_model(source), transformers.AutoConfig.from_pretrained(source)
    whole = WeightComparison(ours, shapes)
    assert (whole.missing(), whole.misshapen(), whole.surplus()) == ([], {}, [])
    for name in list(shapes)[:: max(1, len(shapes) // 6)]:
        rest = {other: shape for other, shape in shapes.items() if other != name}
        theirs = loading_info(ours, config, rest)
        assert theirs is None or theirs["missing_keys"] or theirs["mismatched_keys"]
        assert missing(ours, rest)
        longer = shapes | {name: (shapes[name][0] + 2, *shapes[name][1:])}
        theirs = loading_info(ours, config, longer)
        assert theirs is None or theirs["mismatched_keys"]
        assert WeightComparison(ours, longer).misshapen() == {name: str(list(shapes[name]))}


@pytest.mark.parametrize(
    ("model", "config", "found", "n_tensors"),
    [
        ("llama", {"intermediate_size": 80}, "layers.0.mlp.down_proj.weight': shape [64, 96], needed [64, 80]", 6),
        ("llama", {"vocab_size": 130}, "lm_head.weight': shape [128, 64], needed [130, 64]", 2),
        ("tied_llama", {"vocab_size": 130}, "model.embed_tokens.weight': shape [128, 64], needed [130, 64]", 1),
        ("gpt2", {"n_positions": 16}, "transformer.wpe.weight': shape [32, 32], needed [16, 32]", 1),
        ("gpt2", {"n_inner": 100}, "transformer.h.0.mlp.c_fc.bias': shape [128], needed [100]", 6),
        ("moe", {"intermediate_size": 32}, "sparse_moe.experts.0.w1.weight': shape [24, 32], needed [32, 32]", 24),
        ("moe", {"num_local_experts": 2}, "block_sparse_moe.gate.weight': shape [4, 32], needed [2, 32]", 6),
        ("stacked_moe", {"intermediate_size": 32}, "experts.down_proj': shape [4, 32, 24], needed [4, 32, 32]", 4),
    ],
)  # fmt: skip
def test_weights_of_another_shape_are_named_before_there_is_any_output(
    model, config, found, n_tensors, request, edited_model, tmp_path
):
    source = edited_model(request.getfixturevalue(model), **config)
    with pytest.raises(SourceError) as error:
        salr.convert(source, tmp_path / "out.salr", OPTIONS)
    assert str(error.value).startswith(f"{source / 'model.safetensors'}: tensor '") and "\n" not in str(error.value)
    assert f"{found} for the " in str(error.value)
    count = f"{n_tensors} tensors differ: " if n_tensors > 1 else ""
    assert f" that config.json describes; {count}give the config.json that belongs to these weights" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_of_tied_weights_either_is_enough(tied_llama):
    model, shapes = meta_model(tied_llama), shapes_in(tied_llama)
    others, embedding = without(shapes, "embed_tokens"), shapes["model.embed_tokens.weight"]
    assert "lm_head.weight" not in shapes
    assert missing(model, others) == ["model.embed_tokens.weight"]
    assert missing(model, others | {"lm_head.weight": embedding}) == []
    head = WeightComparison(model, others | {"lm_head.weight": (embedding[0] + 1, embedding[1])})
    assert head.misshapen() == {"lm_head.weight": str(list(embedding))}


def test_a_checkpoint_may_lack_buffers_and_what_its_class_says_may_be_missing(llama):
    model, shapes = meta_model(llama), shapes_in(llama)
    assert "model.rotary_emb.inv_freq" in dict(model.named_buffers())
    model.model.norm.register_buffer("scale", torch.ones(1, device="meta"))
    assert "model.norm.scale" in model.state_dict() and missing(model, shapes) == []
    assert WeightComparison(model, shapes | {"model.norm.scale": (2,)}).misshapen() == {"model.norm.scale": "[1]"}
    assert missing(model, without(shapes, "norm"))
    model._keys_to_ignore_on_load_missing = {"norm.weight$", "layernorm"}
    assert missing(model, without(shapes, "norm")) == []


def test_names_without_the_base_models_prefix_are_known(gpt2):
    shapes = {name.removeprefix("transformer."): shape for name, shape in shapes_in(gpt2).items()}
    model, (first, *_) = meta_model(gpt2), shapes
    old = WeightComparison(model, shapes | {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()})
    assert (old.missing(), old.misshapen()) == ([], {})
    assert missing(model, without(shapes, first)) == [f"transformer.{first}"]
    assert WeightComparison(model, shapes | {first: (7,)}).misshapen() == {first: str(list(shapes[first]))}


def test_experts_whose_names_transformers_would_not_save_are_compared_with_the_stack(moe):
    shapes = {name.removeprefix("model."): shape for name, shape in shapes_in(moe).items()}
    model, expert = meta_model(moe), "layers.0.block_sparse_moe.experts.0.w2.weight"
    assert WeightComparison(model, shapes).misshapen() == {}
    narrow = {name: (32, 20) if ".w2." in name else shape for name, shape in shapes.items()}
    found = WeightComparison(model, narrow).misshapen()
    assert found[expert] == "a part of model.layers.0.mlp.experts.down_proj [4, 32, 24]" and len(found) == 2


def test_stacked_experts_that_transformers_turns_while_it_loads_fit_both_ways():
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    with torch.device("meta"):
        config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config={"depth": 1})
        model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    down = "model.language_model.layers.0.mlp.experts.down_proj"
    turned = shapes | {down: (shapes[down][0], shapes[down][2], shapes[down][1])}
    assert turned != shapes and WeightComparison(model, turned).misshapen() == {}
    assert list(WeightComparison(model, shapes | {down: (4, 23, 32)}).misshapen()) == [down]


@pytest.mark.parametrize(
    ("model", "fewer", "n_tensors"),
    [("llama", {"num_hidden_layers": 1}, 9), ("moe", {"num_hidden_layers": 1}, 19)],
)
def test_tensors_of_layers_that_config_json_does_not_have_are_counted_in_a_warning(
    model, fewer, n_tensors, request, edited_model, tmp_path
):
    source = edited_model(request.getfixturevalue(model), **fewer)
    (note,) = salr.convert(source, tmp_path / "out.salr", OPTIONS).notes
    assert f"has no place for {n_tensors} tensors: model.layers.1." in note and "correct config.json" in note
    names = [line.key for line in salr.open(tmp_path / "out.salr").manifest.ledger]
    assert sorted(names) == sorted(shapes_in(source))
    info = loading_info(meta_model(source), transformers.AutoConfig.from_pretrained(source), shapes_in(source))
    assert all(".layers.1." in key for key in info["unexpected_keys"])


def test_buffers_of_old_checkpoints_are_no_surplus(llama, gpt2):
    old = shapes_in(llama) | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "model.extra": (3,)}
    assert WeightComparison(meta_model(llama), old).surplus() == ["model.extra"]


@pytest.mark.parametrize("architectures", [None, ["NobodysModel"]])
def test_without_a_known_class_nothing_is_asked_for(llama, edited_model, tmp_path, architectures):
    source = edited_model(llama, "q_proj", architectures=architectures, num_hidden_layers=5, vocab_size=99)
    assert salr.convert(source, tmp_path / "out.salr", OPTIONS).notes == ()
    assert len(salr.open(tmp_path / "out.salr").modules) == 12
