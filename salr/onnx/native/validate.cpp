#include "validate.h"

#include <cstring>

#include "half.h"

namespace salr {
namespace {

constexpr int64_t kPaddingBytes = 64;
constexpr int64_t kMostElements = int64_t{1} << 46;  // so that no product of sizes in bytes overflows

[[noreturn]] void refuse(const Tensor& tensor, const std::string& found, const std::string& needed) {
  throw ModelError("salr.SparseLinear: tensor '" + tensor.name + "': " + found + ", needed " + needed);
}

std::string shape_text(std::vector<int64_t> shape) {
  Tensor tensor;
  tensor.shape = std::move(shape);
  return tensor.text();
}

void expect(const Tensor& tensor, const char* type_name, bool has_type, const std::vector<int64_t>& shape) {
  if (!has_type) refuse(tensor, "element type " + std::to_string(tensor.type), type_name);
  if (tensor.shape != shape) refuse(tensor, "shape " + tensor.text(), shape_text(shape));
}

struct Storage {
  int type;
  const char* type_name;
  int64_t bits;
};

Storage storage_of(Encoding encoding) {
  switch (encoding) {
    case Encoding::bf16: return {kBfloat16, "bfloat16", 16};
    case Encoding::fp16: return {kFloat16, "float16", 16};
    case Encoding::fp32: return {kFloat, "float", 32};
    case Encoding::int8: return {kUint8, "uint8", 8};
    case Encoding::nf4: return {kUint8, "uint8", 4};
  }
  throw ModelError("salr.SparseLinear: unknown encoding");
}

bool is_quantized(Encoding encoding) { return encoding == Encoding::int8 || encoding == Encoding::nf4; }

// Float or half, of any alignment, as floats.
std::vector<float> floats(const Tensor& tensor) {
  std::vector<float> out(static_cast<size_t>(tensor.count()));
  if (tensor.type == kFloat && !out.empty()) std::memcpy(out.data(), tensor.data, out.size() * sizeof(float));
  for (size_t i = 0; tensor.type == kFloat16 && i < out.size(); ++i) {
    uint16_t half;
    std::memcpy(&half, static_cast<const uint8_t*>(tensor.data) + 2 * i, sizeof half);
    out[i] = float_of_half(half);
  }
  return out;
}

int64_t popcount(const uint8_t* bytes, int64_t n) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    count += __builtin_popcountll(word);
  }
  for (; i < n; ++i) count += __builtin_popcount(bytes[i]);
  return count;
}

void check_values(const Attributes& attributes, const Tensor& values) {
  const Storage storage = storage_of(attributes.encoding);
  if (values.type != storage.type || values.shape.size() != 1)
    refuse(values, "element type " + std::to_string(values.type) + ", shape " + values.text(),
           std::string("a vector of ") + storage.type_name);
  const int64_t width = storage.bits < 8 ? 8 : storage.bits;
  const int64_t used = (attributes.nnz * storage.bits + 7) / 8, found = values.count() * (width / 8);
  if (found < used + kPaddingBytes)
    refuse(values, std::to_string(found) + " bytes",
           std::to_string(used + kPaddingBytes) + " for " + std::to_string(attributes.nnz) + " values and 64 of padding");
}

void check_bits(const Attributes& attributes, const Tensor& bitmap, const Tensor& row_offsets, Weight& weight) {
  const int64_t n = attributes.out_features, k = attributes.in_features, width = (k + 7) / 8;
  expect(bitmap, "uint8", bitmap.type == kUint8, {n, width});
  expect(row_offsets, "uint64", row_offsets.type == kUint64, {n + 1});
  weight.row_offsets.resize(static_cast<size_t>(n + 1));
  std::memcpy(weight.row_offsets.data(), row_offsets.data, weight.row_offsets.size() * sizeof(uint64_t));
  const uint8_t* bits = static_cast<const uint8_t*>(bitmap.data);
  uint64_t total = 0;
  for (int64_t row = 0; row < n; ++row, bits += width) {
    if (weight.row_offsets[static_cast<size_t>(row)] != total)
      refuse(row_offsets, std::to_string(weight.row_offsets[static_cast<size_t>(row)]) + " at row " + std::to_string(row),
             std::to_string(total) + ", the number of bits before it");
    if (k % 8 && bits[width - 1] >> (k % 8))
      refuse(bitmap, "a bit past column " + std::to_string(k) + " in row " + std::to_string(row), "0");
    total += static_cast<uint64_t>(popcount(bits, width));
  }
  if (weight.row_offsets.back() != total || total != static_cast<uint64_t>(attributes.nnz))
    refuse(row_offsets, std::to_string(weight.row_offsets.back()) + " at its end",
           "nnz = " + std::to_string(attributes.nnz) + " = " + std::to_string(total) + " bits");
}

Matrix factor(const Tensor& tensor, int64_t n_rows, int64_t n_columns) {
  const bool is_known = tensor.type == kFloat || tensor.type == kFloat16 || tensor.type == kBfloat16 || tensor.type == kInt8;
  expect(tensor, "float, float16, bfloat16 or int8", is_known, {n_rows, n_columns});
  Matrix matrix;
  matrix.n_rows = n_rows;
  matrix.n_columns = n_columns;
  matrix.encoding = tensor.type == kFloat      ? Encoding::fp32
                    : tensor.type == kFloat16  ? Encoding::fp16
                    : tensor.type == kBfloat16 ? Encoding::bf16
                                               : Encoding::int8;
  matrix.values = static_cast<const uint8_t*>(tensor.data);
  return matrix;
}

}  // namespace

Attributes checked_attributes(int64_t out_features, int64_t in_features, int64_t nnz, const std::string& encoding,
                              int64_t group_size) {
  int64_t size = 0;
  if (out_features < 1 || in_features < 1 || __builtin_mul_overflow(out_features, in_features, &size) ||
      size > kMostElements)
    throw ModelError("salr.SparseLinear: out_features " + std::to_string(out_features) + ", in_features " +
                     std::to_string(in_features) + ", needed a matrix of 1 to 2^46 weights");
  if (nnz < 0 || nnz > size)
    throw ModelError("salr.SparseLinear: nnz " + std::to_string(nnz) + ", needed 0 to " + std::to_string(size));
  Attributes found{out_features, in_features, nnz, Encoding::fp32, group_size};
  const char* names[] = {"bf16", "fp16", "fp32", "int8", "nf4"};
  int index = 0;
  while (index < 5 && encoding != names[index]) ++index;
  if (index == 5)
    throw ModelError("salr.SparseLinear: encoding '" + encoding + "', needed bf16, fp16, fp32, int8 or nf4");
  found.encoding = static_cast<Encoding>(index);
  if (is_quantized(found.encoding) ? group_size < 1 || group_size > in_features : group_size != 0)
    throw ModelError("salr.SparseLinear: group_size " + std::to_string(group_size) + ", needed 1 to in_features for int8 " +
                     "and nf4, 0 otherwise");
  return found;
}

Weight checked_weight(const Attributes& attributes, const Tensor& bitmap, const Tensor& values,
                      const Tensor& row_offsets, const Tensor& scales) {
  Weight weight;
  Matrix& matrix = weight.matrix;
  matrix.n_rows = attributes.out_features;
  matrix.n_columns = attributes.in_features;
  matrix.encoding = attributes.encoding;
  check_values(attributes, values);
  matrix.values = static_cast<const uint8_t*>(values.data);
  if (bitmap && row_offsets) {
    check_bits(attributes, bitmap, row_offsets, weight);
    matrix.bitmap = static_cast<const uint8_t*>(bitmap.data);
    matrix.row_offsets = weight.row_offsets.data();
  } else if (bitmap || row_offsets) {
    refuse(bitmap ? bitmap : row_offsets, "only one of bitmap and row_offsets", "both or neither");
  } else if (attributes.nnz != matrix.n_rows * matrix.n_columns) {
    refuse(values, "no bitmap and nnz " + std::to_string(attributes.nnz),
           std::to_string(matrix.n_rows * matrix.n_columns) + " where every weight is stored");
  }
  if (is_quantized(attributes.encoding)) {
    matrix.group_size = attributes.group_size;
    matrix.n_groups = (matrix.n_columns + matrix.group_size - 1) / matrix.group_size;
    expect(scales, "float or float16", scales.type == kFloat || scales.type == kFloat16,
           {matrix.n_rows, matrix.n_groups});
    weight.scales = floats(scales);
    matrix.scales = weight.scales.data();
  } else if (scales) {
    refuse(scales, "scales", "none for float values");
  }
  return weight;
}

LowRank checked_low_rank(const Attributes& attributes, const Tensor& a, const Tensor& b, const Tensor& scaling) {
  LowRank found;
  if (!a && !b && !scaling) return found;
  if (!a || !b || !scaling)
    throw ModelError("salr.SparseLinear: only some of lora_A, lora_B and rank_scaling, needed all or none");
  const int64_t rank = a.shape.size() == 2 ? a.shape[0] : -1;
  if (rank < 0) refuse(a, "shape " + a.text(), "[rank, in_features]");
  found.a = factor(a, rank, attributes.in_features);
  found.b = factor(b, attributes.out_features, rank);
  expect(scaling, "float", scaling.type == kFloat, {rank});
  found.scaling = floats(scaling);
  return found;
}

}  // namespace salr
