// y = SiLU(gate) * up of a stacked product [M, gate | up]: LlamaMLP's own roundings, after SiLU and after the product.
//
// grid: (rows, columns / (8 * 128)); block: 128 threads of 8 columns; no shared memory.
#include "rows.cuh"
#include "small.cuh"

extern "C" __global__ void __launch_bounds__(SMALL_THREADS, BLOCKS_OF_SM)
    gated(const uint4* gate_up,  // [M, 2 * n_columns] 16-bit
          uint4* y,              // [M, n_columns]
          int n_columns) {
  let_next_kernel_start();
  const int n_units = n_columns / 8, unit = blockIdx.y * SMALL_THREADS + threadIdx.x;
  wait_for_previous_kernel();
  if (unit >= n_units) return;
  const size_t row = (size_t)blockIdx.x * n_units;
  Eight gate = unpack8(gate_up[2 * row + unit]);
  const Eight up = unpack8(gate_up[2 * row + n_units + unit]);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float g = gate.value[i];
    gate.value[i] = rounded(g / (1.f + expf(-g))) * up.value[i];
  }
  y[row + unit] = pack8(gate);
}
