// What this library uses of ONNX Runtime's C interface, declared from its documented, append-only layout.
//
// OrtApi is a table of function pointers whose slots never move once released; the numbers below are slots of version
// 17 (ONNX Runtime 1.17), the first that has all of them. Every type but these is opaque here.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi {
  void* slot[1];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kInvalidArgument = 2, kNotImplemented = 9, kInvalidGraph = 10 };
enum ElementType : int {
  kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10, kUint64 = 13, kBfloat16 = 16
};
enum Characteristic : int { kRequired = 0, kOptional = 1 };
constexpr int kMemoryDefault = 0;

// A custom operator: ONNX Runtime reads `version` and then as many of the pointers as that version has.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

// Each function of the table: its slot and its type.
#define SALR_ORT_FUNCTION(name, slot_number, result, ...)                        \
  inline auto name(const OrtApi* api) {                                          \
    return reinterpret_cast<result (*)(__VA_ARGS__)>(api->slot[slot_number]);    \
  }

namespace ort {
SALR_ORT_FUNCTION(CreateStatus, 0, OrtStatus*, int, const char*)
SALR_ORT_FUNCTION(CreateCustomOpDomain, 26, OrtStatus*, const char*, OrtCustomOpDomain**)
SALR_ORT_FUNCTION(CustomOpDomain_Add, 27, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*)
SALR_ORT_FUNCTION(AddCustomOpDomain, 28, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)
SALR_ORT_FUNCTION(GetTensorMutableData, 51, OrtStatus*, OrtValue*, void**)
SALR_ORT_FUNCTION(GetTensorElementType, 60, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int*)
SALR_ORT_FUNCTION(GetDimensionsCount, 61, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*)
SALR_ORT_FUNCTION(GetDimensions, 62, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)
SALR_ORT_FUNCTION(GetTensorTypeAndShape, 65, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**)
SALR_ORT_FUNCTION(KernelInfoGetAttribute_int64, 86, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*)
SALR_ORT_FUNCTION(KernelInfoGetAttribute_string, 87, OrtStatus*, const OrtKernelInfo*, const char*, char*, size_t*)
SALR_ORT_FUNCTION(KernelContext_GetInputCount, 88, OrtStatus*, const OrtKernelContext*, size_t*)
SALR_ORT_FUNCTION(KernelContext_GetInput, 90, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**)
SALR_ORT_FUNCTION(KernelContext_GetOutput, 91, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)
SALR_ORT_FUNCTION(ReleaseStatus, 93, void, OrtStatus*)
SALR_ORT_FUNCTION(ReleaseTensorTypeAndShapeInfo, 99, void, OrtTensorTypeAndShapeInfo*)
SALR_ORT_FUNCTION(KernelInfo_GetInputCount, 230, OrtStatus*, const OrtKernelInfo*, size_t*)
SALR_ORT_FUNCTION(KernelInfo_GetInputName, 232, OrtStatus*, const OrtKernelInfo*, size_t, char*, size_t*)
SALR_ORT_FUNCTION(KernelInfoGetConstantInput_tensor, 249, OrtStatus*, const OrtKernelInfo*, size_t, int*, const OrtValue**)
SALR_ORT_FUNCTION(KernelContext_ParallelFor, 274, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)
}  // namespace ort
