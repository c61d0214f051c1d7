"""Running a model block by block gives the hidden states that transformers gives with the whole model in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from salr.converter.calibration.blocks import BlockModel
from salr.converter.sources.architecture import Architecture
from salr.converter.sources.checkpoint import Checkpoint
from salr.formats.errors import CalibrationError

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(0))
WHERE = {"llama32": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Return a BERT directory."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=WHERE)
def source(request):
    return request.param, request.getfixturevalue(request.param)


def block_model(folder) -> BlockModel:
    checkpoint = Checkpoint(folder)
    return BlockModel(checkpoint, Architecture(checkpoint), CPU)


def through_transformers(folder, prefix) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what enters and leaves each block when transformers runs the whole model."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    seen = []

    def note(module, args, output):
        seen.append((args[0], output[0] if isinstance(output, tuple) else output))

    for block in model.get_submodule(prefix):
        block.register_forward_hook(note)
    with torch.no_grad():
        for sample in TOKENS:
            model(input_ids=sample[None], use_cache=False)
    return seen


def test_the_hidden_states_at_every_border_are_transformers_own(source):
    name, folder = source
    model, expected = block_model(folder), through_transformers(folder, WHERE[name])
    assert model.prefix == WHERE[name] and len(model.blocks) == 2
    hidden = model.embed(TOKENS)
    for number in range(2):
        wanted = [expected[2 * sample + number] for sample in range(3)]
        for found, (entering, _) in zip(hidden, wanted, strict=True):
            torch.testing.assert_close(found, entering, rtol=1e-5, atol=1e-5)
        with model.loaded(number) as block:
            hidden = [block.forward(sample) for sample in hidden]
        for found, (_, leaving) in zip(hidden, wanted, strict=True):
            assert found.shape == (1, 12, found.shape[-1])
            torch.testing.assert_close(found, leaving, rtol=1e-5, atol=1e-5)


def test_only_the_block_in_use_holds_weights(source):
    _, folder = source
    model = block_model(folder)
    model.embed(TOKENS[:1])
    assert all(parameter.is_meta for parameter in model.blocks.parameters())
    with model.loaded(0):
        assert not any(parameter.is_meta for parameter in model.blocks[0].parameters())
        assert all(parameter.is_meta for parameter in model.blocks[1].parameters())
    assert all(parameter.is_meta for parameter in model.blocks.parameters())


def test_layers_that_share_an_input_stand_together_in_the_order_of_use(llama32):
    model = block_model(llama32)
    hidden = model.embed(TOKENS[:1])[0]
    names = [f"model.layers.1.{leaf}.weight" for leaf in (
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    )]  # fmt: skip
    with model.loaded(1) as block:
        groups = block.input_groups(hidden, names)
    leaves = [sorted(name.split(".")[-2] for name in group) for group in groups]
    assert leaves == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_tensor_is_told_its_block(gpt2, llama32):
    model = block_model(llama32)
    assert model.block_of("model.layers.1.mlp.up_proj.weight") == 1
    assert model.block_of("lm_head.weight") is None and model.block_of("model.norm.weight") is None
    assert block_model(gpt2).block_of("h.0.attn.c_attn.weight") == 0


def test_a_changed_weight_changes_the_output_and_comes_back_with_the_block(llama32):
    model, name = block_model(llama32), "model.layers.0.mlp.down_proj.weight"
    hidden = model.embed(TOKENS[:1])[0]
    with model.loaded(0) as block:
        before = block.forward(hidden)
        block.set_weight(name, block.weight(name) * 2)
        assert not torch.allclose(block.forward(hidden), before, atol=1e-4)
    with model.loaded(0) as block:
        torch.testing.assert_close(block.forward(hidden), before, rtol=0, atol=0)


def test_captured_inputs_are_what_the_layers_receive(llama32):
    model, name = block_model(llama32), "model.layers.0.mlp.down_proj.weight"
    hidden = model.embed(TOKENS[:1])[0]
    with model.loaded(0) as block, block.capturing([name]) as capture:
        inputs, output = capture(hidden)
    assert list(inputs) == [name] and inputs[name].shape == (12, 96) and output.shape == (1, 12, 64)


def t5(folder):
    """Save an encoder-decoder, whose forward needs more than input ids."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    torch.manual_seed(7)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_model_that_cannot_be_run_on_token_ids_alone_is_named(tmp_path):
    with pytest.raises(CalibrationError, match="T5ForConditionalGeneration") as error:
        block_model(t5(tmp_path / "m")).embed(TOKENS[:1])
    assert "\n" not in str(error.value)


def test_experts_that_transformers_fuses_are_named(moe):
    with pytest.raises(
        CalibrationError, match="MixtralForCausalLM cannot be run block by block: the checkpoint has no"
    ):
        block_model(moe)


@pytest.mark.parametrize("name", ["NobodysModel", None])
def test_a_class_that_transformers_does_not_have_is_named(llama32, tmp_path, name):
    source = shutil.copytree(llama32, tmp_path / "m")
    config = json.loads((source / "config.json").read_text()) | {"architectures": name and [name]}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(llama32)
    with pytest.raises(CalibrationError, match=str(name)):
        BlockModel(Checkpoint(source), Architecture(checkpoint), CPU)
