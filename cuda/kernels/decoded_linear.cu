// y (M, N) = x (M, K) W^T + u B^T + bias for many rows of x: weights go from slabs into registers and are multiplied there by
// asynchronous products (sm_90a); no dense weight is ever in memory. u = (x A^T) * scaling is given.
//
// A tile is a row block of W times TM rows of x. Clusters of two thread blocks take whole tiles in turns; the slabs of the
// tiles that are left are split evenly among some of them, who leave their sums in memory, count them, and add up a share of each
// tile that they had a part of as soon as all parts are there, in order: the same bits every time.
// grid: two thread blocks a cluster, each alone on its SM, all resident where tiles are split. Thread block h of a cluster
// multiplies units 8h .. 8h+7.
// block: GROUPS times two warpgroups of consumers, which take stages in turns and add what they have at the end of a tile; then
// warps of which one copies weights and one x. Both thread blocks need the same x: each copies a half of it to both.
//
//   a stage:  own copies           | header | units 8h .. 8h+7 of a slab (or of two steps of B) |
//             halves from both     | x of the slab, 64 columns: [4 chunks by block 0 | 4 by block 1] (or u of the steps) |
//   full: all bytes of both rows have come.   empty: the 8 warps of a group of both thread blocks have given the stage back.
//
// shared memory: `stages` (three at least) of `stage_bytes`, then, where there are two groups, the sums of one.
#ifndef NT
#define NT 32  // tiles of 8 rows of x
#endif
#include "cluster.cuh"
#include "cut.cuh"
#include "ring.cuh"
#include "split_tiles.cuh"

constexpr int CONSUMER_WARPS = GROUPS * HALF_UNITS;
constexpr int THREADS = CONSUMER_WARPS * 32 + 128;
constexpr int REGISTERS = GROUPS == 1 ? 224 : 112, OF_PRODUCER = GROUPS == 1 ? 56 : 32;
constexpr int EXCHANGED = 4;  // tiles of eight rows that one group leaves to the other at a time
constexpr u32 X_BYTES = 8 * CHUNK_BYTES;

// The bytes of a stage of two steps of B, and of their u.
DEVICE u32 b_bytes(int steps) { return steps * HALF_UNITS * STEP_BYTES; }
DEVICE u32 u_bytes(int steps) { return steps * 2 * CHUNK_BYTES; }

// This thread block's units of each stage, by one warp. They do not depend on the kernel before: a ring of them is on its way
// before x is known to be there. `full` waits for x's bytes too. What is done for a stage is short: it is one lane after all.
DEVICE void produce_weights(const Arguments& p, Ring ring, int half, int lane) {
  for (Items items(p); !items.is_over(p);) {
    const Item item = items.next(p);
    const size_t row_block = item.tile.row_block;
    const u32* places = p.halves + 2 * row_block * p.slabs_per_block;
    for (int batch = item.first; batch < item.last; batch += 32) {
      // where 32 slabs lie, one a lane: to be looked up one by one takes longer than to multiply them
      const u32* of_lane = places + 2 * min(batch + lane, item.last - 1);
      const u32 units = of_lane[0], begin = of_lane[half], end = of_lane[half + 1] - (half ? SLAB_HEADER_BYTES / 16 : 0);
      const int n = min(32, item.last - batch);
      for (int i = 0; i < n; i++) {
        const u32 to = ring.here(p), bar = ring.full_bar();
        const u32 bytes = 16 * __shfl_sync(~0u, end - begin, i);
        const u8* header = p.slabs + (size_t)__shfl_sync(~0u, units, i) * 16 - SLAB_HEADER_BYTES;
        const u8* from = p.slabs + (size_t)__shfl_sync(~0u, begin, i) * 16;
        barrier_wait(ring.empty_bar(), ring.phase ^ 1);
        if (lane == 0) {
          barrier_expect(bar, SLAB_HEADER_BYTES + bytes + X_BYTES);
          bulk_copy(to, header, SLAB_HEADER_BYTES, bar);
          bulk_copy(to + SLAB_HEADER_BYTES, from, bytes, bar);
        }
        ring.advance(p.stages);
      }
    }
    for (int step = 0; step < item.b_stages * STEPS; step += STEPS) {
      const int steps = min(STEPS, p.block_steps - step);
      const u8* from = p.lora_b + ((row_block * p.block_steps + step) * UNITS + half * HALF_UNITS) * STEP_BYTES;
      barrier_wait(ring.empty_bar(), ring.phase ^ 1);
      if (lane == 0) {
        barrier_expect(ring.full_bar(), b_bytes(steps) + u_bytes(steps));
        for (int i = 0; i < steps; i++)
          bulk_copy(ring.here(p) + b_bytes(i), from + i * UNITS * STEP_BYTES, b_bytes(1), ring.full_bar());
      }
      ring.advance(p.stages);
    }
  }
}

// This thread block's half of each stage's x or u, to both, by one lane.
DEVICE void produce_x(const Arguments& p, Ring ring, int half) {
  wait_for_previous_kernel();
  for (Items items(p); !items.is_over(p);) {
    const Item item = items.next(p);
    const u32 to = p.x_at + half * (X_BYTES / 2);
    const u8* from = p.x + ((size_t)item.tile.m_tile * p.slabs_per_block + item.first) * X_BYTES + half * (X_BYTES / 2);
    for (int slab = item.first; slab < item.last; slab++) {
      barrier_wait(ring.empty_bar(), ring.phase ^ 1);
      bulk_copy_to_both(ring.here(p) + to, from, X_BYTES / 2, ring.full_bar());
      ring.advance(p.stages);
      from += X_BYTES;
    }
    if (item.b_stages == 0) continue;
    from = p.u + ((size_t)item.tile.m_tile * p.u_steps + p.first_step[item.tile.row_block]) * u_bytes(1);
    for (int step = 0; step < item.b_stages * STEPS; step += STEPS) {
      const u32 bytes = u_bytes(min(STEPS, p.block_steps - step)) / 2;
      barrier_wait(ring.empty_bar(), ring.phase ^ 1);
      bulk_copy_to_both(ring.here(p) + p.x_at + half * bytes, from + u_bytes(step) + half * bytes, bytes, ring.full_bar());
      ring.advance(p.stages);
    }
  }
}

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
    if (is_there) ring.advance(p.stages, GROUPS);
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

// Slab after slab; where there is one group, the next one is opened first, so that its prefix sums are made beside the decoding.
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
  DEVICE void multiply(const Opened& slab, u32 (&a)[2][2][4]) {
    multiply_pair(slab, 0, a[0], sum, lane, table);
    held.release(lane);
    multiply_pair(slab, 1, a[1], sum, lane, table);
    held.bar = slab.empty_bar;
  }
  // `n` is even where there is one group.
  DEVICE void multiply_all(int n) {
    u32 a[2][2][4];
    Opened even, odd;
    if (GROUPS > 1) {  // enough warps to wait for one another
      for (int i = 0; i < n; i++) {
        open(even, true, 0);
        multiply(even, a);
      }
    } else {
      open(even, true, 0);
      for (int i = 0; i < n; i += 2) {
        open(odd, true, even.stage);
        multiply(even, a);
        open(even, i + 2 < n, odd.stage);
        multiply(odd, a);
      }
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
  ring.advance(p.stages, GROUPS);
}

DEVICE void consumers_meet() { some_meet<CONSUMER_WARPS * 32>(); }

// The second group's sums to the first, some at a time, so that the ring has room; `to` is this lane's place.
DEVICE void add_groups(Tiles& sum, u32 to, int group) {
  if (GROUPS == 1) return;
#pragma unroll
  for (int first = 0; first < NT; first += EXCHANGED) {
    consumers_meet();  // what was left before has been read
    if (group == 1) {
#pragma unroll
      for (int n = 0; n < EXCHANGED; n++) sts128(to + n * 512, as_bits(as_float4(sum[first + n])));
    }
    consumers_meet();
    if (group == 1) continue;
#pragma unroll
    for (int n = 0; n < EXCHANGED; n++) {
      const float4 v = as_floats(lds128_now(to + n * 512));
      sum[first + n][0] += v.x, sum[first + n][1] += v.y, sum[first + n][2] += v.z, sum[first + n][3] += v.w;
    }
  }
}

DEVICE void consume(const Arguments& p, Ring ring, int half, int warp, int lane, u32 table) {
  Held held;
  const int group = GROUPS == 1 ? 0 : warp / HALF_UNITS, of_group = warp % HALF_UNITS;
  const int first_unit = half * HALF_UNITS, unit = first_unit + of_group;
  const u32 exchanged = ring.memory + p.stages * p.stage_bytes + (of_group * EXCHANGED * 32 + lane) * 16;
  Kept kept{ring.memory + (of_group * NT * 32 + lane) * 16, -1, 0, 0};
  wait_for_previous_kernel();
  Tiles sum;
  Items items(p);
  const Split split(p);
  ring.advance(p.stages, group);
  int next = group;  // of an item's stages: this group's next one
  while (!items.is_over(p)) {
    const Item item = items.next(p);
    const int slabs = item.last - item.first, stages = slabs + item.b_stages;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[n][i] = 0.f;
    const int own = (slabs - next + GROUPS - 1) / GROUPS;
    Slabs{p, ring, held, sum, unit, first_unit, lane, table}.multiply_all(own);
    for (next += own * GROUPS; next < stages; next += GROUPS)
      multiply_b(p, ring, sum, p.block_steps - (next - slabs) * STEPS, of_group, lane);
    next -= stages;
    wgmma_done(sum);
    add_groups(sum, exchanged, group);
    if (!item.is_whole() && items.is_over(p)) {  // the last one: what this cluster adds up itself stays here
      const Shared shared(p, split, item.in_split);
      kept.in_split = item.in_split, kept.from = shared.share_of(items.cluster), kept.to = shared.share_of(items.cluster + 1);
      consumers_meet();  // the ring is needed no more
    }
    if (group == 0) store(p, sum, item, kept, unit, lane);
  }
  const int begin = split.begin(items.cluster), end = split.begin(items.cluster + 1);
  for (int tile = begin / p.slabs_per_block; tile * p.slabs_per_block < end; tile++)
    finish(p, Shared(p, split, tile), tile, kept, items.cluster, group, unit, lane);
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
      barrier_init(shared_address(empty + i), 2 * HALF_UNITS);
    }
    barrier_init_fence();
  }
  fill_table(table);
  __syncthreads();
  cluster_meet();
  let_next_kernel_start();
  const Ring ring{kept(shared_address(full)), kept(shared_address(empty)), kept(shared_address(memory))};
  if (warp >= CONSUMER_WARPS) {
    leave_registers<OF_PRODUCER>();
    if (warp == CONSUMER_WARPS) produce_weights(p, ring, half, lane);
    if (warp == CONSUMER_WARPS + 1 && lane == 0) produce_x(p, ring, half);
    __syncwarp();
  } else {
    take_registers<REGISTERS>();
    consume(p, ring, half, warp, lane, shared_address(table));
  }
  cluster_meet();  // nothing is copied to a thread block that has ended
}
