// Canonical tensors of a .salr file -> slabs (slabs.cuh), once at load.
//
// count_kept: a thread a (row, slab).   lay_out: a thread block a slab, a warp a unit, no shared memory.
#include "slabs.cuh"

#ifndef SOURCE_HAS_BITMAP
#define SOURCE_HAS_BITMAP HAS_BITMAP
#endif

// The kept columns of one row in one slab, lowest bit first; rows and columns past the matrix are not kept.
DEVICE u64 kept_columns(const u8* bitmap, int row, int slab, int n_rows, int n_columns) {
  const int left = n_columns - slab * SLAB_COLUMNS;
  if (row >= n_rows || left <= 0) return 0;
  const u64 inside = left >= 64 ? ~0ull : (1ull << left) - 1;
  if (!SOURCE_HAS_BITMAP) return inside;
  const int row_bytes = (n_columns + 7) / 8, n_bytes = min(8, row_bytes - slab * 8);
  const u8* from = bitmap + (size_t)row * row_bytes + slab * 8;
  u64 bits = 0;
  for (int i = 0; i < n_bytes; i++) bits |= (u64)from[i] << (8 * i);
  return bits & inside;
}

// counts [n_padded_rows, n_slabs]
extern "C" __global__ void count_kept(const u8* bitmap, int* counts, int n_rows, int n_columns, int n_padded_rows,
                                      int n_slabs) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long long)n_padded_rows * n_slabs) return;
  const int row = (int)(i / n_slabs), slab = (int)(i % n_slabs);
  counts[i] = __popcll(kept_columns(bitmap, row, slab, n_rows, n_columns));
}

struct Source {
  const u8* bitmap;            // [N, ceil(K/8)]
  const u8* values;            // as stored; 16-bit values in the dtype of the product
  const long long* row_offsets;  // [N + 1]
  const int* before;           // [n_padded_rows, n_slabs] kept in earlier slabs of the row
  const u16* scales;           // [N, n_groups] float16
  int n_rows, n_columns, n_slabs, n_groups, slabs_per_group;
};

DEVICE u32 sign_magnitude(u32 byte) { return byte & 128u ? 128u | ((256u - byte) & 127u) : byte; }

// Stored value number `index`, as the layout holds it.
DEVICE u32 stored_value(const Source& s, long long index) {
  if (ENCODING == BITMAP16 || ENCODING == DENSE16) return ((const u16*)s.values)[index];
  if (ENCODING == DENSE4) return (s.values[index >> 1] >> (4 * (index & 1))) & 15u;
  return sign_magnitude(s.values[index]);
}

// A lane's part of a unit of a slab: rows row, row + 8, of which some columns are kept, and where their values begin.
struct Lane {
  u64 kept[2];
  long long first[2];
  DEVICE Lane(const Source& s, int row, int slab) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = row + 8 * h;
      kept[h] = kept_columns(s.bitmap, r, slab, s.n_rows, s.n_columns);
      if (r >= s.n_rows)
        first[h] = 0;
      else if (SOURCE_HAS_BITMAP)
        first[h] = s.row_offsets[r] + s.before[(size_t)r * s.n_slabs + slab];
      else
        first[h] = (long long)r * s.n_columns + slab * SLAB_COLUMNS;
    }
  }
  // The bits of a group's four weights, and the weights; what stands for 0 where a bit is not set.
  DEVICE u32 group(const Source& s, int column, u32 (&weight)[4]) const {
    const u32 nibble = (u32)((kept[0] >> column) & 3) | (u32)((kept[1] >> column) & 3) << 2;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int h = j >> 1, c = column + (j & 1);
      const long long index = first[h] + __popcll(kept[h] & ((1ull << c) - 1));
      weight[j] = nibble >> j & 1 ? stored_value(s, index) : (ENCODING == DENSE4 ? 7u : 0u);
    }
    return nibble;
  }
};

// Where a unit's values are written, group after group.
struct Writing {
  u8 *unit, *values;
  int lane, written = 0;
  u32 word = 0, codes = 0;
  DEVICE Writing(u8* to, int lane) : unit(to), values(to + BITMAP_BYTES + SCALES_BYTES), lane(lane) {}

  DEVICE void kept(int group, u32 nibble, const u32 (&weight)[4]) {
    word |= nibble << (8 * (group % 4) + 4 * (group / 4));
    if (group == 7) ((u32*)unit)[lane] = word;
    u32 upto = __popc(nibble);
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const u32 v = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += v;
    }
    int at = written + upto - __popc(nibble);
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (nibble >> j & 1) ((u16*)values)[at++] = (u16)weight[j];
    written += __shfl_sync(~0u, upto, 31);
  }

  DEVICE void all(int group, const u32 (&weight)[4]) {
    if (ENCODING == DENSE16) {
      u16* at = (u16*)values + (group / 2) * 256 + lane * 8 + (group % 2) * 4;
#pragma unroll
      for (int j = 0; j < 4; j++) at[j] = (u16)weight[j];
    } else if (ENCODING == DENSE8) {
      u8* at = values + (group / 4) * 512 + lane * 16 + (group % 4) * 4;
#pragma unroll
      for (int j = 0; j < 4; j++) at[j] = (u8)weight[j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) codes |= weight[j] << (16 * (group % 2) + 4 * j);
      if (group % 2) {
        ((u32*)values)[lane * 4 + group / 2] = codes;
        codes = 0;
      }
    }
  }
};

extern "C" __global__ void lay_out(const __grid_constant__ Source s, u8* slabs, const u32* slab_offsets,
                                   const u16* headers /* [slabs][16] */) {
  const int unit = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int row_block = blockIdx.x / s.n_slabs, slab = blockIdx.x % s.n_slabs;
  u8* to_slab = slabs + (size_t)slab_offsets[blockIdx.x] * 16;
  const u16* header = headers + (size_t)blockIdx.x * UNITS;
  if (threadIdx.x < UNITS) ((u16*)to_slab)[threadIdx.x] = header[threadIdx.x];
  u8* to = to_slab + 16 * (unit ? header[unit] : 2);
  const int row = row_block * BLOCK_ROWS + unit * UNIT_ROWS;
  if (HAS_SCALES && lane < UNIT_ROWS) {
    const bool inside = row + lane < s.n_rows && slab * SLAB_COLUMNS < s.n_columns;
    const u16 scale = inside ? s.scales[(size_t)(row + lane) * s.n_groups + slab / s.slabs_per_group] : (u16)0;
    ((u16*)(to + BITMAP_BYTES))[lane] = scale;
  }
  const Lane own(s, row + (lane >> 2), slab);
  Writing writing(to, lane);
#pragma unroll
  for (int group = 0; group < 8; group++) {
    u32 weight[4];
    const u32 nibble = own.group(s, 16 * (lane & 3) + 2 * group, weight);
    if (HAS_BITMAP)
      writing.kept(group, nibble, weight);
    else
      writing.all(group, weight);
  }
}
