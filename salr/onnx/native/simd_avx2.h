// AVX2: eight columns of a row at a time, stored values to the lanes whose bit is set, zeros to the others.
//
// Every encoding has sparse(values, index, bits): kLanes floats from the stored values index, index + 1, ... (bits: of
// the bitmap), and full(values, index): as many stored values in order. sparse reads up to 32 bytes from its index on;
// full reads kLanes values, for nf4 eight bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace salr {
namespace {

constexpr const char* kSimdName = "avx2";
constexpr int kLanes = 8;
// Rows and vectors of a tile: with the inputs and a weight they fill 16 registers.
constexpr int kTileRows = 6, kTileVectors = 2;

using Vec = __m256;
using Bits = uint8_t;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* at) { return _mm256_loadu_ps(at); }
inline void keep(float* at, Vec v) { _mm256_storeu_ps(at, v); }
inline Vec plus(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec times(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec times_plus(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum_of(Vec lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// For each byte of a bitmap, where the eight lanes find their values; 0x80 makes a shuffle write 0.
struct Tables {
  uint8_t bytes2[256][16];  // 2-byte value -> 2-byte lane
  uint8_t bytes1[256][8];   // byte -> byte
  int32_t index4[256][8];   // index of a 4-byte value; negative: no value
  uint8_t shift4[256][8];   // right shift that brings a nibble down; 32: no value
};

constexpr Tables make_tables() {
  Tables t{};
  for (int bits = 0; bits < 256; ++bits) {
    int rank = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool is_set = bits >> lane & 1;
      t.bytes1[bits][lane] = static_cast<uint8_t>(is_set ? rank : 0x80);
      for (int byte = 0; byte < 2; ++byte)
        t.bytes2[bits][2 * lane + byte] = static_cast<uint8_t>(is_set ? 2 * rank + byte : 0x80);
      t.index4[bits][lane] = is_set ? rank : INT32_MIN;
      t.shift4[bits][lane] = static_cast<uint8_t>(is_set ? 4 * rank : 32);
      rank += is_set;
    }
  }
  return t;
}

alignas(64) constexpr Tables kTables = make_tables();

inline __m128i load16(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
inline __m128i load8(const uint8_t* at) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)); }

struct Bf16 {
  static constexpr bool kIsScaled = false;
  static int64_t bytes(int64_t n) { return 2 * n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return widened(_mm_shuffle_epi8(load16(values + 2 * index), load16(kTables.bytes2[bits])));
  }
  static Vec full(const uint8_t* values, int64_t index) { return widened(load16(values + 2 * index)); }

 private:
  static Vec widened(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
};

struct Fp16 {
  static constexpr bool kIsScaled = false;
  static int64_t bytes(int64_t n) { return 2 * n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return _mm256_cvtph_ps(_mm_shuffle_epi8(load16(values + 2 * index), load16(kTables.bytes2[bits])));
  }
  static Vec full(const uint8_t* values, int64_t index) { return _mm256_cvtph_ps(load16(values + 2 * index)); }
};

struct Fp32 {
  static constexpr bool kIsScaled = false;
  static int64_t bytes(int64_t n) { return 4 * n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    const __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.index4[bits]));
    const Vec moved = _mm256_permutevar8x32_ps(full(values, index), from);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(from, 31)), moved);
  }
  static Vec full(const uint8_t* values, int64_t index) {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 4 * index)));
  }
};

struct Int8 {
  static constexpr bool kIsScaled = true;
  static int64_t bytes(int64_t n) { return n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return widened(_mm_shuffle_epi8(load8(values + index), load8(kTables.bytes1[bits])));
  }
  static Vec full(const uint8_t* values, int64_t index) { return widened(load8(values + index)); }

 private:
  static Vec widened(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)); }
};

// The code book is turned so that code 7, which stands for 0, is 0: lanes without a value then need no mask.
struct Nf4 {
  static constexpr bool kIsScaled = true;
  static int64_t bytes(int64_t n) { return (n + 1) / 2; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return looked_up(values, index, _mm256_cvtepu8_epi32(load8(kTables.shift4[bits])));
  }
  static Vec full(const uint8_t* values, int64_t index) {
    return looked_up(values, index, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  }

 private:
  static Vec book(int first) {
    const float* b = kNf4CodeBook;
    const int x = first ^ 7;
    return _mm256_setr_ps(b[x], b[x ^ 1], b[x ^ 2], b[x ^ 3], b[x ^ 4], b[x ^ 5], b[x ^ 6], b[x ^ 7]);
  }
  static Vec looked_up(const uint8_t* values, int64_t index, __m256i shifts) {
    uint64_t word;
    std::memcpy(&word, values + index / 2, sizeof word);
    const int nibbles = static_cast<int>(static_cast<uint32_t>(word >> (index % 2 * 4)) ^ 0x77777777u);
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(nibbles), shifts);
    const Vec low = _mm256_permutevar8x32_ps(book(0), codes), high = _mm256_permutevar8x32_ps(book(8), codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
};

}  // namespace
}  // namespace salr
