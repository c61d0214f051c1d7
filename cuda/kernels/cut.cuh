// How a product with many rows of x is cut: into tiles, of which clusters take some whole and share the slabs of others.
#pragma once
#include "wgmma.cuh"

#ifndef GROUPS
#define GROUPS 1  // two where there are registers for them: each warp waits for itself most of the time
#endif

constexpr int HALF_UNITS = UNITS / 2;
constexpr int STEPS = 2;  // of B in a stage
constexpr int WALKED = 8;  // tiles of x that are walked through before the next row block

typedef float Tiles[NT][4];  // a warp's sums: a unit times a tile

struct Arguments {
  const u8* slabs;
  const u32* halves;      // [2 * n_slabs + 1] where a slab's units 0 and 8 begin, in 16-byte units
  const u8* lora_b;       // [row blocks][block_steps][16 units][32 lanes][8] 16-bit
  const int* first_step;  // [row blocks] where the row block's ranks begin in u, in steps of 16
  const u8* x;            // [M / TM][slabs_per_block][8 chunks][TM][8] 16-bit
  const u8* u;            // [M / TM][u_steps][2 chunks][TM][8] 16-bit
  const float* bias;      // [N] or null
  u16* y;                 // [M, N]
  float4* partial;        // [clusters][2][16 units][NT][32 lanes]: what a cluster leaves of at most two tiles
  u32* counters;          // [split tiles][16 units] how many parts have been left; 0 at the start
  int n_rows, batch, slabs_per_block, block_steps, u_steps, n_row_blocks, n_m_tiles, n_whole, split_clusters;
  int x_at, stage_bytes, stages;
};

struct Tile {
  int row_block, m_tile;
  DEVICE Tile(const Arguments& p, int number) {
    const int group = number / (WALKED * p.n_row_blocks), in_group = number % (WALKED * p.n_row_blocks);
    const int of_x = min(WALKED, p.n_m_tiles - group * WALKED);
    m_tile = group * WALKED + in_group % of_x;
    row_block = in_group / of_x;
  }
};

// The slabs of all tiles that are split, one after the other, in equal runs of pairs: where each cluster's begins.
struct Split {
  int clusters, n_pairs;  // of the slabs of all split tiles
  DEVICE Split(const Arguments& p)
      : clusters(p.split_clusters), n_pairs((p.n_row_blocks * p.n_m_tiles - p.n_whole) * p.slabs_per_block / 2) {}
  DEVICE int begin(int cluster) const {
    return cluster < clusters ? 2 * (int)((long long)cluster * n_pairs / clusters) : 2 * n_pairs;
  }
  DEVICE int cluster_of(int slab) const {
    int cluster = (int)((long long)(slab / 2) * clusters / n_pairs);
    while (begin(cluster + 1) <= slab) cluster++;
    return cluster;
  }
};

// A tile, or slabs first .. last - 1 of one; the steps of B go with a tile's last slab.
struct Item {
  Tile tile;
  int first, last, b_stages;
  int slot, in_split;  // where the sums are left, and of which split tile; -1 where they are y
  DEVICE bool is_whole() const { return slot < 0; }
};

// A cluster's items, one after the other.
struct Items {
  int cluster, clusters, number = 0;  // number: of the next one
  int slab, end;                      // of the split tiles' slabs: the next one, and the end of this cluster's run
  DEVICE Items(const Arguments& p) : cluster(blockIdx.x / 2), clusters(gridDim.x / 2) {
    const Split split(p);
    slab = split.begin(cluster);
    end = split.begin(cluster + 1);
  }
  DEVICE bool is_over(const Arguments& p) const { return cluster + number * clusters >= p.n_whole && slab >= end; }
  DEVICE Item next(const Arguments& p) {
    const int whole = cluster + number * clusters, b_stages = (p.block_steps + STEPS - 1) / STEPS;
    if (whole < p.n_whole) {
      number++;
      return {Tile(p, whole), 0, p.slabs_per_block, b_stages, -1, -1};
    }
    const int in_split = slab / p.slabs_per_block, first = slab - in_split * p.slabs_per_block;
    const int last = min(p.slabs_per_block, first + end - slab);
    const int slot = 2 * cluster + (slab != Split(p).begin(cluster));
    slab += last - first;
    return {Tile(p, p.n_whole + in_split), first, last, last == p.slabs_per_block ? b_stages : 0, slot, in_split};
  }
};
