"""What only an emulator can do: other orders of threads, older GPUs, and broken kernels, which it has to refuse."""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch
from salr.cuda import compilation, expanded, fused, linear, operations
from salr.cuda.device_layout import lay_out
from salr.cuda.fused import FusedProduct
from salr.cuda.launching import Launch
from salr.cuda.low_rank import fragments

from salr.runtime import reference
from tests.cuda import emulated, matrices
from tests.cuda.test_decoded import cuts, decoded
from tests.cuda.test_linear import check_fused, one_launch_products

pytestmark = pytest.mark.skipif(matrices.DEVICE != "cpu", reason="there is a GPU, and tensors are made there")


@pytest.mark.emulated
@pytest.mark.parametrize("batch", [1, 40])
def test_products_give_the_same_bits_in_any_order_of_threads(batch):
    low_rank, bias = matrices.adapters(1000, 712, 24), torch.randn(1000)
    packed, x = matrices.weight(1000, 712), torch.randn(batch, 712).bfloat16()
    for product in one_launch_products(packed, low_rank, bias, torch.bfloat16, batch):
        wide = product.weight.padded(x).contiguous()
        found = {bytes(product(wide, torch.empty(batch, 1000)).numpy()) for _ in range(5)}
        assert len(found) == 1


@pytest.mark.emulated
def test_decoded_weights_give_the_same_bits_in_any_order_of_threads():
    product = decoded(matrices.weight(1000, 712), matrices.adapters(1000, 712, 24), None)
    x = torch.randn(40, 712).bfloat16()
    for cut in cuts(product, 40):
        assert len({bytes(product(x, cut).view(torch.uint8).numpy()) for _ in range(3)}) == 1


@pytest.mark.emulated
def test_norms_of_few_rows_give_the_same_bits_in_any_order_of_threads_and_copies():
    x, residual, weight = (torch.randn(rows, 96).bfloat16() for rows in (3, 3, 1))
    found = {bytes(operations.add_norm(x, residual, weight[0], 1e-5)[1].view(torch.uint8).numpy()) for _ in range(40)}
    assert len(found) == 1


@pytest.mark.parametrize(("encoding", "batch"), [("bf16", 1), ("nf4", 40)])
def test_the_fused_product_is_right_on_older_gpus(encoding, batch):
    with emulated.emulation(capability=(8, 0)):
        check_fused(matrices.weight(1000, 712, 0.5, encoding), 24, batch, tolerance=1e-4)


@pytest.mark.parametrize(("encoding", "capability"), [("bf16", (8, 6)), ("nf4", (8, 0))])
def test_many_ranks_and_rows_are_multiplied_in_little_shared_memory(encoding, capability):
    packed, low_rank = matrices.weight(512, 256, 0.5, encoding), matrices.adapters(512, 256, 256)
    x = torch.randn(64, 256).bfloat16()
    with emulated.emulation(capability=capability):
        product = FusedProduct(lay_out(packed, torch.bfloat16), fragments(low_rank, torch.bfloat16), None)
        assert 0 < product.most_rows < 64
        assert matrices.error(product(x), matrices.exact(x, packed, low_rank, None)) < 5e-3
        assert matrices.error(linear.linear(x, packed, low_rank), matrices.exact(x, packed, low_rank, None)) < 5e-3


@pytest.mark.parametrize("rank", [0, 40, 256])
def test_a_weight_with_everything_kept_is_expanded_in_little_shared_memory(rank):
    packed, low_rank = matrices.weight(300, 200, 0.0), matrices.adapters(300, 200, rank)
    expected = reference.dense(packed) + (low_rank.lora_B.float() * low_rank.scaling) @ low_rank.lora_A.float()
    with emulated.emulation(capability=(8, 6)):
        expanded = linear.prepare(packed, low_rank, None).product(torch.device("cpu"), torch.bfloat16).expanded
        dense = expanded.decode()[:, :200].float()
    assert torch.equal(dense, expected) if rank == 0 else matrices.error(dense, expected) < 3e-3


@pytest.mark.emulated
@pytest.mark.parametrize("rank", [0, 24, 300])
def test_no_rows_and_no_ranks_are_products_too(rank):
    packed, low_rank = matrices.weight(300, 200), matrices.adapters(300, 200, rank)
    prepared, none = linear.prepare(packed, low_rank, None), torch.empty(0, 200).bfloat16()
    product = prepared.product(none.device, none.dtype)
    assert product(none).shape == product.expanded.multiply(none, None).shape == (0, 300)
    x = torch.randn(3, 200).bfloat16()
    assert matrices.error(product(x), matrices.exact(x, packed, low_rank, None)) < 5e-3


@pytest.mark.emulated
def test_x_of_another_width_is_refused():
    with pytest.raises(ValueError, match="x has 90 columns, the weight 100"):
        linear.linear(torch.randn(2, 90).bfloat16(), matrices.weight(300, 100))


@pytest.mark.emulated
def test_a_captured_workspace_lives_when_a_larger_one_takes_its_place(monkeypatch):
    small, large = (
        linear.prepare(matrices.weight(n, 128), None, None).product(torch.device("cpu"), torch.bfloat16).expanded
        for n in (256, 1024)
    )
    x = torch.randn(4, 128).bfloat16()
    monkeypatch.setattr(expanded, "is_capturing", lambda device: True)
    small(x)
    captured = weakref.ref(next(iter(expanded._known_buffers(x.device).values())))
    monkeypatch.setattr(expanded, "is_capturing", lambda device: False)
    large(x), small(x)
    assert captured() is not None
    assert captured() is not next(iter(expanded._known_buffers(x.device).values()))


@pytest.mark.parametrize("n_sms", [1, 2, 13])
def test_the_fused_product_is_right_on_any_number_of_multiprocessors(n_sms):
    packed, low_rank = matrices.weight(1000, 712), matrices.adapters(1000, 712, 24)
    x = torch.randn(5, 712).bfloat16()
    with emulated.emulation(n_sms=n_sms):
        product = FusedProduct(lay_out(packed, torch.bfloat16), fragments(low_rank, torch.bfloat16), None)
        y = product(product.weight.padded(x).contiguous(), torch.full((5, 1000), torch.nan))
    assert matrices.error(y, matrices.exact(x, packed, low_rank, None)) < 5e-5


KERNEL = """
#define NT 2
#include "wgmma.cuh"
extern "C" __global__ void __launch_bounds__(32) broken(const uint4* from, float* to) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full;
  const int lane = threadIdx.x & 31;
  const u32 place = shared_address(memory), bar = shared_address(&full);
  if (lane == 0) barrier_init(bar, 1);
  __syncthreads();
  if (lane == 0) barrier_expect(bar, 512), bulk_copy(place, from, 512, bar);
  BODY
}
"""
RIGHT = "barrier_wait(bar, 0); to[lane] = widen(lds16(place + 2 * lane));"
PRODUCT = """barrier_wait(bar, 0);
  float d[NT][4] = {};
  const u32 a[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  wgmma(d, a, x_descriptor(x_place(place)));
  wgmma_commit();
  WAIT
  to[lane] = d[0][0];"""


def run(monkeypatch, tmp_path, body):
    """Return 32 floats that a kernel makes of 256 ones."""
    for header in compilation.KERNELS.glob("*.cuh"):
        (tmp_path / header.name).write_text(header.read_text())
    (tmp_path / "broken.cu").write_text(KERNEL.replace("BODY", body))
    monkeypatch.setattr(compilation, "KERNELS", tmp_path)
    x, y = torch.ones(256, dtype=torch.bfloat16), torch.zeros(32)
    with emulated.emulation():
        kernel = fused.function("broken.cu", "broken", (), None)
        Launch(kernel, (1, 1, 1), 32, 1024, [ctypes.c_void_p(t.data_ptr()) for t in (x, y)])(0)
    return y


def test_a_copy_and_a_product_that_are_waited_for_are_there(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, RIGHT).tolist() == [1.0] * 32
    y = run(monkeypatch, tmp_path, PRODUCT.replace("WAIT", "wgmma_wait<0>();"))
    assert y.tolist() == [16.0] * 32


def test_a_product_that_is_not_waited_for_is_not_there(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, PRODUCT.replace("WAIT", "")).tolist() == [0.0] * 32


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("", "outlives its thread block"),
        (RIGHT + "lds32(place + 2);", "4 bytes at 2 of 1024"),
        (RIGHT + "lds128(place + 1024);", "16 bytes at 1024 of 1024"),
        (RIGHT + "if (lane < 7) __syncwarp(); else transposed(0);", "different operations"),
        (RIGHT + "if (lane < 7) __shfl_sync(~0u, 1, 0);\n else __shfl_sync(~0u, 2, 0);", "different operations"),
        (RIGHT + "lds32(place - 4);", "4 bytes at -4 of 1024"),
        ("if (lane == 0) barrier_arrive(bar);", "more arrivals"),
        (RIGHT + "if (lane == 0) bulk_copy(place + 8, from, 16, bar);", "a copy of 16 bytes"),
    ],
)
def test_broken_kernels_are_refused(monkeypatch, tmp_path, body, complaint):
    with pytest.raises(AssertionError, match=complaint):
        run(monkeypatch, tmp_path, body)
