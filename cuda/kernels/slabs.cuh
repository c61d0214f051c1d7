// The device layout of a weight (N, K), and how a warp reads it: docs/kernels.md draws it.
//
// A row block is 256 rows; a slab is a row block times 64 columns, contiguous; slabs of a row block follow one another.
//   slab: 16 x u16: [0] the slab's size, [i] where unit i begins, in 16-byte units from the slab's start (unit 0: 2)
//   unit (16 rows x 64 columns): 128 B bitmap (bitmap encodings) | 16 x f16 scales of the rows (quantized) | values
// Weights stand in the order of mma.m16n8k16's A fragments. Group i (0..7) of a unit, lane l: four weights, rows
// l/4, l/4, l/4+8, l/4+8 and columns 16*(l%4) + 2*i + {0, 1}: so a lane meets 16 neighbouring columns of x, and step q
// (0..3) of a unit multiplies groups 2q and 2q+1.
//   bitmap16: 4 bits a (group, lane), 8 lanes a word, word 4*group + lane/8; then the kept values in bit order
//   dense16: 16 bytes a (step, lane); dense8: 16 bytes a (pair of steps, lane); dense4: 16 bytes a lane
//   8-bit values: sign and magnitude. 4-bit values: codes, the even one in the low nibble.
#pragma once
#include "ptx.cuh"

#define BITMAP16 0
#define DENSE16 2
#define DENSE8 3
#define DENSE4 4

#ifndef ENCODING
#define ENCODING BITMAP16
#endif

constexpr bool HAS_BITMAP = ENCODING == BITMAP16;
constexpr bool HAS_SCALES = ENCODING == DENSE8 || ENCODING == DENSE4;
constexpr int UNITS = 16, UNIT_ROWS = 16, SLAB_COLUMNS = 64, BLOCK_ROWS = UNITS * UNIT_ROWS;
constexpr int SLAB_HEADER_BYTES = 32;
constexpr int BITMAP_BYTES = HAS_BITMAP ? 128 : 0, SCALES_BYTES = HAS_SCALES ? 32 : 0;
constexpr u32 MAGIC = HALF ? 0x64006400u : 0x43004300u;    // 1024 or 128, twice: or-ing in a magnitude adds it

// Four 8-bit values, sign and magnitude, as they lie in two registers' low bytes -> two 16-bit floats, exactly.
DEVICE u32 from_sign_magnitude(u32 pair) {  // bytes 0 and 2 of `pair`
  const u32 magnitude = subtract2((pair & 0x007f007fu) | MAGIC, MAGIC);
  return magnitude | ((pair << 8) & 0x80008000u);
}

#if ENCODING == DENSE4
__device__ const float NF4[16] = {  // QLoRA's code book; code 7 is 0
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
#endif

// The two codes of a byte as two 16-bit floats, for all bytes: 256 words of shared memory, empty for other encodings.
constexpr int TABLE_WORDS = ENCODING == DENSE4 ? 256 : 1;
DEVICE void fill_table(u32* table) {
#if ENCODING == DENSE4
  for (int i = threadIdx.x; i < TABLE_WORDS; i += blockDim.x) table[i] = pack2(NF4[i & 15], NF4[i >> 4]);
#endif
}

// One unit in shared memory, opened by a warp.
struct Unit {
  u32 start;        // of the unit
  u32 word_values;  // bitmap16: where the values of bitmap word `lane` begin

  DEVICE void open(u32 address, int lane) {
    start = address;
    if (HAS_BITMAP) {
      const u32 word = lds32(start + lane * 4), count = __popc(word);
      u32 upto = count;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const u32 v = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += v;
      }
      word_values = start + BITMAP_BYTES + 2 * (upto - count);
    }
  }

  DEVICE float scale(int row) const { return half_to_float(lds16(start + BITMAP_BYTES + 2 * row)); }

  // The A fragments of steps 2*pair and 2*pair + 1.
  DEVICE void fragments(int pair, int lane, u32 (&a)[2][4], u32 table) const {
    const u32 values = start + SCALES_BYTES;
    if (ENCODING == DENSE16) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 v = lds128(values + (2 * pair + i) * 512 + lane * 16);
        a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
      }
    } else if (ENCODING == DENSE8) {
      const uint4 v = lds128(values + pair * 512 + lane * 16);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i / 2][2 * (i % 2)] = from_sign_magnitude(__byte_perm(words[i], 0, 0x4140));
        a[i / 2][2 * (i % 2) + 1] = from_sign_magnitude(__byte_perm(words[i], 0, 0x4342));
      }
    } else if (ENCODING == DENSE4) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 codes = lds32(values + lane * 16 + (2 * pair + i) * 4);
#pragma unroll
        for (int j = 0; j < 4; j++) a[i][j] = lds32(table + ((codes >> (8 * j)) & 255u) * 4);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) kept(4 * pair + i, lane, a[i / 2][2 * (i % 2)], a[i / 2][2 * (i % 2) + 1]);
    }
  }

  // bitmap16: the four weights of a group, 0 where nothing is kept. The loop around it waits for shared memory
  // and for the integer pipe about equally: fewer, wider loads with more picking were slower (docs/kernels.md).
  DEVICE void kept(int group, int lane, u32& upper, u32& lower) const {
    const int shift = 4 * (lane & 7);
    const u32 word = lds32(start + group * 16 + (lane >> 3) * 4);
    const u32 base = __shfl_sync(~0u, word_values, group * 4 + (lane >> 3));
    const u32 v0 = base + 2 * __popc(word & ((1u << shift) - 1u));
    const u32 bits = (((word >> shift) & 15u) * 0x00204081u) & 0x01010101u;  // one bit a byte
    // The dot product adds the bytes kept before: the address of each candidate, read whether it is kept or not.
    const u32 v1 = __dp4a(bits, 0x00000002u, v0);
    const u32 v2 = __dp4a(bits, 0x00000202u, v0);
    const u32 v3 = __dp4a(bits, 0x00020202u, v0);
    const u32 keep = bits * 255u;
    const u32 keep_upper = __byte_perm(keep, 0, 0x1100), keep_lower = __byte_perm(keep, 0, 0x3322);
    upper = side_by_side(lds16(v0), lds16(v1)) & keep_upper;
    lower = side_by_side(lds16(v2), lds16(v3)) & keep_lower;
  }
};
