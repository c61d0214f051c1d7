// Hopper's asynchronous products (sm_90a): a warpgroup's 64 rows from registers times x from shared memory, so that x
// passes through no register and costs no load.
//
// x of a slab lies as tiles_of_x.cu leaves it: [8 chunks of 8 columns][8*NT rows][8] 16-bit. A chunk times 8 rows is one
// "core matrix", 128 contiguous bytes; step q of a unit multiplies chunks 2q and 2q + 1.
#pragma once
#include "slabs.cuh"
#include "wgmma_ptx.cuh"

constexpr int TM = 8 * NT;               // rows of x
constexpr int CHUNK_BYTES = TM * 16;  // 8 columns of all rows

// How products find x in shared memory: no swizzle, K major. Its low word, of which one is made for all steps of a slab.
DEVICE u32 x_place(u32 x) { return (x & 0x3ffffu) >> 4 | (CHUNK_BYTES >> 4) << 16; }
// The fragments of x that begin at a chunk behind that.
DEVICE u64 x_descriptor(u32 place, int chunk = 0) {
  return (u64)(128 >> 4) << 32 | (place + chunk * (CHUNK_BYTES >> 4));
}
