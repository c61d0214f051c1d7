// ONNX Runtime's tensors and errors, as the rest of this library wants them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace salr {

// What is wrong with a model; becomes an ONNX Runtime status.
struct ModelError : std::runtime_error {
  explicit ModelError(const std::string& message) : std::runtime_error(message) {}
};

// Throw what a status says and release it; nothing where it is null.
void check(const OrtApi* api, OrtStatus* status);

struct Tensor {
  std::string name;  // in the graph
  int type = kUndefined;
  std::vector<int64_t> shape;
  const void* data = nullptr;

  explicit operator bool() const { return data != nullptr || !shape.empty(); }
  int64_t count() const;
  std::string text() const;  // "[2, 3]"
};

Tensor tensor_of(const OrtApi* api, const OrtValue* value, const std::string& name);

// The name of an input in the graph, empty where it is left out.
std::string input_name(const OrtApi* api, const OrtKernelInfo* info, size_t index);

int64_t int_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name);
int64_t int_attribute_or(const OrtApi* api, const OrtKernelInfo* info, const char* name, int64_t missing);
std::string string_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name);

}  // namespace salr
