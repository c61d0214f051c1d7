// From a fragment of y^T in float32, 16 rows of W times 8 rows of x, to 16-bit rows of y.
#pragma once
#include "ptx.cuh"

struct RowsOfY {
  u16* to;  // row 0 of y, this lane's first of four columns
  float upper, lower;
  int batch, columns_left, pitch;  // of y: rows, columns from `to` on, columns in all
  // `first`: the first of 16 rows of W; `n`: of all.
  DEVICE RowsOfY(u16* y, const float* bias, int first, int n, int batch, int lane) : batch(batch), pitch(n) {
    const int row = first + (lane >> 2), column = first + 4 * (lane & 3);
    upper = bias && row < n ? bias[row] : 0.f;
    lower = bias && row + 8 < n ? bias[row + 8] : 0.f;
    to = y + column;
    columns_left = n - column;
  }
  // Rows m .. m + 7 of y: a lane has one row's four neighbouring columns.
  DEVICE void store(int m, const float (&v)[4], int lane) const {
    const u32 first = transposed(pack2(v[0] + upper, v[1] + upper)), second = transposed(pack2(v[2] + lower, v[3] + lower));
    const int from = (lane & ~3) + 2 * (lane & 1);
    const u32 a = __shfl_sync(~0u, first, from), b = __shfl_sync(~0u, first, from + 1);
    const u32 c = __shfl_sync(~0u, second, from), d = __shfl_sync(~0u, second, from + 1);
    const u32 low = lane & 2 ? c : a, high = lane & 2 ? d : b;
    m += lane >> 2;
    if (m >= batch) return;
    u16* here = to + (size_t)m * pitch;
    if (columns_left >= 4 && pitch % 4 == 0) {
      *(uint2*)here = make_uint2(low, high);
    } else {
      if (columns_left > 0) here[0] = (u16)low;
      if (columns_left > 1) here[1] = (u16)(low >> 16);
      if (columns_left > 2) here[2] = (u16)high;
      if (columns_left > 3) here[3] = (u16)(high >> 16);
    }
  }
};
