// What stands beside an expanded weight and beside x: rows of lora_B, and a copy of x in a wider matrix.
#include "slabs.cuh"

constexpr int RANKS_OF_TILE = 16;

// lora_B's fragments (fused_linear's) -> columns of `dense` [n_rows, pitch]; ranks that a row block does not use are 0.
//
// grid: row blocks, tiles of 16 ranks; block: 16 units x 32 lanes; no shared memory. `dense` begins at row block
// `first_block`, in the first rank's column; `first_step`: where each row block's ranks begin, in tiles.
extern "C" __global__ void __launch_bounds__(UNITS * 32)
    write_ranks(const uint4* lora_b, const int* first_step, u16* dense, int first_block, int block_tiles, int n_rows,
                int pitch) {
  const int unit = threadIdx.x >> 5, lane = threadIdx.x & 31, block = first_block + blockIdx.x;
  const int tile = blockIdx.y - first_step[block];
  uint4 v = make_uint4(0, 0, 0, 0);
  if (tile >= 0 && tile < block_tiles) v = lora_b[(((size_t)block * block_tiles + tile) * UNITS + unit) * 32 + lane];
  const int row = blockIdx.x * BLOCK_ROWS + unit * UNIT_ROWS + (lane >> 2);
  u16* to = dense + (size_t)row * pitch + blockIdx.y * RANKS_OF_TILE + 2 * (lane & 3);
  if (row < n_rows) *(u32*)to = v.x, *(u32*)(to + 8) = v.z;
  to += (size_t)8 * pitch;
  if (row + 8 < n_rows) *(u32*)to = v.y, *(u32*)(to + 8) = v.w;
}

// x [rows, 8 * columns] -> the first columns of `wide` [rows, pitch], zeros up to 8 * padded_columns.
//
// grid: rows, enough thread blocks of 256 for 16 bytes a thread; no shared memory.
extern "C" __global__ void copy_rows(const uint4* x, u16* wide, int columns, int padded_columns, int pitch) {
  const int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= padded_columns) return;
  const uint4 v = i < columns ? x[(size_t)blockIdx.x * columns + i] : make_uint4(0, 0, 0, 0);
  *(uint4*)(wide + (size_t)blockIdx.x * pitch + 8 * i) = v;
}
