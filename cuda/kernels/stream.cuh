// What a thread block of fused_linear.cu multiplies, in which order, and the warp that copies it to shared memory.
//
// The producer streams stages; a stage is SUB slabs of W (slabs.cuh), or as many columns of A, or CHUNK steps of B.
// Weights do not depend on the kernel before, so the ring fills before griddepcontrol.wait; x is copied after it.
// Each thread block takes a contiguous run of rounds (stream-K): of a row block's rounds, those of B have the first
// numbers, so that they belong to the thread block that begins it, and are done last.
#pragma once
#include "ring.cuh"
#include "slabs.cuh"

#ifndef NT
#define NT 1  // tiles of 8 rows of x
#endif
#ifndef WARPS
#define WARPS 16
#endif
#ifndef SUB
#define SUB 2  // slabs a stage
#endif

constexpr int CHUNK = 2 * SUB;                   // 16-rank steps of B a stage
constexpr int X_BYTES = SUB * SLAB_COLUMNS * 2;  // of one row of x in a stage
constexpr int X_PITCH = X_BYTES + 16;            // keeps eight lanes' 16-byte loads off each other's banks

struct Arguments {
  const u8* slabs;
  const u32* slab_offsets;  // [n_slabs + 1] in 16-byte units
  const u8* lora_a;         // [K/64][rank_tiles][4 steps][32 lanes][8] 16-bit
  const u8* lora_b;         // [row blocks][block_steps][16 units][32 lanes][8] 16-bit
  const float* scaling;     // [rank_tiles * 16]
  const int4* schedule;     // [grid] first and last stage of A, first and last round
  const int2* sharers;      // [row blocks] first and last thread block
  const int* first_step;    // [row blocks] where the row block's ranks begin in u, in steps of 16
  const float* bias;        // [N] or null
  const u8* x;              // [M, n_columns] 16-bit
  void* y;                  // [M, N] 16-bit, or float32 where `wide`
  float4* partial;          // [grid][2][16 units][NT][32 lanes], empty between launches
  float4* u_partial;        // [2][a_parts][rank_tiles][NT][32 lanes], in turns; empty at first
  u32* counters;            // [grid] launches
  int n_rows, n_columns, batch, wide;
  int slabs_per_block, rank_tiles, block_steps, a_parts;  // block_steps: steps of B a row block
  int weight_bytes, stage_bytes, stages;                   // of a stage: where x begins, its size; and their number
  int y_pitch;                                             // elements between rows of y
};

struct Stream {
  int4 range;                           // stages of A, rounds
  int n_a, rounds_w, rounds_b, rounds;  // rounds of a row block: of W, of B, in all
  DEVICE Stream(const Arguments& p) {
    range = p.schedule[blockIdx.x];
    n_a = range.y - range.x;
    rounds_w = p.slabs_per_block / SUB;
    rounds_b = (p.block_steps + CHUNK - 1) / CHUNK;
    rounds = rounds_w + rounds_b;
  }
  DEVICE int size() const { return n_a + range.w - range.z; }
  DEVICE int first_block() const { return range.z / rounds; }
  DEVICE int last_block() const { return (range.w - 1) / rounds; }
};

// A thread block's part of a row block: rounds of W first .. last, then those of B where it begins the row block.
struct Segment {
  int row_block, first, last, n_b;
  DEVICE Segment(const Stream& s, int row_block) : row_block(row_block) {
    const int begin = row_block * s.rounds;
    const int from = max(s.range.z - begin, 0), to = min(s.range.w - begin, s.rounds);
    n_b = from == 0 ? s.rounds_b : 0;
    first = max(from - s.rounds_b, 0);
    last = to - s.rounds_b;
  }
  DEVICE int end() const { return last + n_b; }
  DEVICE bool begins_here() const { return first == 0; }
  DEVICE bool ends_here(const Stream& s) const { return last == s.rounds_w; }
  DEVICE bool is_whole(const Stream& s) const { return begins_here() && ends_here(s); }
};

// One stage of the stream: which weights, and which columns of x.
struct Item {
  const u8* weights;
  u32 bytes;
  int column;  // of x; < 0 where none is needed
};

// Walks through the stream's stages; the warp reads the offsets of 31 rounds of W at once.
struct Walk {
  int i = 0, k;  // stage; round in the segment
  Segment segment;
  int w;        // rounds of W before this one, in the whole matrix
  int window;   // the first round that `offsets` has
  u32 offsets;  // of round window + lane
  DEVICE Walk(const Arguments& p, const Stream& s, int lane) : segment(s, s.first_block()) {
    k = segment.first;
    w = segment.row_block * s.rounds_w + k;
    read_offsets(p, lane);
  }
  DEVICE void read_offsets(const Arguments& p, int lane) {
    window = w;
    const int last = (p.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * p.slabs_per_block;
    offsets = p.slab_offsets[min((w + lane) * SUB, last)];
  }
  DEVICE Item next(const Arguments& p, const Stream& s, int lane) {
    if (i < s.n_a) {
      const u32 bytes = SUB * p.rank_tiles * A_TILE_BYTES;
      const int stage = s.range.x + i++;
      return {p.lora_a + (size_t)stage * bytes, bytes, stage * SUB * SLAB_COLUMNS};
    }
    Item item;
    if (k < segment.last) {
      if (w - window == 31) read_offsets(p, lane);
      const u32 start = __shfl_sync(~0u, offsets, w - window), end = __shfl_sync(~0u, offsets, w - window + 1);
      item = {p.slabs + (size_t)start * 16, (end - start) * 16, k * SUB * SLAB_COLUMNS};
      w++;
    } else {
      const int step = (k - segment.last) * CHUNK, steps = min(CHUNK, p.block_steps - step);
      const size_t before = ((size_t)segment.row_block * p.block_steps + step) * UNITS * STEP_BYTES;
      item = {p.lora_b + before, (u32)(steps * UNITS * STEP_BYTES), -1};
    }
    if (++k == segment.end()) {
      segment = Segment(s, segment.row_block + 1);
      k = 0;
    }
    return item;
  }
};

DEVICE void copy_weights(const Arguments& p, const Ring& ring, const Item& item, int lane) {
#if HAS_BULK_COPIES
  if (lane == 0) {
    barrier_expect(ring.full_bar(), item.bytes + (item.column < 0 ? 0 : p.batch * X_BYTES));
    bulk_copy(ring.here(p), item.weights, item.bytes, ring.full_bar());
  }
#else
  for (u32 i = lane * 16; i < item.bytes; i += 512) copy_16(ring.here(p) + i, item.weights + i);
#endif
}

DEVICE void copy_x(const Arguments& p, const Ring& ring, int column, int lane) {
  const u32 to = ring.here(p) + p.weight_bytes;
  if (column >= 0) {
    const u8* from = p.x + (size_t)column * 2;
#if HAS_BULK_COPIES
    __syncwarp();
    const int there = min(X_BYTES, (p.n_columns - column) * 2);
    for (int m = lane; m < p.batch; m += 32) {
      bulk_copy(to + m * X_PITCH, from + (size_t)m * p.n_columns * 2, there, ring.full_bar());
      if (there < X_BYTES) bulk_copy(to + m * X_PITCH + there, NO_COLUMNS, X_BYTES - there, ring.full_bar());
    }
#else
    for (int i = lane; i < p.batch * (X_BYTES / 16); i += 32) {
      const int m = i / (X_BYTES / 16), c = 16 * (i % (X_BYTES / 16));
      const bool is_there = column + c / 2 < p.n_columns;
      copy_16(to + m * X_PITCH + c, is_there ? from + (size_t)m * p.n_columns * 2 + c : (const u8*)NO_COLUMNS);
    }
#endif
  }
#if !HAS_BULK_COPIES
  arrive_after_copies(ring.full_bar());
#endif
}

DEVICE void produce(const Arguments& p, const Stream& stream, Ring ring, int lane) {
  const int n = stream.size(), first = min(n, p.stages);
  Walk walk(p, stream, lane);
  Ring filling = ring;
  int column = 0;  // of the stage whose number is the lane's
  for (int i = 0; i < first; i++) {
    const Item item = walk.next(p, stream, lane);
    if (lane == i) column = item.column;
    copy_weights(p, filling, item, lane);
    filling.advance(p.stages);
  }
  wait_for_previous_kernel();
  for (int i = 0; i < first; i++) {
    copy_x(p, ring, __shfl_sync(~0u, column, i), lane);
    ring.advance(p.stages);
  }
  for (int i = first; i < n; i++) {
    const Item item = walk.next(p, stream, lane);
    barrier_wait(ring.empty_bar(), ring.phase ^ 1);
    copy_weights(p, ring, item, lane);
    copy_x(p, ring, item.column, lane);
    ring.advance(p.stages);
  }
}
