// The device layout of a weight (N, K), and how a warp reads it: docs/kernels.md draws it.
//
// A row block is 256 rows; a slab is a row block times 64 columns, contiguous; slabs of a row block follow one another.
//   slab: 16 x u16: [0] the slab's size, [i] where unit i begins, in 16-byte units from the slab's start (unit 0: 2)
//   unit (16 rows x 64 columns): 128 B bitmap (bitmap encodings) | 16 x f16 scales of the rows (quantized) | values
// Weights stand in the order of mma.m16n8k16's A fragments. Group i (0..7) of a unit, lane l: four weights, rows
// l/4, l/4, l/4+8, l/4+8 and columns 16*(l%4) + 2*i + {0, 1}: so a lane meets 16 neighbouring columns of x, and step q
// (0..3) of a unit multiplies groups 2q and 2q+1.
//   bitmap16: a word a lane, 4 bits a group, those of group i from bit 8*(i%4) + 4*(i/4) on; then the kept values, group
//   after group, in each lane after lane
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
constexpr int STEP_BYTES = 512;  // one 16 x 16 fragment of 16-bit weights
constexpr int A_TILE_BYTES = 4 * STEP_BYTES;  // of A: 16 ranks x 64 columns
constexpr int BITMAP_BYTES = HAS_BITMAP ? 128 : 0, SCALES_BYTES = HAS_SCALES ? 32 : 0;
// Zeros, read in place of x beyond its last column: W's columns there are 0, but 0 times what is no number is not.
__device__ const uint4 NO_COLUMNS[16] = {};
constexpr u32 MAGIC = HALF ? 0x64006400u : 0x43004300u;    // 1024 or 128, twice: or-ing in a magnitude adds it

// Two 8-bit values, sign and magnitude -> two 16-bit floats, exactly.
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

// A row's scale for fewer instructions than float32 takes, where they are what takes the time: twice a 16-bit float, and twice
// what that leaves of it (0 for float16, which scales are).
struct Scale {
  u32 high, low;
  DEVICE Scale() {}
  DEVICE explicit Scale(float scale) {
    high = pack2(scale, scale);
    const float left = scale - widen(high);
    low = pack2(left, left);
  }
  // Two weights times it: what a float32 product is rounded to, but for the last bit of one in some thousands.
  DEVICE u32 times(u32 pair) const {
    constexpr u32 NOTHING = 0x80008000u;  // -0, twice: added to 0 of either sign, it leaves that
    return multiply_add2(pair, high, HALF ? NOTHING : multiply_add2(pair, low, NOTHING));
  }
};

// The two codes of a byte as two 16-bit floats, for all bytes, each 32 times, so that a lane stays in its own bank: 32 KB
// of shared memory, none for other encodings.
constexpr int TABLE_WORDS = ENCODING == DENSE4 ? 256 * 32 : 1;
DEVICE void fill_table(u32* table) {
#if ENCODING == DENSE4
  for (int i = threadIdx.x; i < TABLE_WORDS; i += blockDim.x) table[i] = pack2(NF4[i / 32 & 15], NF4[i / 32 >> 4]);
#endif
}

// One unit in shared memory, opened by a warp.
struct Unit {
  u32 start;  // of the unit
  // bitmap16: this lane's bits; by group, a byte each: values of lanes before it, and of all lanes
  u32 word, before[2], in_all[2];

  DEVICE void open(u32 address, int lane) {
    start = address;
    if (HAS_BITMAP) {
      word = lds32(start + lane * 4);
      const u32 of_two = word - ((word >> 1) & 0x55555555u);
      const u32 of_four = (of_two & 0x33333333u) + ((of_two >> 2) & 0x33333333u);
      u32 own[2], upto[2];
#pragma unroll
      for (int h = 0; h < 2; h++) upto[h] = own[h] = (of_four >> (4 * h)) & 0x0f0f0f0fu;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1)
#pragma unroll
        for (int h = 0; h < 2; h++) upto[h] = add_from_below(upto[h], d);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        before[h] = upto[h] - own[h];
        in_all[h] = __shfl_sync(~0u, upto[h], 31);
      }
    }
  }

  // bitmap16: where this lane's values of a group begin.
  DEVICE u32 values_of(int group) const {
    u32 at = start + BITMAP_BYTES;
    if (group > 3) at = __dp4a(in_all[0], 0x02020202u, at);
    if (group % 4) at = __dp4a(in_all[group / 4], 0x02020202u >> (32 - 8 * (group % 4)), at);
    return __dp4a(before[group / 4], 2u << (8 * (group % 4)), at);
  }

  // bitmap16: the four weights of a group; 0 where the lane's bits say that nothing is kept.
  DEVICE void group(int group, u32& upper, u32& lower) const {
    // How many are kept before the second, third and fourth: of four groups, a byte each.
    const u32 bits = word >> (4 * (group / 4)), one = bits & 0x01010101u;
    const u32 two = one + ((bits >> 1) & 0x01010101u), three = two + ((bits >> 2) & 0x01010101u);
    const u32 first = values_of(group), of_group = 2u << (8 * (group % 4));
    const u32 at[4] = {first, __dp4a(one, of_group, first), __dp4a(two, of_group, first), __dp4a(three, of_group, first)};
    u32 v[4];
    lds16_where(bits, 8 * (group % 4), at, v);
    upper = side_by_side(v[0], v[1]);
    lower = side_by_side(v[2], v[3]);
  }

  DEVICE float scale(int row) const { return half_to_float(lds16(start + BITMAP_BYTES + 2 * row)); }

  // Add N tiles of products (16 rows x 8, as mma leaves them) times their rows' scales.
  template <int N>
  DEVICE void add_scaled(const float (*products)[4], float (*total)[4], int lane) const {
    const float upper = scale(lane >> 2), lower = scale((lane >> 2) + 8);
#pragma unroll
    for (int n = 0; n < N; n++) {
      total[n][0] += upper * products[n][0];
      total[n][1] += upper * products[n][1];
      total[n][2] += lower * products[n][2];
      total[n][3] += lower * products[n][3];
    }
  }

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
        for (int j = 0; j < 4; j++) a[i][j] = lds32(table + lane * 4 + ((codes >> (8 * j)) & 255u) * 128);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) group(4 * pair + i, a[i / 2][2 * (i % 2)], a[i / 2][2 * (i % 2) + 1]);
    }
  }

};
