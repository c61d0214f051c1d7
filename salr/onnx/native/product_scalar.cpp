// Kernels for any processor: decode a stretch of a row to floats, multiply, go on.

#include <cstring>

#include "half.h"
#include "matrix.h"

namespace salr {
namespace {

constexpr int64_t kStretch = 256;

template <class T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// The stored value at `index`, before scales.
float value_at(const Matrix& w, int64_t index) {
  switch (w.encoding) {
    case Encoding::bf16: return float_of_bits(static_cast<uint32_t>(load<uint16_t>(w.values + 2 * index)) << 16);
    case Encoding::fp16: return float_of_half(load<uint16_t>(w.values + 2 * index));
    case Encoding::fp32: return load<float>(w.values + 4 * index);
    case Encoding::int8: return static_cast<float>(static_cast<int8_t>(w.values[index]));
    case Encoding::nf4: return kNf4CodeBook[w.values[index / 2] >> (index % 2 * 4) & 15];
  }
  return 0.0f;
}

// Columns [begin, end) of a row to `out`; `cursor` is the index of the next stored value and moves on.
void decode(const Matrix& w, int64_t row, int64_t begin, int64_t end, int64_t& cursor, float* out) {
  const uint8_t* bits = w.bitmap ? w.bitmap + row * w.bitmap_width() : nullptr;
  for (int64_t k = begin; k < end; ++k) {
    if (bits && !(bits[k / 8] >> (k % 8) & 1)) {
      out[k - begin] = 0.0f;
      continue;
    }
    const float scale = w.scales ? w.scales[row * w.n_groups + k / w.group_size] : 1.0f;
    out[k - begin] = scale * value_at(w, cursor++);
  }
}

void accumulate(const Matrix& w, const float* x, int64_t m, int64_t row, float* sums) {
  float stretch[kStretch];
  int64_t cursor = w.first_value(row);
  for (int64_t begin = 0; begin < w.n_columns; begin += kStretch) {
    const int64_t end = begin + kStretch < w.n_columns ? begin + kStretch : w.n_columns;
    decode(w, row, begin, end, cursor, stretch);
    for (int64_t i = 0; i < m; ++i) {
      const float* input = x + i * w.n_columns + begin;
      float sum = 0.0f;
      for (int64_t k = 0; k < end - begin; ++k) sum += stretch[k] * input[k];
      sums[i] += sum;
    }
  }
}

void rows(const Term* terms, int n_terms, int64_t m, int64_t begin, int64_t end, const Output& out) {
  for (int64_t row = begin; row < end; ++row) {
    float sums[kMostInputs] = {};
    for (int t = 0; t < n_terms; ++t) accumulate(*terms[t].matrix, terms[t].x, m, row, sums);
    for (int64_t i = 0; i < m; ++i) store(out, i, row, sums[i]);
  }
}

bool supports(const Matrix&) { return true; }

bool is_plain(int64_t, int64_t) { return true; }

int64_t prepared_size(int64_t m, int64_t k) { return m * k; }

void prepare(const void* x, bool is_half, int64_t m, int64_t k, int64_t begin, int64_t end, float* out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t column = begin; column < end; ++column) out[i * k + column] = input_at(x, is_half, i * k + column);
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels{"scalar", supports, is_plain, prepared_size, prepare, rows};
  return kernels;
}

}  // namespace salr
