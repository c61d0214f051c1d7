// int8 for processors with AVX-512 F, BW, VL, VBMI2 and VNNI: compiled with these enabled, and called only where they are
// there.
//
// A block is one or two words of 64 columns that share a scale. Prepared inputs: a float for each block and input (what a
// unit stands for), then for each block and input four planes of bytes, the lowest first. An input's number has 2^31
// added, so that all of its bytes are unsigned, as vpdpbusd wants them; weights times 128 are taken from the highest
// plane's sum.

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "few_inputs.h"
#include "half.h"

namespace salr {
namespace {

constexpr int kPlanes = 4;
constexpr int kLeastExponent = -90;  // of the largest input: smaller ones are rounded as if it were this
constexpr int64_t kLine = 64;

int64_t blocks_of(int64_t n_columns, int64_t width) { return (n_columns + width - 1) / width; }

// Columns of a block.
int64_t block_width(const Matrix& w) { return w.n_groups == 1 || w.group_size % (2 * kWord) == 0 ? 2 * kWord : kWord; }

bool supports(const Matrix& w) {
  return w.encoding == Encoding::int8 && w.scales && (w.n_groups == 1 || w.group_size % kWord == 0);
}

int64_t units_size(int64_t n_blocks, int64_t m) { return (n_blocks * m * 4 + kLine - 1) / kLine * kLine; }

int64_t prepared_size(const Matrix& w, int64_t m) {
  const int64_t width = block_width(w), n_blocks = blocks_of(w.n_columns, width);
  return units_size(n_blocks, m) + n_blocks * m * kPlanes * width;
}

// The four planes of `width` floats; returns what a unit stands for, NaN where an input is not finite.
float split(const float* x, int64_t width, uint8_t* planes) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 odd = 0;
  for (int64_t k = 0; k < width; k += 16) {
    const __m512 v = _mm512_abs_ps(_mm512_loadu_ps(x + k));
    odd |= _mm512_cmp_ps_mask(v, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, v);
  }
  if (odd) return NAN;
  const float largest = _mm512_reduce_max_ps(most);
  int exponent = 0;
  std::frexp(largest, &exponent);  // largest < 2^exponent
  if (exponent < kLeastExponent) exponent = kLeastExponent;
  const __m512 scale = _mm512_set1_ps(std::ldexp(1.0f, 31 - exponent));
  for (int64_t k = 0; k < width; k += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), scale));
    const __m512i number = _mm512_xor_epi32(whole, _mm512_set1_epi32(INT32_MIN));
    for (int plane = 0; plane < kPlanes; ++plane)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + plane * width + k),
                       _mm512_cvtepi32_epi8(_mm512_srli_epi32(number, static_cast<unsigned>(8 * plane))));
  }
  return std::ldexp(1.0f, exponent - 31);
}

bool prepare(const Matrix& w, const void* x, bool is_half, int64_t m, uint8_t* out) {
  const int64_t k = w.n_columns, width = block_width(w), n_blocks = blocks_of(k, width);
  float* units = reinterpret_cast<float*>(out);
  uint8_t* planes = out + units_size(n_blocks, m);
  float block[2 * kWord];
  for (int64_t b = 0; b < n_blocks; ++b)
    for (int64_t i = 0; i < m; ++i) {
      const int64_t first = b * width, n = k - first < width ? k - first : width;
      for (int64_t j = 0; j < width; ++j) block[j] = j < n ? input_at(x, is_half, i * k + first + j) : 0.0f;
      const float unit = split(block, width, planes + (b * m + i) * kPlanes * width);
      if (std::isnan(unit)) return false;
      units[b * m + i] = unit;
    }
  return true;
}

__m512i bytes_at(const uint8_t* at) { return _mm512_loadu_si512(at); }

// Keeps a load apart from the expansion of what it loads: with a memory operand those take 2.5 times as long on Zen 4.
__m512i in_register(__m512i value) {
  asm("" : "+v"(value));
  return value;
}

template <int kWords, bool kIsSparse, int kInputs>
class Row {
 public:
  Row(const Matrix& w, const uint8_t* x, int64_t row)
      : values_(w.values + w.first_value(row)),
        bits_(kIsSparse ? w.bitmap + row * w.bitmap_width() : nullptr),
        scales_(w.scales + row * w.n_groups),
        units_(reinterpret_cast<const float*>(x)),
        planes_(x + units_size(blocks_of(w.n_columns, kWidth), kInputs)) {
    for (__m512& sum : sums_) sum = _mm512_setzero_ps();
  }

  // Columns [begin, end), which share a scale: begin is a multiple of kWidth, end too where kIsWhole.
  template <bool kIsWhole>
  void add(int64_t begin, int64_t end, float scale) {
    for (; begin < end; begin += kWidth) block<kIsWhole>(begin, end, scale);
  }

  float scale(int64_t group) const { return scales_[group]; }
  float sum(int input) const { return _mm512_reduce_add_ps(sums_[input]); }

 private:
  static constexpr int64_t kWidth = kWords * kWord;

  template <bool kIsWhole>
  __m512i weights(int64_t k, int64_t end) {
    if (!kIsSparse) {
      const int64_t n = end - k;
      const __mmask64 mask = kIsWhole || n >= kWord ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1;
      return _mm512_maskz_loadu_epi8(mask, values_ + k);
    }
    const uint64_t mask = word_at(bits_ + k / 8, kIsWhole ? kWord : end - k);
    __builtin_prefetch(values_ + kAheadBytes);
    const __m512i found = _mm512_maskz_expand_epi8(mask, in_register(bytes_at(values_)));
    values_ += __builtin_popcountll(mask);
    return found;
  }

  template <bool kIsWhole>
  void block(int64_t k, int64_t end, float scale) {
    const __m512i zero = _mm512_setzero_si512(), offset = _mm512_set1_epi8(-128);
    __m512i shifted = zero, sums[kInputs][kPlanes];
    for (auto& planes : sums)
      for (__m512i& sum : planes) sum = zero;
    const uint8_t* x = planes_ + k * kInputs * kPlanes;
    if (kIsSparse) __builtin_prefetch(bits_ + k / 8 + kAheadBytes / 4);
    for (int word = 0; word < kWords; ++word) {
      const __m512i w = weights<kIsWhole>(k + word * kWord, end);
      shifted = _mm512_dpbusd_epi32(shifted, offset, w);
      for (int i = 0; i < kInputs; ++i)
        for (int plane = 0; plane < kPlanes; ++plane)
          sums[i][plane] = _mm512_dpbusd_epi32(sums[i][plane], bytes_at(x + (i * kPlanes + plane) * kWidth + word * kWord), w);
    }
    const float* units = units_ + k / kWidth * kInputs;
    for (int i = 0; i < kInputs; ++i) {
      const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(sums[i][1], 8), sums[i][0]);
      const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(_mm512_sub_epi32(sums[i][3], shifted), 8), sums[i][2]);
      const __m512 all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low));
      sums_[i] = _mm512_fmadd_ps(all, _mm512_set1_ps(scale * units[i]), sums_[i]);
    }
  }

  const uint8_t* values_;
  const uint8_t* bits_;
  const float* scales_;
  const float* units_;
  const uint8_t* planes_;
  __m512 sums_[kInputs];
};

template <int kWords, bool kIsSparse, int kInputs>
void rows_of(const Matrix& w, const uint8_t* x, int64_t begin, int64_t end, const float* rest, const Output& out) {
  const int64_t width = kWords * kWord, group_size = w.n_groups == 1 ? w.n_columns : w.group_size;
  for (int64_t r = begin; r < end; ++r) {
    Row<kWords, kIsSparse, kInputs> row(w, x, r);
    int64_t k = 0;
    for (int64_t group = 0; group < w.n_groups; ++group) {
      const int64_t stop = (group + 1) * group_size < w.n_columns ? (group + 1) * group_size : w.n_columns;
      const int64_t whole = k + (stop - k) / width * width;
      row.template add<true>(k, whole, row.scale(group));
      row.template add<false>(whole, stop, row.scale(group));
      k = stop;
    }
    for (int i = 0; i < kInputs; ++i) store(out, i, r, row.sum(i) + (rest ? rest[i * w.n_rows + r] : 0.0f));
  }
}

template <int kInputs>
void rows_for(const Matrix& w, const uint8_t* x, int64_t begin, int64_t end, const float* rest, const Output& out) {
  const bool is_wide = block_width(w) == 2 * kWord;
  if (w.bitmap)
    is_wide ? rows_of<2, true, kInputs>(w, x, begin, end, rest, out) : rows_of<1, true, kInputs>(w, x, begin, end, rest, out);
  else
    is_wide ? rows_of<2, false, kInputs>(w, x, begin, end, rest, out) : rows_of<1, false, kInputs>(w, x, begin, end, rest, out);
}

void rows(const Matrix& w, const uint8_t* x, int64_t m, int64_t begin, int64_t end, const float* rest, const Output& out) {
  switch (m) {
    case 1: return rows_for<1>(w, x, begin, end, rest, out);
    case 2: return rows_for<2>(w, x, begin, end, rest, out);
    case 3: return rows_for<3>(w, x, begin, end, rest, out);
    default: return rows_for<4>(w, x, begin, end, rest, out);
  }
}

}  // namespace

const FewInputKernels& few_inputs_vnni() {
  static const FewInputKernels kernels{supports, prepared_size, prepare, rows};
  return kernels;
}

}  // namespace salr
