// What cuda/kernels/ptx.cuh names, on a CPU: the same names, in its order.
#pragma once
#include "gpu.h"

#define DEVICE inline
#define HAS_BULK_COPIES (__CUDA_ARCH__ >= 900)

inline u32 shared_address(const void* p) { return (u32)((const u8*)p - gpu::base()); }
inline u32 kept(u32 v) { return v; }

// Shared memory at `a`: what the launch asked for, or a variable.
template <class T> T* in_shared(u32 a, u32 bytes = sizeof(T)) {
  const int at = (int)a - gpu::FIRST_SHARED, asked = gpu::block->shared_bytes;
  u8* place = gpu::base() + (int)a;
  const bool is_inside = at >= 0 && at + (int)bytes <= asked;
  if (a % (bytes < 16 ? bytes : 16) || !(is_inside || gpu::is_variable(place, bytes)))
    gpu::fail("%u bytes at %d of %d of shared memory", bytes, at, asked);
  return (T*)place;
}
template <class T> T* in_global(const void* p) {
  if ((u64)p % alignof(T)) gpu::fail("a pointer to memory that is not aligned to %zu", alignof(T));
  return (T*)p;
}

// ---- barriers

inline void barrier_init(u32 bar, int arrivals) { *in_shared<u64>(bar) = gpu::Barrier{(u32)arrivals, (u32)arrivals, 0, 0}.bits(); }
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 bar) { gpu::count(in_shared<u64>(bar), 1, 0), gpu::block->moved = true; }
inline bool barrier_poll(u32 bar, u32 phase) {
  const bool done = gpu::Barrier::of(gpu::load(*in_shared<u64>(bar))).phase != phase;
  if (done) gpu::block->moved = true;
  else gpu::ask_again();
  return done;
}

// ---- global -> shared copies

#if HAS_BULK_COPIES
inline void barrier_expect(u32 bar, u32 bytes) { gpu::count(in_shared<u64>(bar), 1, bytes); }
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
  if (bytes % 16 || to % 16 || bytes == 0) gpu::fail("a copy of %u bytes to %u", bytes, to);
  gpu::copy_later(in_shared<u8>(to, bytes), in_global<uint4>(from), bytes, in_shared<u64>(bar), gpu::own_base(), false);
}
#else
inline void copy_16(u32 to, const void* from) { gpu::copy_later(in_shared<u8>(to, 16), in_global<uint4>(from), 16, nullptr, gpu::own_base(), true); }
inline void arrive_after_copies(u32 bar) { gpu::copy_later(nullptr, nullptr, 0, in_shared<u64>(bar), gpu::own_base(), true); }
#endif

// ---- launches follow one another

inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

// ---- warps

template <int N> void some_meet() { gpu::meet(1, N); }
template <int N> void leave_registers() {}
template <int N> void take_registers() {}
inline u32 transposed(u32 v, int site = __builtin_LINE()) {
  gpu::together(site, &v, [](void** given) {
    u16 matrix[8][8];
    for (int lane = 0; lane < 32; lane++) std::memcpy(&matrix[lane / 4][lane % 4 * 2], given[lane], 4);
    for (int lane = 0; lane < 32; lane++)
      *(u32*)given[lane] = matrix[lane % 4 * 2][lane / 4] | (u32)matrix[lane % 4 * 2 + 1][lane / 4] << 16;
  });
  return v;
}

// ---- loads

inline u32 lds32(u32 a) { return *in_shared<u32>(a); }
inline u32 lds16(u32 a) { return *in_shared<u16>(a); }
inline void lds16_where(u32 bits, int first, const u32 (&a)[4], u32 (&v)[4]) {
  for (int i = 0; i < 4; i++) v[i] = bits >> (first + i) & 1 ? lds16(a[i]) : 0;
}
inline uint4 lds128(u32 a) { return *in_shared<uint4>(a); }
inline uint4 lds128_now(u32 a) { return lds128(a); }
inline void sts128(u32 a, uint4 v) { *in_shared<uint4>(a) = v; }
// Asks again, so that whoever leaves what is looked for gets its turn.
inline float4 load_fresh(const float4* p) {
  gpu::ask_again();
  float4 v;
  const u32* from = (const u32*)in_global<float4>(p);
  for (int i = 0; i < 4; i++) ((u32*)&v)[i] = gpu::load(from[i]);
  return v;
}
inline float load_fresh(const float* p) { return __uint_as_float(gpu::load(*(const u32*)p)); }
inline u32 load_fresh(const u32* p) { return gpu::load(*p); }
inline u32 load_acquire(const u32* p) { return gpu::ask_again(), gpu::load(*p); }
inline u32 add_relaxed(u32* p, u32 v) { return gpu::add(*p, v); }
inline u32 add_release(u32* p, u32 v) { return gpu::add(*p, v); }
inline void prefetch(const void*) {}
inline void store_global(void* p, uint4 v) {
  u32* to = (u32*)in_global<uint4>(p);
  for (int i = 0; i < 4; i++) gpu::store(to[i], ((u32*)&v)[i]);
}
inline void store_floats(float4* to, const float (&v)[4]) { *in_global<float4>(to) = make_float4(v[0], v[1], v[2], v[3]); }

// ---- 16-bit floats

#ifndef HALF
#define HALF 0
#endif

inline float half_to_float(u32 v) {
  const u16 bits = (u16)v;
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return (float)h;
}
inline float widen(u32 v) { return HALF ? half_to_float(v) : __uint_as_float(v << 16); }
inline u32 narrow(float f) {  // to nearest, even where two are
  if (HALF) {
    const _Float16 h = (_Float16)f;
    u16 bits;
    std::memcpy(&bits, &h, 2);
    return bits;
  }
  const u32 v = __float_as_uint(f);
  return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
inline u32 pack2(float low, float high) { return narrow(low) | narrow(high) << 16; }
inline u32 add_from_below(u32 v, int d) {
  const u32 below = __shfl_up_sync(~0u, v, d);
  return gpu::here->lane >= d ? v + below : v;
}
inline u32 side_by_side(u32 low, u32 high) { return low + high * 65536; }
inline u32 subtract2(u32 a, u32 b) { return pack2(widen(a) - widen(b), widen(a >> 16) - widen(b >> 16)); }
inline u32 multiply_add2(u32 a, u32 b, u32 c) {
  const auto once = [](u32 a, u32 b, u32 c) { return (float)((double)widen(a) * widen(b) + widen(c)); };
  return pack2(once(a, b, c), once(a >> 16, b >> 16, c >> 16));
}

// A fragment of 16 x 16 numbers of `a` from all lanes, as mma.m16n8k16 has it.
inline void fragment_of(int lane, const u32* a, float (&to)[16][16]) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) to[lane / 4 + 8 * (i % 2)][lane % 4 * 2 + j + 8 * (i / 2)] = widen(a[i] >> 16 * j);
}
// 16 x 16 numbers of `a` times 16 x 8 of `b`, both by columns of `a`: `add` gets a lane's four, as mma.m16n8k16 has them.
template <class Add> __attribute__((optimize("O3"))) void multiply_fragments(const float (&a)[16][16], const float (&b)[16][8], Add add) {
  float sum[16][8] = {};
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) add(lane, i, sum[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
}
struct Operands {
  float* c;
  const u32* a;
  u32 b[2];
};
inline void mma(float* c, const u32* a, u32 b0, u32 b1, int site = __builtin_LINE()) {
  Operands mine{c, a, {b0, b1}};
  gpu::together(site, &mine, [](void** given) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const auto* each = (Operands*)given[lane];
      fragment_of(lane, each->a, a);
      for (int i = 0; i < 4; i++) b[lane % 4 * 2 + i % 2 + 8 * (i / 2)][lane / 4] = widen(each->b[i / 2] >> 16 * (i % 2));
    }
    multiply_fragments(a, b, [&](int lane, int i, float sum) { ((Operands*)given[lane])->c[i] += sum; });
  });
}

#include "waiting.cuh"
