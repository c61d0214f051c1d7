// Partial sums of fused_linear.cu: waiting for them, adding them in order, turning them into u or into y.
#pragma once
#include "stream.cuh"

// Wait until *counter, which only grows (modulo 2^32), has come to `target`.
DEVICE void wait_for_count(const u32* counter, u32 target) {
  while ((int)(load_acquire(counter) - target) < 0) {
  }
}

DEVICE float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
DEVICE float4 as_float4(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

DEVICE uint4 as_bits(float4 v) {
  return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
}
DEVICE float4 as_floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
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

// For each of N tiles: first[0] + rest[0] + rest[stride] + ..., n_rest numbers, in this order; loads go side by side.
template <int N>
DEVICE void sum_in_order(const float4* first, const float4* rest, size_t stride, int n_rest, float4 (&sum)[N]) {
  constexpr int AT_ONCE = LOADS / N < 1 ? 1 : LOADS / N;
#pragma unroll
  for (int t = 0; t < N; t++) sum[t] = load_fresh(first + t * 32);
#pragma unroll 1
  for (int i = 0; i < n_rest; i += AT_ONCE) {
    float4 v[AT_ONCE][N];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
      for (int t = 0; t < N; t++) v[j][t] = load_fresh(rest + (size_t)min(i + j, n_rest - 1) * stride + t * 32);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
      for (int t = 0; t < N; t++)
        if (i + j < n_rest) sum[t] = sum[t] + v[j][t];
  }
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
