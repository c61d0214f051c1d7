// y (M, N) = x (M, K) W^T + ((x A^T) * scaling) B^T + bias for M <= 8*NT, in one launch.
//
// grid: as many thread blocks as the schedule has entries, all resident, each alone on its SM.
// block: WARPS consumer warps, one producer, GATHERERS.
// shared memory: `stages` stages of `stage_bytes` (weights, then x) in a ring (stream.cuh), then u.
//
// u = (x A^T) * scaling stands in shared memory as two 16-bit floats a number. The first `a_parts` thread blocks begin with a
// part of A each, and the gatherers of a thread block that has B rounds add all parts in order.
// A row block that several thread blocks share is summed from float32 partials, in thread-block order: the same bits
// every time. Nothing is announced: a place for a sum is EMPTY until the sum is there, who needs it looks until it is, and
// leaves the place empty (sums.cuh). All thread blocks are resident, and none waits with work left that others wait for.
#include "small.cuh"
#include "stream.cuh"

constexpr int RT = UNITS / WARPS;  // units a warp
constexpr int CONSUMERS = WARPS * 32;
#ifndef GATHERERS
#define GATHERERS 7  // warps that gather u; with none, consumers do, when they come to need it
#endif
constexpr int THREADS = CONSUMERS + 32 + GATHERERS * 32;

#include "scaled_u.cuh"
#include "sums.cuh"

typedef float Tiles[RT][NT][4];

DEVICE void clear(Tiles& tiles) {
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) tiles[r][n][i] = 0.f;
}

// `x` is this lane's place in row lane/4 of the stage's x, 0 where the row does not exist.
DEVICE uint4 x_fragment(u32 x, int n, int slab, int pair) {
  if (NT == 1 && x == 0) return make_uint4(0, 0, 0, 0);
  return lds128(x + n * 8 * X_PITCH + slab * 128 + pair * 16);
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
        const uint4 b = x_fragment(x, n, slab, pair);
#pragma unroll
        for (int r = 0; r < RT; r++) {
          mma(sum[r][n], a[r][0], b.x, b.y);
          mma(sum[r][n], a[r][1], b.z, b.w);
        }
      }
    }
    if (HAS_SCALES) {
#pragma unroll
      for (int r = 0; r < RT; r++) unit[r].add_scaled<NT>(scaled[r], total[r], lane);
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
          const uint4 b = x_fragment(x, n, slab, pair);
          mma(sum[r][n], first, b.x, b.y);
          mma(sum[r][n], second, b.z, b.w);
        }
      }
    }
  }
}

// Up to CHUNK steps of B times u in shared memory, high and low part.
DEVICE void multiply_b(u32 b_address, u32 u_address, int steps, Tiles& sum, int warp, int lane) {
  for (int step = 0; step < steps; step++) {
    u32 a[RT][4];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const uint4 v = lds128(b_address + (step * UNITS + warp * RT + r) * STEP_BYTES + lane * 16);
      a[r][0] = v.x, a[r][1] = v.y, a[r][2] = v.z, a[r][3] = v.w;
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 b = lds128_now(u_address + (step * NT + n) * 512 + lane * 16);
#pragma unroll
      for (int r = 0; r < RT; r++) {
        mma(sum[r][n], a[r], b.x, b.y);
        mma(sum[r][n], a[r], b.z, b.w);
      }
    }
  }
}

// u in shared memory, and its barriers: `full` when it is there, `empty` (of gatherers) when it was the last needed.
struct LowRank {
  u32 u, full, empty;
};

DEVICE void consumers_meet() { some_meet<CONSUMERS>(); }

// Part `blockIdx.x` of x A^T is done: publish this warp's tiles of it, and empty what the launch before left.
DEVICE void publish_u(const Arguments& p, const Tiles& sum, u32 launch, int warp, int lane) {
#pragma unroll
  for (int r = 0; r < RT; r++) {
    const int tile = warp * RT + r;
    if (tile >= p.rank_tiles) continue;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const int at = (tile * NT + n) * 32 + lane;
      store_sum(part_of_u(p, launch, blockIdx.x) + at, as_float4(sum[r][n]));
      empty(part_of_u(p, launch + 1, blockIdx.x) + at);
    }
  }
}

// Add all parts of u from step `first_step` on, a row block's share of the ranks, into this thread block's shared memory:
// every so many warps' tile.
DEVICE void gather_u(const Arguments& p, u32 u, int first_step, u32 launch, int warp, int warps, int lane) {
  const size_t stride = (size_t)p.rank_tiles * NT * 32;
  for (int i = warp; i < p.block_steps * NT; i += warps) {
    const int step = first_step + i / NT;
    const float4* first = part_of_u(p, launch, 0) + (first_step * NT + i) * 32 + lane;
    float4 sum[1];
    sum_in_order<1, 8>(first, first + stride, stride, p.a_parts - 1, sum);
    sts128(u + i * 512 + lane * 16, as_u(sum[0], p.scaling + step * 16, lane));
  }
}

// The u of another row block than before, where consumers see to it themselves.
DEVICE void fetch_u(const Arguments& p, const LowRank& low_rank, int first_step, u32 launch, int warp, int lane) {
  consumers_meet();  // the u before is needed no more
  gather_u(p, low_rank.u, first_step, launch, warp, WARPS, lane);
  consumers_meet();
}

// Which u lies in shared memory, for consumers.
struct UInPlace {
  int first_step = -1;
  u32 phase = 0;
  DEVICE void need(const Arguments& p, const LowRank& low_rank, int step, u32 launch, int warp, int lane) {
    if (step == first_step) return;
    if (GATHERERS && first_step >= 0) arrive_for_warp(low_rank.empty, lane);
    if (!GATHERERS) fetch_u(p, low_rank, step, launch, warp, lane);
    first_step = step;
    if (GATHERERS) barrier_wait(low_rank.full, phase), phase ^= 1;
  }
};

// u for one row block after the other, as the consumers come to need it.
DEVICE void gather(const Arguments& p, const Stream& stream, const LowRank& low_rank, int gatherer, int lane) {
  if (!stream.rounds_b) return;
  wait_for_previous_kernel();
  const u32 launch = load_fresh(p.counters + blockIdx.x);
  int have = -1;
  u32 phase = 0;
  for (int row_block = stream.first_block(); row_block <= stream.last_block(); row_block++) {
    const int step = p.first_step[row_block];
    if (!Segment(stream, row_block).n_b || step == have) continue;
    if (have >= 0) barrier_wait(low_rank.empty, phase), phase ^= 1;
    have = step;
    gather_u(p, low_rank.u, step, launch, gatherer, GATHERERS, lane);
    arrive_for_warp(low_rank.full, lane);
  }
}

// Where a thread block leaves its part of a row block: at most one that it begins and does not end, and one that it
// does not begin.
DEVICE float4* partial_of(const Arguments& p, int block, bool begins) {
  return p.partial + ((size_t)block * 2 + begins) * UNITS * NT * 32;
}

DEVICE void store_partial(const Arguments& p, const Tiles& sum, const Segment& segment, int warp, int lane) {
  float4* to = partial_of(p, blockIdx.x, segment.begins_here()) + warp * RT * NT * 32 + lane;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < NT; n++) store_sum(to + (r * NT + n) * 32, as_float4(sum[r][n]));
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

// Add up this warp's share of a row block that several thread blocks worked on: every so many times N tiles.
template <int N, int LOADS>
DEVICE void finish_tiles(const Arguments& p, int row_block, int2 sharers, int warp, int lane) {
  const int n_sharers = sharers.y - sharers.x + 1;
  const size_t stride = 2 * UNITS * NT * 32;
  for (int i = blockIdx.x - sharers.x + n_sharers * warp; i < UNITS * NT / N; i += n_sharers * WARPS) {
    const int tile = i * N, row = row_block * BLOCK_ROWS + tile / NT * UNIT_ROWS + (lane >> 2);
    const float4 bias = bias_of(p, row);
    float4 sum[N];
    float4* first = partial_of(p, sharers.x, true) + tile * 32 + lane;
    float4* rest = partial_of(p, sharers.x + 1, false) + tile * 32 + lane;
    sum_in_order<N, LOADS>(first, rest, stride, n_sharers - 1, sum);
#pragma unroll
    for (int t = 0; t < N; t++) {
      empty(first + t * 32);
      for (int j = 0; j < n_sharers - 1; j++) empty(rest + j * stride + t * 32);
      store_outputs(p, row, (tile + t) % NT * 8 + 2 * (lane & 3), sum[t] + bias);
    }
  }
}

DEVICE void finish_shared(const Arguments& p, int row_block, int2 sharers, int warp, int lane) {
  if (NT == 1 || (sharers.y - sharers.x + 1) * WARPS >= UNITS * NT)
    finish_tiles<1, 10>(p, row_block, sharers, warp, lane);
  else
    finish_tiles<NT < 4 ? NT : 4, 8>(p, row_block, sharers, warp, lane);
}

// What is needed late and is cold then: the bias of this thread block's rows, and the scaling.
DEVICE void prefetch_small(const Arguments& p, const Stream& stream, int thread) {
  const int line = thread * 32, row = stream.first_block() * BLOCK_ROWS + line;
  if (p.bias && row < min(p.n_rows, (stream.last_block() + 1) * BLOCK_ROWS)) prefetch(p.bias + row);
  if (line < p.rank_tiles * 16) prefetch(p.scaling + line);
  if (thread == 0) prefetch(p.first_step + stream.first_block());
}

// The thread block's part of x A^T.
DEVICE void make_part_of_u(const Arguments& p, const Stream& stream, Ring& ring, bool has_row, u32 x_offset, u32 launch,
                           Tiles& sum, int warp, int lane) {
  clear(sum);
  for (int i = 0; i < stream.n_a; i++) {
    barrier_wait(ring.full_bar(), ring.phase);
    multiply_a(p, ring.here(p), has_row ? ring.here(p) + x_offset : 0, sum, warp, lane);
    ring.release(lane, p.stages);
  }
  publish_u(p, sum, launch, warp, lane);
}

// All stages of A, then row block after row block.
DEVICE void consume(const Arguments& p, const Stream& stream, Ring ring, const LowRank& low_rank, int warp, int lane,
                    u32 table) {
  prefetch_small(p, stream, warp * 32 + lane);
  const int2 first_sharers = p.sharers[stream.first_block()], last_sharers = p.sharers[stream.last_block()];
  wait_for_previous_kernel();
  const u32 launch = load_fresh(p.counters + blockIdx.x);
  const u32 x_offset = p.weight_bytes + (lane >> 2) * X_PITCH + (lane & 3) * 32;
  const bool has_row = NT > 1 || (lane >> 2) < p.batch;
  Tiles sum;
  if (stream.n_a) make_part_of_u(p, stream, ring, has_row, x_offset, launch, sum, warp, lane);
  clear(sum);
  UInPlace u;
  for (int row_block = stream.first_block(); row_block <= stream.last_block(); row_block++) {
    const Segment segment(stream, row_block);
    for (int k = segment.first; k < segment.end(); k++) {
      if (k == segment.last) u.need(p, low_rank, p.first_step[row_block], launch, warp, lane);
      barrier_wait(ring.full_bar(), ring.phase);
      const u32 stage = ring.here(p);
      if (k < segment.last) {
        multiply_w(stage, has_row ? stage + x_offset : 0, sum, warp, lane, table);
      } else {
        const int step = (k - segment.last) * CHUNK, steps = min(CHUNK, p.block_steps - step);
        multiply_b(stage, low_rank.u + step * NT * 512, steps, sum, warp, lane);
      }
      ring.release(lane, p.stages);
    }
    if (segment.is_whole(stream))
      store_whole(p, sum, row_block, warp, lane);
    else
      store_partial(p, sum, segment, warp, lane);
    clear(sum);
  }
  const Segment first(stream, stream.first_block()), last(stream, stream.last_block());
  if (!first.is_whole(stream)) finish_shared(p, first.row_block, first_sharers, warp, lane);
  if (last.row_block != first.row_block && !last.is_whole(stream))
    finish_shared(p, last.row_block, last_sharers, warp, lane);
  consumers_meet();  // all have read the number of the launch
  if (warp == 0 && lane == 0) p.counters[blockIdx.x] = launch + 1;
}

extern "C" __global__ void __maxnreg__(REGISTERS_BESIDE_SMALL(THREADS)) fused_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[MAX_STAGES], empty[MAX_STAGES], u_full, u_empty;
  __shared__ u32 table[TABLE_WORDS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      barrier_init(shared_address(full + i), HAS_BULK_COPIES ? 1 : 32);
      barrier_init(shared_address(empty + i), WARPS * ARRIVALS_OF_WARP);
    }
    if (GATHERERS) {
      barrier_init(shared_address(&u_full), GATHERERS * ARRIVALS_OF_WARP);
      barrier_init(shared_address(&u_empty), WARPS * ARRIVALS_OF_WARP);
    }
    barrier_init_fence();
  }
  fill_table(table);
  __syncthreads();
  let_next_kernel_start();
  const Stream stream(p);
  const Ring ring{shared_address(full), shared_address(empty), shared_address(memory)};
  const LowRank low_rank{ring.memory + p.stages * p.stage_bytes, shared_address(&u_full), shared_address(&u_empty)};
  if (warp == WARPS)
    produce(p, stream, ring, lane);
  else if (warp > WARPS)
    gather(p, stream, low_rank, warp - WARPS - 1, lane);
  else
    consume(p, stream, ring, low_rank, warp, lane, shared_address(table));
}
