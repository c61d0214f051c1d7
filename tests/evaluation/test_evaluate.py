"""Perplexity, agreement and KL: held against direct computations, and every refusal."""

from __future__ import annotations

import math
import shutil
import weakref

import pytest
import torch
from salr.formats.errors import OptionError

import salr
from salr.evaluation.errors import EvaluationError
from salr.evaluation.models import ModelSource, load_model
from salr.evaluation.protocol import EvalOptions, plan_windows

OPTIONS = EvalOptions(window=32)


def direct_log_probs(path, text, window=32):
    """Return log-probabilities (windows, window - 1, vocabulary) and targets of the non-overlapping windows."""
    model, tokenizer = load_model(path)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: ids.numel() // window * window].reshape(-1, window)
    with torch.no_grad():
        logits = model(ids).logits.double()
    return logits[:, :-1].log_softmax(-1), ids[:, 1:]


def test_perplexity_is_that_of_a_direct_computation(reader, text):
    log_probs, targets = direct_log_probs(reader, text)
    nll = -log_probs.gather(-1, targets[..., None]).mean().item()
    (found,) = salr.evaluate([reader], text, options=OPTIONS)
    assert found.nll == pytest.approx(nll, rel=1e-5) and found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (found.n_tokens, found.n_windows, found.n_scored) == (205, 6, 6 * 31)
    assert (found.ratio, found.agreement, found.kl, found.is_reference) == (None, None, None, False)


def test_perplexity_is_the_loss_that_transformers_reports(reader, text):
    model, tokenizer = load_model(reader)
    ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert salr.evaluate(reader, text, options=EvalOptions(32, max_windows=1))[0].nll == pytest.approx(loss, rel=1e-5)


def test_agreement_and_kl_are_those_of_a_direct_computation(reader, reader_salr, text):
    (ours, _), (theirs, _) = direct_log_probs(reader_salr, text), direct_log_probs(reader, text)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    reference, found = salr.evaluate([reader_salr], text, reader, OPTIONS)
    assert found.kl == pytest.approx(kl, rel=2e-3) and kl > 0.01
    assert found.agreement == pytest.approx(agreement) and 0.05 < agreement < 1
    assert found.ratio == pytest.approx(found.perplexity / reference.perplexity) and found.ratio != 1
    assert reference.is_reference and not found.is_reference


def test_a_model_against_itself_diverges_by_exactly_nothing(reader_salr, text):
    reference, found = salr.evaluate(reader_salr, text, reader_salr, OPTIONS)
    assert (found.kl, found.agreement, found.ratio, found.nll) == (0.0, 1.0, 1.0, reference.nll)


def test_a_file_is_worth_what_its_unpacked_directory_is(reader_salr, text, tmp_path):
    salr.unpack(reader_salr, tmp_path / "out", merge=True, dtype="fp32")
    _, packed, dense = salr.evaluate([reader_salr, tmp_path / "out"], text, reader_salr, OPTIONS)
    assert (packed.nll, packed.kl, packed.agreement) == (dense.nll, dense.kl, dense.agreement) == (packed.nll, 0.0, 1.0)
    assert packed.n_bytes == reader_salr.stat().st_size and dense.bits_per_weight == 32
    assert 8 < packed.bits_per_weight < 40 and packed.bits_per_weight != 32


def test_pieces_do_not_change_the_sums(reader, reader_salr, text, monkeypatch):
    whole = salr.evaluate(reader_salr, text, reader, OPTIONS)
    monkeypatch.setattr("salr.evaluation.scoring._PIECE_ELEMENTS", 7 * 128)
    for one, other in zip(whole, salr.evaluate(reader_salr, text, reader, OPTIONS), strict=True):
        assert (one.nll, one.kl) == pytest.approx((other.nll, other.kl)) and one.agreement == other.agreement


@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 31), (32, 1), (16, 16)])
def test_with_a_stride_each_token_counts_once_from_its_first_window(reader, text, window, stride):
    model, tokenizer = load_model(reader)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    seen: dict[int, float] = {}
    for start in range(0, ids.numel() - window + 1, stride):
        tokens = ids[start : start + window]
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0].double().log_softmax(-1)
        for position in range(1, window):
            seen.setdefault(start + position, -log_probs[position - 1, tokens[position]].item())
    (found,) = salr.evaluate(reader, text, options=EvalOptions(window, stride))
    assert found.n_scored == len(seen) and found.nll == pytest.approx(sum(seen.values()) / len(seen), rel=1e-5)


def test_windows_cover_the_text_without_overlap_and_drop_the_rest():
    assert [(w.start, w.stop, w.n_scored) for w in plan_windows(35, EvalOptions(10))] == [
        (0, 10, 9),
        (10, 20, 9),
        (20, 30, 9),
    ]
    assert [(w.start, w.first, w.n_scored) for w in plan_windows(20, EvalOptions(10, 4))] == [
        (0, 0, 9),
        (4, 5, 4),
        (8, 5, 4),
    ]
    assert plan_windows(9, EvalOptions(10)) == [] and len(plan_windows(10, EvalOptions(10))) == 1
    assert len(plan_windows(100, EvalOptions(10, max_windows=3))) == 3


def test_one_model_at_a_time_is_in_memory(reader, reader_salr, text, monkeypatch):
    alive, load = [], ModelSource.load

    def watched(self, device, dtype):
        assert [model() for model in alive if model() is not None] == []
        model = load(self, device, dtype)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ModelSource, "load", watched)
    salr.evaluate([reader, reader_salr], text, reader, OPTIONS)
    assert len(alive) == 3


def test_nothing_stays_on_disk_and_progress_ends_with_every_window(reader, text, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    salr.evaluate(reader, text, reader, OPTIONS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(13)] and list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_the_reference_is_told_before_the_run(reader, text, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(EvaluationError, match=r"0.0 GB of disk space free, needed .*--max-windows"):
        salr.evaluate(reader, text, reader, OPTIONS)


def test_a_broken_model_is_told(reader, text, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(reader, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="broken: the logits are not numbers"):
        salr.evaluate(folder, text, options=OPTIONS)


def test_texts_that_cannot_be_used_are_refused(reader, text, tmp_path):
    with pytest.raises(EvaluationError, match=r"no.txt: the text cannot be read \(No such file"):
        salr.evaluate(reader, tmp_path / "no.txt", options=OPTIONS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="binary: is no UTF-8 text"):
        salr.evaluate(reader, tmp_path / "binary", options=OPTIONS)
    with pytest.raises(EvaluationError, match="there is no text in it"):
        salr.evaluate(reader, " \n", options=OPTIONS)
    with pytest.raises(EvaluationError, match="has 31 tokens for its tokenizer, needed at least one window of 32"):
        salr.evaluate(reader, " ".join(text.split()[:31]), options=OPTIONS)


def test_a_window_longer_than_the_models_positions_is_refused(reader, text):
    with pytest.raises(EvaluationError, match="a window of 65 tokens, needed at most its 64 positions; give --window"):
        salr.evaluate(reader, text, options=EvalOptions(65))


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "T5ForConditionalGeneration", "LlamaModel"])
def test_classes_that_predict_no_next_token_have_no_perplexity(kind, readers, reader, text, tmp_path, edit_config):
    if kind == "LlamaModel":
        folder = edit_config(shutil.copytree(reader, tmp_path / "m"), architectures=[kind])
    else:
        folder = readers(save_encoder(kind, tmp_path / "encoder"), tmp_path / "m")
    with pytest.raises(EvaluationError, match=f"{kind} has no perplexity: it predicts no next token, needed a causal"):
        salr.evaluate(folder, text, options=OPTIONS)


def save_encoder(kind, folder, **more):
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    } | more
    config = transformers.T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, vocab_size=60)
    if kind.startswith("Bert"):
        config = transformers.BertConfig(intermediate_size=48, **settings)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def test_a_language_model_head_that_sees_later_tokens_is_refused_and_one_that_does_not_is_scored(
    readers, text, tmp_path
):
    blind = readers(save_encoder("BertLMHeadModel", tmp_path / "a", is_decoder=True), tmp_path / "blind")
    assert salr.evaluate(blind, text, options=OPTIONS)[0].n_scored == 6 * 31
    sees = readers(save_encoder("BertLMHeadModel", tmp_path / "b"), tmp_path / "sees")
    with pytest.raises(EvaluationError, match=r"sees: BertLMHeadModel has no perplexity: its logits depend on later"):
        salr.evaluate(sees, text, options=OPTIONS)


def test_another_vocabulary_than_the_references_is_refused(reader, readers, gpt2, text, tmp_path, edit_config):
    other = readers(gpt2, tmp_path / "gpt2")
    with pytest.raises(EvaluationError, match=r"gpt2: a vocabulary of 64 than the reference's .*tiny-reader, needed"):
        salr.evaluate(other, text, reader, EvalOptions(16))
    shifted = shutil.copytree(reader, tmp_path / "shifted")
    words = (shifted / "tokenizer.json").read_text()
    (shifted / "tokenizer.json").write_text(words.replace('"w3"', '"x3"').replace('"w100"', '"w3"'))
    with pytest.raises(EvaluationError, match="shifted: other tokens for this text than the reference's"):
        salr.evaluate(shifted, text, reader, OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window 1, needed at least 2"),
        ({"stride": 1025}, "stride 1025, needed 0"),
        ({"stride": -1}, "stride -1"),
        ({"max_windows": 0}, "max_windows 0, needed at least 1"),
        ({"device": "tpu"}, "device 'tpu', needed cpu or cuda"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        EvalOptions(**options)


def test_a_device_that_is_not_there_and_an_empty_list_are_refused(reader, text):
    with pytest.raises(OptionError, match="device 'cuda:99' is not there"):
        salr.evaluate(reader, text, options=EvalOptions(32, device="cuda:99"))
    with pytest.raises(OptionError, match="device 'cuda:x'"):
        salr.evaluate(reader, text, options=EvalOptions(32, device="cuda:x"))
    with pytest.raises(OptionError, match="no model to evaluate"):
        salr.evaluate([], text, options=OPTIONS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_numbers_are_those_of_the_cpu_within_bf16(reader, reader_salr, text):
    here = salr.evaluate(reader_salr, text, reader, OPTIONS)
    there = salr.evaluate(reader_salr, text, reader, EvalOptions(32, device="cuda:0"))
    for one, other in zip(here, there, strict=True):
        assert other.nll == pytest.approx(one.nll, rel=0.02) and other.nll != one.nll
        assert other.kl == pytest.approx(one.kl, rel=0.05)
    assert there[0].agreement == 1.0 and abs(there[1].agreement - here[1].agreement) < 0.05
