// add_norm.cu's for few rows, with a place beside a product (small.cuh): it has begun when the product before it ends, and asks for
// what it reads at once, before the product behind asks for its weights.
//
// grid: a thread block a row; block: SMALL_THREADS threads; shared memory: the rows of weight, x and residual, copied there, since
// there are few registers.
// The sum and the weight's product are rounded once where add_norm.cu rounds a float32: that is the same number, since either
// float32 is exact unless one summand is too small to matter.
#include "rows.cuh"
#include "small.cuh"

constexpr int WARPS = SMALL_THREADS / 32, AT_ONCE = 2;
constexpr u32 ONE = HALF ? 0x3c003c00u : 0x3f803f80u, NOTHING = 0x80008000u;  // 1 and -0, twice

DEVICE uint4 sum8(uint4 a, uint4 b) {
  return make_uint4(multiply_add2(a.x, ONE, b.x), multiply_add2(a.y, ONE, b.y), multiply_add2(a.z, ONE, b.z),
                    multiply_add2(a.w, ONE, b.w));
}
DEVICE uint4 product8(uint4 a, uint4 b) {
  return make_uint4(multiply_add2(a.x, b.x, NOTHING), multiply_add2(a.y, b.y, NOTHING), multiply_add2(a.z, b.z, NOTHING),
                    multiply_add2(a.w, b.w, NOTHING));
}

// This thread block's row in shared memory: x, which becomes x + residual.
struct Row {
  int n_units, bytes;
  u32 of_weight, of_x, of_residual;
  DEVICE Row(u32 memory, int n_columns)
      : n_units(n_columns / 8), bytes(n_columns * 2), of_weight(memory), of_x(of_weight + bytes), of_residual(of_x + bytes) {}

  // Add the residual where there is one, and return this thread's sum of squares. `before`: eights in the rows before.
  DEVICE float add(const uint4* residual, uint4* summed, size_t before) const {
    float squares[AT_ONCE] = {};
    for (int first = threadIdx.x; first < n_units; first += AT_ONCE * SMALL_THREADS) {
      uint4 v[AT_ONCE], r[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int unit = first + i * SMALL_THREADS < n_units ? first + i * SMALL_THREADS : first;  // its own: no other writes it
        v[i] = lds128_now(of_x + unit * 16);
        r[i] = residual ? lds128_now(of_residual + unit * 16) : make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int unit = first + i * SMALL_THREADS;
        if (unit >= n_units) continue;
        v[i] = sum8(v[i], r[i]);
        const Eight h = unpack8(v[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) squares[i] += h.value[j] * h.value[j];
        if (!residual) continue;
        sts128(of_x + unit * 16, v[i]);
        summed[before + unit] = v[i];
      }
    }
    return squares[0] + squares[1];
  }

  DEVICE void scale(float factor, uint4* normed, size_t before) const {
#pragma unroll 2
    for (int unit = threadIdx.x; unit < n_units; unit += SMALL_THREADS) {
      Eight h = unpack8(lds128_now(of_x + unit * 16));
#pragma unroll
      for (int j = 0; j < 8; j++) h.value[j] *= factor;
      normed[before + unit] = product8(lds128_now(of_weight + unit * 16), pack8(h));
    }
  }
};

DEVICE float sum_of_block(float f, float* of_warp) {
  f = sum_of_warp(f);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = f;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += of_warp[w];
  return total;
}

extern "C" __global__ void __launch_bounds__(SMALL_THREADS, BLOCKS_OF_SM)
    add_norm_beside(const uint4* x,         // [M, n_columns] 16-bit
                    const uint4* residual,  // [M, n_columns], or null: normed alone is written
                    const uint4* weight,    // [n_columns]
                    uint4* summed,          // [M, n_columns]
                    uint4* normed,          // [M, n_columns]
                    int n_columns, float epsilon) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 weight_full, rows_full;
  __shared__ float of_warp[WARPS];
  const Row row(shared_address(memory), n_columns);
  const u32 weight_bar = shared_address(&weight_full), rows_bar = shared_address(&rows_full);
  const size_t before = (size_t)blockIdx.x * row.n_units;
  if (threadIdx.x == 0) {
    barrier_init(weight_bar, 1);
    barrier_init(rows_bar, 1);
    barrier_init_fence();
    barrier_expect(weight_bar, row.bytes);
    bulk_copy(row.of_weight, weight, row.bytes, weight_bar);  // no kernel writes weights: before the one in front ends
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x == 0) {
    barrier_expect(rows_bar, residual ? 2 * row.bytes : row.bytes);
    bulk_copy(row.of_x, x + before, row.bytes, rows_bar);
    if (residual) bulk_copy(row.of_residual, residual + before, row.bytes, rows_bar);
  }
  barrier_wait(rows_bar, 0);
  const float squares = sum_of_block(row.add(residual, summed, before), of_warp);
  const float factor = rsqrtf(squares / (float)n_columns + epsilon);
  barrier_wait(weight_bar, 0);
  row.scale(factor, normed, before);
}
