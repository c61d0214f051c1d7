// Hopper's asynchronous products (sm_90a): a warpgroup's 64 rows from registers times x from shared memory, so that x
// passes through no register and costs no load.
//
// x of a slab lies as arrange_x.cu leaves it: [8 chunks of 8 columns][8*NT rows][8] 16-bit. A chunk times 8 rows is one
// "core matrix", 128 contiguous bytes; step q of a unit multiplies chunks 2q and 2q + 1.
#pragma once
#include "slabs.cuh"
#include "wgmma_ptx.cuh"

constexpr int TM = 8 * NT;               // rows of x
constexpr int CHUNK_BYTES = TM * 16;  // 8 columns of all rows

// The fragments of x for one step, beginning at `x` in shared memory: no swizzle, K major.
DEVICE u64 x_descriptor(u32 x) {
  return ((u64)(x & 0x3ffffu) >> 4) | (u64)(CHUNK_BYTES >> 4) << 16 | (u64)(128 >> 4) << 32;
}
