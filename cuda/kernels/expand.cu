// Slabs -> dense 16-bit weights, for products with many rows of x.
//
// grid: about as many thread blocks as fit, each walks through slabs; block: a warp a unit; shared memory: BUFFERS slabs
// of `buffer_bytes`, the next ones on their way while one is decoded, then a tile for each warp, so that rows are written
// in whole lines of 128 bytes.
#include "slabs.cuh"

#ifndef BUFFERS
#define BUFFERS 3
#endif
constexpr int THREADS = UNITS * 32;
constexpr int TILE_PITCH = SLAB_COLUMNS * 2 + 16;  // bytes; keeps eight lanes' 16-byte accesses off each other's banks
constexpr int TILE_BYTES = UNIT_ROWS * TILE_PITCH;

DEVICE void start_copy(u32 to, const u8* slabs, const u32* slab_offsets, int number, u32 bar) {
  const u32 start = slab_offsets[number], bytes = (slab_offsets[number + 1] - start) * 16;
  const u8* from = slabs + (size_t)start * 16;
#if HAS_BULK_COPIES
  if (threadIdx.x == 0) {
    barrier_expect(bar, bytes);
    bulk_copy(to, from, bytes, bar);
  }
#else
  for (u32 i = threadIdx.x * 16; i < bytes; i += THREADS * 16) copy_16(to + i, from + i);
  arrive_after_copies(bar);
#endif
}

// One slab in shared memory -> 256 rows x 64 columns at `to`, of which `rows` exist; `tiles`: a tile for each warp.
DEVICE void decode(u32 slab, u32 tiles, u16* to, int rows, int pitch, u32 table) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 tile = tiles + warp * TILE_BYTES;
  Unit unit;
  unit.open(slab + 16 * (warp ? lds16(slab + 2 * warp) : 2), lane);
  const float upper = HAS_SCALES ? unit.scale(lane >> 2) : 1.f, lower = HAS_SCALES ? unit.scale((lane >> 2) + 8) : 1.f;
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    u32 a[2][4];
    unit.fragments(pair, lane, a, table);
    const u32 at = tile + (lane >> 2) * TILE_PITCH + 32 * (lane & 3) + 16 * pair;
    sts128(at, make_uint4(scaled(a[0][0], upper), scaled(a[0][2], upper), scaled(a[1][0], upper), scaled(a[1][2], upper)));
    sts128(at + 8 * TILE_PITCH,
           make_uint4(scaled(a[0][1], lower), scaled(a[0][3], lower), scaled(a[1][1], lower), scaled(a[1][3], lower)));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int local = 4 * i + (lane >> 3), row = warp * UNIT_ROWS + local;
    if (row < rows) store_global(to + (size_t)row * pitch + 8 * (lane & 7), lds128_now(tile + local * TILE_PITCH + 16 * (lane & 7)));
  }
  __syncwarp();
}

// dense [n_rows, pitch], its first row being that of row block `first_block`
extern "C" __global__ void __launch_bounds__(THREADS)
    expand(const u8* slabs, const u32* slab_offsets, u16* dense, int n_slabs, int first_block, int n_rows, int pitch,
           int buffer_bytes) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[BUFFERS];
  __shared__ u32 table[TABLE_WORDS];
  if (threadIdx.x == 0) {
    for (int i = 0; i < BUFFERS; i++) barrier_init(shared_address(full + i), HAS_BULK_COPIES ? 1 : THREADS);
    barrier_init_fence();
  }
  fill_table(table);
  __syncthreads();
  const int first = first_block * n_slabs, n = (n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * n_slabs;
  const u32 ring = shared_address(memory), bars = shared_address(full);
  for (int i = 0; i < BUFFERS - 1; i++)
    if (blockIdx.x + i * gridDim.x < n)
      start_copy(ring + i * buffer_bytes, slabs, slab_offsets, first + blockIdx.x + i * gridDim.x, bars + 8 * i);
  int stage = 0;
  u32 phase = 0;
  for (int i = blockIdx.x; i < n; i += gridDim.x) {
    const int ahead = i + (BUFFERS - 1) * gridDim.x, other = (stage + BUFFERS - 1) % BUFFERS;
    if (ahead < n) start_copy(ring + other * buffer_bytes, slabs, slab_offsets, first + ahead, bars + 8 * other);
    barrier_wait(bars + 8 * stage, phase);
    const int row_block = i / n_slabs, slab = i - row_block * n_slabs;
    decode(ring + stage * buffer_bytes, ring + BUFFERS * buffer_bytes, dense + (size_t)row_block * BLOCK_ROWS * pitch + slab * SLAB_COLUMNS,
           n_rows - row_block * BLOCK_ROWS, pitch, shared_address(table));
    __syncthreads();
    if (++stage == BUFFERS) stage = 0, phase ^= 1;
  }
}
