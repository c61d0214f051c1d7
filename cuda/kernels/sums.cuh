// Partial sums: leaving them in memory, waiting for them, adding them in order, turning them into u or into y. `Arguments`
// is that of the kernel.
#pragma once
#include "ptx.cuh"

constexpr u32 EMPTY = ~0u;  // in a place for a sum that is not there yet; as a float, a NaN that no product yields
#define EMPTY_FLOAT __uint_as_float(EMPTY)

DEVICE void store_sum(float4* to, float4 v) {
  const uint4 bits = as_bits(v);
  store_global(to, make_uint4(min(bits.x, EMPTY - 1), min(bits.y, EMPTY - 1), min(bits.z, EMPTY - 1), min(bits.w, EMPTY - 1)));
}
DEVICE void empty(float4* place) { store_global(place, make_uint4(EMPTY, EMPTY, EMPTY, EMPTY)); }
DEVICE bool is_empty(float4 v) {
  const uint4 bits = as_bits(v);
  return bits.x == EMPTY || bits.y == EMPTY || bits.z == EMPTY || bits.w == EMPTY;
}
// Where a part of x A^T is left: launches take turns with two buffers.
DEVICE float4* part_of_u(const Arguments& p, u32 launch, int part) {
  return p.u_partial + (size_t)((launch & 1) * p.a_parts + part) * p.rank_tiles * NT * 32;
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

// For each of N tiles: the sums at first, rest, rest + stride, ..., n_rest numbers, added in this order as soon as they
// are there; LOADS go side by side.
template <int N, int LOADS>
DEVICE void sum_in_order(const float4* first, const float4* rest, size_t stride, int n_rest, float4 (&sum)[N]) {
  constexpr int AT_ONCE = LOADS / N;
#pragma unroll 1
  for (int i = -1; i < n_rest; i += AT_ONCE) {
    float4 v[AT_ONCE][N];
#pragma unroll
    for (int j = 0; j < AT_ONCE * N; j++) v[j / N][j % N] = make_float4(EMPTY_FLOAT, 0.f, 0.f, 0.f);
    bool all_there;
    do {
      all_there = true;
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const float4* from = i + j < 0 ? first : rest + (size_t)(i + j) * stride;
        if (i + j >= n_rest) break;
#pragma unroll
        for (int t = 0; t < N; t++)
          if (is_empty(v[j][t])) v[j][t] = load_fresh(from + t * 32);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int t = 0; t < N; t++) all_there &= i + j >= n_rest || !is_empty(v[j][t]);
    } while (!all_there);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
      for (int t = 0; t < N; t++)
        if (i + j < n_rest) sum[t] = i + j < 0 ? v[j][t] : sum[t] + v[j][t];
  }
}
