// Kernels for processors with AVX2, FMA and F16C: compiled with these enabled, and called only where they are there.

#include "simd_avx2.h"
// after it: what a vector is
#include "product_simd.h"

namespace salr {

const Kernels& avx2_kernels() {
  static const Kernels kernels{kSimdName, supports, is_plain, prepared_size, prepare, rows};
  return kernels;
}

}  // namespace salr
