// Kernels for processors with AVX-512 F, BW, VL and VBMI2: compiled with these enabled, and called only where they are there.

#include "simd_avx512.h"
// after it: what a vector is
#include "product_simd.h"

namespace salr {

const Kernels& avx512_kernels() {
  static const Kernels kernels{kSimdName, supports, is_plain, prepared_size, prepare, rows};
  return kernels;
}

}  // namespace salr
