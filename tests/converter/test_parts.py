"""Parts made by jobs that know nothing of each other: joined, the file of one conversion."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from salr.converter.execution.devices import check_one_kind
from salr.converter.execution.division import contents_in_parts
from salr.converter.execution.packers import LocalExecutor
from salr.converter.options import CalibrationOptions
from salr.converter.pipeline import plan_conversion
from salr.formats.errors import FormatError, OptionError, OutputError
from salr.formats.joining import join

import salr

DATA = CalibrationOptions("synthetic", 3, 24)
KINDS = {
    "magnitude": salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude"),
    "random tokens": salr.ConvertOptions(salr.ModuleOptions(0.5, 4), rounds=3, calibration=DATA),
    "global": salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", scope="global"),
    "target bits": salr.ConvertOptions(method="magnitude", target_bits=11.5, module=salr.ModuleOptions(values="bf16")),
}


def part(options, i, n, **more) -> salr.ConvertOptions:
    return dataclasses.replace(options, part=(i, n), **more)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_parts_are_the_file_of_one_conversion(llama32, lora, tmp_path, kind):
    options, plan = dataclasses.replace(KINDS[kind], adapters=(("a", lora),)), tmp_path / "plan.json"
    options = dataclasses.replace(options, plan_file=plan if options.looks_at_whole_model else None)
    salr.convert(llama32, tmp_path / "whole.salr", options)
    for number in (2, 1, 3):
        salr.convert(llama32, tmp_path / "parts", part(options, number, 3))
    join([tmp_path / "parts"], tmp_path / "joined.salr")
    assert (tmp_path / "joined.salr").read_bytes() == (tmp_path / "whole.salr").read_bytes()
    assert dict(salr.open(tmp_path / "parts").modules) == dict(salr.open(tmp_path / "whole.salr").modules)


def test_until_the_last_part_is_there_nothing_opens(llama, tmp_path):
    salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 1, 2))
    with pytest.raises(FormatError, match=r"a directory without model.salr.index.json"):
        salr.open(tmp_path / "parts")
    salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 2, 2))
    assert len(salr.open(tmp_path / "parts").modules) == 14


@pytest.mark.parametrize("n", [1, 2, 3, 5, 13, 14])
def test_every_part_has_modules_and_about_the_same_work(llama, n):
    plan = plan_conversion(llama, KINDS["magnitude"])
    sizes = {m.entry.source_tensor: m.entry.n_weights for m in plan.modules}
    contents = contents_in_parts(plan, n)
    work = [sum(sizes[source] for source in content.sources) for content in contents]
    assert len(contents) == n and min(work) > 0 and max(work) <= sum(work) / n + max(sizes.values())
    assert sorted(name for c in contents for name in c.names()) == sorted(spec.name for spec in plan.specs())


def test_more_parts_than_modules_are_refused_and_leave_no_directory(llama, tmp_path):
    for _ in range(2):
        with pytest.raises(OptionError, match="15 parts, needed at most 14"):
            salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 1, 15))
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "parts").mkdir()
    with pytest.raises(OptionError, match="15 parts"):
        salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 1, 15))
    assert list(tmp_path.iterdir()) == [tmp_path / "parts"]  # the user's own


def test_a_part_that_can_be_resumed_keeps_its_directory(llama, tmp_path):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 1, 2), progress=stop)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["model-00001-of-00002.salr.partial"]
    report = salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 1, 2))
    assert "interrupted run" in report.notes[0]


def test_a_whole_model_decision_is_made_once_before_the_parts(llama, tmp_path):
    with pytest.raises(OptionError, match=r"decisions about the whole model, made once; run it once with --plan"):
        salr.convert(llama, tmp_path / "parts", part(KINDS["global"], 1, 2))
    plan = tmp_path / "plan.json"
    plan_conversion(llama, dataclasses.replace(KINDS["global"], plan_file=plan))
    salr.convert(llama, tmp_path / "parts", part(KINDS["global"], 1, 2, plan_file=plan))
    other = dataclasses.replace(KINDS["global"], module=salr.ModuleOptions(0.6, 8))
    with pytest.raises(OptionError, match=r"plan.json: holds the decisions of another conversion"):
        salr.convert(llama, tmp_path / "other", part(other, 1, 2, plan_file=plan))
    plan.write_text("{}")
    with pytest.raises(OptionError, match=r"plan.json: is no plan file"):
        salr.convert(llama, tmp_path / "other", part(KINDS["global"], 1, 2, plan_file=plan))


def test_parts_of_a_method_that_goes_from_block_to_block_are_refused():
    with pytest.raises(OptionError, match="each block is fitted to what those before it give"):
        salr.ConvertOptions(method="joint", calibration=DATA, part=(1, 2))


@pytest.mark.parametrize("numbers", [(0, 2), (3, 2)])
def test_a_part_that_there_is_not_is_refused(numbers):
    with pytest.raises(OptionError, match="needed i/n with 1 <= i <= n"):
        salr.ConvertOptions(part=numbers)


def test_parts_of_different_inputs_are_refused(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "LICENSE").write_text("not free")
    config = source / "config.json"
    config.write_text(config.read_text() + " ")
    salr.convert(llama, tmp_path / "parts", part(KINDS["magnitude"], 1, 2))
    with pytest.raises(FormatError, match="belongs to another set"):
        salr.convert(source, tmp_path / "parts", part(KINDS["magnitude"], 2, 2))


def test_a_plan_file_that_cannot_be_written_is_refused_before_anything_is_decided(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("salr.converter.pipeline.make_plan", lambda *_: pytest.fail("the model is looked at"))
    for path, found in ((tmp_path, "this is a directory"), (tmp_path / "no" / "plan.json", "its folder is missing")):
        with pytest.raises(OutputError, match=found):
            plan_conversion(llama, dataclasses.replace(KINDS["global"], plan_file=path))


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["magnitude", "random tokens"])
def test_two_devices_share_the_work_and_give_the_same_bytes(llama, tmp_path, monkeypatch, kind):
    import torch
    from salr.converter.execution import packers

    seen = set()
    original = packers.packed_matrices

    def noted(module, checkpoint, options, device, calibrated=None):
        seen.add(device)
        return original(module, checkpoint, options, torch.device("cpu"), calibrated)

    monkeypatch.setattr(packers, "packed_matrices", noted)
    devices = [torch.device("cpu"), torch.device("cpu", 0)]  # stand-ins for two GPUs
    salr.convert(llama, tmp_path / "one.salr", KINDS[kind])
    salr.convert(llama, tmp_path / "two.salr", KINDS[kind], executor=LocalExecutor(devices, 2))
    assert (tmp_path / "one.salr").read_bytes() == (tmp_path / "two.salr").read_bytes() and seen == set(devices)


def test_devices_of_different_kinds_are_refused():
    check_one_kind(["cuda: A", "cuda: A"])
    with pytest.raises(OptionError, match=r"devices of different kinds \(cpu: X, cuda: A\), needed one kind"):
        check_one_kind(["cuda: A", "cpu: X"])
