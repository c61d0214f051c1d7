// x (M, K) -> the order in which asynchronous products read it (wgmma.cuh).
#include "slabs.cuh"

// For fused_linear.cu: x [batch, pitch] 16-bit -> out [n_slabs][8 chunks][n_rows][8] 16-bit, rows padded with zeros; chunk
// 2q + h, element 2t + e is column 16t + 4q + 2h + e of the slab: the order that slabs.cuh gives the weights.
// grid: enough thread blocks of 256 for a thread a (slab, chunk, row); no shared memory.
extern "C" __global__ void arrange_x(const u16* x, uint4* out, int batch, int n_rows, int n_slabs, int pitch) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_slabs * 8 * n_rows) return;
  const int row = i % n_rows, chunk = i / n_rows % 8, slab = i / n_rows / 8;
  uint4 v = make_uint4(0, 0, 0, 0);
  if (row < batch) {
    const u32* from = (const u32*)(x + (size_t)row * pitch + slab * SLAB_COLUMNS + 4 * (chunk / 2) + 2 * (chunk % 2));
    v = make_uint4(from[0], from[8], from[16], from[24]);
  }
  out[i] = v;
}

// For wide_linear.cu: x [batch, 64 * n_slabs] -> x_out [batch / tile_rows][n_slabs][8 chunks][tile_rows][8] in the same order, and
// u [batch, ranks] -> u_out [batch / tile_rows][ranks / 8][tile_rows][8] as it is; rows that are not there are not written.
// grid: n_slabs and a thread block for each 64 ranks, times one for each 32 rows; 256 threads: a warp takes 4 rows.
extern "C" __global__ void __launch_bounds__(256)
    arrange_tiles(const u16* x, const u16* u, uint4* x_out, uint4* u_out, int batch, int tile_rows, int n_slabs, int ranks) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, part = lane & 7;  // of a row's 64 columns: 8
  const int row = blockIdx.y * 32 + (threadIdx.x >> 3), tile = row / tile_rows, in_tile = row % tile_rows;
  const bool is_row = row < batch;
  if ((int)blockIdx.x >= n_slabs) {
    const int chunk = (blockIdx.x - n_slabs) * 8 + part;
    if (is_row && chunk * 8 < ranks)
      u_out[((size_t)tile * (ranks / 8) + chunk) * tile_rows + in_tile] = *(const uint4*)(u + (size_t)row * ranks + chunk * 8);
    return;
  }
  uint4 v = make_uint4(0, 0, 0, 0);
  if (is_row) v = *(const uint4*)(x + ((size_t)row * n_slabs + blockIdx.x) * SLAB_COLUMNS + part * 8);
  // Columns 16t + 8p + 2w + {0, 1} are word w of part 2t + p, and belong to word t of chunk 4p + w: the four lanes of a p
  // transpose their words.
  const int t = part >> 1, p = part & 1;
  const bool upper = t & 2, odd = t & 1;
  const u32 y0 = __shfl_xor_sync(~0u, upper ? v.x : v.z, 4), y1 = __shfl_xor_sync(~0u, upper ? v.y : v.w, 4);
  v = upper ? make_uint4(y0, y1, v.z, v.w) : make_uint4(v.x, v.y, y0, y1);
  const u32 z0 = __shfl_xor_sync(~0u, odd ? v.x : v.y, 2), z1 = __shfl_xor_sync(~0u, odd ? v.z : v.w, 2);
  v = odd ? make_uint4(z0, v.y, z1, v.w) : make_uint4(v.x, z0, v.z, z1);
  if (is_row) x_out[(((size_t)tile * n_slabs + blockIdx.x) * 8 + 4 * p + t) * tile_rows + in_tile] = v;
}
