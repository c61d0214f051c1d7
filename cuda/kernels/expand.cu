// Slabs -> dense 16-bit weights, for products with many rows of x.
//
// grid: a thread block a slab (x) of the chosen row blocks (y); block: a warp a unit; shared memory: one slab.
#include "slabs.cuh"

DEVICE u32 scaled(u32 pair, float scale) {
  return HAS_SCALES ? pack2(widen(pair) * scale, widen(pair >> 16) * scale) : pair;
}

// dense [>= n_rows, pitch], its first row being that of row block `first_block`
extern "C" __global__ void expand(const u8* slabs, const u32* slab_offsets, u16* dense, int n_slabs, int first_block,
                                  int n_rows, int pitch) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ u32 table[TABLE_WORDS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int number = (first_block + blockIdx.y) * n_slabs + blockIdx.x;
  const uint4* from = (const uint4*)(slabs + (size_t)slab_offsets[number] * 16);
  const u32 size = slab_offsets[number + 1] - slab_offsets[number];
  for (u32 i = threadIdx.x; i < size; i += blockDim.x) ((uint4*)memory)[i] = from[i];
  fill_table(table);
  __syncthreads();
  const u32 slab = shared_address(memory);
  Unit unit;
  unit.open(slab + 16 * (warp ? lds16(slab + 2 * warp) : 2), lane);
  const int row = (first_block + blockIdx.y) * BLOCK_ROWS + warp * UNIT_ROWS + (lane >> 2);
  const int local = blockIdx.y * BLOCK_ROWS + warp * UNIT_ROWS + (lane >> 2);
  const float upper = HAS_SCALES ? unit.scale(lane >> 2) : 1.f, lower = HAS_SCALES ? unit.scale((lane >> 2) + 8) : 1.f;
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    u32 a[2][4];
    unit.fragments(pair, lane, a, shared_address(table));
    u16* to = dense + (size_t)local * pitch + blockIdx.x * SLAB_COLUMNS + 16 * (lane & 3) + 8 * pair;
    if (row < n_rows)
      *(uint4*)to = make_uint4(scaled(a[0][0], upper), scaled(a[0][2], upper), scaled(a[1][0], upper), scaled(a[1][2], upper));
    if (row + 8 < n_rows)
      *(uint4*)(to + 8 * (size_t)pitch) =
          make_uint4(scaled(a[0][1], lower), scaled(a[0][3], lower), scaled(a[1][1], lower), scaled(a[1][3], lower));
  }
}
