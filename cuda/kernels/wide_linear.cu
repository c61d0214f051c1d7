// y (M, N) = x (M, K) W^T + u B^T + bias for many rows of x: weights go from slabs into registers and are multiplied there by
// asynchronous products (sm_90a); no dense weight is ever in memory. u = (x A^T) * scaling is given.
//
// grid: clusters of two thread blocks, at most as many as fit; each cluster walks through items: a row block of W times
// TM rows of x, all slabs or one of `splits` runs of them. Thread block h of a cluster multiplies units 8h .. 8h+7.
// block: two warpgroups of consumers, then one of which a thread copies. Both thread blocks need the same x: each copies a
// half of it to both.
// shared memory: `stages` stages of `stage_bytes`: a slab's header, half of its units (or of two steps of B), then x (or u).
#ifndef NT
#define NT 32  // tiles of 8 rows of x
#endif
#include "wgmma.cuh"
#include "rows_of_y.cuh"

constexpr int CONSUMER_WARPS = 8, THREADS = CONSUMER_WARPS * 32 + 128;
constexpr int HALF_UNITS = UNITS / 2;
constexpr int STEPS = 2;  // of B in a stage
constexpr int STEP_BYTES = 512;
constexpr int GROUP = 8;  // tiles of x that are walked through before the next row block
#define MAX_STAGES 16

struct Arguments {
  const u8* slabs;
  const u32* halves;      // [2 * n_slabs + 1] where a slab's units 0 and 8 begin, in 16-byte units
  const u8* lora_b;       // [row blocks][block_steps][16 units][32 lanes][8] 16-bit
  const int* first_step;  // [row blocks] where the row block's ranks begin in u, in steps of 16
  const u8* x;            // [M / TM][slabs_per_block][8 chunks][TM][8] 16-bit
  const u8* u;            // [M / TM][u_steps][2 chunks][TM][8] 16-bit
  const float* bias;      // [N] or null
  u16* y;                 // [M, N]
  float4* partial;        // [items][16 units][NT][32 lanes] where splits > 1
  int n_rows, batch, slabs_per_block, block_steps, u_steps, n_row_blocks, n_m_tiles, splits;
  int x_at, stage_bytes, stages;
};

DEVICE u32 cluster_rank() { u32 v; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v)); return v; }
DEVICE void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// One arrival at the same barrier of both thread blocks.
DEVICE void arrive_at_both(u32 bar) {
#pragma unroll
  for (int rank = 0; rank < 2; rank++)
    asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(bar), "r"(rank) : "memory");
}
// To the same place of both thread blocks, and counted by both of their barriers.
DEVICE void bulk_copy_to_both(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "h"((u16)3) : "memory");
}

// A row block times a tile of x: slabs first .. last - 1, then steps of B in so many stages.
struct Item {
  int m_tile, row_block, first, last, b_stages;
  DEVICE Item(const Arguments& p, int number) {
    const int split = number % p.splits, tile = number / p.splits;
    const int group = tile / (GROUP * p.n_row_blocks), in_group = tile % (GROUP * p.n_row_blocks);
    const int wide = min(GROUP, p.n_m_tiles - group * GROUP);
    m_tile = group * GROUP + in_group % wide;
    row_block = in_group / wide;
    first = split * p.slabs_per_block / p.splits;
    last = (split + 1) * p.slabs_per_block / p.splits;
    b_stages = split + 1 == p.splits ? (p.block_steps + STEPS - 1) / STEPS : 0;
  }
};

// All stages of this cluster's items, one after the other.
struct Walk {
  int number, k;
  Item item;
  DEVICE Walk(const Arguments& p) : number(blockIdx.x / 2), k(0), item(p, blockIdx.x / 2) {}
  DEVICE bool is_over(const Arguments& p) const { return number >= n_items(p); }
  DEVICE static int n_items(const Arguments& p) { return p.n_row_blocks * p.n_m_tiles * p.splits; }
  DEVICE bool at_b() const { return item.first + k >= item.last; }
  DEVICE int slab() const { return item.first + k; }
  DEVICE int step() const { return (k - (item.last - item.first)) * STEPS; }
  DEVICE void advance(const Arguments& p) {
    if (++k < item.last - item.first + item.b_stages) return;
    k = 0;
    number += gridDim.x / 2;
    if (!is_over(p)) item = Item(p, number);
  }
};

struct Ring {
  u32 full, empty, memory;
  int stage = 0;
  u32 phase = 0;
  DEVICE u32 full_bar() const { return full + 8 * stage; }
  DEVICE u32 empty_bar() const { return empty + 8 * stage; }
  DEVICE u32 here(const Arguments& p) const { return memory + stage * p.stage_bytes; }
  DEVICE void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

constexpr u32 X_BYTES = 8 * CHUNK_BYTES;

DEVICE void copy_weights(const Arguments& p, const Walk& at, const Ring& ring, int half) {
  const u32 to = ring.here(p), bar = ring.full_bar();
  if (at.at_b()) {
    const int steps = min(STEPS, p.block_steps - at.step());
    barrier_expect(bar, steps * (HALF_UNITS * STEP_BYTES + 2 * CHUNK_BYTES));
    const u8* from = p.lora_b + ((size_t)at.item.row_block * p.block_steps + at.step()) * UNITS * STEP_BYTES;
    for (int i = 0; i < steps; i++)
      bulk_copy(to + i * HALF_UNITS * STEP_BYTES, from + (i * UNITS + half * HALF_UNITS) * STEP_BYTES,
                HALF_UNITS * STEP_BYTES, bar);
  } else {
    const u32* halves = p.halves + 2 * ((size_t)at.item.row_block * p.slabs_per_block + at.slab());
    const u32 units = halves[0], begin = halves[half], end = halves[half + 1] - (half ? SLAB_HEADER_BYTES / 16 : 0);
    barrier_expect(bar, SLAB_HEADER_BYTES + (end - begin) * 16 + X_BYTES);
    bulk_copy(to, p.slabs + (size_t)units * 16 - SLAB_HEADER_BYTES, SLAB_HEADER_BYTES, bar);
    bulk_copy(to + SLAB_HEADER_BYTES, p.slabs + (size_t)begin * 16, (end - begin) * 16, bar);
  }
}

// This thread block's half of the stage's x or u, to both.
DEVICE void copy_x(const Arguments& p, const Walk& at, const Ring& ring, int half) {
  const u32 to = ring.here(p) + p.x_at, bar = ring.full_bar();
  if (at.at_b()) {
    const int steps = min(STEPS, p.block_steps - at.step());
    const int step = p.first_step[at.item.row_block] + at.step();
    const u32 bytes = steps * CHUNK_BYTES;
    bulk_copy_to_both(to + half * bytes, p.u + ((size_t)at.item.m_tile * p.u_steps + step) * 2 * CHUNK_BYTES + half * bytes, bytes, bar);
  } else {
    const u8* from = p.x + ((size_t)at.item.m_tile * p.slabs_per_block + at.slab()) * X_BYTES;
    bulk_copy_to_both(to + half * X_BYTES / 2, from + half * X_BYTES / 2, X_BYTES / 2, bar);
  }
}

// Weights do not depend on the kernel before, so a ring of them is on its way before x is known to be there.
DEVICE void produce(const Arguments& p, Ring ring, int half) {
  Walk weights(p);
  {
    Walk x(p);
    Ring filling = ring;
    for (int i = 0; i < p.stages && !weights.is_over(p); i++) {
      copy_weights(p, weights, filling, half);
      weights.advance(p);
      filling.advance(p.stages);
    }
    wait_for_previous_kernel();
    for (int i = 0; i < p.stages && !x.is_over(p); i++) {
      copy_x(p, x, ring, half);
      x.advance(p);
      ring.advance(p.stages);
    }
  }
  for (; !weights.is_over(p); weights.advance(p)) {
    barrier_wait(ring.empty_bar(), ring.phase ^ 1);
    copy_weights(p, weights, ring, half);
    copy_x(p, weights, ring, half);
    ring.advance(p.stages);
  }
}

typedef float Tiles[NT][4];

// A stage that has been multiplied is given back when the products that read it are done: after those of the next one begin.
struct Held {
  u32 bar = 0;
  DEVICE void release(int lane) {
    __syncwarp();
    if (bar && lane == 0) arrive_at_both(bar);
    bar = 0;
  }
};

DEVICE void multiply_w(const Arguments& p, Ring& ring, Held& held, Tiles& sum, int unit_number, int first_unit, int lane, u32 table) {
  barrier_wait(ring.full_bar(), ring.phase);
  const u32 stage = ring.here(p), x = stage + p.x_at;
  const int begin = unit_number ? lds16(stage + 2 * unit_number) : 2, before = first_unit ? lds16(stage + 2 * first_unit) : 2;
  Unit unit;
  unit.open(stage + SLAB_HEADER_BYTES + 16 * (begin - before), lane);
  const float upper = HAS_SCALES ? unit.scale(lane >> 2) : 1.f, lower = HAS_SCALES ? unit.scale((lane >> 2) + 8) : 1.f;
  u32 a[2][2][4];
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    unit.fragments(pair, lane, a[pair], table);
#pragma unroll
    for (int i = 0; i < 8; i++) a[pair][i / 4][i % 4] = scaled(a[pair][i / 4][i % 4], i % 2 ? lower : upper);
    wgmma_fence();
    wgmma(sum, a[pair][0], x_descriptor(x + 4 * pair * CHUNK_BYTES));
    wgmma(sum, a[pair][1], x_descriptor(x + (4 * pair + 2) * CHUNK_BYTES));
    wgmma_commit();
    wgmma_wait<1>();
    if (pair == 0) held.release(lane);
  }
  held.bar = ring.empty_bar();
  ring.advance(p.stages);
}

DEVICE void multiply_b(const Arguments& p, Ring& ring, Held& held, Tiles& sum, int steps, int unit, int lane) {
  barrier_wait(ring.full_bar(), ring.phase);
  const u32 stage = ring.here(p);
  for (int step = 0; step < steps; step++) {
    const uint4 v = lds128(stage + (step * HALF_UNITS + unit) * STEP_BYTES + lane * 16);
    const u32 a[4] = {v.x, v.y, v.z, v.w};
    wgmma_fence();
    wgmma(sum, a, x_descriptor(stage + p.x_at + 2 * step * CHUNK_BYTES));
    wgmma_commit();
    wgmma_wait<0>();
    held.release(lane);
  }
  held.bar = ring.empty_bar();
  ring.advance(p.stages);
}

DEVICE void store(const Arguments& p, const Tiles& sum, const Item& item, int number, int unit, int lane) {
  const int m = item.m_tile * TM;
  if (p.splits > 1) {
    float4* to = p.partial + ((size_t)number * UNITS + unit) * NT * 32 + lane;
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (m + 8 * n < p.batch) store_floats(to + n * 32, sum[n]);
    return;
  }
  const int row = item.row_block * BLOCK_ROWS + unit * UNIT_ROWS;
  const RowsOfY rows(p.y, p.bias, row, p.n_rows, p.batch, lane);
#pragma unroll
  for (int n = 0; n < NT; n++)
    if (m + 8 * n < p.batch) rows.store(m + 8 * n, sum[n], lane);
}

DEVICE void consume(const Arguments& p, Ring ring, int half, int warp, int lane, u32 table) {
  Held held;
  const int first_unit = half * HALF_UNITS, unit = first_unit + warp;
  wait_for_previous_kernel();
  Tiles sum;
  for (int number = blockIdx.x / 2; number < Walk::n_items(p); number += gridDim.x / 2) {
    const Item item(p, number);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[n][i] = 0.f;
    for (int slab = item.first; slab < item.last; slab++) multiply_w(p, ring, held, sum, unit, first_unit, lane, table);
    for (int i = 0; i < item.b_stages; i++) multiply_b(p, ring, held, sum, min(STEPS, p.block_steps - i * STEPS), warp, lane);
    wgmma_wait<0>();
    wgmma_done(sum);
    held.release(lane);
    store(p, sum, item, number, unit, lane);
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    wide_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[MAX_STAGES], empty[MAX_STAGES];
  __shared__ u32 table[TABLE_WORDS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      barrier_init(shared_address(full + i), 1);
      barrier_init(shared_address(empty + i), 2 * CONSUMER_WARPS);
    }
    barrier_init_fence();
  }
  fill_table(table);
  __syncthreads();
  cluster_meet();
  let_next_kernel_start();
  const Ring ring{shared_address(full), shared_address(empty), shared_address(memory)};
  if (warp >= CONSUMER_WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMER_WARPS * 32) produce(p, ring, half);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(p, ring, half, warp, lane, shared_address(table));
  }
  cluster_meet();  // nothing is copied to a thread block that has ended
}

// Add the parts of each item that was split, in order, and write y.
// grid: a warp for each four tiles of eight rows of x of a unit; no shared memory.
extern "C" __global__ void __launch_bounds__(256) add_splits(const __grid_constant__ Arguments p) {
  constexpr int QUARTERS = NT / 4;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, task = blockIdx.x * 8 + (threadIdx.x >> 5);
  const int tile = task / (UNITS * QUARTERS), unit = task / QUARTERS % UNITS, quarter = task % QUARTERS;
  if (tile >= p.n_row_blocks * p.n_m_tiles) return;
  const Item item(p, tile * p.splits);
  const int m = item.m_tile * TM + 32 * quarter;
  if (m >= p.batch) return;
  const size_t stride = (size_t)UNITS * NT * 32;
  const float4* from = p.partial + (size_t)tile * p.splits * stride + (unit * NT + 4 * quarter) * 32 + lane;
  const RowsOfY rows(p.y, p.bias, item.row_block * BLOCK_ROWS + unit * UNIT_ROWS, p.n_rows, p.batch, lane);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    if (m + 8 * n >= p.batch) continue;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int split = 0; split < p.splits; split++) {
      const float4 v = from[split * stride + n * 32];
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    rows.store(m + 8 * n, sum, lane);
  }
}
