// x in a wider matrix, beside what is to stand there.
#include "ptx.cuh"

// x [rows, 8 * columns] -> the first columns of `wide` [rows, pitch], zeros up to 8 * padded_columns.
//
// grid: rows, enough thread blocks of 256 for 16 bytes a thread; no shared memory.
extern "C" __global__ void copy_rows(const uint4* x, u16* wide, int columns, int padded_columns, int pitch) {
  const int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= padded_columns) return;
  const uint4 v = i < columns ? x[(size_t)blockIdx.x * columns + i] : make_uint4(0, 0, 0, 0);
  *(uint4*)(wide + (size_t)blockIdx.x * pitch + 8 * i) = v;
}
