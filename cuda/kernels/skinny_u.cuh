// u = (x A^T) * scaling for skinny_linear.cu: computed in parts by some thread blocks, added in order by all.
#pragma once
#include "scaled_u.cuh"
#include "skinny.cuh"

constexpr int A_AT_ONCE = 2;  // slabs of A that a finisher asks for
constexpr int GATHERED = 8;   // parts of u that a lane asks for

DEVICE void finishers_meet() { some_meet<FINISHERS * 32>(); }

// A part of a tile of x A^T, by all finishers: publish it, and empty what the launch before left.
DEVICE void multiply_a(const Arguments& p, const Shared& shared, int job, u32 launch, int finisher, int lane) {
  const int tile = job % p.rank_tiles, part = job / p.rank_tiles, quarter = part * FINISHERS + finisher;
  const int quarters = p.a_parts * FINISHERS, begin = quarter * p.n_slabs / quarters, end = (quarter + 1) * p.n_slabs / quarters;
  const u32 x = shared.x(p) + (lane >> 2) * Shared::x_pitch(p) + (lane & 3) * 32;
  float sum[NT][4] = {};
  for (int slab = begin; slab < end; slab += A_AT_ONCE) {
    uint4 a[A_AT_ONCE][4];
#pragma unroll
    for (int i = 0; i < A_AT_ONCE; i++)
#pragma unroll
      for (int step = 0; step < 4; step++)
        a[i][step] = slab + i >= end ? make_uint4(0, 0, 0, 0)
            : ((const uint4*)(p.lora_a + ((size_t)(slab + i) * p.rank_tiles + tile) * A_TILE_BYTES))[step * 32 + lane];
#pragma unroll
    for (int i = 0; i < A_AT_ONCE; i++) {
      if (slab + i >= end) break;
      shared.wait_for_x(p, slab + i);
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const uint4 v = a[i][2 * pair], w = a[i][2 * pair + 1];
        const u32 upper[4] = {v.x, v.y, v.z, v.w}, lower[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const uint4 b = x_fragment(p, x + (slab + i) * SLAB_COLUMNS * 2 + pair * 16, n, lane);
          mma(sum[n], upper, b.x, b.y);
          mma(sum[n], lower, b.z, b.w);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++) sts128(shared.parts(p) + (finisher * NT + n) * 512 + lane * 16, as_bits(as_float4(sum[n])));
  wait_for_previous_kernel();
  finishers_meet();
  if (finisher < NT && has_sums(p, lane)) {
    const int at = (tile * NT + finisher) * 32 + lane;
    store_sum(part_of_u(p, launch, part) + at, sum_of(shared.parts(p) + finisher * 512 + lane * 16, NT * 512, FINISHERS));
    empty(part_of_u(p, launch + 1, part) + at);
  }
  finishers_meet();
}

DEVICE float4 shuffled(float4 v, int lane) {
  return make_float4(__shfl_sync(~0u, v.x, lane), __shfl_sync(~0u, v.y, lane), __shfl_sync(~0u, v.z, lane),
                     __shfl_sync(~0u, v.w, lane));
}

// The sums of all parts of NT tiles of u. Where there is one, lanes whose rows of x do not exist ask for some of the parts
// of others.
DEVICE void parts_sum(const Arguments& p, const float4* from, int lane, float4 (&total)[NT]) {
  const size_t stride = (size_t)p.rank_tiles * NT * 32;
  if (NT > 1) {
    sum_in_order<NT, GATHERED * NT>(from + lane, from + lane + stride, stride, p.a_parts - 1, total);
    return;
  }
  const int columns = (p.batch + 1) / 2, groups = columns == 1 ? 4 : columns == 2 ? 2 : 1, width = 4 / groups;
  const int group = (lane & 3) / width, column = (lane & 3) % width;
  const int begin = group * p.a_parts / groups, end = (group + 1) * p.a_parts / groups;
  const float4* first = from + begin * stride + (lane & ~3) + column;
  float4 sum[1] = {make_float4(0.f, 0.f, 0.f, 0.f)};
  if (column < columns && begin < end) sum_in_order<1, GATHERED>(first, first + stride, stride, end - begin - 1, sum);
  __syncwarp();
  total[0] = shuffled(sum[0], (lane & ~3) + column);
  for (int g = 1; g < groups; g++) total[0] = total[0] + shuffled(sum[0], (lane & ~3) + g * width + column);
}

// Which launch this is. The next one, which asks too, may only then begin.
DEVICE u32 count_launch(const Arguments& p) {
  const u32 launch = add_relaxed(p.counters + blockIdx.x, 1);
  if (launch != ~0u) let_next_kernel_start();  // always: so the trigger waits for the answer
  return launch;
}

// u in shared memory from step `first` on, for the last row pair too.
DEVICE void gather_u(const Arguments& p, const Shared& shared, int first, int n, u32 launch, int finisher, int lane) {
  for (int i = finisher; i < n; i += FINISHERS) {
    const int step = first + i;
    float4 sum[NT] = {};
    parts_sum(p, part_of_u(p, launch, 0) + step * NT * 32, lane, sum);
#pragma unroll
    for (int n = 0; n < NT; n++) sts128(shared.u(p) + (i * NT + n) * 512 + lane * 16, as_u(sum[n], p.scaling + step * 16, lane));
  }
  arrive_for_warp(shared.u_full, lane);
}
