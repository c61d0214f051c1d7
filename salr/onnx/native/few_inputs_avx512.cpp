// bf16 for processors with AVX-512 F, BW, VL and VBMI2: compiled with these enabled, and called only where they are there.
//
// A register holds 32 weights, two in each lane: the lower of all lanes make one vector of floats, the upper another.
// Prepared inputs are in that order: for each word and input 64 floats. (fp16 the same way is slower than with AVX2: its
// conversion takes longer than all the rest.)

#include <immintrin.h>

#include "few_inputs.h"
#include "half.h"

namespace salr {
namespace {

constexpr int kParts = 4;  // vectors of a word

// The column of a word that comes out at `place`.
constexpr int64_t column(int64_t place) { return place / 32 * 32 + place % 16 * 2 + place / 16 % 2; }

inline __m512 lower(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

inline __m512 upper(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

bool supports(const Matrix& w) { return w.bitmap && w.encoding == Encoding::bf16; }

int64_t words_of(const Matrix& w) { return (w.n_columns + kWord - 1) / kWord; }

int64_t prepared_size(const Matrix& w, int64_t m) { return words_of(w) * m * kWord * 4; }

bool prepare(const Matrix& w, const void* x, bool is_half, int64_t m, uint8_t* laid_out) {
  float* out = reinterpret_cast<float*>(laid_out);
  for (int64_t word = 0; word < words_of(w); ++word)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t place = 0; place < kWord; ++place) {
        const int64_t k = word * kWord + column(place);
        *out++ = k < w.n_columns ? input_at(x, is_half, i * w.n_columns + k) : 0.0f;
      }
  return true;
}

// The next stored values to the 32 columns of `mask`; `values` moves on. The load is kept apart from the expansion: with a
// memory operand those take 2.5 times as long on Zen 4.
inline __m512i expanded(const uint8_t*& values, uint32_t mask) {
  __builtin_prefetch(values + kAheadBytes);
  __m512i stored = _mm512_loadu_si512(values);
  asm("" : "+v"(stored));
  values += 2 * __builtin_popcount(mask);
  return _mm512_maskz_expand_epi16(mask, stored);
}

template <int kInputs>
void rows_of(const Matrix& w, const uint8_t* prepared, int64_t begin, int64_t end, const float* rest, const Output& out) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* values = w.values + 2 * w.first_value(row);
    const uint8_t* bits = w.bitmap + row * w.bitmap_width();
    const float* x = reinterpret_cast<const float*>(prepared);
    __m512 sums[kInputs][kParts];
    for (auto& parts : sums)
      for (__m512& sum : parts) sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.n_columns; k += kWord, x += kInputs * kWord) {
      if (k % (8 * kWord) == 0) __builtin_prefetch(bits + k / 8 + kAheadBytes / 8);
      const uint64_t mask = word_at(bits + k / 8, w.n_columns - k);
      for (int half = 0; half < 2; ++half) {
        const __m512i pairs = expanded(values, static_cast<uint32_t>(mask >> 32 * half));
        const __m512 first = lower(pairs), second = upper(pairs);
        for (int i = 0; i < kInputs; ++i) {
          const float* own = x + i * kWord + 32 * half;
          sums[i][2 * half] = _mm512_fmadd_ps(first, _mm512_loadu_ps(own), sums[i][2 * half]);
          sums[i][2 * half + 1] = _mm512_fmadd_ps(second, _mm512_loadu_ps(own + 16), sums[i][2 * half + 1]);
        }
      }
    }
    for (int i = 0; i < kInputs; ++i) {
      const __m512 all = _mm512_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]), _mm512_add_ps(sums[i][2], sums[i][3]));
      store(out, i, row, _mm512_reduce_add_ps(all) + (rest ? rest[i * w.n_rows + row] : 0.0f));
    }
  }
}

void rows(const Matrix& w, const uint8_t* x, int64_t m, int64_t begin, int64_t end, const float* rest, const Output& out) {
  switch (m) {
    case 1: return rows_of<1>(w, x, begin, end, rest, out);
    case 2: return rows_of<2>(w, x, begin, end, rest, out);
    case 3: return rows_of<3>(w, x, begin, end, rest, out);
    default: return rows_of<4>(w, x, begin, end, rest, out);
  }
}

}  // namespace

const FewInputKernels& few_inputs_avx512() {
  static const FewInputKernels kernels{supports, prepared_size, prepare, rows};
  return kernels;
}

}  // namespace salr
