// Thin names for the PTX that the kernels need. No header of CUDA's own is included: NVRTC ships without them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define HAS_BULK_COPIES (__CUDA_ARCH__ >= 900)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// v, which the compiler is to keep, not to compute again.
DEVICE u32 kept(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- barriers in shared memory: a phase ends when all arrivals and all announced bytes have come

DEVICE void barrier_init(u32 bar, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
DEVICE void barrier_init_fence() {
#if HAS_BULK_COPIES
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(u32 bar) {
  asm volatile("{\n.reg .b64 s;\nmbarrier.arrive.shared.b64 s, [%0];\n}" ::"r"(bar) : "memory");
}
DEVICE bool barrier_poll(u32 bar, u32 phase) {
  u32 done;
#if HAS_BULK_COPIES
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(bar), "r"(phase) : "memory");
#else
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(bar), "r"(phase) : "memory");
#endif
  return done;
}

// ---- global -> shared copies that complete on such a barrier; 16-byte units

#if HAS_BULK_COPIES
DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar) : "memory");
}
#else
DEVICE void copy_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void arrive_after_copies(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}
#endif

// ---- programmatic dependent launch

DEVICE void let_next_kernel_start() {
#if HAS_BULK_COPIES
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous_kernel() {
#if HAS_BULK_COPIES
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- warps

template <int N>  // some of the thread block's warps wait for each other
DEVICE void some_meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(N) : "memory");
}
// A warpgroup leaves registers to others, or takes some that were left (sm_90a).
template <int N>
DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
// An 8 x 8 matrix of 16-bit numbers, two a lane, transposed.
DEVICE u32 transposed(u32 v) {
  u32 t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}

// ---- loads

DEVICE u32 lds32(u32 a) { u32 v; asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
DEVICE u32 lds16(u32 a) { u16 v; asm("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a)); return v; }
// Numbers of 16 bits from four places, for those of bits `first` .. `first` + 3 that are set, else 0. All predicates come
// first: the machine makes four of them in one instruction. Addresses are four registers: one that is added to waits until the
// load before has read it.
DEVICE void lds16_where(u32 bits, int first, const u32 (&a)[4], u32 (&v)[4]) {
  asm("{\n.reg .pred p, q, r, s;\n.reg .b32 t;\n"
      "and.b32 t, %8, %9;\nsetp.ne.b32 p, t, 0;\nand.b32 t, %8, %10;\nsetp.ne.b32 q, t, 0;\n"
      "and.b32 t, %8, %11;\nsetp.ne.b32 r, t, 0;\nand.b32 t, %8, %12;\nsetp.ne.b32 s, t, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.shared.u16 %0, [%4];\n@q ld.shared.u16 %1, [%5];\n@r ld.shared.u16 %2, [%6];\n@s ld.shared.u16 %3, [%7];\n}"
      : "=&r"(v[0]), "=&r"(v[1]), "=&r"(v[2]), "=&r"(v[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(bits), "r"(1u << first), "r"(2u << first), "r"(4u << first), "r"(8u << first));
}
DEVICE uint4 lds128(u32 a) {
  uint4 v;
  asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
DEVICE uint4 lds128_now(u32 a) {  // of what was written a moment ago: stays in its place, as lds128 may not
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
  return v;
}
DEVICE void sts128(u32 a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// What other thread blocks of the same launch wrote: past the first-level cache.
DEVICE float4 load_fresh(const float4* p) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE float load_fresh(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
DEVICE u32 load_fresh(const u32* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// What was written before another thread block's `add_release` that this sees is there.
DEVICE u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE u32 add_relaxed(u32* p, u32 v) {
  u32 before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
DEVICE u32 add_release(u32* p, u32 v) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE void store_global(void* p, uint4 v) {  // 16 bytes, aligned; the compiler splits what it cannot prove
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_floats(float4* to, const float (&v)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// ---- 16-bit floats: bfloat16, or float16 where HALF is set

#ifndef HALF
#define HALF 0
#endif

DEVICE u32 pack2(float low, float high) {
  u32 v;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}
// v plus v of the lane `d` below, where there is one.
DEVICE u32 add_from_below(u32 v, int d) {
  asm volatile("{\n.reg .pred p;\n.reg .b32 t;\nshfl.sync.up.b32 t|p, %0, %1, 0, 0xffffffff;\n@p add.u32 %0, %0, t;\n}"
               : "+r"(v) : "r"(d));
  return v;
}
// low | high << 16 for numbers below 2^16, on the multiplier: the pipe for permutations has enough to do.
DEVICE u32 side_by_side(u32 low, u32 high) {
  u32 v;
  asm("mad.lo.u32 %0, %1, 65536, %2;" : "=r"(v) : "r"(high), "r"(low));
  return v;
}
DEVICE float widen(u32 v) {  // of the low 16 bits
#if HALF
  float f;
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(v & 0xffffu));
  return f;
#else
  return __uint_as_float(v << 16);
#endif
}
DEVICE float half_to_float(u32 v) {  // float16, whatever HALF says
  float f;
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(v & 0xffffu));
  return f;
}
DEVICE u32 subtract2(u32 a, u32 b) {
  u32 v;
#if HALF
  asm("sub.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#else
  asm("{\n.reg .b32 one;\nmov.b32 one, 0xbf80bf80;\nfma.rn.bf16x2 %0, %2, one, %1;\n}" : "=r"(v) : "r"(a), "r"(b));
#endif
  return v;
}
DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) {  // rounded once
  u32 v;
#if HALF
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
#endif
  return v;
}
// c (16 x 8, float32) += a (16 x 16) b (16 x 8)
DEVICE void mma(float* c, const u32* a, u32 b0, u32 b1) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#include "waiting.cuh"
