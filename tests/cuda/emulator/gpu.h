// The CUDA language on a CPU, enough of it for cuda/kernels; gpu.cpp runs it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- the language

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __cluster_dims__(...)
#define __shared__ static thread_local
#define VARIABLE(name) gpu::variable(&name, sizeof name)  // behind each declaration of one in shared memory
#define __align__(n) __attribute__((aligned(n)))
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

struct uint3 { u32 x, y, z; };
struct __align__(8) int2 { int x, y; };
struct __align__(8) uint2 { u32 x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(16) uint4 { u32 x, y, z, w; };
struct __align__(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace gpu {

constexpr int WARP = 32;
constexpr int MOST_SHARED_BYTES = 227 << 10, FIRST_SHARED = 1024;

// What a kernel sees of its thread, and of its thread block.
struct Thread {
  uint3 index;
  int lane, warp;
};
struct Place {
  uint3 index, grid, block;
  u32 number, cluster, shared_bytes;
  bool moved;  // whether any of its threads did anything but ask
};
extern __thread Thread* here;
extern __thread Place* block;
extern __thread u8 dynamic[MOST_SHARED_BYTES];  // shared memory that a launch asks for

inline u8* base() { return dynamic - FIRST_SHARED; }
u8* const* base_of_rank(u32 rank);  // where the thread block `rank` of the cluster has its base, null where it does not run
inline u8* const* own_base() { return base_of_rank(block->number % block->cluster); }

void ask_again();                                        // somebody else has to do something first
[[noreturn]] void fail(const char* format, ...);         // the launch ends with this complaint
void variable(void* place, size_t bytes);                // in shared memory; not 0 before anybody writes it
bool is_variable(const void* place, size_t bytes);
void together(int site, void* given, void (*run)(void**));  // the last of a warp does `run`; null for lanes that have ended
void meet(int barrier, int threads);                     // 0 threads: all that have not ended
void cluster_meet();
void count(u64* barrier, int arrivals, int bytes);       // of an mbarrier
void copy_later(u8* to, const void* from, u32 bytes, u64* barrier, u8* const* of_block,
                bool in_order);  // after this thread's copies before it; 0 bytes: one arrival

// An mbarrier in its 64 bits: arrivals still to come, arrivals of a phase, bytes still to come, phase.
struct Barrier {
  u32 left, arrivals;
  int bytes;
  u32 phase;
  static Barrier of(u64 v) { return {(u32)(v & 0xffff), (u32)(v >> 16 & 0xffff), (int)(v >> 32) >> 1, (u32)(v >> 32 & 1)}; }
  u64 bits() const { return (u64)(u32)(bytes << 1 | (int)phase) << 32 | arrivals << 16 | left; }
};

// An asynchronous product of a lane: made when its group is waited for, of what is there then.
struct Product {
  float* sums;
  const u32* a;
  u64 x;
  int tiles, group;
};
void multiply_later(float* sums, const u32* a, u64 x, int tiles);
void commit();
void wait_for_all_groups_but(int n, void (*make)(Product* (&)[WARP]));

// What threads of the machine share.
template <class T> T load(const T& from) { return __atomic_load_n(&from, __ATOMIC_SEQ_CST); }
template <class T> void store(T& to, T v) { __atomic_store_n(&to, v, __ATOMIC_SEQ_CST); }
template <class T> T add(T& to, T v) { return __atomic_fetch_add(&to, v, __ATOMIC_SEQ_CST); }

int launch(void (*enter)(void**), u32 cluster, const u32* grid, u32 threads, u32 shared_bytes, void** arguments, u64 seed);

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** given, std::index_sequence<I...>) {
  kernel(*(Parameters*)given[I]...);
}

}  // namespace gpu

#define KERNEL(name, cluster)                                                                                         \
  template <class... P> static void enter_##name(void (*)(P...), void** given) {                                     \
    gpu::call(name, given, std::index_sequence_for<P...>());                                                          \
  }                                                                                                                   \
  extern "C" int launch_##name(const u32* grid, u32 threads, u32 shared_bytes, void** arguments, u64 seed) {           \
    return gpu::launch([](void** given) { enter_##name(name, given); }, cluster, grid, threads, shared_bytes, arguments, \
                       seed);                                                                                         \
  }
#define threadIdx (gpu::here->index)
#define blockIdx (gpu::block->index)
#define blockDim (gpu::block->block)
#define gridDim (gpu::block->grid)

// ---- functions of the language

template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }
inline float rsqrtf(float f) { return 1.f / std::sqrt(f); }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __popcll(u64 v) { return __builtin_popcountll(v); }
inline u32 __float_as_uint(float f) { u32 v; std::memcpy(&v, &f, 4); return v; }
inline float __uint_as_float(u32 v) { float f; std::memcpy(&f, &v, 4); return f; }
inline u32 __dp4a(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline u32 __byte_perm(u32 low, u32 high, u32 from) {
  const u64 bytes = (u64)high << 32 | low;
  u32 v = 0;
  for (int i = 0; i < 4; i++) v |= (u32)(bytes >> 8 * (from >> 4 * i & 7) & 255) << 8 * i;
  return v;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline u32 atomicAdd(u32* p, u32 v) { return gpu::add(*p, v); }

inline void __syncthreads() { gpu::meet(0, 0); }
inline void __syncwarp(int site = __builtin_LINE()) {
  gpu::together(site, gpu::here, [](void**) {});
}
template <class T> struct Shuffled {
  T value, result;
  int from;
};
template <class T> T shuffle(int site, T value, int from) {
  Shuffled<T> mine{value, value, from};
  gpu::together(site, &mine, [](void** given) {
    for (int lane = 0; lane < gpu::WARP; lane++) {
      auto* each = (Shuffled<T>*)given[lane];
      if (!each || each->from < 0) continue;
      if (!given[each->from & 31]) gpu::fail("a shuffle from a lane that has ended");
      each->result = ((Shuffled<T>*)given[each->from & 31])->value;
    }
  });
  return mine.result;
}
template <class T> T __shfl_sync(u32, T v, int from, int site = __builtin_LINE()) { return shuffle(site, v, from & 31); }
template <class T> T __shfl_xor_sync(u32, T v, int distance, int site = __builtin_LINE()) {
  return shuffle(site, v, gpu::here->lane ^ distance);
}
inline int __any_sync(u32, int v, int site = __builtin_LINE()) {
  int any = v;
  for (int d = 16; d; d >>= 1) any |= shuffle(site, any, gpu::here->lane ^ d);
  return any;
}
template <class T> T __shfl_up_sync(u32, T v, int distance, int site = __builtin_LINE()) {
  return shuffle(site, v, gpu::here->lane - distance);
}
