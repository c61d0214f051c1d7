// Slabs and adapters -> dense 16-bit weights W + scaling * B A, for products with many rows of x: rounded once, as who merges
// adapters into a dense model rounds.
//
// grid: about as many thread blocks as fit, each takes a run of slabs; block: a warp a unit; shared memory: `buffers` places of
// `buffer_bytes`, each for a slab and, from `a_at` on, its columns of A, the next ones on their way while one is decoded; then,
// with B_IN_SHARED, the row block's B.
#include "slabs.cuh"

#ifndef B_IN_SHARED
#define B_IN_SHARED 1  // otherwise B is read where it lies, for each slab
#endif
#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM 2
#endif
constexpr int THREADS = UNITS * 32, MOST_BUFFERS = 4, B_TILE_BYTES = UNITS * STEP_BYTES;

struct Arguments {
  const u8* slabs;
  const u32* slab_offsets;
  const u8* lora_a;       // times scaling: [n_slabs][rank_tiles][4 steps][32 lanes][8] 16-bit, B fragments of mma.m16n8k16: lane l,
                          // element 4p + 2h + e is rank 2 * (l % 4) + 8h + e, column 16 * (l / 8) + 4 * step + 2p + l / 4 % 2
  const u8* lora_b;       // [row blocks][block_tiles][UNITS][32 lanes][8] 16-bit, A fragments
  const int* first_step;  // of each row block: the first of its tiles of ranks
  u16* dense;             // [n_rows, pitch], its first row being that of row block `first_block`
  int n_slabs, first_block, n_rows, pitch, buffers, buffer_bytes, a_at, rank_tiles, block_tiles;
};

// Copies to shared memory: by one thread with bulk copies, else by all.
DEVICE void copy(u32 to, const u8* from, u32 bytes, u32 bar) {
#if HAS_BULK_COPIES
  bulk_copy(to, from, bytes, bar);
#else
  for (u32 i = threadIdx.x * 16; i < bytes; i += THREADS * 16) copy_16(to + i, from + i);
#endif
}
DEVICE bool copies() { return !HAS_BULK_COPIES || threadIdx.x == 0; }
DEVICE void announce(u32 bar, u32 bytes) {
#if HAS_BULK_COPIES
  barrier_expect(bar, bytes);
#endif
}
DEVICE void all_started(u32 bar) {
#if !HAS_BULK_COPIES
  arrive_after_copies(bar);
#endif
}

// A run's slabs one after the other into their places. Where the next one lies is asked for before it is needed.
struct Filling {
  int row_block, slab, left;
  u32 start, end;
  int tile;  // the row block's first
  DEVICE Filling(const Arguments& p, int first, int n) : row_block(p.first_block + first / p.n_slabs), slab(first % p.n_slabs), left(n) {
    if (!copies() || left <= 0) return;
    start = offset(p, 0), end = offset(p, 1), tile = p.block_tiles ? p.first_step[row_block] : 0;
  }
  DEVICE u32 offset(const Arguments& p, int more) const { return p.slab_offsets[row_block * p.n_slabs + slab + more]; }
  DEVICE void fill(const Arguments& p, u32 to, u32 bar) {
    if (!copies() || left <= 0) return;
    const u32 bytes = (end - start) * 16, of_a = p.block_tiles * A_TILE_BYTES;
    announce(bar, bytes + of_a);
    copy(to, p.slabs + (size_t)start * 16, bytes, bar);
    if (of_a) copy(to + p.a_at, p.lora_a + ((size_t)slab * p.rank_tiles + tile) * A_TILE_BYTES, of_a, bar);
    all_started(bar);
    if (--left == 0) return;
    if (++slab == p.n_slabs) {
      slab = 0, row_block++;
      if (of_a) tile = p.first_step[row_block];
    }
    start = end, end = offset(p, 1);
  }
};

// The row block's B, before the first of its slabs in a run.
DEVICE void fill_b(const Arguments& p, u32 to, int row_block, u32 bar) {
  if (!copies()) return;
  const u32 bytes = p.block_tiles * B_TILE_BYTES;
  announce(bar, bytes);
  copy(to, p.lora_b + (size_t)row_block * bytes, bytes, bar);
  all_started(bar);
}

// sums = B A, eight groups of columns. b: in shared memory, or row_block's where it lies.
DEVICE void multiply_ranks(const Arguments& p, u32 a, u32 b, int row_block, float (&sums)[8][4]) {
  const u32 at = threadIdx.x * 16;
  const u8* from = p.lora_b + (size_t)row_block * p.block_tiles * B_TILE_BYTES;
  for (int t = 0; t < p.block_tiles; t++) {
    const uint4 v = B_IN_SHARED ? lds128_now(b + t * B_TILE_BYTES + at) : *(const uint4*)(from + (size_t)t * B_TILE_BYTES + at);
    const u32 of_b[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const uint4 of_a = lds128_now(a + (4 * t + step) * STEP_BYTES + (threadIdx.x & 31) * 16);
      mma(sums[2 * step], of_b, of_a.x, of_a.y);
      mma(sums[2 * step + 1], of_b, of_a.z, of_a.w);
    }
  }
}

DEVICE u32 sum_of(u32 pair, float scale, float low, float high) {
  return pack2(widen(pair) * scale + low, widen(pair >> 16) * scale + high);
}

// Eight rows, of which lane l has columns 16 * (l % 4) .. + 15 of row `row` + l / 4, to `to`, as far as there are rows: each
// lane takes turns with the one that has the row four below, so that whole lines of 128 bytes are written at a time.
DEVICE void store_rows(u16* to, int row, int rows, int pitch, const uint4 (&v)[2], int lane) {
  const bool below = lane & 16;
  const uint4 give = below ? v[0] : v[1];
  const uint4 got = make_uint4(__shfl_xor_sync(~0u, give.x, 16), __shfl_xor_sync(~0u, give.y, 16),
                               __shfl_xor_sync(~0u, give.z, 16), __shfl_xor_sync(~0u, give.w, 16));
  row += (lane & 15) >> 2;
  u16* at = to + (size_t)row * pitch + 8 * (2 * (lane & 3) + below);
  if (row < rows) store_global(at, below ? got : v[0]);
  if (row + 4 < rows) store_global(at + (size_t)4 * pitch, below ? v[1] : got);
}

// The unit of this warp in shared memory -> its 16 rows x 64 columns at `to`, of which `rows` exist.
DEVICE void decode(const Arguments& p, u32 slab, u32 b, int row_block, u16* to, int rows, u32 table) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float sums[8][4] = {};
  multiply_ranks(p, slab + p.a_at, b, row_block, sums);
  Unit unit;
  unit.open(slab + 16 * (warp ? lds16(slab + 2 * warp) : 2), lane);
  const float upper = HAS_SCALES ? unit.scale(lane >> 2) : 1.f, lower = HAS_SCALES ? unit.scale((lane >> 2) + 8) : 1.f;
  uint4 of_upper[2], of_lower[2];
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    u32 a[2][4];
    unit.fragments(pair, lane, a, table);
    u32 u[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u[i] = sum_of(a[i / 2][2 * (i % 2)], upper, sums[4 * pair + i][0], sums[4 * pair + i][1]);
      l[i] = sum_of(a[i / 2][2 * (i % 2) + 1], lower, sums[4 * pair + i][2], sums[4 * pair + i][3]);
    }
    of_upper[pair] = make_uint4(u[0], u[1], u[2], u[3]), of_lower[pair] = make_uint4(l[0], l[1], l[2], l[3]);
  }
  store_rows(to, warp * UNIT_ROWS, rows, p.pitch, of_upper, lane);
  store_rows(to, warp * UNIT_ROWS + 8, rows, p.pitch, of_lower, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) expand(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[MOST_BUFFERS], full_b;
  __shared__ u32 table[TABLE_WORDS];
  const u32 ring = shared_address(memory), bars = shared_address(full), bar_b = shared_address(&full_b);
  const u32 b = ring + p.buffers * p.buffer_bytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.buffers; i++) barrier_init(bars + 8 * i, HAS_BULK_COPIES ? 1 : THREADS);
    barrier_init(bar_b, HAS_BULK_COPIES ? 1 : THREADS);
    barrier_init_fence();
  }
  fill_table(table);
  __syncthreads();
  let_next_kernel_start();
  const long long n = (p.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * p.n_slabs;
  const int begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
  const bool has_b = B_IN_SHARED && p.block_tiles;
  Filling filling(p, begin, end - begin);
  if (has_b) fill_b(p, b, filling.row_block, bar_b);
  for (int i = 0; i < p.buffers - 1; i++) filling.fill(p, ring + i * p.buffer_bytes, bars + 8 * i);
  wait_for_previous_kernel();
  int stage = 0, next = p.buffers - 1, row_block = begin / p.n_slabs, slab = begin % p.n_slabs;
  u32 phase = 0, phase_b = 0;
  if (has_b) barrier_wait(bar_b, phase_b);
  for (int i = begin; i < end; i++) {
    filling.fill(p, ring + next * p.buffer_bytes, bars + 8 * next);
    barrier_wait(bars + 8 * stage, phase);
    decode(p, ring + stage * p.buffer_bytes, b, p.first_block + row_block,
           p.dense + (size_t)row_block * BLOCK_ROWS * p.pitch + slab * SLAB_COLUMNS, p.n_rows - row_block * BLOCK_ROWS,
           shared_address(table));
    __syncthreads();
    if (++next == p.buffers) next = 0;
    if (++stage == p.buffers) stage = 0, phase ^= 1;
    if (++slab < p.n_slabs || i + 1 == end) continue;
    slab = 0, row_block++;
    if (!has_b) continue;
    fill_b(p, b, p.first_block + row_block, bar_b);
    barrier_wait(bar_b, phase_b ^= 1);
  }
}
