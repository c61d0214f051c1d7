// Rotary embedding of q and k of a stacked product, q to its place, k and v into a static cache.
//
// grid: (rows, heads / 4); block: 4 warps, each one head of one row; no shared memory.
// A row's slot in the cache is read on the device, so that a CUDA graph can be replayed for every token.
// q * cos + rotate_half(q) * sin is rounded as transformers does: each product, then the sum. With norm weights
// (Qwen3), q and k are normalised a head before that, as Qwen3RMSNorm does.
#include "rows.cuh"

#ifndef HEAD_COLUMNS
#define HEAD_COLUMNS 128  // a multiple of 64
#endif
constexpr int HALF_HEAD = HEAD_COLUMNS / 2, PAIRS = HALF_HEAD / 32;

struct Arguments {
  const u16* qkv;            // [M, (n_heads + 2 n_kv_heads) * HEAD_COLUMNS] 16-bit
  const u16* cosines;        // [n_positions, HALF_HEAD]
  const u16* sines;          // [n_positions, HALF_HEAD]
  const u16* q_weight;       // [HEAD_COLUMNS], or null without a norm
  const u16* k_weight;       // [HEAD_COLUMNS], or null
  const int* slots;          // [sequences] where in the cache the sequence's first row goes
  const int* starts;         // [sequences] the slot of its position 0: what lies before is padding
  u16* q;                    // [M, n_heads, HEAD_COLUMNS]
  u16* k;                    // [sequences, n_kv_heads, capacity, HEAD_COLUMNS]
  u16* v;                    // [sequences, n_kv_heads, capacity, HEAD_COLUMNS]
  int n_heads, n_kv_heads, rows_per_sequence, capacity, n_positions;
  float epsilon;
};

DEVICE void normalise(float (&x)[2][PAIRS], const u16* weight, int lane, float epsilon) {
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) squares += x[0][i] * x[0][i] + x[1][i] * x[1][i];
  const float factor = rsqrtf(sum_of_warp(squares) / (float)HEAD_COLUMNS + epsilon);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
      x[h][i] = rounded(widen(weight[h * HALF_HEAD + lane * PAIRS + i]) * rounded(x[h][i] * factor));
}

extern "C" __global__ void __launch_bounds__(128) rotary(const __grid_constant__ Arguments p) {
  let_next_kernel_start();
  const int lane = threadIdx.x & 31, head = blockIdx.y * 4 + (threadIdx.x >> 5), row = blockIdx.x;
  const int n_all = p.n_heads + 2 * p.n_kv_heads;
  wait_for_previous_kernel();
  if (head >= n_all) return;
  const int sequence = row / p.rows_per_sequence;
  const int slot = p.slots[sequence] + row % p.rows_per_sequence;
  const int position = min(max(slot - p.starts[sequence], 0), p.n_positions - 1);
  const u16* from = p.qkv + ((size_t)row * n_all + head) * HEAD_COLUMNS;
  const bool is_q = head < p.n_heads, is_v = head >= p.n_heads + p.n_kv_heads;
  const int kv_head = (head - p.n_heads) % p.n_kv_heads;
  u16* to = is_q ? p.q + ((size_t)row * p.n_heads + head) * HEAD_COLUMNS
                 : (is_v ? p.v : p.k) +
                       (((size_t)sequence * p.n_kv_heads + kv_head) * p.capacity + slot) * HEAD_COLUMNS;
  if (!is_q && slot >= p.capacity) return;  // past the cache's end: the host has to stop before
  float x[2][PAIRS];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < PAIRS; i++) x[h][i] = widen(from[h * HALF_HEAD + lane * PAIRS + i]);
  if (!is_v) {
    const u16* weight = is_q ? p.q_weight : p.k_weight;
    if (weight) normalise(x, weight, lane, p.epsilon);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const size_t at = (size_t)position * HALF_HEAD + lane * PAIRS + i;
      const float c = widen(p.cosines[at]), s = widen(p.sines[at]), first = x[0][i], second = x[1][i];
      x[0][i] = rounded(first * c) + rounded(-second * s);
      x[1][i] = rounded(second * c) + rounded(first * s);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < PAIRS; i++) to[h * HALF_HEAD + lane * PAIRS + i] = (u16)pack2(x[h][i], 0.f);
}
