// x (M, K) -> the order in which fused_linear's asynchronous products read it (wgmma.cuh), rows padded with zeros.
//
// grid: enough thread blocks of 256 for a thread a (slab, chunk, row); no shared memory.
#include "slabs.cuh"

// x [batch, n_columns] 16-bit, n_columns even -> out [n_slabs][8 chunks][n_rows][8] 16-bit; chunk 2q + h, element 2t + e
// is column 16t + 4q + 2h + e of the slab: the order that slabs.cuh gives the weights.
extern "C" __global__ void arrange_x(const u16* x, uint4* out, int batch, int n_rows, int n_slabs, int n_columns) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_slabs * 8 * n_rows) return;
  const int row = i % n_rows, chunk = i / n_rows % 8, slab = i / n_rows / 8;
  const int column = slab * SLAB_COLUMNS + 4 * (chunk / 2) + 2 * (chunk % 2), left = row < batch ? n_columns - column : 0;
  const u32* from = (const u32*)(x + (size_t)row * n_columns + column);
  const uint4 v = make_uint4(left > 0 ? from[0] : 0, left > 16 ? from[8] : 0, left > 32 ? from[16] : 0, left > 48 ? from[24] : 0);
  out[i] = v;
}
