// The kernels of a vector unit, written once for all: include simd_*.h first, which says what a vector is.
//
// Up to 8 inputs: each weight is expanded once into a register and multiplied with every input; columns go in slabs whose
// inputs stay in the first-level cache. More inputs: weights of a few rows are expanded into a small buffer, and tiles of
// kTileRows rows x kTileVectors * kLanes inputs are multiplied from there.
//
// Prepared inputs have zeros where there are none. Up to 8: (K / kLanes, m, kLanes), so that what is loaded together lies
// together. More: panels of (K, kPanel), one after the other.
#pragma once

#include <cstring>

#include "half.h"
#include "matrix.h"

namespace salr {
namespace {

constexpr int64_t kFewInputs = 8, kPanel = kTileVectors * kLanes;
constexpr int64_t kDotRows = 16;         // rows whose partial sums are held at once
constexpr int64_t kSlabFloats = 3072;    // inputs of a slab in the first-level cache
constexpr int64_t kTileBlock = 24;       // rows whose weights are expanded at once
constexpr int64_t kTileColumns = 128;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Ask for what will be read next. An address past the tensor is harmless: nothing is read that is not used.
inline void fetch(const uint8_t* at) { __builtin_prefetch(at); }

constexpr int64_t kLineBytes = 64;

// Where a row stands: index of its next stored value, its bits and its scales.
struct Cursor {
  int64_t index;
  const uint8_t* bits;
  const float* scales;
};

Cursor row_cursor(const Matrix& w, int64_t row) {
  return {w.first_value(row), w.bitmap ? w.bitmap + row * w.bitmap_width() : nullptr,
          w.scales ? w.scales + row * w.n_groups : nullptr};
}

// The bits of kLanes columns from k on, of which the row has only some where `is_last`.
inline Bits bits_at(const uint8_t* bits, int64_t k, bool is_short) {
  if (kLanes == 8 || is_short) return bits[k / 8];
  Bits found;
  std::memcpy(&found, bits + k / 8, sizeof found);
  return found;
}

// Fewer than kLanes stored values in order, zeros behind them (nf4: any numbers, whose inputs are 0).
template <class E>
Vec partial(const uint8_t* values, int64_t index, int64_t n) {
  alignas(64) uint8_t copy[64] = {};
  const bool is_odd = E::bytes(2) == 1 && index % 2;
  const int64_t first = E::bytes(index + 1) - E::bytes(1);
  std::memcpy(copy, values + first, static_cast<size_t>(E::bytes(is_odd + n)));
  return E::full(copy, is_odd);
}

// One row's weights, kLanes at a time, from column `begin` to `end`: both multiples of kLanes but for the last column.
//
// step(chain, k, weight) is called with chain = 0 ... kChains - 1 in turn, so that as many independent sums are under way
// as the multiplier's latency asks for. `ahead` is how far from this row's next value that of the row after it lies:
// what comes there is fetched meanwhile, because a slab of a row is too short for the processor to foresee the stream.
template <class E, bool kIsSparse, int kChains, class Step>
inline __attribute__((always_inline)) void expand(const Matrix& w, Cursor& at, int64_t begin, int64_t end, int64_t ahead,
                                                  Step step) {
  const uint8_t* values = w.values;
  const int64_t whole = end - end % kLanes;
  const bool is_scaled = E::kIsScaled && at.scales;
  int64_t index = at.index, k = begin;
  Vec scale = all(1.0f);
  const auto one = [&](int chain, int64_t column) {
    const Bits bits = kIsSparse ? bits_at(at.bits, column, false) : Bits{0};
    if (kIsSparse) fetch(values + E::bytes(index + ahead));
    const Vec weight = kIsSparse ? E::sparse(values, index, bits) : E::full(values, index);
    index += kIsSparse ? __builtin_popcount(bits) : kLanes;
    step(chain, column, E::kIsScaled ? times(weight, scale) : weight);
  };
  while (k < end) {
    const int64_t group = is_scaled ? k / w.group_size : 0;
    const int64_t stop = is_scaled ? smaller(end, (group + 1) * w.group_size) : end, full = smaller(stop, whole);
    if (is_scaled) scale = all(at.scales[group]);
    for (; k + kChains * kLanes <= full; k += kChains * kLanes)
      for (int chain = 0; chain < kChains; ++chain) one(chain, k + chain * kLanes);
    for (; k < full; k += kLanes) one(0, k);
    if (k < stop) {
      const Bits bits = kIsSparse ? bits_at(at.bits, k, stop - k <= 8) : Bits{0};
      const Vec weight = kIsSparse ? E::sparse(values, index, bits) : partial<E>(values, index, stop - k);
      index += kIsSparse ? __builtin_popcount(bits) : stop - k;
      step(0, k, E::kIsScaled ? times(weight, scale) : weight);
      k = stop;
    }
  }
  at.index = index;
}

// --- up to 8 inputs ---------------------------------------------------------------------------------------------------

template <class E, bool kIsSparse, int kInputs>
void dot_row(const Matrix& w, Cursor& at, int64_t begin, int64_t end, int64_t ahead, const float* x, Vec* sums) {
  constexpr int kChains = kInputs == 1 ? 4 : kInputs <= 4 ? 2 : 1;
  Vec own[kChains][kInputs];
  for (int i = 0; i < kInputs; ++i) {
    own[0][i] = sums[i];
    for (int chain = 1; chain < kChains; ++chain) own[chain][i] = zero();
  }
  expand<E, kIsSparse, kChains>(w, at, begin, end, ahead, [&](int chain, int64_t k, Vec weight) {
    for (int i = 0; i < kInputs; ++i)
      own[chain][i] = times_plus(weight, load(x + k * kInputs + kLanes * i), own[chain][i]);
  });
  for (int i = 0; i < kInputs; ++i) {
    for (int chain = 1; chain < kChains; ++chain) own[0][i] = plus(own[0][i], own[chain][i]);
    sums[i] = own[0][i];
  }
}

template <class E, bool kIsSparse, int kInputs>
void dot(const Matrix& w, const float* x, int64_t begin, int64_t end, Vec* sums) {
  const int64_t slab = kSlabFloats / kInputs / 128 * 128, n_rows = end - begin;
  Cursor at[kDotRows];
  for (int64_t row = 0; row < n_rows; ++row) at[row] = row_cursor(w, begin + row);
  for (int64_t k = 0; k < w.n_columns; k += slab) {
    const int64_t stop = smaller(k + slab, w.n_columns);
    for (int64_t row = 0; row < n_rows; ++row) {
      const bool is_last = row + 1 == n_rows;
      const Cursor& next = at[is_last ? 0 : row + 1];
      if (kIsSparse) {
        const int64_t first = is_last ? stop : k, last = smaller(first + slab, w.n_columns);
        for (int64_t byte = first / 8; byte < last / 8; byte += kLineBytes) fetch(next.bits + byte);
      }
      dot_row<E, kIsSparse, kInputs>(w, at[row], k, stop, next.index - at[row].index, x, sums + row * kInputs);
    }
  }
}

template <int kInputs>
using Dot = void (*)(const Matrix&, const float*, int64_t, int64_t, Vec*);

template <int kInputs>
void few_inputs(const Term* terms, int n_terms, int64_t begin, int64_t end, const Output& out) {
  static constexpr Dot<kInputs> dots[5][2] = {
      {dot<Bf16, false, kInputs>, dot<Bf16, true, kInputs>}, {dot<Fp16, false, kInputs>, dot<Fp16, true, kInputs>},
      {dot<Fp32, false, kInputs>, dot<Fp32, true, kInputs>}, {dot<Int8, false, kInputs>, dot<Int8, true, kInputs>},
      {dot<Nf4, false, kInputs>, dot<Nf4, true, kInputs>}};
  for (int64_t first = begin; first < end; first += kDotRows) {
    const int64_t last = smaller(first + kDotRows, end);
    Vec sums[kDotRows * kInputs];
    for (Vec& sum : sums) sum = zero();
    for (int t = 0; t < n_terms; ++t) {
      const Matrix& w = *terms[t].matrix;
      dots[static_cast<int>(w.encoding)][w.bitmap != nullptr](w, terms[t].x, first, last, sums);
    }
    for (int64_t row = first; row < last; ++row)
      for (int i = 0; i < kInputs; ++i) store(out, i, row, sum_of(sums[(row - first) * kInputs + i]));
  }
}

// --- more inputs ------------------------------------------------------------------------------------------------------

template <class E, bool kIsSparse>
void decode(const Matrix& w, Cursor& at, int64_t begin, int64_t end, float* out) {
  if (kIsSparse) fetch(at.bits + begin / 8 + kLineBytes);
  expand<E, kIsSparse, 2>(w, at, begin, end, 1024 / E::bytes(2) * 2,
                          [&](int, int64_t k, Vec weight) { keep(out + k - begin, weight); });
}

// sums (kRows, kVectors * kLanes, row stride ld) += weights (kRows, n) * x (n, kPanel). The n products are added to each
// other first: a sum of many blocks of columns then loses less than one long chain does.
template <int kRows, int kVectors>
void tile(const float* weights, const float* x, int64_t n, float* sums, int64_t ld) {
  Vec own[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) own[r][v] = zero();
  for (int64_t k = 0; k < n; ++k) {
    Vec inputs[kVectors];
    for (int v = 0; v < kVectors; ++v) inputs[v] = load(x + k * kPanel + kLanes * v);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = all(weights[r * kTileColumns + k]);
      for (int v = 0; v < kVectors; ++v) own[r][v] = times_plus(weight, inputs[v], own[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* at = sums + r * ld + kLanes * v;
      keep(at, plus(load(at), own[r][v]));
    }
}

template <int kRows, int kVectors>
void last_tile(const float* weights, int64_t n_rows, const float* x, int64_t n, float* sums, int64_t ld) {
  if (n_rows == kRows)
    tile<kRows, kVectors>(weights, x, n, sums, ld);
  else if constexpr (kRows > 1)
    last_tile<kRows - 1, kVectors>(weights, n_rows, x, n, sums, ld);
}

template <int kVectors>
void tiles(const float* weights, int64_t n_rows, const float* x, int64_t n, float* sums, int64_t ld) {
  int64_t r = 0;
  for (; r + kTileRows <= n_rows; r += kTileRows)
    tile<kTileRows, kVectors>(weights + r * kTileColumns, x, n, sums + r * ld, ld);
  last_tile<kTileRows - 1, kVectors>(weights + r * kTileColumns, n_rows - r, x, n, sums + r * ld, ld);
}

using Decode = void (*)(const Matrix&, Cursor&, int64_t, int64_t, float*);
constexpr Decode kDecodes[5][2] = {{decode<Bf16, false>, decode<Bf16, true>}, {decode<Fp16, false>, decode<Fp16, true>},
                                   {decode<Fp32, false>, decode<Fp32, true>}, {decode<Int8, false>, decode<Int8, true>},
                                   {decode<Nf4, false>, decode<Nf4, true>}};

void add_term(const Term& term, int64_t m, int64_t first, int64_t n_rows, float* sums, int64_t ld) {
  const Matrix& w = *term.matrix;
  const Decode decode_part = kDecodes[static_cast<int>(w.encoding)][w.bitmap != nullptr];
  const int64_t padded = rounded_up(w.n_columns, kLanes);
  alignas(32) float weights[kTileBlock * kTileColumns];
  Cursor at[kTileBlock];
  for (int64_t r = 0; r < n_rows; ++r) at[r] = row_cursor(w, first + r);
  for (int64_t k = 0; k < w.n_columns; k += kTileColumns) {
    const int64_t stop = smaller(k + kTileColumns, w.n_columns);
    for (int64_t r = 0; r < n_rows; ++r) decode_part(w, at[r], k, stop, weights + r * kTileColumns);
    for (int64_t i = 0; i < m; i += kPanel) {
      const float* x = term.x + i * padded + k * kPanel;
      if (m - i > kLanes)
        tiles<2>(weights, n_rows, x, stop - k, sums + i, ld);
      else
        tiles<1>(weights, n_rows, x, stop - k, sums + i, ld);
    }
  }
}

void many_inputs(const Term* terms, int n_terms, int64_t m, int64_t begin, int64_t end, const Output& out) {
  const int64_t ld = rounded_up(m, kPanel);
  for (int64_t first = begin; first < end; first += kTileBlock) {
    const int64_t n_rows = smaller(kTileBlock, end - first);
    alignas(32) float sums[kTileBlock * kMostInputs];
    std::memset(sums, 0, static_cast<size_t>(n_rows * ld) * sizeof(float));
    for (int t = 0; t < n_terms; ++t) add_term(terms[t], m, first, n_rows, sums, ld);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t r = 0; r < n_rows; ++r) store(out, i, first + r, sums[r * ld + i]);
  }
}

// --- the table --------------------------------------------------------------------------------------------------------

void rows(const Term* terms, int n_terms, int64_t m, int64_t begin, int64_t end, const Output& out) {
  switch (m) {
    case 1: return few_inputs<1>(terms, n_terms, begin, end, out);
    case 2: return few_inputs<2>(terms, n_terms, begin, end, out);
    case 3: return few_inputs<3>(terms, n_terms, begin, end, out);
    case 4: return few_inputs<4>(terms, n_terms, begin, end, out);
    case 5: return few_inputs<5>(terms, n_terms, begin, end, out);
    case 6: return few_inputs<6>(terms, n_terms, begin, end, out);
    case 7: return few_inputs<7>(terms, n_terms, begin, end, out);
    case 8: return few_inputs<8>(terms, n_terms, begin, end, out);
    default: return many_inputs(terms, n_terms, m, begin, end, out);
  }
}

// Groups of scales have to begin where a vector does.
bool supports(const Matrix& w) { return !w.scales || w.n_groups == 1 || w.group_size % kLanes == 0; }

bool is_plain(int64_t m, int64_t k) { return m == 1 && k % kLanes == 0; }

int64_t prepared_size(int64_t m, int64_t k) {
  return rounded_up(k, kLanes) * (m <= kFewInputs ? m : rounded_up(m, kPanel));
}

void prepare(const void* x, bool is_half, int64_t m, int64_t k, int64_t begin, int64_t end, float* out) {
  const int64_t padded = rounded_up(k, kLanes), stop = end == k ? padded : end;
  if (m <= kFewInputs) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t column = begin; column < stop; ++column)
        out[column / kLanes * kLanes * m + kLanes * i + column % kLanes] = column < k ? input_at(x, is_half, i * k + column) : 0.0f;
    return;
  }
  for (int64_t first = 0; first < m; first += kPanel)
    for (int64_t column = begin; column < stop; ++column) {
      float* lanes = out + first * padded + column * kPanel;
      for (int64_t i = 0; i < kPanel; ++i)
        lanes[i] = first + i < m && column < k ? input_at(x, is_half, (first + i) * k + column) : 0.0f;
    }
}

}  // namespace

}  // namespace salr
