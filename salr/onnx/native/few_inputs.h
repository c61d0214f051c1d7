// Kernels for few inputs, which are laid out for one matrix: its columns go in words of 64, rows one after the other, so
// that weights stream through the processor and each is expanded once.
//
// int8 (few_inputs_vnni.cpp): inputs become whole numbers of 32 bits, in units of their own for each block of columns. Those
// down to 1/128 of their block's largest are so exactly, the others to 2^-32 of the power of two above it. Sums within a
// block are exact; blocks are scaled and added in float32.
// bf16 (few_inputs_avx512.cpp): products and sums in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace salr {

// Largest number of inputs that these kernels take.
constexpr int64_t kMostFewInputs = 4;
constexpr int64_t kWord = 64;

struct FewInputKernels {
  // Whether these kernels can compute with a matrix.
  bool (*supports)(const Matrix& matrix);
  // Bytes that m prepared inputs take.
  int64_t (*prepared_size)(const Matrix& matrix, int64_t m);
  // Lay x (m, k) row-major out; false where these kernels cannot take it.
  bool (*prepare)(const Matrix& matrix, const void* x, bool is_half, int64_t m, uint8_t* out);
  // Rows [begin, end) of the product for m inputs plus `rest` (m, n_rows), or null, written to `out`.
  void (*rows)(const Matrix& matrix, const uint8_t* x, int64_t m, int64_t begin, int64_t end, const float* rest,
               const Output& out);
};

#ifdef SALR_X86
const FewInputKernels& few_inputs_avx512();
const FewInputKernels& few_inputs_vnni();
#endif

namespace {

// How far ahead stored values are asked for. An address past the tensor is harmless: nothing is read that is not used.
constexpr int64_t kAheadBytes = 8192;

// The bits of a word of which `n_columns` are the row's.
inline uint64_t word_at(const uint8_t* bits, int64_t n_columns) {
  uint64_t word = 0;
  if (n_columns >= kWord)
    std::memcpy(&word, bits, sizeof word);
  else if (n_columns > 0)
    std::memcpy(&word, bits, static_cast<size_t>((n_columns + 7) / 8));
  return word;
}

}  // namespace
}  // namespace salr
