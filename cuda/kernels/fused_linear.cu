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
// A row block that several thread blocks share is summed from float32 partials, in thread-block order whoever is last:
// the same bits every time. Counters only ever grow; `launches` of a thread block says what to wait for.
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
  u32* counters;            // launches [grid], A parts done, u published, parts done [row blocks]
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
  DEVICE Item item(const Arguments& p, int i) const {
    if (i < n_a) {
      const u32 bytes = SUB * p.rank_tiles * A_TILE_BYTES;
      return {p.lora_a + (size_t)(range.x + i) * bytes, bytes, (range.x + i) * SUB * SLAB_COLUMNS};
    }
    const int round = range.z + i - n_a, row_block = round / rounds, k = round - row_block * rounds;
    if (k < rounds_w) {
      const u32* at = p.slab_offsets + row_block * p.slabs_per_block + k * SUB;
      const u32 start = at[0];
      return {p.slabs + (size_t)start * 16, (at[SUB] - start) * 16, k * SUB * SLAB_COLUMNS};
    }
    const int step = (k - rounds_w) * CHUNK, steps = min(CHUNK, p.block_steps - step);
    const size_t before = ((size_t)row_block * p.block_steps + step) * UNITS * STEP_BYTES;
    return {p.lora_b + before, (u32)(steps * UNITS * STEP_BYTES), -1};
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

DEVICE void copy_x(const Arguments& p, const Ring& ring, const Item& item, int lane) {
  const u32 to = ring.memory + ring.stage * p.stage_bytes + p.weight_bytes;
  if (item.column >= 0) {
    const u8* from = p.x + (size_t)item.column * 2;
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
  Ring filling = ring;
  for (int i = 0; i < first; i++) {
    copy_weights(p, filling, stream.item(p, i), lane);
    filling.advance(p.stages);
  }
  wait_for_previous_kernel();
  for (int i = 0; i < first; i++) {
    copy_x(p, ring, stream.item(p, i), lane);
    ring.advance(p.stages);
  }
  for (int i = first; i < n; i++) {
    barrier_wait(ring.empty_bar(), ring.phase ^ 1);
    const Item item = stream.item(p, i);
    copy_weights(p, ring, item, lane);
    copy_x(p, ring, item, lane);
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

DEVICE void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// Wait until *counter, which only grows (modulo 2^32), has come to `target`.
DEVICE void wait_for_count(const u32* counter, u32 target) {
  while ((int)(load_acquire(counter) - target) < 0) {
  }
}

// Store one lane's four sums: rows row, row + 8 of y^T, columns m, m + 1.
DEVICE void store_outputs(const Arguments& p, int row, int m, float4 v) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = row + 8 * i;
    if (at >= p.n_rows) continue;
    const float bias = p.bias ? p.bias[at] : 0.f;
    const float sums[2] = {(i ? v.z : v.x) + bias, (i ? v.w : v.y) + bias};
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

// Part `blockIdx.x` of u is done: publish it; the last thread block to come adds all parts, in order.
DEVICE void finish_u(const Arguments& p, const Tiles& sum, u32 launch, int warp, int lane, u32* is_last) {
  const int n_fragments = p.rank_tiles * NT * 32, thread = warp * 32 + lane;
  float4* own = p.u_partial + (size_t)blockIdx.x * n_fragments;
#pragma unroll
  for (int r = 0; r < RT; r++)
    if (warp * RT + r < p.rank_tiles)
#pragma unroll
      for (int n = 0; n < NT; n++)
        own[((warp * RT + r) * NT + n) * 32 + lane] =
            make_float4(sum[r][n][0], sum[r][n][1], sum[r][n][2], sum[r][n][3]);
  __threadfence();
  consumers_meet();
  u32* done = p.counters + gridDim.x;
  if (thread == 0) *is_last = add_release(done, 1) + 1 == (launch + 1) * p.a_splits;
  consumers_meet();
  if (!*is_last) return;
  __threadfence();
  for (int i = thread; i < n_fragments; i += CONSUMERS) {
    // B-fragment lane (m % 8, k pair) gathers its numbers from where the product's fragments left them.
    const int l = i & 31, tile = i / 32, k = 2 * (l & 3), m = l >> 2;
    float v[4] = {0.f, 0.f, 0.f, 0.f};
    for (int split = 0; split < p.a_splits; split++) {
      const float* from = (const float*)(p.u_partial + (size_t)split * n_fragments + tile * 32);
#pragma unroll
      for (int j = 0; j < 4; j++)
        v[j] += load_fresh(from + (4 * (k + (j & 1)) + m / 2) * 4 + (m & 1) + 2 * (j >> 1));
    }
    const float* scale = p.scaling + tile / NT * 16 + k;
    u32 high[2], low[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float s = v[2 * h] * scale[8 * h], t = v[2 * h + 1] * scale[8 * h + 1];
      high[h] = pack2(s, t);
      low[h] = pack2(s - widen(high[h]), t - widen(high[h] >> 16));
    }
    p.u[i] = make_uint4(high[0], high[1], low[0], low[1]);
  }
  __threadfence();
  consumers_meet();
  if (thread == 0) store_release(done + 1, launch + 1);
}

// Where a thread block leaves its part of a row block: one that began here ends elsewhere, one that ends here began
// elsewhere, so two places are enough.
DEVICE float4* partial_of(const Arguments& p, int block, bool began_here) {
  return p.partial + ((size_t)block * 2 + began_here) * UNITS * NT * 32;
}

DEVICE void store_partial(const Arguments& p, const Tiles& sum, int row_block, bool began_here, int warp, int lane) {
  float4* to = partial_of(p, blockIdx.x, began_here);
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
      to[((warp * RT + r) * NT + n) * 32 + lane] =
          make_float4(sum[r][n][0], sum[r][n][1], sum[r][n][2], sum[r][n][3]);
  __threadfence();
  consumers_meet();
  if (warp == 0 && lane == 0) add_release(p.counters + gridDim.x + 2 + row_block, 1);
}

// Add up this thread block's share of a row block that several thread blocks worked on.
DEVICE void finish_shared(const Arguments& p, int row_block, u32 launch, int warp, int lane) {
  const int2 sharers = p.sharers[row_block];
  const int n_sharers = sharers.y - sharers.x + 1, own = blockIdx.x - sharers.x;
  if (warp == 0 && lane == 0) wait_for_count(p.counters + gridDim.x + 2 + row_block, (launch + 1) * n_sharers);
  consumers_meet();
  for (int tile = own + n_sharers * warp; tile < UNITS * NT; tile += n_sharers * WARPS) {
    float4 sum = load_fresh(partial_of(p, sharers.x, true) + tile * 32 + lane);
#pragma unroll 4
    for (int block = sharers.x + 1; block <= sharers.y; block++) {
      const float4 v = load_fresh(partial_of(p, block, false) + tile * 32 + lane);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int row = row_block * BLOCK_ROWS + tile / NT * UNIT_ROWS + (lane >> 2);
    store_outputs(p, row, tile % NT * 8 + 2 * (lane & 3), sum);
  }
}

DEVICE void consume(const Arguments& p, const Stream& stream, Ring ring, int warp, int lane, u32* is_last, u32 table) {
  wait_for_previous_kernel();
  const u32 launch = load_acquire(p.counters + blockIdx.x);
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
      if (!have_u) wait_for_count(p.counters + gridDim.x + 1, launch + 1);
      have_u = true;
      const int step = (k - stream.rounds_w) * CHUNK;
      multiply_b(p, weights, p.first_step[row_block] + step, min(CHUNK, p.block_steps - step), sum, warp, lane);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty_bar());
    ring.advance(p.stages);
    if (is_a) {
      if (i + 1 == stream.n_a) {
        finish_u(p, sum, launch, warp, lane, is_last);
        clear(sum);
      }
    } else if (++k == stream.rounds || i + 1 == n) {
      const bool began_here = row_block > first_block || first_k == 0, ends_here = k == stream.rounds;
      if (began_here && ends_here) {
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
          for (int t = 0; t < NT; t++)
            store_outputs(p, row_block * BLOCK_ROWS + (warp * RT + r) * UNIT_ROWS + (lane >> 2), t * 8 + 2 * (lane & 3),
                          make_float4(sum[r][t][0], sum[r][t][1], sum[r][t][2], sum[r][t][3]));
      } else {
        store_partial(p, sum, row_block, began_here, warp, lane);
      }
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
  consumers_meet();
  if (warp == 0 && lane == 0) p.counters[blockIdx.x] = launch + 1;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, MIN_BLOCKS) fused_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[MAX_STAGES], empty[MAX_STAGES];
  __shared__ u32 is_last;
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
    consume(p, stream, ring, warp, lane, &is_last, shared_address(table));
}
