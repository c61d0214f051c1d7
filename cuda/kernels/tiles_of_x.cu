// x (M, K) and u = (x A^T) * scaling (M, ranks), in the order in which asynchronous products read them, from one reading of x.
//
// grid: (8, one for each 8 * N_TILES rows), clusters of the 8 thread blocks of a row group, which share K; block: WARPS warps,
// each with slabs of its own. Sums are added warp after warp, then thread block after thread block: the same bits every time.
// shared memory: SUMS float4 for each warp, where there are ranks.
#include "cluster.cuh"
#include "scaled_u.cuh"
#include "slabs.cuh"

#ifndef N_TILES
#define N_TILES 4  // of 8 rows of x a thread block; two at least
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef FEW_ROWS
#define FEW_ROWS 0  // one tile of rows, and u as fragments of two 16-bit floats a number, for fused_linear.cu
#endif

constexpr int PARTS = 8;                          // thread blocks that share K
constexpr int AT_ONCE = 4;                        // tiles of 16 ranks whose sums are held in registers
constexpr int SUMS = AT_ONCE * N_TILES * 32;      // of a warp, four numbers each

struct Arguments {
  const u16* x;          // [batch, n_columns], a multiple of 8
  const u8* lora_a;      // [n_slabs][rank_tiles][4 steps][32 lanes][8] 16-bit
  const float* scaling;  // [rank_tiles * 16]
  uint4* x_out;          // [batch / tile_rows][n_slabs][8 chunks][tile_rows][8] 16-bit; chunk 2q + h, element 2t + e is
                         // column 16t + 4q + 2h + e of the slab: the order that slabs.cuh gives the weights
  void* u_out;           // [batch / tile_rows][rank_tiles * 2][tile_rows][8] 16-bit, or [rank_tiles][tile_rows / 8][32 lanes] 16 B
  int batch, n_columns, tile_rows, n_slabs, rank_tiles;
};

// Four lanes have a row's 64 columns, 16 each; words 4 * pair .. of lane t are words t of chunks 4 * pair ...
DEVICE uint4 chunk_of(uint4 v, int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  const u32 y0 = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2), y1 = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
  v = upper ? make_uint4(y0, y1, v.z, v.w) : make_uint4(v.x, v.y, y0, y1);
  const u32 z0 = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), z1 = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
  return odd ? make_uint4(z0, v.y, z1, v.w) : make_uint4(v.x, z0, v.z, z1);
}

DEVICE void store_chunks(const Arguments& p, const uint4 (&x)[N_TILES][2], int slab, int lane) {
#pragma unroll
  for (int n = 0; n < N_TILES; n++) {
    const int row = blockIdx.y * 8 * N_TILES + 8 * n + (lane >> 2), tile = row / p.tile_rows;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      const uint4 chunk = chunk_of(x[n][pair], lane);
      if (row < p.batch)
        p.x_out[(((size_t)tile * p.n_slabs + slab) * 8 + 4 * pair + (lane & 3)) * p.tile_rows + row % p.tile_rows] = chunk;
    }
  }
}

// A slab of 16 ranks of A.
DEVICE void load_ranks(const Arguments& p, int slab, int tile, uint4 (&a)[4], int lane) {
  const uint4* from = (const uint4*)(p.lora_a + ((size_t)slab * p.rank_tiles + tile) * A_TILE_BYTES) + lane;
#pragma unroll
  for (int step = 0; step < 4; step++) a[step] = from[32 * step];
}

// This warp's slabs: x to its new order where `stores`, and its products with rank tiles first .. first + AT_ONCE - 1. Of few
// rows A of the first slab is asked for before x is known to be there: registers are left for it.
DEVICE void multiply(const Arguments& p, int first, bool stores, float (&sum)[AT_ONCE][N_TILES][4], int warp, int lane) {
  const int begin = (blockIdx.x * WARPS + warp) * p.n_slabs / (PARTS * WARPS);
  const int end = (blockIdx.x * WARPS + warp + 1) * p.n_slabs / (PARTS * WARPS);
  uint4 a[AT_ONCE][4];
#pragma unroll
  for (int t = 0; t < AT_ONCE; t++)
    if (FEW_ROWS && begin < end && first + t < p.rank_tiles) load_ranks(p, begin, first + t, a[t], lane);
  if (first == 0) wait_for_previous_kernel();
  for (int slab = begin; slab < end; slab++) {
    uint4 x[N_TILES][2];
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
      const int row = blockIdx.y * 8 * N_TILES + 8 * n + (lane >> 2);
      const int column = slab * SLAB_COLUMNS + 16 * (lane & 3), left = row < p.batch ? p.n_columns - column : 0;
      const uint4* from = (const uint4*)(p.x + (size_t)row * p.n_columns + column);
#pragma unroll
      for (int pair = 0; pair < 2; pair++) x[n][pair] = left > 8 * pair ? from[pair] : make_uint4(0, 0, 0, 0);
    }
    if (stores) store_chunks(p, x, slab, lane);
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++) {
      if (first + t >= p.rank_tiles) break;
      if (!FEW_ROWS || slab != begin) load_ranks(p, slab, first + t, a[t], lane);
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const uint4 v = a[t][step];
        const u32 fragment[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
          const uint4 b = x[n][step / 2];
          mma(sum[t][n], fragment, step % 2 ? b.z : b.x, step % 2 ? b.w : b.y);
        }
      }
    }
  }
}

// u of one fragment, 16 ranks of tile `t` x 8 rows of x.
DEVICE void store_u(const Arguments& p, int t, int n, float4 v, int lane) {
  if (FEW_ROWS) {
    const int tiles = p.tile_rows / 8, tile = blockIdx.y * N_TILES + n;
    const uint4 u = as_u(v, p.scaling + 16 * t, lane);
    if (tile < tiles) ((uint4*)p.u_out)[((size_t)t * tiles + tile) * 32 + lane] = u;
    return;
  }
  const float sums[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int rank = (lane >> 2) + 8 * (i / 2), row = blockIdx.y * 8 * N_TILES + 8 * n + 2 * (lane & 3) + i % 2;
    if (row >= p.batch) continue;
    const size_t chunk = (size_t)(row / p.tile_rows) * p.rank_tiles * 2 + 2 * t + rank / 8;
    ((u16*)p.u_out)[(chunk * p.tile_rows + row % p.tile_rows) * 8 + rank % 8] = (u16)pack2(sums[i] * p.scaling[16 * t + rank], 0.f);
  }
}

extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(WARPS * 32)
    tiles_of_x(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) float4 sums[];  // [WARPS][SUMS]; the first SUMS then hold those of all warps
  let_next_kernel_start();
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  for (int first = 0; first == 0 || first < p.rank_tiles; first += AT_ONCE) {
    float sum[AT_ONCE][N_TILES][4] = {};
    multiply(p, first, first == 0, sum, warp, lane);
    if (p.rank_tiles == 0) break;
#pragma unroll
    for (int i = 0; i < AT_ONCE * N_TILES; i++) {
      const float* v = sum[i / N_TILES][i % N_TILES];
      sums[warp * SUMS + i * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
    for (int i = thread; i < SUMS; i += WARPS * 32) {
      float4 total = sums[i];
#pragma unroll
      for (int w = 1; w < WARPS; w++) total = total + sums[w * SUMS + i];
      sums[i] = total;
    }
    cluster_meet();
    constexpr int SHARE = SUMS / PARTS;  // whole warps
    if (thread < SHARE) {
      const int i = cluster_rank() * SHARE + thread;
      float4 total = load_of(sums + i, 0);
#pragma unroll
      for (int part = 1; part < PARTS; part++) total = total + load_of(sums + i, part);
      if (first + i / (32 * N_TILES) < p.rank_tiles) store_u(p, first + i / (32 * N_TILES), i / 32 % N_TILES, total, i % 32);
    }
    cluster_meet();  // the sums are read, also by others
  }
}
