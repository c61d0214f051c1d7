"""Conversions by Ray workers: the bytes of a local one. Skipped where Ray is not installed.

Every test starts two processes that import torch, so all but one run where SALR_FUZZ=1.
"""

from __future__ import annotations

import pytest
from salr.converter.options import CalibrationOptions
from salr.formats.errors import OptionError, SourceError

import salr

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'salr[ray]'")

CALIBRATION = CalibrationOptions("synthetic", 3, 24)
OPTIONS = {
    "magnitude": {"method": "magnitude"},
    "joint": {"method": "joint", "rounds": 3, "calibration": CALIBRATION, "include": ("lm_head",)},
    "global": {"method": "magnitude", "scope": "global"},
}


@pytest.fixture(scope="module")
def cluster():
    """Start Ray on this machine with room for two workers."""
    ray.init(address=None, num_cpus=2, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def executor_of(cluster):
    from salr.integrations.ray_executor import RayExecutor

    return RayExecutor


def options_of(kind: str) -> salr.ConvertOptions:
    return salr.ConvertOptions(salr.ModuleOptions(0.5, 4), workers=2, **OPTIONS[kind])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "joint" else [pytest.mark.fuzz]) for kind in OPTIONS]
)
def test_two_ray_workers_give_the_same_bytes_as_this_process(executor_of, llama, tmp_path, kind):
    options = options_of(kind)
    salr.convert(llama, tmp_path / "local.salr", options)
    salr.convert(llama, tmp_path / "ray.salr", options, executor=executor_of(llama, options))
    assert (tmp_path / "ray.salr").read_bytes() == (tmp_path / "local.salr").read_bytes()


@pytest.mark.fuzz
def test_stacked_experts_come_one_by_one(executor_of, stacked_moe, tmp_path):
    options = options_of("magnitude")
    salr.convert(stacked_moe, tmp_path / "local.salr", options)
    salr.convert(stacked_moe, tmp_path / "ray.salr", options, executor=executor_of(stacked_moe, options))
    assert (tmp_path / "ray.salr").read_bytes() == (tmp_path / "local.salr").read_bytes()


@pytest.mark.fuzz
def test_a_workers_error_is_the_one_that_this_process_would_raise(executor_of, llama, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    source, name = shutil.copytree(llama, tmp_path / "nan"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = options_of("magnitude")
    with pytest.raises(SourceError, match=rf"nan: tensor '{name}': holds NaN or infinity"):
        salr.convert(source, tmp_path / "m.salr", options, executor=executor_of(source, options))
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


@pytest.mark.fuzz
def test_workers_unlike_this_process_are_refused(executor_of, llama, tmp_path, monkeypatch):
    options = options_of("magnitude")
    monkeypatch.setattr("salr.integrations.ray_executor.environment", lambda device: {"torch": "0.1"})
    with pytest.raises(OptionError, match=r"a worker has torch '.*', this process '0.1', needed one kind of device"):
        salr.convert(llama, tmp_path / "m.salr", options, executor=executor_of(llama, options))


@pytest.mark.fuzz
def test_more_workers_than_the_cluster_has_room_for_are_refused(executor_of, llama, tmp_path):
    options = salr.ConvertOptions(method="magnitude", workers=9)
    with pytest.raises(OptionError, match="2 CPUs in the Ray cluster, needed 9 for as many workers"):
        salr.convert(llama, tmp_path / "m.salr", options, executor=executor_of(llama, options))
