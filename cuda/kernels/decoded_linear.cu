// y (M, N) = x (M, K) W^T + u B^T + bias for many rows of x: weights go from slabs into registers and are multiplied there by
// asynchronous products (sm_90a); no dense weight is ever in memory. u = (x A^T) * scaling is given.
//
// A tile is a row block of W times TM rows of x. Clusters of two thread blocks take whole tiles in turns; the slabs of the
// tiles that are left are split evenly among them, and add_splits adds what they leave, in order.
// grid: two thread blocks a cluster, each alone on its SM. Thread block h of a cluster multiplies units 8h .. 8h+7.
// block: two warpgroups of consumers, then one of which a thread copies. Both thread blocks need the same x: each copies a
// half of it to both.
//
//   a stage:  own copies           | header | units 8h .. 8h+7 of a slab (or of two steps of B) |
//             halves from both     | x of the slab, 64 columns: [4 chunks by block 0 | 4 by block 1] (or u of the steps) |
//   full: all bytes of both rows have come.   empty: all 16 warps of both thread blocks have given the stage back.
//
// shared memory: `stages` (three at least) of `stage_bytes`.
#ifndef NT
#define NT 32  // tiles of 8 rows of x
#endif
#include "cluster.cuh"
#include "ring.cuh"
#include "rows_of_y.cuh"
#include "wgmma.cuh"

constexpr int CONSUMER_WARPS = 8, THREADS = CONSUMER_WARPS * 32 + 128;
constexpr int HALF_UNITS = UNITS / 2;
constexpr int STEPS = 2;  // of B in a stage
constexpr int GROUP = 8;  // tiles of x that are walked through before the next row block

struct Arguments {
  const u8* slabs;
  const u32* halves;      // [2 * n_slabs + 1] where a slab's units 0 and 8 begin, in 16-byte units
  const u8* lora_b;       // [row blocks][block_steps][16 units][32 lanes][8] 16-bit
  const int* first_step;  // [row blocks] where the row block's ranks begin in u, in steps of 16
  const u8* x;            // [M / TM][slabs_per_block][8 chunks][TM][8] 16-bit
  const u8* u;            // [M / TM][u_steps][2 chunks][TM][8] 16-bit
  const float* bias;      // [N] or null
  u16* y;                 // [M, N]
  float4* partial;        // [clusters][2][16 units][NT][32 lanes]: what a cluster leaves of at most two tiles
  int n_rows, batch, slabs_per_block, block_steps, u_steps, n_row_blocks, n_m_tiles, n_whole;
  int x_at, stage_bytes, stages;
};

struct Tile {
  int row_block, m_tile;
  DEVICE Tile(const Arguments& p, int number) {
    const int group = number / (GROUP * p.n_row_blocks), in_group = number % (GROUP * p.n_row_blocks);
    const int of_x = min(GROUP, p.n_m_tiles - group * GROUP);
    m_tile = group * GROUP + in_group % of_x;
    row_block = in_group / of_x;
  }
};

// The slabs of all tiles that are split, one after the other, in equal runs of pairs: where each cluster's begins.
struct Split {
  int clusters, n_pairs;  // of the slabs of all split tiles
  DEVICE Split(const Arguments& p, int clusters)
      : clusters(clusters), n_pairs((p.n_row_blocks * p.n_m_tiles - p.n_whole) * p.slabs_per_block / 2) {}
  DEVICE int begin(int cluster) const { return 2 * (int)((long long)cluster * n_pairs / clusters); }
  DEVICE int cluster_of(int slab) const {
    int cluster = (int)((long long)(slab / 2) * clusters / n_pairs);
    while (begin(cluster + 1) <= slab) cluster++;
    return cluster;
  }
};

// A tile, or slabs first .. last - 1 of one; the steps of B go with a tile's last slab.
struct Item {
  Tile tile;
  int first, last, b_stages;
  int slot;  // where the sums are left, -1 where they are y
  DEVICE bool is_whole() const { return slot < 0; }
};

// A cluster's items, one after the other.
struct Items {
  int cluster, clusters, number = 0;  // number: of the next one
  int slab, end;                      // of the split tiles' slabs: the next one, and the end of this cluster's run
  DEVICE Items(const Arguments& p) : cluster(blockIdx.x / 2), clusters(gridDim.x / 2) {
    const Split split(p, clusters);
    slab = split.begin(cluster);
    end = split.begin(cluster + 1);
  }
  DEVICE bool is_over(const Arguments& p) const { return cluster + number * clusters >= p.n_whole && slab >= end; }
  DEVICE Item next(const Arguments& p) {
    const int whole = cluster + number * clusters, b_stages = (p.block_steps + STEPS - 1) / STEPS;
    if (whole < p.n_whole) {
      number++;
      return {Tile(p, whole), 0, p.slabs_per_block, b_stages, -1};
    }
    const int in_split = slab / p.slabs_per_block, first = slab - in_split * p.slabs_per_block;
    const int last = min(p.slabs_per_block, first + end - slab);
    const int slot = 2 * cluster + (slab != Split(p, clusters).begin(cluster));
    slab += last - first;
    return {Tile(p, p.n_whole + in_split), first, last, last == p.slabs_per_block ? b_stages : 0, slot};
  }
};

// All stages of this cluster's items.
struct Walk {
  Items items;
  Item item;
  int k = 0;
  bool is_over;
  DEVICE Walk(const Arguments& p) : items(p), item(items.next(p)), is_over(false) {}
  DEVICE bool at_b() const { return item.first + k >= item.last; }
  DEVICE int slab() const { return item.first + k; }
  DEVICE int step() const { return (k - (item.last - item.first)) * STEPS; }
  DEVICE void advance(const Arguments& p) {
    if (++k < item.last - item.first + item.b_stages) return;
    k = 0;
    is_over = items.is_over(p);
    if (!is_over) item = items.next(p);
  }
};

constexpr u32 X_BYTES = 8 * CHUNK_BYTES;

DEVICE void copy_weights(const Arguments& p, const Walk& at, const Ring& ring, int half) {
  const u32 to = ring.here(p), bar = ring.full_bar();
  if (at.at_b()) {
    const int steps = min(STEPS, p.block_steps - at.step());
    barrier_expect(bar, steps * (HALF_UNITS * STEP_BYTES + 2 * CHUNK_BYTES));
    const u8* from = p.lora_b + ((size_t)at.item.tile.row_block * p.block_steps + at.step()) * UNITS * STEP_BYTES;
    for (int i = 0; i < steps; i++)
      bulk_copy(to + i * HALF_UNITS * STEP_BYTES, from + (i * UNITS + half * HALF_UNITS) * STEP_BYTES,
                HALF_UNITS * STEP_BYTES, bar);
  } else {
    const u32* halves = p.halves + 2 * ((size_t)at.item.tile.row_block * p.slabs_per_block + at.slab());
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
    const int step = p.first_step[at.item.tile.row_block] + at.step();
    const u32 bytes = steps * CHUNK_BYTES;
    bulk_copy_to_both(to + half * bytes, p.u + ((size_t)at.item.tile.m_tile * p.u_steps + step) * 2 * CHUNK_BYTES + half * bytes, bytes, bar);
  } else {
    const u8* from = p.x + ((size_t)at.item.tile.m_tile * p.slabs_per_block + at.slab()) * X_BYTES;
    bulk_copy_to_both(to + half * X_BYTES / 2, from + half * X_BYTES / 2, X_BYTES / 2, bar);
  }
}

// Weights do not depend on the kernel before, so a ring of them is on its way before x is known to be there.
DEVICE void produce(const Arguments& p, Ring ring, int half) {
  Walk weights(p);
  {
    Walk x(p);
    Ring filling = ring;
    for (int i = 0; i < p.stages && !weights.is_over; i++) {
      copy_weights(p, weights, filling, half);
      weights.advance(p);
      filling.advance(p.stages);
    }
    wait_for_previous_kernel();
    for (int i = 0; i < p.stages && !x.is_over; i++) {
      copy_x(p, x, ring, half);
      x.advance(p);
      ring.advance(p.stages);
    }
  }
  for (; !weights.is_over; weights.advance(p)) {
    barrier_wait(ring.empty_bar(), ring.phase ^ 1);
    copy_weights(p, weights, ring, half);
    copy_x(p, weights, ring, half);
    ring.advance(p.stages);
  }
}

typedef float Tiles[NT][4];

// A stage that has been multiplied is given back when the products that read it are done.
struct Held {
  u32 bar = 0;
  DEVICE void release(int lane) {
    __syncwarp();
    if (bar && lane == 0) arrive_at_both(bar);
    bar = 0;
  }
};

// A stage of W whose unit is opened, so that its weights can be taken.
struct Opened {
  Unit unit;
  u32 stage, x, empty_bar;  // x: its place for products
  Scale upper, lower;
  // The next stage; where there is none, the one at `held` again: it is not given back yet, so that what is read is sound.
  DEVICE void open(const Arguments& p, Ring& ring, bool is_there, u32 held, int unit_number, int first_unit, int lane) {
    while (is_there && !barrier_poll(ring.full_bar(), ring.phase)) {
    }
    stage = is_there ? ring.here(p) : held;
    const int begin = unit_number ? lds16(stage + 2 * unit_number) : 2, before = first_unit ? lds16(stage + 2 * first_unit) : 2;
    unit.open(stage + SLAB_HEADER_BYTES + 16 * (begin - before), lane);
    if (HAS_SCALES) upper = Scale(unit.scale(lane >> 2)), lower = Scale(unit.scale((lane >> 2) + 8));
    x = x_place(stage + p.x_at);
    empty_bar = ring.empty_bar();
    if (is_there) ring.advance(p.stages);
  }
};

// Begin two steps of products, and wait for those of the call before.
DEVICE void multiply_pair(const Opened& slab, int pair, u32 (&a)[2][4], Tiles& sum, int lane, u32 table) {
  slab.unit.fragments(pair, lane, a, table);
#pragma unroll
  for (int i = 0; HAS_SCALES && i < 8; i++) a[i / 4][i % 4] = (i % 2 ? slab.lower : slab.upper).times(a[i / 4][i % 4]);
  wgmma_fence();
  wgmma(sum, a[0], x_descriptor(slab.x, 4 * pair));
  wgmma(sum, a[1], x_descriptor(slab.x, 4 * pair + 2));
  wgmma_commit();
  wgmma_wait<1>();
}

// One slab; the next one is opened first, so that its prefix sums are made beside the decoding.
struct Slabs {
  const Arguments& p;
  Ring& ring;
  Held& held;
  Tiles& sum;
  int unit_number, first_unit, lane;
  u32 table;
  DEVICE void open(Opened& slab, bool is_there, u32 held) {
    slab.open(p, ring, is_there, held, unit_number, first_unit, lane);
  }
  DEVICE void multiply(const Opened& now, Opened& next, bool has_next, u32 (&a)[2][2][4]) {
    open(next, has_next, now.stage);
    multiply_pair(now, 0, a[0], sum, lane, table);
    held.release(lane);
    multiply_pair(now, 1, a[1], sum, lane, table);
    held.bar = now.empty_bar;
  }
  // `n` is even.
  DEVICE void multiply_all(int n) {
    u32 a[2][2][4];
    Opened even, odd;
    open(even, true, 0);
    for (int i = 0; i < n; i += 2) {
      multiply(even, odd, true, a);
      multiply(odd, even, i + 2 < n, a);
    }
    wgmma_wait<0>();
    held.release(lane);
  }
};

DEVICE void multiply_b(const Arguments& p, Ring& ring, Tiles& sum, int steps, int unit, int lane) {
  barrier_wait(ring.full_bar(), ring.phase);
  const u32 stage = ring.here(p);
  for (int step = 0; step < min(STEPS, steps); step++) {
    const uint4 v = lds128(stage + (step * HALF_UNITS + unit) * STEP_BYTES + lane * 16);
    const u32 a[4] = {v.x, v.y, v.z, v.w};
    wgmma_fence();
    wgmma(sum, a, x_descriptor(x_place(stage + p.x_at), 2 * step));
    wgmma_commit();
    wgmma_wait<0>();
  }
  Held held{ring.empty_bar()};
  held.release(lane);
  ring.advance(p.stages);
}

DEVICE float4* sums_of(const Arguments& p, int slot, int unit) { return p.partial + ((size_t)slot * UNITS + unit) * NT * 32; }

DEVICE void store(const Arguments& p, const Tiles& sum, const Item& item, int unit, int lane) {
  const int m = item.tile.m_tile * TM;
  if (item.is_whole()) {
    const RowsOfY rows(p.y, p.bias, item.tile.row_block * BLOCK_ROWS + unit * UNIT_ROWS, p.n_rows, p.batch, lane);
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (m + 8 * n < p.batch) rows.store(m + 8 * n, sum[n], lane);
  } else {
    float4* to = sums_of(p, item.slot, unit) + lane;
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (m + 8 * n < p.batch) store_floats(to + n * 32, sum[n]);
  }
}

DEVICE void consume(const Arguments& p, Ring ring, int half, int warp, int lane, u32 table) {
  Held held;
  const int first_unit = half * HALF_UNITS, unit = first_unit + warp;
  wait_for_previous_kernel();
  Tiles sum;
  Items items(p);
  while (!items.is_over(p)) {
    const Item item = items.next(p);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[n][i] = 0.f;
    Slabs{p, ring, held, sum, unit, first_unit, lane, table}.multiply_all(item.last - item.first);
    for (int i = 0; i < item.b_stages; i++) multiply_b(p, ring, sum, p.block_steps - i * STEPS, warp, lane);
    wgmma_done(sum);
    store(p, sum, item, unit, lane);
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    decoded_linear(const __grid_constant__ Arguments p) {
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
  const Ring ring{kept(shared_address(full)), kept(shared_address(empty)), kept(shared_address(memory))};
  if (warp >= CONSUMER_WARPS) {
    leave_registers<56>();
    if (threadIdx.x == CONSUMER_WARPS * 32) produce(p, ring, half);
    __syncwarp();
  } else {
    take_registers<224>();
    consume(p, ring, half, warp, lane, shared_address(table));
  }
  cluster_meet();  // nothing is copied to a thread block that has ended
}

// Add the sums of each tile that was split, in order, and write y.
// grid: a warp for each four tiles of eight rows of x of a unit, and `clusters` as decoded_linear had; no shared memory.
extern "C" __global__ void __launch_bounds__(256) add_splits(const __grid_constant__ Arguments p, int clusters) {
  constexpr int QUARTERS = NT / 4;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, task = blockIdx.x * 8 + (threadIdx.x >> 5);
  const int number = task / (UNITS * QUARTERS), unit = task / QUARTERS % UNITS, quarter = task % QUARTERS;
  if (p.n_whole + number >= p.n_row_blocks * p.n_m_tiles) return;
  const Tile tile(p, p.n_whole + number);
  const int m = tile.m_tile * TM + 32 * quarter, begin = number * p.slabs_per_block;
  if (m >= p.batch) return;
  const Split split(p, clusters);
  const int first = split.cluster_of(begin), last = split.cluster_of(begin + p.slabs_per_block - 1);
  float sum[4][4] = {};
  for (int cluster = first; cluster <= last; cluster++) {
    const float4* from = sums_of(p, 2 * cluster + (split.begin(cluster) < begin), unit) + 4 * quarter * 32 + lane;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      if (m + 8 * n >= p.batch) continue;
      const float4 v = from[n * 32];
      sum[n][0] += v.x, sum[n][1] += v.y, sum[n][2] += v.z, sum[n][3] += v.w;
    }
  }
  const RowsOfY rows(p.y, p.bias, tile.row_block * BLOCK_ROWS + unit * UNIT_ROWS, p.n_rows, p.batch, lane);
#pragma unroll
  for (int n = 0; n < 4; n++)
    if (m + 8 * n < p.batch) rows.store(m + 8 * n, sum[n], lane);
}
