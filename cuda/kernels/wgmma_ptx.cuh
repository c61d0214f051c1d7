// The instructions of asynchronous products (sm_90a) for NT tiles of 8 rows of x; wgmma.cuh says what they multiply.
#pragma once
#include "ptx.cuh"

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#if HALF
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define FOUR(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FOUR_TILES(d, n) FOUR(d, n), FOUR(d, n + 1), FOUR(d, n + 2), FOUR(d, n + 3)
#define SIXTEEN_TILES(d, n) FOUR_TILES(d, n), FOUR_TILES(d, n + 4), FOUR_TILES(d, n + 8), FOUR_TILES(d, n + 12)
#define WGMMA(columns, sums, a0, a1, a2, a3, x_at)                                                            \
  "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16." WGMMA_TYPES " {" sums \
  "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" x_at ", p, 1, 1, 0;\n}"
#define FROM(a, x) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x)
#define SUMS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SUMS_16 SUMS_8 "," "%8,%9,%10,%11,%12,%13,%14,%15"
#define SUMS_32 SUMS_16 "," "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SUMS_64 SUMS_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define SUMS_128 SUMS_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110," \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d (64 x 8*NT, float32, each warp 16 rows) += a (64 x 16) x^T
DEVICE void wgmma(float (&d)[NT][4], const u32 (&a)[4], u64 x) {
#if NT == 4
  asm volatile(WGMMA("32", SUMS_16, "16", "17", "18", "19", "20") : FOUR_TILES(d, 0) : FROM(a, x));
#elif NT == 8
  asm volatile(WGMMA("64", SUMS_32, "32", "33", "34", "35", "36") : FOUR_TILES(d, 0), FOUR_TILES(d, 4) : FROM(a, x));
#elif NT == 16
  asm volatile(WGMMA("128", SUMS_64, "64", "65", "66", "67", "68") : SIXTEEN_TILES(d, 0) : FROM(a, x));
#elif NT == 32
  asm volatile(WGMMA("256", SUMS_128, "128", "129", "130", "131", "132")
               : SIXTEEN_TILES(d, 0), SIXTEEN_TILES(d, 16) : FROM(a, x));
#else
#error "asynchronous products are written for NT 4, 8, 16 and 32"
#endif
}

// The accumulators are what the products before left: for the compiler, which does not see them being written.
DEVICE void wgmma_done(float (&d)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++) asm volatile("" : FOUR(d, n)::"memory");
}
