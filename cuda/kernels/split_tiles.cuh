// Tiles that several clusters had a part of: leaving sums in memory, or in shared memory those that the thread block adds up
// itself, and adding them, in order.
#pragma once
#include "cut.cuh"
#include "rows_of_y.cuh"

DEVICE float4* sums_of(const Arguments& p, int slot, int unit) { return p.partial + ((size_t)slot * UNITS + unit) * NT * 32; }

// Of a tile that begins at row m of x: how many tiles of eight rows there are.
DEVICE int eights(const Arguments& p, int m) { return min(NT, (p.batch - m + 7) / 8); }

// A tile that is split: clusters `first` .. have a part of it each; where the first one left its own.
struct Shared {
  Tile tile;
  int first, parts, first_slot, n_eights;
  DEVICE Shared(const Arguments& p, const Split& split, int in_split) : tile(p, p.n_whole + in_split) {
    const int begin = in_split * p.slabs_per_block;
    first = split.cluster_of(begin), parts = split.cluster_of(begin + p.slabs_per_block - 1) - first + 1;
    first_slot = 2 * first + (split.begin(first) < begin);
    n_eights = eights(p, tile.m_tile * TM);
  }
  // A cluster adds up and writes eights share_of(cluster) .. share_of(cluster + 1) - 1, its groups a half of them each.
  DEVICE int share_of(int cluster, int group = 0) const {
    return n_eights * ((cluster - first) * GROUPS + group) / (parts * GROUPS);
  }
};

// Eights `from` .. `to` - 1 of a warp's unit, which stay in shared memory: at `place`, this lane's.
struct Kept {
  u32 place;
  int in_split, from, to;
  DEVICE bool has(int n) const { return from <= n && n < to; }
};

DEVICE void store(const Arguments& p, const Tiles& sum, const Item& item, const Kept& kept, int unit, int lane) {
  const int m = item.tile.m_tile * TM, n_eights = eights(p, m);
  if (item.is_whole()) {
    const RowsOfY rows(p.y, p.bias, item.tile.row_block * BLOCK_ROWS + unit * UNIT_ROWS, p.n_rows, p.batch, lane);
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (n < n_eights) rows.store(m + 8 * n, sum[n], lane);
  } else {
    float4* to = sums_of(p, item.slot, unit) + lane;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (kept.has(n))
        sts128(kept.place + n * 512, as_bits(as_float4(sum[n])));
      else if (n < n_eights)
        store_floats(to + n * 32, sum[n]);
    }
    __syncwarp();
    if (lane == 0) add_release(p.counters + item.in_split * UNITS + unit, 1);
  }
}

// A warp's share of a unit of a split tile: all parts of some eights, by few instructions, since each warp waits for its own.
struct Share {
  static constexpr int AT_ONCE = GROUPS == 1 ? 8 : 4;  // eights
  const float4 *first, *rest;                          // where a lane's parts begin: the first one, and those after it
  u32 kept;
  int own, parts, n, end;  // own: the part that is kept; n: the next eight
  DEVICE void load(int part, float4 (&v)[AT_ONCE]) const {
    if (part >= parts) return;
    constexpr size_t STRIDE = 2 * (size_t)UNITS * NT * 32;
    const float4* from = (part ? rest + (part - 1) * STRIDE : first) + n * 32;
    if (part == own) {
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
        if (n + j < end) v[j] = as_floats(lds128_now(kept + (n + j) * 512));
    } else {
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
        if (n + j < end) v[j] = load_fresh(from + j * 32);
    }
  }
  DEVICE void add(int part, const float4 (&v)[AT_ONCE], float4 (&sum)[AT_ONCE]) const {
    if (part >= parts) return;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) sum[j] = sum[j] + v[j];
  }
};

// As soon as all parts are there, this thread block's own among them: add them, in order, and write y.
DEVICE void finish(const Arguments& p, const Shared& shared, int in_split, const Kept& kept, int cluster, int group, int unit, int lane) {
  const int from = shared.share_of(cluster, group), to = shared.share_of(cluster, group + 1);
  if (from == to) return;
  const RowsOfY rows(p.y, p.bias, shared.tile.row_block * BLOCK_ROWS + unit * UNIT_ROWS, p.n_rows, p.batch, lane);
  Share share{sums_of(p, shared.first_slot, unit) + lane, sums_of(p, 2 * shared.first + 2, unit) + lane, kept.place,
              kept.in_split == in_split ? cluster - shared.first : -1, shared.parts, from, to};
  // all lanes wait alike: else the compiler takes nothing in this kernel to be the same for a warp: 7 % more instructions
  while (__any_sync(~0u, load_acquire(p.counters + in_split * UNITS + unit) < shared.parts)) {
  }
#pragma unroll 1
  for (; share.n < to; share.n += Share::AT_ONCE) {
    float4 even[Share::AT_ONCE], odd[Share::AT_ONCE], sum[Share::AT_ONCE];
    share.load(0, sum);
    share.load(1, even);
#pragma unroll 1
    for (int part = 1; part < shared.parts; part += 2) {
      share.load(part + 1, odd);
      share.add(part, even, sum);
      share.load(part + 2, even);
      share.add(part + 1, odd, sum);
    }
#pragma unroll
    for (int j = 0; j < Share::AT_ONCE; j++) {
      const float sums[4] = {sum[j].x, sum[j].y, sum[j].z, sum[j].w};
      if (share.n + j < to) rows.store(shared.tile.m_tile * TM + 8 * (share.n + j), sums, lane);
    }
  }
}
