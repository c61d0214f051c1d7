// u = (x A^T) * scaling in the order in which B is multiplied by it.
#pragma once
#include "ptx.cuh"

// From where a product's fragment (16 ranks x 8 rows of x) has its numbers to where the next product wants them,
// scaled, as two 16-bit floats each.
DEVICE uint4 as_u(float4 v, const float* scaling, int lane) {
  const int k = 2 * (lane & 3), m = lane >> 2;
  float upper[2], lower[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int from = 4 * (k + j) + m / 2;
    const float x = __shfl_sync(~0u, v.x, from), y = __shfl_sync(~0u, v.y, from);
    const float z = __shfl_sync(~0u, v.z, from), w = __shfl_sync(~0u, v.w, from);
    upper[j] = (m & 1 ? y : x) * scaling[k + j];
    lower[j] = (m & 1 ? w : z) * scaling[k + j + 8];
  }
  const u32 high0 = pack2(upper[0], upper[1]), high1 = pack2(lower[0], lower[1]);
  return make_uint4(high0, high1, pack2(upper[0] - widen(high0), upper[1] - widen(high0 >> 16)),
                    pack2(lower[0] - widen(high1), lower[1] - widen(high1 >> 16)));
}
