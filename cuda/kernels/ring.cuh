// Stages in shared memory that a producer fills and consumers give back: `full` counts bytes that come, `empty` warps that are
// done.
#pragma once
#include "ptx.cuh"

#define MAX_STAGES 16

struct Ring {
  u32 full, empty, memory;
  int stage = 0;
  u32 phase = 0;
  DEVICE u32 full_bar() const { return full + 8 * stage; }
  DEVICE u32 empty_bar() const { return empty + 8 * stage; }
  template <class Arguments>
  DEVICE u32 here(const Arguments& p) const { return memory + stage * p.stage_bytes; }
  DEVICE void advance(int stages, int by = 1) {  // `by` is less than `stages`
    stage += by;
    if (stage >= stages) stage -= stages, phase ^= 1;
  }
  DEVICE void release(int lane, int stages) {
    arrive_for_warp(empty_bar(), lane);
    advance(stages);
  }
};
