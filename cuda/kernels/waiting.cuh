// Waiting at barriers, and what else is made of what ptx.cuh names.
#pragma once

// What a warp has done is done: one lane says so for all, or, for a checker that does not know what __syncwarp means, each.
#ifndef EACH_LANE_ARRIVES
#define EACH_LANE_ARRIVES 0
#endif
constexpr int ARRIVALS_OF_WARP = EACH_LANE_ARRIVES ? 32 : 1;
DEVICE void arrive_for_warp(u32 bar, int lane) {
  __syncwarp();
  if (EACH_LANE_ARRIVES || lane == 0) barrier_arrive(bar);
}
DEVICE void barrier_wait(u32 bar, u32 phase) {
  while (!barrier_poll(bar, phase)) {
  }
}

DEVICE float4 as_float4(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }
DEVICE uint4 as_bits(float4 v) {
  return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
}
DEVICE float4 as_floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
DEVICE float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
