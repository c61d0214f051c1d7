// What cuda/kernels/wgmma_ptx.cuh names, on a CPU: products are made when they are waited for, of what registers and shared
// memory hold then.
#pragma once
#include "ptx.cuh"

inline void wgmma_fence() {}
inline void wgmma_commit() { gpu::commit(); }

// One product of all lanes: `x` is a descriptor of core matrices of 8 rows x 16 bytes.
inline void multiply_now(gpu::Product* (&each)[32]) {
  float a[16][16];
  for (int lane = 0; lane < 32; lane++) fragment_of(lane, each[lane]->a, a);
  const u64 x = each[0]->x;
  const u32 begin = (u32)(x & 0x3fff) << 4, next_k = (u32)(x >> 16 & 0x3fff) << 4, next_rows = (u32)(x >> 32 & 0x3fff) << 4;
  for (int tile = 0; tile < each[0]->tiles; tile++) {
    float b[16][8];
    for (int row = 0; row < 8; row++)
      for (int half = 0; half < 2; half++) {
        const u16* from = (const u16*)in_shared<uint4>(begin + half * next_k + tile * next_rows + row * 16);
        for (int k = 0; k < 8; k++) b[8 * half + k][row] = widen(from[k]);
      }
    multiply_fragments(a, b, [&](int lane, int i, float sum) { each[lane]->sums[4 * tile + i] += sum; });
  }
}
template <int N> void wgmma_wait() { gpu::wait_for_all_groups_but(N, multiply_now); }
inline void wgmma(float (&d)[NT][4], const u32 (&a)[4], u64 x) { gpu::multiply_later(&d[0][0], a, x, NT); }
inline void wgmma_done(float (&)[NT][4]) {}
