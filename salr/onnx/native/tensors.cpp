#include "tensors.h"

namespace salr {

void check(const OrtApi* api, OrtStatus* status) {
  if (!status) return;
  ort::ReleaseStatus(api)(status);
  throw ModelError("salr.SparseLinear: ONNX Runtime refused a request");
}

int64_t Tensor::count() const {
  int64_t n = 1;
  for (const int64_t extent : shape)
    if (extent < 0 || __builtin_mul_overflow(n, extent, &n)) throw ModelError("tensor '" + name + "': " + text());
  return n;
}

std::string Tensor::text() const {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Tensor tensor_of(const OrtApi* api, const OrtValue* value, const std::string& name) {
  Tensor tensor;
  tensor.name = name;
  if (!value) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, ort::GetTensorTypeAndShape(api)(value, &info));
  size_t rank = 0;
  OrtStatus* status = ort::GetTensorElementType(api)(info, &tensor.type);
  if (!status) status = ort::GetDimensionsCount(api)(info, &rank);
  if (!status) {
    tensor.shape.resize(rank);
    status = ort::GetDimensions(api)(info, tensor.shape.data(), rank);
  }
  ort::ReleaseTensorTypeAndShapeInfo(api)(info);
  check(api, status);
  void* data = nullptr;
  check(api, ort::GetTensorMutableData(api)(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

std::string input_name(const OrtApi* api, const OrtKernelInfo* info, size_t index) {
  size_t n_inputs = 0, size = 0;
  check(api, ort::KernelInfo_GetInputCount(api)(info, &n_inputs));
  if (index >= n_inputs) return "";
  check(api, ort::KernelInfo_GetInputName(api)(info, index, nullptr, &size));
  std::string name(size, '\0');
  check(api, ort::KernelInfo_GetInputName(api)(info, index, &name[0], &size));
  while (!name.empty() && name.back() == '\0') name.pop_back();
  return name;
}

int64_t int_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  if (OrtStatus* status = ort::KernelInfoGetAttribute_int64(api)(info, name, &value)) {
    ort::ReleaseStatus(api)(status);
    throw ModelError(std::string("salr.SparseLinear: attribute '") + name + "' is missing or no integer");
  }
  return value;
}

int64_t int_attribute_or(const OrtApi* api, const OrtKernelInfo* info, const char* name, int64_t missing) {
  int64_t value = 0;
  OrtStatus* status = ort::KernelInfoGetAttribute_int64(api)(info, name, &value);
  if (status) ort::ReleaseStatus(api)(status);
  return status ? missing : value;
}

std::string string_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  size_t size = 0;
  OrtStatus* status = ort::KernelInfoGetAttribute_string(api)(info, name, nullptr, &size);
  std::string value(size, '\0');
  if (!status && size) status = ort::KernelInfoGetAttribute_string(api)(info, name, &value[0], &size);
  if (status) {
    ort::ReleaseStatus(api)(status);
    throw ModelError(std::string("salr.SparseLinear: attribute '") + name + "' is missing or no string");
  }
  while (!value.empty() && value.back() == '\0') value.pop_back();
  return value;
}

}  // namespace salr
