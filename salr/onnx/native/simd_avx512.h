// AVX-512 (F, BW, VL, VBMI2): sixteen columns of a row at a time; see simd_avx2.h for what every name has to do.
//
// sparse reads up to 64 bytes from its index on; full reads kLanes values, for nf4 nine bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace salr {
namespace {

constexpr const char* kSimdName = "avx512";
constexpr int kLanes = 16;
constexpr int kTileRows = 12, kTileVectors = 2;

using Vec = __m512;
using Bits = uint16_t;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* at) { return _mm512_loadu_ps(at); }
inline void keep(float* at, Vec v) { _mm512_storeu_ps(at, v); }
inline Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec times_plus(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_of(Vec lanes) { return _mm512_reduce_add_ps(lanes); }

inline __m256i load32(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// Keeps a load apart from the expansion of what it loads: with a memory operand those take 2.5 times as long on Zen 4.
template <class T>
inline T in_register(T value) {
  asm("" : "+v"(value));
  return value;
}

struct Bf16 {
  static constexpr bool kIsScaled = false;
  static int64_t bytes(int64_t n) { return 2 * n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return widened(_mm256_maskz_expand_epi16(bits, in_register(load32(values + 2 * index))));
  }
  static Vec full(const uint8_t* values, int64_t index) { return widened(load32(values + 2 * index)); }

 private:
  static Vec widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
};

struct Fp16 {
  static constexpr bool kIsScaled = false;
  static int64_t bytes(int64_t n) { return 2 * n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(bits, in_register(load32(values + 2 * index))));
  }
  static Vec full(const uint8_t* values, int64_t index) { return _mm512_cvtph_ps(load32(values + 2 * index)); }
};

struct Fp32 {
  static constexpr bool kIsScaled = false;
  static int64_t bytes(int64_t n) { return 4 * n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return _mm512_maskz_expand_ps(bits, in_register(full(values, index)));
  }
  static Vec full(const uint8_t* values, int64_t index) { return _mm512_loadu_ps(values + 4 * index); }
};

struct Int8 {
  static constexpr bool kIsScaled = true;
  static int64_t bytes(int64_t n) { return n; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return widened(_mm_maskz_expand_epi8(bits, in_register(stored(values, index))));
  }
  static Vec full(const uint8_t* values, int64_t index) { return widened(stored(values, index)); }

 private:
  static __m128i stored(const uint8_t* values, int64_t index) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + index));
  }
  static Vec widened(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); }
};

// The code book is turned so that code 7, which stands for 0, is 0: lanes without a value then need no look-up of it.
struct Nf4 {
  static constexpr bool kIsScaled = true;
  static int64_t bytes(int64_t n) { return (n + 1) / 2; }
  static Vec sparse(const uint8_t* values, int64_t index, Bits bits) {
    return looked_up(_mm_maskz_expand_epi8(bits, codes(values, index)));
  }
  static Vec full(const uint8_t* values, int64_t index) { return looked_up(codes(values, index)); }

 private:
  static __m128i codes(const uint8_t* values, int64_t index) {
    uint64_t word;
    std::memcpy(&word, values + index / 2, sizeof word);
    if (index % 2) word = word >> 4 | static_cast<uint64_t>(values[index / 2 + 8]) << 60;
    word ^= 0x7777777777777777u;
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0fu;
    const __m128i low = _mm_cvtsi64_si128(static_cast<int64_t>(word & nibble));
    const __m128i high = _mm_cvtsi64_si128(static_cast<int64_t>(word >> 4 & nibble));
    return _mm_unpacklo_epi8(low, high);
  }
  static Vec looked_up(__m128i codes) {
    const float* b = kNf4CodeBook;
    const Vec book = _mm512_setr_ps(b[7], b[6], b[5], b[4], b[3], b[2], b[1], b[0], b[15], b[14], b[13], b[12], b[11],
                                    b[10], b[9], b[8]);
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), book);
  }
};

}  // namespace
}  // namespace salr
