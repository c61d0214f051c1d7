// x (M, K) and u = (x A^T) * scaling (M, ranks) from one reading of x, in the order in which asynchronous products read them.
//
// grid: (PARTS, one for each 16 * ROW_WARPS rows, and so many that share the ranks, of which the first writes x), clusters of
// the PARTS thread blocks that share K; block: K_WARPS
// groups of ROW_WARPS warps. A group has slabs of its own, which its warps multiply by 16 rows of x each, and a ring of
// `stages` places in shared memory, into which its first warp copies A: as much as there is room for before x is known to be there.
// Sums are added group after group, then thread block after thread block: the same bits every time.
// shared memory: the rings, then SUMS float4 for each warp, where there are ranks.
#include "cluster.cuh"
#include "ring.cuh"
#include "slabs.cuh"

#ifndef ROW_WARPS
#define ROW_WARPS 4
#endif
#ifndef K_WARPS
#define K_WARPS 4
#endif
#ifndef RANK_TILES
#define RANK_TILES 4
#endif
#ifndef PARTS
#define PARTS 8  // thread blocks that share K
#endif

constexpr int N_TILES = 2, ROWS = 8 * N_TILES;  // of x, of a warp
constexpr int WARPS = ROW_WARPS * K_WARPS, BLOCK_X_ROWS = ROWS * ROW_WARPS;
constexpr int AT_ONCE = RANK_TILES;           // tiles of 16 ranks whose sums are held in registers
constexpr int SUMS = AT_ONCE * N_TILES * 32;  // of a warp, four numbers each
constexpr int AHEAD = 3;                      // slabs of x on their way
constexpr int MOST_STAGES = 32 / K_WARPS;      // of a ring

struct Arguments {
  const u16* x;          // [batch, n_columns], a multiple of 8
  const u8* lora_a;      // [n_slabs][rank_tiles][4 steps][32 lanes][8] 16-bit
  const float* scaling;  // [rank_tiles * 16]
  uint4* x_out;          // [batch / tile_rows][n_slabs][8 chunks][tile_rows][8] 16-bit; chunk 2q + h, element 2t + e is
                         // column 16t + 4q + 2h + e of the slab: the order that slabs.cuh gives the weights
  u16* u_out;            // [batch / tile_rows][rank_tiles * 2][tile_rows][8] 16-bit
  u32* counters;         // [n_counters], which are set to 0 for the launch after
  int batch, n_columns, tile_rows, n_slabs, rank_tiles, n_counters, stages, stage_bytes;
};

// Four lanes have a row's 64 columns, 16 each; words 4 * pair .. of lane t are words t of chunks 4 * pair ...
DEVICE uint4 chunk_of(uint4 v, int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  const u32 y0 = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2), y1 = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
  v = upper ? make_uint4(y0, y1, v.z, v.w) : make_uint4(v.x, v.y, y0, y1);
  const u32 z0 = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), z1 = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
  return odd ? make_uint4(z0, v.y, z1, v.w) : make_uint4(v.x, z0, v.z, z1);
}

// A warp's rows of a slab: columns 16 * (lane % 4) .. + 15 of rows lane / 4 and 8 more.
struct Rows {
  uint4 of[N_TILES][2];
  DEVICE void load(const Arguments& p, int first, int slab, int lane) {
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
      const int row = first + 8 * n + (lane >> 2);
      const int column = slab * SLAB_COLUMNS + 16 * (lane & 3), left = row < p.batch ? p.n_columns - column : 0;
      const uint4* from = (const uint4*)(p.x + (size_t)row * p.n_columns + column);
#pragma unroll
      for (int pair = 0; pair < 2; pair++) of[n][pair] = left > 8 * pair ? from[pair] : make_uint4(0, 0, 0, 0);
    }
  }
  DEVICE void store(const Arguments& p, int first, int slab, int lane) const {
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
      const int row = first + 8 * n + (lane >> 2), tile = row / p.tile_rows;
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const uint4 chunk = chunk_of(of[n][pair], lane);
        if (row < p.batch)
          p.x_out[(((size_t)tile * p.n_slabs + slab) * 8 + 4 * pair + (lane & 3)) * p.tile_rows + row % p.tile_rows] = chunk;
      }
    }
  }
};

typedef float Sums[AT_ONCE][N_TILES][4];

// A slab of up to AT_ONCE tiles of ranks times x.
DEVICE void multiply(const Rows& x, u32 a_address, int tiles, Sums& sum, int lane) {
#pragma unroll
  for (int t = 0; t < AT_ONCE; t++) {
    if (t >= tiles) break;
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const uint4 v = lds128_now(a_address + (4 * t + step) * STEP_BYTES + lane * 16);
      const u32 fragment[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int n = 0; n < N_TILES; n++) {
        const uint4 b = x.of[n][step / 2];
        mma(sum[t][n], fragment, step % 2 ? b.z : b.x, step % 2 ? b.w : b.y);
      }
    }
  }
}

// A group's slabs of A, once for each AT_ONCE tiles of ranks that are this thread block's, into its ring: by one thread.
struct Filling {
  Ring ring;
  int begin, n, next = 0, first = blockIdx.z * AT_ONCE;  // next: slab after slab, then again with the next tiles
  DEVICE void fill(const Arguments& p) {
    if (n == 0 || first >= p.rank_tiles) return;
    const int slab = begin + next;
    const u32 bytes = min(AT_ONCE, p.rank_tiles - first) * A_TILE_BYTES;
    barrier_wait(ring.empty_bar(), ring.phase ^ 1);
    barrier_expect(ring.full_bar(), bytes);
    bulk_copy(ring.here(p), p.lora_a + ((size_t)slab * p.rank_tiles + first) * A_TILE_BYTES, bytes, ring.full_bar());
    ring.advance(p.stages);
    if (++next == n) next = 0, first += gridDim.z * AT_ONCE;
  }
};

// This warp's rows times its group's slabs of rank tiles `first` ..; x to its new order at the first of them.
DEVICE void multiply_slabs(const Arguments& p, Filling& filling, bool fills, Ring& ring, int first, int first_row, Sums& sum, int lane) {
  const int tiles = min(AT_ONCE, p.rank_tiles - first);
  Rows x[AHEAD];
#pragma unroll
  for (int j = 0; j < AHEAD; j++)
    if (j < filling.n) x[j].load(p, first_row, filling.begin + j, lane);
  for (int i = 0; i < filling.n; i += AHEAD) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      if (i + j >= filling.n) break;
      const int slab = filling.begin + i + j;
      if (tiles > 0) {
        if (fills && (first != blockIdx.z * AT_ONCE || i + j)) filling.fill(p);
        __syncwarp();
        barrier_wait(ring.full_bar(), ring.phase);
        multiply(x[j], ring.here(p), tiles, sum, lane);
        ring.release(lane, p.stages);
      }
      if (first == 0) x[j].store(p, first_row, slab, lane);
      if (i + j + AHEAD < filling.n) x[j].load(p, first_row, slab + AHEAD, lane);
    }
  }
}

// u of one fragment, 16 ranks of tile `t` x 8 rows of x from `first` on.
DEVICE void store_u(const Arguments& p, int t, int first, float4 v, int lane) {
  const float sums[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int rank = (lane >> 2) + 8 * (i / 2), row = first + 2 * (lane & 3) + i % 2;
    if (row >= p.batch) continue;
    const u16 u = (u16)pack2(sums[i] * p.scaling[16 * t + rank], 0.f);
    const size_t chunk = (size_t)(row / p.tile_rows) * p.rank_tiles * 2 + 2 * t + rank / 8;
    p.u_out[(chunk * p.tile_rows + row % p.tile_rows) * 8 + rank % 8] = u;
  }
}

// The sums of all warps of the thread block, then of the cluster, to u. sums: [ROW_WARPS][K_WARPS][SUMS]
DEVICE void add_up(const Arguments& p, const Sums& sum, float4* sums, int first, int row_warp, int group, int lane) {
  float4* own = sums + (row_warp * K_WARPS + group) * SUMS;
#pragma unroll
  for (int i = 0; i < AT_ONCE * N_TILES; i++) own[i * 32 + lane] = as_float4(sum[i / N_TILES][i % N_TILES]);
  __syncthreads();
  for (int i = threadIdx.x; i < ROW_WARPS * SUMS; i += WARPS * 32) {
    float4* of_first = sums + i / SUMS * K_WARPS * SUMS + i % SUMS;
    float4 total = *of_first;
#pragma unroll
    for (int k = 1; k < K_WARPS; k++) total = total + of_first[k * SUMS];
    *of_first = total;
  }
  cluster_meet();
  constexpr int ALL = ROW_WARPS * SUMS, SHARE = ALL / PARTS < 32 ? 32 : ALL / PARTS;  // whole warps
  for (int i = threadIdx.x; i < SHARE; i += WARPS * 32) {
    const int at = cluster_rank() * SHARE + i, in_warp = at % SUMS;
    if (at >= ALL) break;
    const float4* from = sums + at / SUMS * K_WARPS * SUMS + in_warp;
    float4 total = load_of(from, 0);
#pragma unroll
    for (int part = 1; part < PARTS; part++) total = total + load_of(from, part);
    const int tile = first + in_warp / (32 * N_TILES), row = blockIdx.y * BLOCK_X_ROWS + at / SUMS * ROWS + in_warp / 32 % N_TILES * 8;
    if (tile < p.rank_tiles) store_u(p, tile, row, total, lane);
  }
  cluster_meet();  // the sums are read, also by others
}

extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(WARPS * 32)
    tiles_of_x(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[K_WARPS * MOST_STAGES], empty[K_WARPS * MOST_STAGES];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp / ROW_WARPS, row_warp = warp % ROW_WARPS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < K_WARPS * p.stages; i++) {
      barrier_init(shared_address(full + i), 1);
      barrier_init(shared_address(empty + i), ROW_WARPS * ARRIVALS_OF_WARP);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const int number = blockIdx.x * K_WARPS + group, begin = number * p.n_slabs / (PARTS * K_WARPS);
  const int end = (number + 1) * p.n_slabs / (PARTS * K_WARPS), first_row = blockIdx.y * BLOCK_X_ROWS + row_warp * ROWS;
  const bool fills = row_warp == 0 && lane == 0;
  Ring ring{shared_address(full + group * p.stages), shared_address(empty + group * p.stages),
            shared_address(memory) + group * p.stages * p.stage_bytes};
  Filling filling{ring, begin, end - begin};
  for (int i = 0; fills && i < p.stages; i++) filling.fill(p);
  __syncwarp();
  wait_for_previous_kernel();
  for (int i = threadIdx.x; blockIdx.x == 0 && blockIdx.y == 0 && i < p.n_counters; i += WARPS * 32) p.counters[i] = 0;
  float4* sums = (float4*)(memory + K_WARPS * p.stages * p.stage_bytes);
  for (int first = blockIdx.z * AT_ONCE; first == 0 || first < p.rank_tiles; first += gridDim.z * AT_ONCE) {
    Sums sum = {};
    multiply_slabs(p, filling, fills, ring, first, first_row, sum, lane);
    if (p.rank_tiles) add_up(p, sum, sums, first, row_warp, group, lane);
  }
}
