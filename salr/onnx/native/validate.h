// From a node's tensors to matrices that kernels may trust.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"
#include "tensors.h"

namespace salr {

struct Attributes {
  int64_t out_features, in_features, nnz;
  Encoding encoding;
  int64_t group_size;
};

// The weight of a node, with what is held in another form than the model's.
struct Weight {
  Matrix matrix;
  std::vector<uint64_t> row_offsets;
  std::vector<float> scales;
};

// The low-rank part: y += B (scaling * (A x)); rank 0 where there is none.
struct LowRank {
  Matrix a, b;
  std::vector<float> scaling;
  int64_t rank() const { return static_cast<int64_t>(scaling.size()); }
};

// Every function throws ModelError: tensor, what was found, what was needed.
Attributes checked_attributes(int64_t out_features, int64_t in_features, int64_t nnz, const std::string& encoding,
                              int64_t group_size);
Weight checked_weight(const Attributes& attributes, const Tensor& bitmap, const Tensor& values,
                      const Tensor& row_offsets, const Tensor& scales);
LowRank checked_low_rank(const Attributes& attributes, const Tensor& a, const Tensor& b, const Tensor& scaling);

}  // namespace salr
