// Attention of one new token a sequence over a static cache, the GROUP query heads of a key head together.
//
// grid: (splits, key heads, sequences); block: WARPS warps; shared memory: [WARPS][GROUP][HEAD_COLUMNS] floats.
// A split is a contiguous part of the slots in use, LEAST_SHARE at least, so that few slots need no merging; HEAD_COLUMNS / 8
// lanes read a slot of k and of v, 16 bytes each.
// Softmax runs along (a maximum and a sum for each group of lanes), in float32; groups, warps and splits are merged in
// a fixed order, the splits by whichever thread block ends last: the same bits every time.
#include "rows.cuh"

#ifndef HEAD_COLUMNS
#define HEAD_COLUMNS 128
#endif
#ifndef GROUP
#define GROUP 4
#endif
#ifndef WARPS
#define WARPS 8
#endif
#define MOST_SPLITS 64

constexpr int LANES = HEAD_COLUMNS / 8, SLOTS_AT_ONCE = WARPS * (32 / LANES), UNROLL = GROUP <= 4 ? 4 : 2;
constexpr int N_THREADS = WARPS * 32, N_OUT = GROUP * HEAD_COLUMNS, LEAST_SHARE = UNROLL * SLOTS_AT_ONCE;
constexpr float LOWEST = -1e30f;

struct Arguments {
  const uint4* q;      // [sequences, n_kv_heads * GROUP, HEAD_COLUMNS] 16-bit
  const uint4* k;      // [sequences, n_kv_heads, capacity, HEAD_COLUMNS]
  const uint4* v;      // [sequences, n_kv_heads, capacity, HEAD_COLUMNS]
  const int* slots;    // [sequences] the new token's slot, the last one that is attended
  const int* starts;   // [sequences] the first slot in use
  u16* y;              // [sequences, n_kv_heads * GROUP * HEAD_COLUMNS]
  float4* partial;     // [sequences, n_kv_heads, splits, GROUP, HEAD_COLUMNS]
  float* sums;         // [sequences, n_kv_heads, splits, GROUP, 2] maximum (in powers of 2) and sum
  u32* counters;       // [sequences, n_kv_heads], 0 before and after
  int n_kv_heads, capacity, window;  // window: slots attended at most, the new one included; 0 for all
  float scale;         // of q k, times log2(e)
};

struct Running {
  float most[GROUP], sum[GROUP];
  Eight y[GROUP];
};

// `mine` and another group's, as one.
DEVICE void merge_lanes(Running& mine, int distance) {
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    const float other = __shfl_xor_sync(~0u, mine.most[g], distance), most = fmaxf(mine.most[g], other);
    const float keep = exp2f(mine.most[g] - most), take = exp2f(other - most);
    const float other_sum = __shfl_xor_sync(~0u, mine.sum[g], distance);
    mine.sum[g] = mine.sum[g] * keep + other_sum * take;
    mine.most[g] = most;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float y = __shfl_xor_sync(~0u, mine.y[g].value[i], distance);
      mine.y[g].value[i] = mine.y[g].value[i] * keep + y * take;
    }
  }
}

// UNROLL slots of this group of lanes, from `slot` in steps of SLOTS_AT_ONCE; what is at or past `stop` counts nothing.
DEVICE void attend_slots(Running& run, const Eight (&q)[GROUP], const uint4* k, const uint4* v, int slot, int stop) {
  uint4 keys[UNROLL], values[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const size_t at = (size_t)min(slot + u * SLOTS_AT_ONCE, stop - 1) * LANES;
    keys[u] = k[at], values[u] = v[at];
  }
  float score[UNROLL][GROUP];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const Eight key = unpack8(keys[u]);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) s += q[g].value[i] * key.value[i];
#pragma unroll
      for (int d = LANES / 2; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
      score[u][g] = slot + u * SLOTS_AT_ONCE < stop ? s : LOWEST;
    }
  }
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    float most = run.most[g];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) most = fmaxf(most, score[u][g]);
    const float keep = exp2f(run.most[g] - most);
    run.most[g] = most, run.sum[g] *= keep;
#pragma unroll
    for (int i = 0; i < 8; i++) run.y[g].value[i] *= keep;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      score[u][g] = slot + u * SLOTS_AT_ONCE < stop ? exp2f(score[u][g] - most) : 0.f;
      run.sum[g] += score[u][g];
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const Eight value = unpack8(values[u]);
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
      for (int i = 0; i < 8; i++) run.y[g].value[i] += score[u][g] * value.value[i];
  }
}

// The last thread block of a key head: all splits, in order, as y. A warp a query head weighs them, all at once.
DEVICE void merge_splits(const Arguments& p, size_t head, int splits, float (&weights)[MOST_SPLITS][GROUP]) {
  constexpr int A_LANE = MOST_SPLITS / 32;
  const int lane = threadIdx.x & 31;
  for (int g = threadIdx.x >> 5; g < GROUP; g += WARPS) {
    float most_of[A_LANE], sum_of[A_LANE], most = LOWEST, sum = 0.f;
#pragma unroll
    for (int i = 0; i < A_LANE; i++) {
      const float* from = p.sums + ((head * gridDim.x + lane + 32 * i) * GROUP + g) * 2;
      const bool is_there = lane + 32 * i < splits;
      most_of[i] = is_there ? load_fresh(from) : LOWEST, sum_of[i] = is_there ? load_fresh(from + 1) : 0.f;
      most = fmaxf(most, most_of[i]);
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
#pragma unroll
    for (int i = 0; i < A_LANE; i++) sum += sum_of[i] * exp2f(most_of[i] - most);
    sum = sum_of_warp(sum);
#pragma unroll
    for (int i = 0; i < A_LANE; i++) weights[lane + 32 * i][g] = exp2f(most_of[i] - most) / sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < N_OUT / 4; i += N_THREADS) {
    const int g = i / (HEAD_COLUMNS / 4);
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int s = 0; s < splits; s++) {
      const float4 part = load_fresh(p.partial + (head * gridDim.x + s) * (N_OUT / 4) + i);
      const float w = weights[s][g];
      y.x += w * part.x, y.y += w * part.y, y.z += w * part.z, y.w += w * part.w;
    }
    ((uint2*)p.y)[head * (N_OUT / 4) + i] = make_uint2(pack2(y.x, y.y), pack2(y.z, y.w));
  }
}

// This thread block's part of a sequence's slots in use.
struct Slots {
  int start, stop, splits;
  DEVICE Slots(const Arguments& p) {
    const int end = min(p.slots[blockIdx.z] + 1, p.capacity);
    const int begin = max(p.starts[blockIdx.z], p.window ? end - p.window : 0);
    const int share = max((end - begin + (int)gridDim.x - 1) / (int)gridDim.x, LEAST_SHARE);
    splits = max((end - begin + share - 1) / share, 1);
    start = begin + blockIdx.x * share, stop = min(start + share, end);
  }
};

// What the warps have found, in shared memory.
struct OfWarps {
  float (&most)[WARPS][GROUP], (&sum)[WARPS][GROUP];
  float* y;  // [WARPS][GROUP][HEAD_COLUMNS]

  DEVICE void leave(const Running& run, int warp, int lane) const {
    if (lane >= LANES) return;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      if (lane == 0) most[warp][g] = run.most[g], sum[warp][g] = run.sum[g];
#pragma unroll
      for (int i = 0; i < 8; i++) y[(warp * GROUP + g) * HEAD_COLUMNS + lane * 8 + i] = run.y[g].value[i];
    }
  }

  // All warps' as one, in order: y where there is one split, else this split's part.
  DEVICE void merge(const Arguments& p, size_t head, int splits) const {
    for (int i = threadIdx.x; i < N_OUT; i += N_THREADS) {
      const int g = i / HEAD_COLUMNS;
      float of_all = LOWEST, total = 0.f, out = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) of_all = fmaxf(of_all, most[w][g]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float factor = exp2f(most[w][g] - of_all);
        total += factor * sum[w][g], out += factor * y[w * N_OUT + i];
      }
      if (splits == 1) {
        p.y[head * N_OUT + i] = (u16)pack2(out / total, 0.f);
      } else {
        const size_t at = head * gridDim.x + blockIdx.x;
        ((float*)p.partial)[at * N_OUT + i] = out;
        if (i % HEAD_COLUMNS == 0) p.sums[(at * GROUP + g) * 2] = of_all, p.sums[(at * GROUP + g) * 2 + 1] = total;
      }
    }
  }
};

DEVICE void attend_all(const Arguments& p, Running& run, const Slots& slots, size_t head, int part) {
  Eight q[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    q[g] = unpack8(p.q[(head * GROUP + g) * LANES + part]);
    run.most[g] = LOWEST, run.sum[g] = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) q[g].value[i] *= p.scale, run.y[g].value[i] = 0.f;
  }
  const uint4* k = p.k + head * p.capacity * LANES + part;
  const uint4* v = p.v + head * p.capacity * LANES + part;
  for (int slot = slots.start; slot < slots.stop; slot += SLOTS_AT_ONCE * UNROLL)
    attend_slots(run, q, k, v, slot + threadIdx.x / LANES, slots.stop);
#pragma unroll
  for (int d = LANES; d < 32; d <<= 1) merge_lanes(run, d);
}

extern "C" __global__ void __launch_bounds__(N_THREADS) attend(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) float of_warps[];  // [WARPS][GROUP][HEAD_COLUMNS]
  __shared__ float most_of[WARPS][GROUP], sum_of[WARPS][GROUP], weights[MOST_SPLITS][GROUP];
  __shared__ bool is_last;
  let_next_kernel_start();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const size_t head = (size_t)blockIdx.z * p.n_kv_heads + blockIdx.y;
  wait_for_previous_kernel();
  const Slots slots(p);
  if (blockIdx.x >= slots.splits) return;
  Running run;
  attend_all(p, run, slots, head, lane % LANES);
  const OfWarps found{most_of, sum_of, of_warps};
  found.leave(run, warp, lane);
  __syncthreads();
  found.merge(p, head, slots.splits);
  if (slots.splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = add_release(p.counters + head, 1) == slots.splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) p.counters[head] = 0;
  merge_splits(p, head, slots.splits, weights);
}
