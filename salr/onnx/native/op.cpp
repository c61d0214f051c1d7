// The operator salr.SparseLinear for ONNX Runtime's CPU provider.
//
// A kernel is made for each node when a session is built: the weight has to be constant and is checked then, once.
// The low-rank part may be an input of the graph and is checked at each run. Work is handed to ONNX Runtime's own threads.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "few_inputs.h"
#include "matrix.h"
#include "tensors.h"
#include "validate.h"

namespace salr {
namespace {

constexpr const char* kDomain = "salr";
constexpr const char* kName = "SparseLinear";
constexpr int kVersion = 1;
constexpr int64_t kRowsATask = 48, kRankRowsATask = 8;
constexpr int64_t kParallelWork = 1 << 18;  // multiplications below which waking another thread costs more than it gives

enum Input : size_t { kX, kBitmap, kValues, kRowOffsets, kScales, kLoraA, kLoraB, kRankScaling, kInputCount };

// Inputs up to which AVX2 kernels are faster than AVX-512 ones (Zen 4): expanding weights takes more of the time then.
constexpr int64_t kFewForAvx512 = 4;

enum Level { kScalar, kAvx2, kAvx512, kVnni };
constexpr const char* kLevels[] = {"scalar", "avx2", "avx512", "avx512vnni"};

Level level_of_processor() {
#ifdef SALR_X86
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return kScalar;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2")))
    return kAvx2;
  return __builtin_cpu_supports("avx512vnni") ? kVnni : kAvx512;
#else
  return kScalar;
#endif
}

// What this processor has, at most what SALR_ONNX_KERNELS names.
Level level() {
  static const Level found = [] {
    const char* most = std::getenv("SALR_ONNX_KERNELS");
    const Level own = level_of_processor();
    for (int named = kScalar; most && named < own; ++named)
      if (std::string(most) == kLevels[named]) return static_cast<Level>(named);
    return own;
  }();
  return found;
}

// The fastest kernels for m inputs.
const Kernels& kernels_for(const Matrix& matrix, int64_t m) {
#ifdef SALR_X86
  if (level() >= kAvx512 && m > kFewForAvx512 && avx512_kernels().supports(matrix)) return avx512_kernels();
  if (level() >= kAvx2 && avx2_kernels().supports(matrix)) return avx2_kernels();
#endif
  (void)matrix, (void)m;
  return scalar_kernels();
}

// Kernels for m inputs that are faster than those, or null.
const FewInputKernels* few_input_kernels_for(const Matrix& matrix, int64_t m) {
#ifdef SALR_X86
  if (m > kMostFewInputs) return nullptr;
  if (level() >= kVnni && few_inputs_vnni().supports(matrix)) return &few_inputs_vnni();
  if (level() >= kAvx512 && few_inputs_avx512().supports(matrix)) return &few_inputs_avx512();
#endif
  (void)matrix, (void)m;
  return nullptr;
}

// Floats on a cache line of their own.
struct Freed {
  void operator()(float* floats) const { ::operator delete[](floats, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Freed>;

Floats make_floats(int64_t n) {
  return Floats(static_cast<float*>(::operator new[](static_cast<size_t>(n) * sizeof(float), std::align_val_t{64})));
}

// Runs tasks 0 ... n - 1 on ONNX Runtime's threads, or here where they are little work.
class Team {
 public:
  Team(const OrtApi* api, const OrtKernelContext* context) : api_(api), context_(context) {}

  template <class Task>
  void run(int64_t n, int64_t work, Task task) const {
    if (n < 2 || work < kParallelWork) {
      for (int64_t i = 0; i < n; ++i) task(i);
      return;
    }
    const auto call = [](void* given, size_t i) { (*static_cast<Task*>(given))(static_cast<int64_t>(i)); };
    check(api_, ort::KernelContext_ParallelFor(api_)(context_, call, static_cast<size_t>(n), 0, &task));
  }

 private:
  const OrtApi* api_;
  const OrtKernelContext* context_;
};

int64_t tasks_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

class Kernel {
 public:
  Kernel(const OrtApi* api, const OrtKernelInfo* info) : api_(api), attributes_(read_attributes(api, info)) {
    const Tensor bitmap = constant(info, kBitmap), values = constant(info, kValues);
    const Tensor row_offsets = constant(info, kRowOffsets), scales = constant(info, kScales);
    weight_ = checked_weight(attributes_, bitmap, values, row_offsets, scales);
    for (size_t i = kLoraA; i <= kRankScaling; ++i) names_[i - kLoraA] = input_name(api, info, i);
  }

  void compute(OrtKernelContext* context) const {
    const Tensor x = input(context, kX, "x");
    const int64_t n = attributes_.out_features, k = attributes_.in_features;
    if (x.shape.empty() || x.shape.back() != k)
      throw ModelError("salr.SparseLinear: x has shape " + x.text() + ", needed [..., " + std::to_string(k) + "]");
    std::vector<int64_t> shape = x.shape;
    shape.back() = n;
    OrtValue* y = nullptr;
    void* data = nullptr;
    check(api_, ort::KernelContext_GetOutput(api_)(context, 0, shape.data(), shape.size(), &y));
    check(api_, ort::GetTensorMutableData(api_)(y, &data));
    const LowRank low_rank = checked_low_rank(attributes_, input(context, kLoraA, names_[0]),
                                              input(context, kLoraB, names_[1]), input(context, kRankScaling, names_[2]));
    const Team team(api_, context);
    const bool is_half = x.type == kFloat16;
    const int64_t m = x.count() / k, width = is_half ? 2 : 4;
    for (int64_t first = 0; first < m; first += kMostInputs) {
      const int64_t some = std::min(m - first, kMostInputs);
      const void* from = static_cast<const uint8_t*>(x.data) + first * k * width;
      multiply(team, low_rank, from, is_half, some, {static_cast<uint8_t*>(data) + first * n * width, is_half, n});
    }
  }

 private:
  // ONNX Runtime takes this kernel for later versions of the domain too, so a later operator says so itself.
  static Attributes read_attributes(const OrtApi* api, const OrtKernelInfo* info) {
    const int64_t version = int_attribute_or(api, info, "version", kVersion);
    if (version != kVersion)
      throw ModelError("salr.SparseLinear: tensor '" + input_name(api, info, kValues) + "': version " +
                       std::to_string(version) + " of the operator, needed " + std::to_string(kVersion) +
                       "; upgrade salr, or run the model without this library");
    return checked_attributes(int_attribute(api, info, "out_features"), int_attribute(api, info, "in_features"),
                              int_attribute(api, info, "nnz"), string_attribute(api, info, "encoding"),
                              int_attribute(api, info, "group_size"));
  }

  // The tensor of an input that must not change between runs; an empty one where the node leaves it out.
  Tensor constant(const OrtKernelInfo* info, size_t index) const {
    const std::string name = input_name(api_, info, index);
    if (name.empty()) return {};
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_, ort::KernelInfoGetConstantInput_tensor(api_)(info, index, &is_constant, &value));
    if (!is_constant || !value)
      throw ModelError("salr.SparseLinear: tensor '" + name + "': an input that may change, needed an initializer");
    return tensor_of(api_, value, name);
  }

  Tensor input(const OrtKernelContext* context, size_t index, const std::string& name) const {
    size_t n_inputs = 0;
    check(api_, ort::KernelContext_GetInputCount(api_)(context, &n_inputs));
    if (index >= n_inputs) return {};
    const OrtValue* value = nullptr;
    check(api_, ort::KernelContext_GetInput(api_)(context, index, &value));
    return tensor_of(api_, value, name);
  }

  // Inputs as the kernels take them: `x` itself or prepared into `kept`.
  const float* prepared(const Team& team, const void* x, bool is_half, int64_t m, int64_t k, Floats& kept) const {
    const Kernels& kernels = kernels_for(weight_.matrix, m);
    if (!is_half && kernels.is_plain(m, k)) return static_cast<const float*>(x);
    kept = make_floats(kernels.prepared_size(m, k));
    float* out = kept.get();
    team.run(tasks_of(k, kPrepareColumns), m * k, [&](int64_t task) {
      const int64_t begin = task * kPrepareColumns;
      kernels.prepare(x, is_half, m, k, begin, std::min(begin + kPrepareColumns, k), out);
    });
    return out;
  }

  void multiply(const Team& team, const LowRank& low_rank, const void* x, bool is_half, int64_t m, const Output& y) const {
    const Matrix& w = weight_.matrix;
    const int64_t rank = low_rank.rank();
    Floats kept_x, kept_inner, inner;
    Term terms[2] = {{&w, prepared(team, x, is_half, m, w.n_columns, kept_x)}, {&low_rank.b, nullptr}};
    if (rank) {
      inner = make_floats(m * rank);
      const Term down{&low_rank.a, terms[0].x};
      run_rows(team, &down, 1, m, rank, kRankRowsATask, {inner.get(), false, rank});
      for (int64_t i = 0; i < m * rank; ++i) inner[i] *= low_rank.scaling[static_cast<size_t>(i % rank)];
      terms[1].x = prepared(team, inner.get(), false, m, rank, kept_inner);
    }
    if (!multiply_few(team, terms[1], rank, x, is_half, m, y))
      run_rows(team, terms, rank ? 2 : 1, m, w.n_rows, kRowsATask, y);
  }

  // The same for few inputs, where there are kernels for them that take x; else false.
  bool multiply_few(const Team& team, const Term& up, int64_t rank, const void* x, bool is_half, int64_t m,
                      const Output& y) const {
    const Matrix& w = weight_.matrix;
    const FewInputKernels* kernels = few_input_kernels_for(w, m);
    if (!kernels) return false;
    const Floats kept = make_floats((kernels->prepared_size(w, m) + 3) / 4);
    uint8_t* laid_out = reinterpret_cast<uint8_t*>(kept.get());
    if (!kernels->prepare(w, x, is_half, m, laid_out)) return false;
    const Floats rest = rank ? make_floats(m * w.n_rows) : nullptr;
    team.run(tasks_of(w.n_rows, kRowsATask), m * w.n_rows * w.n_columns, [&](int64_t task) {
      const int64_t begin = task * kRowsATask, end = std::min(begin + kRowsATask, w.n_rows);
      if (rank) kernels_for(w, m).rows(&up, 1, m, begin, end, {rest.get(), false, w.n_rows});
      kernels->rows(w, laid_out, m, begin, end, rest.get(), y);
    });
    return true;
  }

  void run_rows(const Team& team, const Term* terms, int n_terms, int64_t m, int64_t n_rows, int64_t each,
                const Output& out) const {
    const Kernels& kernels = kernels_for(weight_.matrix, m);
    const int64_t work = m * n_rows * terms[0].matrix->n_columns;
    team.run(tasks_of(n_rows, each), work, [&](int64_t task) {
      kernels.rows(terms, n_terms, m, task * each, std::min((task + 1) * each, n_rows), out);
    });
  }

  const OrtApi* api_;
  const Attributes attributes_;
  Weight weight_;
  std::string names_[3];
};

// --- what ONNX Runtime calls ------------------------------------------------------------------------------------------

// Calls `function` and turns what it throws into a status.
template <class Function>
OrtStatus* guarded(const OrtApi* api, Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return ort::CreateStatus(api)(kInvalidArgument, "salr.SparseLinear: not enough memory");
  } catch (const std::exception& error) {
    return ort::CreateStatus(api)(kInvalidGraph, error.what());
  }
}

struct KernelOfSession {
  const OrtApi* api;
  Kernel kernel;
};

int input_type(size_t index, ElementType activations) {
  switch (index) {
    case kX: return activations;
    case kBitmap: return kUint8;
    case kRowOffsets: return kUint64;
    case kRankScaling: return kFloat;
    default: return kUndefined;  // several types; checked when a kernel is made
  }
}

template <ElementType kActivations>
OrtCustomOp make_operator() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return input_type(index, kActivations); };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return static_cast<size_t>(kInputCount); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return static_cast<int>(kActivations); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index == kX || index == kValues ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kMemoryDefault; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity =
      op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = op.GetEndVersion = [](const OrtCustomOp*) { return kVersion; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new KernelOfSession{api, Kernel(api, info)}; });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto* own = static_cast<const KernelOfSession*>(kernel);
    return guarded(own->api, [&] { own->kernel.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<KernelOfSession*>(kernel); };
  return op;
}

}  // namespace
}  // namespace salr

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  static const OrtCustomOp operators[] = {salr::make_operator<kFloat>(), salr::make_operator<kFloat16>()};
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) return nullptr;  // older than 1.17, which has said so itself
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = ort::CreateCustomOpDomain(api)(salr::kDomain, &domain)) return status;
  for (const OrtCustomOp& op : operators)
    if (OrtStatus* status = ort::CustomOpDomain_Add(api)(domain, &op)) return status;
  return ort::AddCustomOpDomain(api)(options, domain);
}

// For tools and tests: the best kernels that are used here.
extern "C" __attribute__((visibility("default"))) const char* salr_kernels() { return salr::kLevels[salr::level()]; }
