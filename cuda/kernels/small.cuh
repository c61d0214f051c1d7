// Small kernels beside products: a product leaves SMALL_THREADS threads with SMALL_REGISTERS registers each free on its SM, so
// that the small kernel behind it has begun, and waits, when it ends. An SM has four parts with 16384 registers each, among
// which warps are dealt out in turn.
#pragma once

constexpr int SMALL_THREADS = 128, SMALL_REGISTERS = 32;
constexpr int REGISTERS_OF_PART = 16384;

// The registers of a thread of a product of so many threads, alone on its SM but for a small kernel: a multiple of eight.
#define REGISTERS_BESIDE_SMALL(threads) \
  ((REGISTERS_OF_PART - SMALL_THREADS / 4 * SMALL_REGISTERS) / (((threads) / 32 + 3) / 4 * 32) / 8 * 8)

// Thread blocks of a small kernel that an SM has room for.
constexpr int BLOCKS_OF_SM = 4 * REGISTERS_OF_PART / (SMALL_THREADS * SMALL_REGISTERS);
