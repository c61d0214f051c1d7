// summed = x + residual, normed = weight * RMSNorm(summed): LlamaDecoderLayer's addition and LlamaRMSNorm in one pass. Few rows
// are add_norm_beside.cu's.
//
// grid: a thread block a row; block: THREADS threads, CHUNKS times 8 columns each; shared memory: a float a warp.
// Rounded to 16 bits where transformers is: after the sum, after the normalisation, after the weight.
#include "rows.cuh"

#ifndef THREADS
#define THREADS 512
#endif
#ifndef CHUNKS
#define CHUNKS 1  // THREADS * CHUNKS * 8 >= n_columns
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(const uint4* x,         // [M, n_columns] 16-bit
             const uint4* residual,  // [M, n_columns], or null: normed alone is written
             const uint4* weight,    // [n_columns]
             uint4* summed,          // [M, n_columns]
             uint4* normed,          // [M, n_columns]
             int n_columns, float epsilon) {
  __shared__ float of_warp[THREADS / 32];
  let_next_kernel_start();
  const int n_units = n_columns / 8;
  uint4 scale[CHUNKS];  // no kernel writes weights: they are read before the kernel in front ends
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int unit = c * THREADS + threadIdx.x;
    scale[c] = unit < n_units ? weight[unit] : make_uint4(0, 0, 0, 0);
  }
  wait_for_previous_kernel();
  const size_t row = (size_t)blockIdx.x * n_units;
  Eight h[CHUNKS];
  float squares = 0.f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int unit = c * THREADS + threadIdx.x;
    uint4 v = unit < n_units ? x[row + unit] : make_uint4(0, 0, 0, 0);
    if (residual && unit < n_units) {
      Eight a = unpack8(v);
      const Eight b = unpack8(residual[row + unit]);
#pragma unroll
      for (int i = 0; i < 8; i++) a.value[i] += b.value[i];
      v = pack8(a);
      summed[row + unit] = v;
    }
    h[c] = unpack8(v);
#pragma unroll
    for (int i = 0; i < 8; i++) squares += h[c].value[i] * h[c].value[i];
  }
  squares = sum_of_warp(squares);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) total += of_warp[w];
  const float factor = rsqrtf(total / (float)n_columns + epsilon);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int unit = c * THREADS + threadIdx.x;
    if (unit >= n_units) continue;
    const Eight w = unpack8(scale[c]);
    Eight y;
#pragma unroll
    for (int i = 0; i < 8; i++) y.value[i] = w.value[i] * rounded(h[c].value[i] * factor);
    normed[row + unit] = pack8(y);
  }
}
