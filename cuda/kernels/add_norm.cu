// summed = x + residual, normed = weight * RMSNorm(summed): LlamaDecoderLayer's addition and LlamaRMSNorm in one pass.
//
// grid: a thread block a row; block: THREADS threads; shared memory: the rows of weight, x and residual, copied there, so that
// few registers are needed: 128 threads have a place beside a product (small.cuh), and what they read is asked for at once
// when that ends, before the product behind asks for its weights.
// Rounded to 16 bits where transformers is: after the sum, after the normalisation, after the weight.
#include "rows.cuh"
#include "small.cuh"

#ifndef THREADS
#define THREADS SMALL_THREADS
#endif
constexpr int WARPS = THREADS / 32;

// A row to shared memory; `bar` waits for one thread, or, without bulk copies, for all.
DEVICE void copy_row(u32 to, const uint4* from, int n_units, u32 bar) {
#if HAS_BULK_COPIES
  if (threadIdx.x == 0) bulk_copy(to, from, n_units * 16, bar);
#else
  for (int i = threadIdx.x; i < n_units; i += THREADS) copy_16(to + i * 16, from + i);
#endif
}

// Rows of so many bytes are on their way: `bar` waits for them.
DEVICE void announce(u32 bar, u32 bytes) {
#if HAS_BULK_COPIES
  if (threadIdx.x == 0) barrier_expect(bar, bytes);
#endif
}
DEVICE void all_asked_for(u32 bar) {
#if !HAS_BULK_COPIES
  arrive_after_copies(bar);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_OF_SM(THREADS))
    add_norm(const uint4* x,         // [M, n_columns] 16-bit
             const uint4* residual,  // [M, n_columns], or null: normed alone is written
             const uint4* weight,    // [n_columns]
             uint4* summed,          // [M, n_columns]
             uint4* normed,          // [M, n_columns]
             int n_columns, float epsilon) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 weight_full, rows_full;
  __shared__ float of_warp[WARPS];
  const int n_units = n_columns / 8, row_bytes = n_columns * 2;
  const u32 of_weight = shared_address(memory), of_x = of_weight + row_bytes, of_residual = of_x + row_bytes;
  const u32 weight_bar = shared_address(&weight_full), rows_bar = shared_address(&rows_full);
  if (threadIdx.x == 0) {
    barrier_init(weight_bar, HAS_BULK_COPIES ? 1 : THREADS);
    barrier_init(rows_bar, HAS_BULK_COPIES ? 1 : THREADS);
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  announce(weight_bar, row_bytes);
  copy_row(of_weight, weight, n_units, weight_bar);  // no kernel writes weights: they are read before the kernel in front ends
  all_asked_for(weight_bar);
  wait_for_previous_kernel();
  const size_t row = (size_t)blockIdx.x * n_units;
  announce(rows_bar, residual ? 2 * row_bytes : row_bytes);
  copy_row(of_x, x + row, n_units, rows_bar);
  if (residual) copy_row(of_residual, residual + row, n_units, rows_bar);
  all_asked_for(rows_bar);
  barrier_wait(rows_bar, 0);
  float squares = 0.f;
  for (int i = threadIdx.x; i < n_units; i += THREADS) {
    Eight h = unpack8(lds128_now(of_x + i * 16));
    if (residual) {
      const Eight r = unpack8(lds128_now(of_residual + i * 16));
#pragma unroll
      for (int j = 0; j < 8; j++) h.value[j] = rounded(h.value[j] + r.value[j]);
      const uint4 v = pack8(h);
      sts128(of_x + i * 16, v);
      summed[row + i] = v;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) squares += h.value[j] * h.value[j];
  }
  squares = sum_of_warp(squares);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += of_warp[w];
  const float factor = rsqrtf(total / (float)n_columns + epsilon);
  barrier_wait(weight_bar, 0);
  for (int i = threadIdx.x; i < n_units; i += THREADS) {
    const Eight h = unpack8(lds128_now(of_x + i * 16)), w = unpack8(lds128_now(of_weight + i * 16));
    Eight y;
#pragma unroll
    for (int j = 0; j < 8; j++) y.value[j] = w.value[j] * rounded(h.value[j] * factor);
    normed[row + i] = pack8(y);
  }
}
