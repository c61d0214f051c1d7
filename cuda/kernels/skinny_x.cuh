// All of x in a thread block's shared memory: copied, or, with NORM_CHUNKS, norm * RMSNorm(x + residual) of NORM_ROWS rows, made there
// by the warps that multiply, each thread block for itself: a launch less before the product.
#pragma once
#include "rows.cuh"
#include "skinny.cuh"

#ifndef NORM_CHUNKS
#define NORM_CHUNKS 0  // times 8 * 32 * WARPS columns; 0: x is copied
#endif
#ifndef NORM_ROWS
#define NORM_ROWS 1
#endif

DEVICE void consumers_meet() { some_meet<WARPS * 32, 2>(); }
DEVICE int arrivals_of_x(const Arguments& p) { return NORM_CHUNKS ? WARPS * ARRIVALS_OF_WARP : p.batch; }
DEVICE int n_chunks(const Arguments& p) { return (p.n_slabs - 1 >> p.x_shift) + 1; }

// A row of x by each of the first warps, in chunks of columns, a lane each, those that are needed first first.
DEVICE void copy_x(const Arguments& p, const Run& run, const Shared& shared, int row, int lane) {
  const int row_bytes = p.n_columns * 2;
  const int turn = (run.begin - run.first_row * p.n_slabs >> p.x_shift) + lane;
  const int chunk = turn < n_chunks(p) ? turn : turn - n_chunks(p), at = chunk * (SLAB_COLUMNS * 2 << p.x_shift);
  const int bytes = min(SLAB_COLUMNS * 2 << p.x_shift, p.n_slabs * SLAB_COLUMNS * 2 - at), there = min(bytes, row_bytes - at);
  const u32 bar = shared.x_full + 8 * chunk, to = shared.x(p) + row * Shared::x_pitch(p) + at;
  wait_for_previous_kernel();
  if (lane >= n_chunks(p)) return;
  barrier_expect(bar, bytes);
  bulk_copy(to, p.x + (size_t)row * row_bytes + at, there, bar);
  if (there < bytes) bulk_copy(to + there, NO_COLUMNS, bytes - there, bar);
}

// NORM_ROWS rows of x, NORM_CHUNKS units of eight columns a lane of each. Sums of squares are added in add_norm.cu's order, and
// rounded where it rounds: both give the same bits.
struct NormedX {
  static constexpr int CHUNKS = NORM_CHUNKS ? NORM_CHUNKS : 1, ALL = NORM_ROWS * CHUNKS;
  const Arguments& p;
  const Shared& shared;
  int warp, lane;

  DEVICE int unit(int i) const { return (i % CHUNKS * WARPS + warp) * 32 + lane; }
  DEVICE bool is_there(int i) const { return 8 * unit(i) < p.n_columns; }
  DEVICE int place(int i) const { return i / CHUNKS * (p.n_columns / 8) + unit(i); }  // in a matrix of all rows

  DEVICE void load(const uint4* from, uint4 (&v)[ALL]) const {
#pragma unroll
    for (int i = 0; i < ALL; i++) v[i] = from && is_there(i) ? from[place(i)] : make_uint4(0, 0, 0, 0);
  }

  // The rows' factors, of this lane's sums of squares.
  DEVICE void factors(float (&of_row)[NORM_ROWS]) const {
    const u32 sums = shared.sums(p, 0);  // where no warp leaves anything before x is there
#pragma unroll
    for (int row = 0; row < NORM_ROWS; row++) {
      const float sum = sum_of_warp(of_row[row]);
      if (lane == 0) sts32(sums + (row * WARPS + warp) * 4, __float_as_uint(sum));
    }
    consumers_meet();
#pragma unroll
    for (int row = 0; row < NORM_ROWS; row++) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w += 4) {
        const float4 v = as_floats(lds128_now(sums + (row * WARPS + w) * 4));
        total += v.x, total += v.y, total += v.z, total += v.w;
      }
      of_row[row] = rsqrtf(total / (float)p.n_columns + p.epsilon);
    }
  }

  DEVICE void make() const {
    uint4 norm[CHUNKS], h[ALL], residual[ALL];
    float of_row[NORM_ROWS] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)  // no kernel writes weights: they are read before the kernel in front ends
      norm[c] = is_there(c) ? p.norm[unit(c)] : make_uint4(0, 0, 0, 0);
    wait_for_previous_kernel();
    load((const uint4*)p.x, h);
    load(p.residual, residual);
#pragma unroll
    for (int i = 0; i < ALL; i++) {
      Eight sum = unpack8(h[i]);
      const Eight r = unpack8(residual[i]);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (p.residual) sum.value[j] = rounded(sum.value[j] + r.value[j]);
        of_row[i / CHUNKS] += sum.value[j] * sum.value[j];
      }
      h[i] = pack8(sum);
    }
    factors(of_row);
#pragma unroll
    for (int i = 0; i < ALL; i++) {
      const Eight v = unpack8(h[i]), w = unpack8(norm[i % CHUNKS]);
      Eight y;
#pragma unroll
      for (int j = 0; j < 8; j++) y.value[j] = w.value[j] * rounded(v.value[j] * of_row[i / CHUNKS]);
      if (unit(i) < p.n_slabs * (SLAB_COLUMNS / 8))
        sts128(shared.x(p) + i / CHUNKS * Shared::x_pitch(p) + unit(i) * 16, is_there(i) ? pack8(y) : make_uint4(0, 0, 0, 0));
    }
    arrive_for_warp(shared.x_full, lane);
#pragma unroll
    for (int i = 0; i < ALL; i++)  // each thread block a part of x + residual
      if (p.residual && is_there(i) && unit(i) % gridDim.x == blockIdx.x) p.summed[place(i)] = h[i];
  }
};

DEVICE void take_x(const Arguments& p, const Run& run, const Shared& shared, int warp, int lane) {
  if (NORM_CHUNKS)
    NormedX{p, shared, warp, lane}.make();
  else
    for (int row = warp; row < p.batch; row += WARPS) copy_x(p, run, shared, row, lane);
}
