// What cuda/kernels/cluster.cuh names, on a CPU.
#pragma once
#include "ptx.cuh"

inline u32 cluster_rank() { return gpu::block->number % gpu::block->cluster; }
inline void cluster_meet() { gpu::cluster_meet(); }

// A place of this thread block's shared memory in that of the cluster's thread block `rank`.
template <class T> T* of_rank(const T* own, u32 rank) {
  u8* base = gpu::load(*gpu::base_of_rank(rank));
  if (!base) gpu::fail("thread block %u of the cluster has not begun, or has ended", rank);
  return (T*)(base + ((const u8*)own - gpu::base()));
}
inline void arrive_at_both(u32 bar) {
  for (u32 rank = 0; rank < 2; rank++) gpu::count(of_rank(in_shared<u64>(bar), rank), 1, 0);
}
inline void bulk_copy_to_both(u32 to, const void* from, u32 bytes, u32 bar) {
  if (bytes % 16 || to % 16 || bytes == 0) gpu::fail("a copy of %u bytes to %u", bytes, to);
  for (u32 rank = 0; rank < 2; rank++)
    gpu::copy_later(of_rank(in_shared<u8>(to, bytes), rank), in_global<uint4>(from), bytes,
                                 of_rank(in_shared<u64>(bar), rank), gpu::base_of_rank(rank), false);
}
inline float4 load_of(const float4* own, u32 rank) { return *of_rank(own, rank); }
