// y (M, N) = x (M, K) W^T + ((x A^T) * scaling) B^T + bias for M <= 8*NT, in one launch.
//
// grid: as many thread blocks as the schedule has entries, all resident; block: WARPS consumer warps and one producer.
// shared memory: `stages` stages of `stage_bytes` (weights, then x) in a ring.
//
// The producer streams stages; a stage is SUB slabs of W (slabs.cuh), or as many columns of A, or CHUNK steps of B.
// Weights do not depend on the kernel before, so the ring fills before griddepcontrol.wait; x is copied after it.
// Each thread block takes a contiguous run of rounds (stream-K): all W and B rounds of one row block, then the next.
// The first `a_splits` thread blocks begin with a part of A each; the last of them to finish adds the parts in order
// and publishes u = (x A^T) * scaling as two 16-bit floats a number, which B rounds multiply.
// A row block that several thread blocks share is summed from float32 partials, in thread-block order: the same bits
// every time. Warps publish and wait on their own; no barrier joins a thread block's consumers. Counters only ever
// grow (modulo 2^32), and `launches` of a thread block says what to wait for.
#include "slabs.cuh"

#ifndef NT
#define NT 1  // tiles of 8 rows of x
#endif
#ifndef WARPS
#define WARPS 16
#endif
#ifndef SUB
#define SUB 2  // slabs a stage
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2  // thread blocks an SM: the next launch becomes resident and prefetches while this one runs
#endif
#define MAX_STAGES 16

constexpr int RT = UNITS / WARPS;             // units a warp
constexpr int CHUNK = 2 * SUB;                // 16-rank steps of B a stage
constexpr int X_BYTES = SUB * SLAB_COLUMNS * 2;  // of one row of x in a stage
constexpr int X_PITCH = X_BYTES + 16;         // keeps eight lanes' 16-byte loads off each other's banks
constexpr int STEP_BYTES = 512;               // one 16 x 16 fragment of 16-bit weights
constexpr int A_TILE_BYTES = 4 * STEP_BYTES;  // 16 rows x 64 columns
constexpr int CONSUMERS = WARPS * 32;
constexpr int LOADS = MIN_BLOCKS == 2 && WARPS == 16 ? 5 : 8;  // of partial sums at once: what registers allow

struct Arguments {
  const u8* slabs;
  const u32* slab_offsets;  // [n_slabs + 1] in 16-byte units
  const u8* lora_a;         // [K/64][rank_tiles][4 steps][32 lanes][8] 16-bit
  const u8* lora_b;         // [row blocks][block_steps][16 units][32 lanes][8] 16-bit
  const float* scaling;     // [rank_tiles * 16]
  const int4* schedule;     // [grid] first and last stage of A, first and last round
  const int2* sharers;      // [row blocks] first and last thread block
  const int* first_step;    // [row blocks] where the row block's ranks begin in u, in steps of 16
  const float* bias;        // [N] or null
  const u8* x;              // [M, K] 16-bit
  void* y;                  // [M, N] 16-bit, or float32 where `wide`
  float4* partial;          // [grid][2][16 units][NT][32 lanes]
  float4* u_partial;        // [a_splits][rank_tiles][NT][32 lanes]
  uint4* u;                 // [rank_tiles][NT][32 lanes] high part (2 words), low part
  u32* counters;            // launches [grid], warps done with A [16], tiles of u published, warps done [row blocks]
  int n_rows, n_columns, batch, wide;
  int slabs_per_block, rank_tiles, block_steps, a_splits;  // block_steps: steps of B a row block
  int weight_bytes, stage_bytes, stages, y_pitch;          // y_pitch: elements between rows of y
};

struct Ring {
  u32 full, empty, memory;
  int stage = 0;
  u32 phase = 0;
  DEVICE u32 full_bar() const { return full + 8 * stage; }
  DEVICE u32 empty_bar() const { return empty + 8 * stage; }
  DEVICE void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// One stage of the stream: which weights, and which columns of x.
struct Item {
  const u8* weights;
  u32 bytes;
  int column;  // of x; < 0 where none is needed
};

// What a thread block multiplies, in order: stages of A, then rounds.
struct Stream {
  int4 range;
  int n_a, rounds_w, rounds;  // rounds of a row block: of W, in all
  DEVICE Stream(const Arguments& p) {
    range = p.schedule[blockIdx.x];
    n_a = range.y - range.x;
    rounds_w = p.slabs_per_block / SUB;
    rounds = rounds_w + (p.block_steps + CHUNK - 1) / CHUNK;
  }
  DEVICE int size() const { return n_a + range.w - range.z; }
};

// Walks through the stream's stages; a warp reads the offsets of 31 rounds of W at once.
struct Walk {
  int i = 0, row_block, k;  // stage, row block and round in it
  int w;                    // rounds of W before this one, in the whole matrix
  int window;               // the first round that `offsets` has
  u32 offsets;              // of round window + lane
  DEVICE Walk(const Arguments& p, const Stream& s, int lane) {
    row_block = s.range.z / s.rounds;
    k = s.range.z - row_block * s.rounds;
    w = row_block * s.rounds_w + min(k, s.rounds_w);
    read_offsets(p, lane);
  }
  DEVICE void read_offsets(const Arguments& p, int lane) {
    window = w;
    const int last = (p.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * p.slabs_per_block;
    offsets = p.slab_offsets[min((w + lane) * SUB, last)];
  }
  DEVICE Item next(const Arguments& p, const Stream& s, int lane) {
    if (i < s.n_a) {
      const u32 bytes = SUB * p.rank_tiles * A_TILE_BYTES;
      const int stage = s.range.x + i++;
      return {p.lora_a + (size_t)stage * bytes, bytes, stage * SUB * SLAB_COLUMNS};
    }
    i++;
    Item item;
    if (k < s.rounds_w) {
      if (w - window == 31) read_offsets(p, lane);
      const u32 start = __shfl_sync(~0u, offsets, w - window), end = __shfl_sync(~0u, offsets, w - window + 1);
      item = {p.slabs + (size_t)start * 16, (end - start) * 16, k * SUB * SLAB_COLUMNS};
      w++;
    } else {
      const int step = (k - s.rounds_w) * CHUNK, steps = min(CHUNK, p.block_steps - step);
      const size_t before = ((size_t)row_block * p.block_steps + step) * UNITS * STEP_BYTES;
      item = {p.lora_b + before, (u32)(steps * UNITS * STEP_BYTES), -1};
    }
    if (++k == s.rounds) k = 0, row_block++;
    return item;
  }
};

DEVICE void copy_weights(const Arguments& p, const Ring& ring, const Item& item, int lane) {
  const u32 to = ring.memory + ring.stage * p.stage_bytes;
#if HAS_BULK_COPIES
  if (lane == 0) {
    barrier_expect(ring.full_bar(), item.bytes + (item.column < 0 ? 0 : p.batch * X_BYTES));
    bulk_copy(to, item.weights, item.bytes, ring.full_bar());
  }
#else
  for (u32 i = lane * 16; i < item.bytes; i += 512) copy_16(to + i, item.weights + i);
#endif
}

DEVICE void copy_x(const Arguments& p, const Ring& ring, int column, int lane) {
  const u32 to = ring.memory + ring.stage * p.stage_bytes + p.weight_bytes;
  if (column >= 0) {
    const u8* from = p.x + (size_t)column * 2;
#if HAS_BULK_COPIES
    __syncwarp();
    for (int m = lane; m < p.batch; m += 32)
      bulk_copy(to + m * X_PITCH, from + (size_t)m * p.n_columns * 2, X_BYTES, ring.full_bar());
#else
    for (int i = lane; i < p.batch * (X_BYTES / 16); i += 32) {
      const int m = i / (X_BYTES / 16), c = 16 * (i % (X_BYTES / 16));
      copy_16(to + m * X_PITCH + c, from + (size_t)m * p.n_columns * 2 + c);
    }
#endif
  }
#if !HAS_BULK_COPIES
  arrive_after_copies(ring.full_bar());
#endif
}

DEVICE void produce(const Arguments& p, const Stream& stream, Ring ring, int lane) {
  const int n = stream.size(), first = min(n, p.stages);
  Walk walk(p, stream, lane);
  Ring filling = ring;
  int column = 0;  // of lane's stage: x's columns of the first stages
  for (int i = 0; i < first; i++) {
    const Item item = walk.next(p, stream, lane);
    if (lane == i) column = item.column;
    copy_weights(p, filling, item, lane);
    filling.advance(p.stages);
  }
  wait_for_previous_kernel();
  for (int i = 0; i < first; i++) {
    copy_x(p, ring, __shfl_sync(~0u, column, i), lane);
    ring.advance(p.stages);
  }
  for (int i = first; i < n; i++) {
    const Item item = walk.next(p, stream, lane);
    barrier_wait(ring.empty_bar(), ring.phase ^ 1);
    copy_weights(p, ring, item, lane);
    copy_x(p, ring, item.column, lane);
    ring.advance(p.stages);
  }
}

typedef float Tiles[RT][NT][4];

DEVICE void clear(Tiles& tiles) {
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) tiles[r][n][i] = 0.f;
}

DEVICE uint4 x_fragment(u32 x, int n, int slab, int pair, int lane) {
  return lds128(x + (n * 8 + (lane >> 2)) * X_PITCH + slab * 128 + (lane & 3) * 32 + pair * 16);
}

// SUB slabs of W times x.
DEVICE void multiply_w(u32 slab_address, u32 x, Tiles& total, int warp, int lane, u32 table) {
#pragma unroll
  for (int slab = 0; slab < SUB; slab++) {
    Unit unit[RT];
    Tiles scaled;
    Tiles& sum = HAS_SCALES ? scaled : total;
    if (HAS_SCALES) clear(scaled);
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const int u = warp * RT + r;
      unit[r].open(slab_address + 16 * (u ? lds16(slab_address + 2 * u) : 2), lane);
    }
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      u32 a[RT][2][4];
#pragma unroll
      for (int r = 0; r < RT; r++) unit[r].fragments(pair, lane, a[r], table);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 b = x_fragment(x, n, slab, pair, lane);
#pragma unroll
        for (int r = 0; r < RT; r++) {
          mma(sum[r][n], a[r][0], b.x, b.y);
          mma(sum[r][n], a[r][1], b.z, b.w);
        }
      }
    }
    if (HAS_SCALES) {
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const float upper = unit[r].scale(lane >> 2), lower = unit[r].scale((lane >> 2) + 8);
#pragma unroll
        for (int n = 0; n < NT; n++) {
          total[r][n][0] += upper * scaled[r][n][0];
          total[r][n][1] += upper * scaled[r][n][1];
          total[r][n][2] += lower * scaled[r][n][2];
          total[r][n][3] += lower * scaled[r][n][3];
        }
      }
    }
    slab_address += 16 * lds16(slab_address);
  }
}

// SUB * 64 columns of A times x: warp w takes rank tiles w*RT ...
DEVICE void multiply_a(const Arguments& p, u32 a_address, u32 x, Tiles& sum, int warp, int lane) {
#pragma unroll
  for (int r = 0; r < RT; r++) {
    const int tile = warp * RT + r;
    if (tile >= p.rank_tiles) continue;
#pragma unroll
    for (int slab = 0; slab < SUB; slab++) {
      const u32 from = a_address + (slab * p.rank_tiles + tile) * A_TILE_BYTES + lane * 16;
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const uint4 v = lds128(from + 2 * pair * STEP_BYTES), w = lds128(from + (2 * pair + 1) * STEP_BYTES);
        const u32 first[4] = {v.x, v.y, v.z, v.w}, second[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const uint4 b = x_fragment(x, n, slab, pair, lane);
          mma(sum[r][n], first, b.x, b.y);
          mma(sum[r][n], second, b.z, b.w);
        }
      }
    }
  }
}

// Up to CHUNK steps of B times u, high and low part.
DEVICE void multiply_b(const Arguments& p, u32 b_address, int u_step, int steps, Tiles& sum, int warp, int lane) {
  for (int step = 0; step < steps; step++) {
    u32 a[RT][4];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const uint4 v = lds128(b_address + (step * UNITS + warp * RT + r) * STEP_BYTES + lane * 16);
      a[r][0] = v.x, a[r][1] = v.y, a[r][2] = v.z, a[r][3] = v.w;
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 b = load_fresh(p.u + ((size_t)(u_step + step) * NT + n) * 32 + lane);
#pragma unroll
      for (int r = 0; r < RT; r++) {
        mma(sum[r][n], a[r], b.x, b.y);
        mma(sum[r][n], a[r], b.z, b.w);
      }
    }
  }
}

DEVICE u32* warps_done_with_a(const Arguments& p, int tile) { return p.counters + gridDim.x + tile; }
DEVICE u32* tiles_of_u(const Arguments& p) { return p.counters + gridDim.x + UNITS; }
DEVICE u32* warps_done(const Arguments& p, int row_block) { return p.counters + gridDim.x + UNITS + 1 + row_block; }

// Wait until *counter, which only grows (modulo 2^32), has come to `target`.
DEVICE void wait_for_count(const u32* counter, u32 target) {
  while ((int)(load_acquire(counter) - target) < 0) {
  }
}

DEVICE float4 bias_of(const Arguments& p, int row) {  // of rows row (x, y) and row + 8 (z, w)
  const float upper = p.bias && row < p.n_rows ? p.bias[row] : 0.f;
  const float lower = p.bias && row + 8 < p.n_rows ? p.bias[row + 8] : 0.f;
  return make_float4(upper, upper, lower, lower);
}

// Store one lane's four sums: rows row, row + 8 of y^T, columns m, m + 1.
DEVICE void store_outputs(const Arguments& p, int row, int m, float4 v) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = row + 8 * i;
    if (at >= p.n_rows) continue;
    const float sums[2] = {i ? v.z : v.x, i ? v.w : v.y};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (m + j >= p.batch) continue;
      const size_t to = (size_t)(m + j) * p.y_pitch + at;
      if (p.wide)
        ((float*)p.y)[to] = sums[j];
      else
        ((u16*)p.y)[to] = (u16)pack2(sums[j], 0.f);
    }
  }
}

DEVICE float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
DEVICE float4 as_float4(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

// first[0] + first[stride] + ..., n numbers, in this order; several loads are under way at once.
DEVICE float4 sum_in_order(const float4* first, size_t stride, int n) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int i = 0; i < n; i += LOADS) {
    float4 v[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; j++) v[j] = load_fresh(first + (size_t)min(i + j, n - 1) * stride);
#pragma unroll
    for (int j = 0; j < LOADS; j++)
      if (i + j < n) sum = sum + v[j];
  }
  return sum;
}

// From where a product's fragment (16 ranks x 8 rows of x) has its numbers to where the next product wants them,
// scaled, as two 16-bit floats each.
DEVICE uint4 as_u(float4 v, const float* scaling, int lane) {
  const int k = 2 * (lane & 3), m = lane >> 2;
  float upper[2], lower[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int from = 4 * (k + j) + m / 2;
    const float x = __shfl_sync(~0u, v.x, from), y = __shfl_sync(~0u, v.y, from);
    const float z = __shfl_sync(~0u, v.z, from), w = __shfl_sync(~0u, v.w, from);
    upper[j] = (m & 1 ? y : x) * scaling[k + j];
    lower[j] = (m & 1 ? w : z) * scaling[k + j + 8];
  }
  const u32 high0 = pack2(upper[0], upper[1]), high1 = pack2(lower[0], lower[1]);
  return make_uint4(high0, high1, pack2(upper[0] - widen(high0), upper[1] - widen(high0 >> 16)),
                    pack2(lower[0] - widen(high1), lower[1] - widen(high1 >> 16)));
}

// This warp's tiles of part `blockIdx.x` of u are done: the last warp to come adds all parts of a tile, in order.
DEVICE void finish_u(const Arguments& p, const Tiles& sum, u32 launch, int warp, int lane) {
  const size_t part = (size_t)p.rank_tiles * NT * 32;
#pragma unroll
  for (int r = 0; r < RT; r++) {
    const int tile = warp * RT + r;
    if (tile >= p.rank_tiles) continue;
    float4* own = p.u_partial + blockIdx.x * part + tile * NT * 32 + lane;
#pragma unroll
    for (int n = 0; n < NT; n++) own[n * 32] = as_float4(sum[r][n]);
    __syncwarp();
    u32 before = 0;
    if (lane == 0) before = add_release(warps_done_with_a(p, tile), 1);
    if (__shfl_sync(~0u, before, 0) + 1 != (launch + 1) * p.a_splits) continue;
    for (int n = 0; n < NT; n++) {
      const float4 v = sum_in_order(p.u_partial + (tile * NT + n) * 32 + lane, part, p.a_splits);
      p.u[(tile * NT + n) * 32 + lane] = as_u(v, p.scaling + tile * 16, lane);
    }
    __syncwarp();
    if (lane == 0) add_release(tiles_of_u(p), 1);
  }
}

// Where a thread block leaves its part of a row block. One part began in this thread block and ends in another, one
// began in another: so two places are enough.
DEVICE float4* partial_of(const Arguments& p, int block, bool began_here) {
  return p.partial + ((size_t)block * 2 + began_here) * UNITS * NT * 32;
}

DEVICE void store_partial(const Arguments& p, const Tiles& sum, int row_block, bool began_here, int warp, int lane) {
  float4* to = partial_of(p, blockIdx.x, began_here) + warp * RT * NT * 32 + lane;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < NT; n++) to[(r * NT + n) * 32] = as_float4(sum[r][n]);
  __syncwarp();
  if (lane == 0) add_release(warps_done(p, row_block), 1);
}

DEVICE void store_whole(const Arguments& p, const Tiles& sum, int row_block, int warp, int lane) {
#pragma unroll
  for (int r = 0; r < RT; r++) {
    const int row = row_block * BLOCK_ROWS + (warp * RT + r) * UNIT_ROWS + (lane >> 2);
    const float4 bias = bias_of(p, row);
#pragma unroll
    for (int n = 0; n < NT; n++) store_outputs(p, row, n * 8 + 2 * (lane & 3), as_float4(sum[r][n]) + bias);
  }
}

// Add up this warp's share of a row block that several thread blocks worked on.
DEVICE void finish_shared(const Arguments& p, int row_block, u32 launch, int warp, int lane) {
  const int2 sharers = p.sharers[row_block];
  const int n_sharers = sharers.y - sharers.x + 1;
  bool waited = false;
  for (int tile = blockIdx.x - sharers.x + n_sharers * warp; tile < UNITS * NT; tile += n_sharers * WARPS) {
    const int row = row_block * BLOCK_ROWS + tile / NT * UNIT_ROWS + (lane >> 2);
    const float4 bias = bias_of(p, row);
    if (!waited) wait_for_count(warps_done(p, row_block), (launch + 1) * n_sharers * WARPS);
    waited = true;
    const float4 first = load_fresh(partial_of(p, sharers.x, true) + tile * 32 + lane);
    const float4 rest = sum_in_order(partial_of(p, sharers.x + 1, false) + tile * 32 + lane, 2 * UNITS * NT * 32, n_sharers - 1);
    store_outputs(p, row, tile % NT * 8 + 2 * (lane & 3), first + rest + bias);
  }
}

DEVICE void consume(const Arguments& p, const Stream& stream, Ring ring, int warp, int lane, u32 table) {
  wait_for_previous_kernel();
  const u32 launch = load_fresh(p.counters + blockIdx.x);
  Tiles sum;
  clear(sum);
  const int n = stream.size();
  int row_block = stream.range.z / stream.rounds, k = stream.range.z - row_block * stream.rounds;
  const int first_block = row_block, first_k = k;
  bool have_u = false;
  for (int i = 0; i < n; i++) {
    barrier_wait(ring.full_bar(), ring.phase);
    const u32 weights = ring.memory + ring.stage * p.stage_bytes, x = weights + p.weight_bytes;
    const bool is_a = i < stream.n_a;
    if (is_a) {
      multiply_a(p, weights, x, sum, warp, lane);
    } else if (k < stream.rounds_w) {
      multiply_w(weights, x, sum, warp, lane, table);
    } else {
      if (!have_u) wait_for_count(tiles_of_u(p), (launch + 1) * p.rank_tiles);
      have_u = true;
      const int step = (k - stream.rounds_w) * CHUNK;
      multiply_b(p, weights, p.first_step[row_block] + step, min(CHUNK, p.block_steps - step), sum, warp, lane);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty_bar());
    ring.advance(p.stages);
    if (is_a) {
      if (i + 1 == stream.n_a) {
        finish_u(p, sum, launch, warp, lane);
        clear(sum);
      }
    } else if (++k == stream.rounds || i + 1 == n) {
      const bool began_here = row_block > first_block || first_k == 0, ends_here = k == stream.rounds;
      if (began_here && ends_here)
        store_whole(p, sum, row_block, warp, lane);
      else
        store_partial(p, sum, row_block, began_here, warp, lane);
      clear(sum);
      if (ends_here) k = 0, row_block++;
    }
  }
  // Shared row blocks last, so that no thread block waits with work of its own left.
  const int last_block = (stream.range.w - 1) / stream.rounds;
  const bool last_is_whole = stream.range.w % stream.rounds == 0;
  const bool first_is_shared = first_k != 0 || (last_block == first_block && !last_is_whole);
  if (first_is_shared) finish_shared(p, first_block, launch, warp, lane);
  if (!last_is_whole && last_block != first_block) finish_shared(p, last_block, launch, warp, lane);
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");  // all have read the count
  if (warp == 0 && lane == 0) p.counters[blockIdx.x] = launch + 1;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, MIN_BLOCKS) fused_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[MAX_STAGES], empty[MAX_STAGES];
  __shared__ u32 table[TABLE_WORDS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      barrier_init(shared_address(full + i), HAS_BULK_COPIES ? 1 : 32);
      barrier_init(shared_address(empty + i), WARPS);
    }
    barrier_init_fence();
  }
  fill_table(table);
  __syncthreads();
  let_next_kernel_start();
  const Stream stream(p);
  const Ring ring{shared_address(full), shared_address(empty), shared_address(memory)};
  if (warp == WARPS)
    produce(p, stream, ring, lane);
  else
    consume(p, stream, ring, warp, lane, shared_address(table));
}
