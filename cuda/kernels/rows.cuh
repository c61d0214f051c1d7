// Eight 16-bit floats at once, and the places where torch rounds to 16 bits between two operations.
#pragma once
#include "ptx.cuh"

struct Eight {
  float value[8];
};

DEVICE Eight unpack8(uint4 v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  Eight e;
#pragma unroll
  for (int i = 0; i < 4; i++) e.value[2 * i] = widen(words[i]), e.value[2 * i + 1] = widen(words[i] >> 16);
  return e;
}

DEVICE uint4 pack8(const Eight& e) {
  return make_uint4(pack2(e.value[0], e.value[1]), pack2(e.value[2], e.value[3]), pack2(e.value[4], e.value[5]),
                    pack2(e.value[6], e.value[7]));
}

DEVICE float rounded(float f) { return widen(pack2(f, 0.f)); }

DEVICE float sum_of_warp(float f) {
#pragma unroll
  for (int d = 16; d; d >>= 1) f += __shfl_xor_sync(~0u, f, d);
  return f;
}
