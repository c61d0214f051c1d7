// What a thread block of skinny_linear.cu multiplies, and where things lie in its shared memory.
#pragma once
#include "slabs.cuh"

#ifndef NT
#define NT 1  // tiles of 8 rows of x
#endif
#ifndef WARPS
#define WARPS 16
#endif
constexpr int FINISHERS = 4, TEAMS = 2 / NT, THREADS = (WARPS + FINISHERS) * 32;
constexpr int PAIR = 2, PAIR_ROWS = PAIR * UNIT_ROWS, PAIRS_OF_BLOCK = BLOCK_ROWS / PAIR_ROWS;
constexpr int TILES = PAIR * NT, SUMS_BYTES = TILES * 512;  // sums of a row pair: tiles by unit, then by rows of x; of a warp
constexpr int MAX_DEPTH = 8, MAX_CHUNKS = 16;

struct Arguments {
  const u8* slabs;
  const uint2* items;    // [row pairs][slabs] first byte / 16; size of the first unit / 16 | of both << 16
  const u8* lora_a;      // [K/64][rank_tiles][4 steps][32 lanes][8] 16-bit
  const u8* lora_b;      // [row blocks][block_steps][16 units][32 lanes][8] 16-bit
  const float* scaling;  // [rank_tiles * 16]
  const int* first_step; // [row blocks] where the row block's ranks begin in u, in steps of 16
  const float* bias;     // [N] or null
  const u8* x;           // [M, n_columns] 16-bit
  void* y;               // [M, N] 16-bit, or float32 where `wide`
  float4* partial;       // [grid][2 units][NT][32 lanes], empty between launches
  float4* u_partial;     // [2][a_parts][rank_tiles][NT][32 lanes], in turns; empty at first
  u32* counters;         // [grid] launches
  int n_rows, n_columns, batch, wide, n_slabs, rank_tiles, block_steps, a_parts;
  int item_bytes, depth, y_pitch;  // room for an item; items of a warp in shared memory; elements between rows of y
  int x_shift;                     // a chunk of x is 2^x_shift slabs
  int share, more;                 // items of a thread block, one more for the first `more`
  int first_late, fewer;           // from thread block `first_late` on `fewer` fewer
};

#include "sums.cuh"

// Items begin .. end - 1, and the row pairs that they are of.
struct Run {
  int begin, end, first_row, last_row;
  DEVICE static int begin_of(const Arguments& p, int block) {
    return block * p.share + min(block, p.more) - max(block - p.first_late, 0) * p.fewer;
  }
  DEVICE Run(const Arguments& p) {
    begin = begin_of(p, blockIdx.x), end = begin_of(p, blockIdx.x + 1);
    first_row = (u32)begin / p.n_slabs, last_row = (u32)(end - 1) / p.n_slabs;
  }
  DEVICE bool has_head(const Arguments& p) const { return begin > first_row * p.n_slabs; }
};

// Shared memory: items [depth][WARPS], x, sums of the teams [TEAMS][WARPS], parts of u, u. Barriers: of each item; of each
// chunk of x; of a team's sums, there and used; of u; of all warps' sums of the first row pair.
struct Shared {
  u32 memory, full, x_full, sums_full, sums_empty, u_full, head_full;
  u32 *launch, *head_sums;  // the number of this launch; warps that have left their sums of the first row pair
  DEVICE void wait_for_x(const Arguments& p, int slab) const { barrier_wait(x_full + 8 * (slab >> p.x_shift), 0); }
  DEVICE u32 item(const Arguments& p, int slot, int warp) const { return memory + (slot * WARPS + warp) * p.item_bytes; }
  DEVICE u32 item_full(int slot, int warp) const { return full + 8 * (slot * WARPS + warp); }
  DEVICE static int x_pitch(const Arguments& p) { return p.n_slabs * SLAB_COLUMNS * 2 + 16; }  // keeps rows off each other's banks
  DEVICE u32 x(const Arguments& p) const { return memory + p.depth * WARPS * p.item_bytes; }
  DEVICE u32 sums(const Arguments& p, int team) const { return x(p) + p.batch * x_pitch(p) + team * WARPS * SUMS_BYTES; }
  DEVICE u32 parts(const Arguments& p) const { return sums(p, TEAMS); }  // of a tile of u, a finisher's each
  DEVICE u32 u(const Arguments& p) const { return parts(p) + FINISHERS * NT * 512; }
};

// Sums in shared memory, `n` of them `stride` bytes apart, in order.
DEVICE float4 sum_of(u32 from, int stride, int n) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < n; i++) sum = sum + as_floats(lds128_now(from + i * stride));
  return sum;
}

// Whether a lane's sums are needed: where there is one tile, those of rows of x that exist.
DEVICE bool has_sums(const Arguments& p, int lane) { return NT > 1 || 2 * (lane & 3) < p.batch; }

// This lane's columns of x for tile n and two steps: `x` is its place in row lane/4.
DEVICE uint4 x_fragment(const Arguments& p, u32 x, int n, int lane) {
  const bool has_row = 8 * n + (lane >> 2) < p.batch;
  return has_row ? lds128_now(x + n * 8 * Shared::x_pitch(p)) : make_uint4(0, 0, 0, 0);
}
