// A packed matrix as kernels see it, and the kernels of one instruction set.
//
// Invariant of every Matrix given to a kernel (validate.cpp): row_offsets start at 0 and differ by the popcounts of the
// bitmap's rows, bits past n_columns are 0, and a sparse matrix has 64 readable bytes behind its last value. So no
// kernel that advances by popcounts leaves `values`.
#pragma once

#include <cstdint>

namespace salr {

enum class Encoding { bf16, fp16, fp32, int8, nf4 };

constexpr float kNf4CodeBook[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
    0.7229568362236023f, 1.0f};

// (n_rows, n_columns); bitmap and row_offsets are null where every weight is stored, scales where there are none.
// Row r's scales begin at scales + r * n_groups, one for each group_size columns.
struct Matrix {
  int64_t n_rows = 0;
  int64_t n_columns = 0;
  Encoding encoding = Encoding::fp32;
  const uint8_t* values = nullptr;
  const uint8_t* bitmap = nullptr;
  const uint64_t* row_offsets = nullptr;
  const float* scales = nullptr;
  int64_t group_size = 0;
  int64_t n_groups = 0;

  int64_t bitmap_width() const { return (n_columns + 7) / 8; }
  int64_t first_value(int64_t row) const {
    return row_offsets ? static_cast<int64_t>(row_offsets[row]) : row * n_columns;
  }
};

// One product of a sum: matrix times the inputs x, which `prepare` laid out (or row-major where is_plain says so).
struct Term {
  const Matrix* matrix;
  const float* x;
};

// y (m, ld) row-major, float or half.
struct Output {
  void* data;
  bool is_half;
  int64_t ld;
};

// Largest number of inputs that one call takes.
constexpr int64_t kMostInputs = 256;
// Columns that one call of `prepare` is best given.
constexpr int64_t kPrepareColumns = 512;

struct Kernels {
  const char* name;
  // Whether these kernels can compute with a matrix.
  bool (*supports)(const Matrix& matrix);
  // Whether (m, k) row-major floats need no preparation.
  bool (*is_plain)(int64_t m, int64_t k);
  // Floats that prepared inputs take.
  int64_t (*prepared_size)(int64_t m, int64_t k);
  // Lay columns [begin, end) of x (m, k) row-major out; begin is a multiple of kPrepareColumns, end too or k.
  void (*prepare)(const void* x, bool is_half, int64_t m, int64_t k, int64_t begin, int64_t end, float* out);
  // Rows [begin, end) of the sum of terms for m inputs, written to `out` (offset to input 0, row 0).
  void (*rows)(const Term* terms, int n_terms, int64_t m, int64_t begin, int64_t end, const Output& out);
};

const Kernels& scalar_kernels();
#ifdef SALR_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace salr
