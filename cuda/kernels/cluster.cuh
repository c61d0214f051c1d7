// Clusters of thread blocks (sm_90 and later).
#pragma once
#include "ptx.cuh"

DEVICE u32 cluster_rank() { u32 v; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v)); return v; }
DEVICE void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// One arrival at the same barrier of both thread blocks of a cluster of two.
DEVICE void arrive_at_both(u32 bar) {
#pragma unroll
  for (int rank = 0; rank < 2; rank++)
    asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(bar), "r"(rank) : "memory");
}
// To the same place of both thread blocks, and counted by both of their barriers.
DEVICE void bulk_copy_to_both(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "h"((u16)3) : "memory");
}
// What lies at the same place of shared memory of the cluster's thread block `rank`.
DEVICE float4 load_of(const float4* own, u32 rank) {
  float4 v;
  asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];\n}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared_address(own)), "r"(rank) : "memory");
  return v;
}
