// Hopper's asynchronous products (sm_90a): a warpgroup's 64 rows from registers times x from shared memory, so that x
// passes through no register and costs no load.
//
// x of a slab lies as arrange_x.cu leaves it: [8 chunks of 8 columns][8*NT rows][8] 16-bit. A chunk times 8 rows is one
// "core matrix", 128 contiguous bytes; step q of a unit multiplies chunks 2q and 2q + 1.
#pragma once
#include "slabs.cuh"

constexpr int CHUNK_BYTES = 8 * NT * 16;  // 8 columns of all rows

// The fragments of x for one step, beginning at `x` in shared memory: no swizzle, K major.
DEVICE u64 x_descriptor(u32 x) {
  return ((u64)(x & 0x3ffffu) >> 4) | (u64)(CHUNK_BYTES >> 4) << 16 | (u64)(128 >> 4) << 32;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#if HALF
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define FOUR(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])

// d (64 x 8*NT, float32, each warp 16 rows) += a (64 x 16) x^T
DEVICE void wgmma(float (&d)[NT][4], const u32 (&a)[4], u64 x) {
#if NT == 2
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n16k16." WGMMA_TYPES " {%0,%1,%2,%3,%4,%5,%6,%7}, "
               "{%8,%9,%10,%11}, %12, p, 1, 1, 0;\n}"
               : FOUR(d, 0), FOUR(d, 1) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif NT == 4
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k16." WGMMA_TYPES
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}"
               : FOUR(d, 0), FOUR(d, 1), FOUR(d, 2), FOUR(d, 3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif NT == 8
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
               "%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
               : FOUR(d, 0), FOUR(d, 1), FOUR(d, 2), FOUR(d, 3), FOUR(d, 4), FOUR(d, 5), FOUR(d, 6), FOUR(d, 7)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#else
#error "asynchronous products are written for NT 2, 4 and 8"
#endif
}

// The accumulators are what the products before left: for the compiler, which does not see them being written.
DEVICE void wgmma_done(float (&d)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++) asm volatile("" : FOUR(d, n)::"memory");
}
