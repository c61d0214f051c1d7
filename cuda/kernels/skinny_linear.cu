// y (M, N) = x (M, K) W^T + ((x A^T) * scaling) B^T + bias for M <= 8*NT, in one launch.
//
// An item is two units of a slab, one below the other: 32 rows x 64 columns. Items go row pair after row pair, in each
// along K; a thread block takes a run of them, and its consumer warps every WARPS-th each. A warp copies its own items to
// shared memory, `depth` ahead, and waits for nobody. All of x lies there.
//
// Finishers compute u (skinny_u.cuh), then add up what the warps leave of each row pair, and B u and bias. A row pair that
// thread blocks share is finished by the one that begins it, with its last items; the others do their part of it first,
// so that nobody waits long. Loads that depend on nothing are asked for before anything is waited for: an answer takes
// 2 us while the memory is busy. All thread blocks must be resident. Sums are added in a fixed order: the same bits every
// time.
#include "skinny_u.cuh"
#include "small.cuh"

// A warp's items: where they are and their copies. Lane l knows item 32 * window + l, and that of the window after it.
struct Feed {
  const uint2* next_item;
  int n, window = 0;
  uint2 here = {0, 0}, after;
  DEVICE Feed(const Arguments& p, const Run& run, int warp, int lane) {
    n = (run.end - run.begin - warp + WARPS - 1) / WARPS;
    next_item = p.items + run.begin + warp;
    if (lane < p.depth) here = read(lane);  // what is asked for first comes first
  }
  DEVICE void read_all(const Arguments& p, int lane) {
    if (lane >= p.depth) here = read(lane);
    after = read(32 + lane);
  }
  DEVICE uint2 read(int t) const { return t < n ? next_item[t * WARPS] : make_uint2(0, 0); }
  DEVICE uint2 entry(int t) const {
    const bool is_here = t < 32 * window + 32;
    return make_uint2(__shfl_sync(~0u, is_here ? here.x : after.x, t & 31), __shfl_sync(~0u, is_here ? here.y : after.y, t & 31));
  }
  DEVICE void copy(const Arguments& p, const Shared& shared, int t, int slot, int warp, int lane) const {
    if (t >= n) return;
    const uint2 e = entry(t);
    if (lane == 0) {
      const u32 bytes = (e.y >> 16) * 16;
      barrier_expect(shared.item_full(slot, warp), bytes);
      bulk_copy(shared.item(p, slot, warp), p.slabs + (size_t)e.x * 16, bytes, shared.item_full(slot, warp));
    }
  }
  DEVICE void advance(int t, int lane) {  // t is the first of a window
    if (t % 32 || t == 0) return;
    window++, here = after, after = read(t + 32 + lane);
  }
};

typedef float Sums[PAIR][NT][4];

// Two units that begin at `first` and `second` times 64 columns of x; `x` is this lane's part of the columns.
template <class Wait>
DEVICE void multiply(const Arguments& p, u32 first, u32 second, u32 x, Sums& total, int lane, u32 table, Wait wait_for_x) {
  Unit unit[PAIR];
  unit[0].open(first, lane), unit[1].open(second, lane);
  Sums scaled = {};
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    u32 a[PAIR][2][4];
#pragma unroll
    for (int r = 0; r < PAIR; r++) unit[r].fragments(pair, lane, a[r], table);
    if (pair == 0) wait_for_x();
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 b = x_fragment(p, x + pair * 16, n, lane);
#pragma unroll
      for (int r = 0; r < PAIR; r++) {
        float* sum = HAS_SCALES ? scaled[r][n] : total[r][n];
        mma(sum, a[r][0], b.x, b.y);
        mma(sum, a[r][1], b.z, b.w);
      }
    }
  }
  if (HAS_SCALES) {
#pragma unroll
    for (int r = 0; r < PAIR; r++) unit[r].add_scaled<NT>(scaled[r], total[r], lane);
  }
}

// The first row pair is another thread block's, which waits for these sums: whoever comes last leaves them in memory.
DEVICE void publish_head(const Arguments& p, const Shared& shared, int lane) {
  u32 before = 0;
  arrive_for_warp(shared.head_full, lane);
  if (lane == 0) before = atomicAdd(shared.head_sums, 1);
  if (__shfl_sync(~0u, before, 0) != WARPS - 1) return;
  barrier_wait(shared.head_full, 0);  // all are there: it is for the order alone
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const float4 v = sum_of(shared.sums(p, 0) + tile * 512 + lane * 16, SUMS_BYTES, WARPS);
    if (has_sums(p, lane)) store_sum(p.partial + (blockIdx.x * TILES + tile) * 32 + lane, v);
  }
}

// Leave this warp's sums of a row pair to the finishers.
DEVICE void deposit(const Arguments& p, const Run& run, const Shared& shared, Sums& sum, int piece, int warp, int lane) {
  const int team = piece % TEAMS, turn = piece / TEAMS;
  if (turn) barrier_wait(shared.sums_empty + 8 * team, (turn - 1) & 1);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    float(&own)[4] = sum[tile / NT][tile % NT];
    sts128(shared.sums(p, team) + warp * SUMS_BYTES + tile * 512 + lane * 16, as_bits(as_float4(own)));
    own[0] = own[1] = own[2] = own[3] = 0.f;
  }
  __syncwarp();
  if (piece == 0 && run.has_head(p)) publish_head(p, shared, lane);
  arrive_for_warp(shared.sums_full + 8 * team, lane);
}

DEVICE int n_chunks(const Arguments& p) { return (p.n_slabs - 1 >> p.x_shift) + 1; }

// A row of x by each of the first warps, in chunks of columns, a lane each, those that are needed first first.
DEVICE void copy_x(const Arguments& p, const Run& run, const Shared& shared, int row, int lane) {
  const int row_bytes = p.n_columns * 2;
  const int turn = (run.begin - run.first_row * p.n_slabs >> p.x_shift) + lane;
  const int chunk = turn < n_chunks(p) ? turn : turn - n_chunks(p), at = chunk * (SLAB_COLUMNS * 2 << p.x_shift);
  const int bytes = min(SLAB_COLUMNS * 2 << p.x_shift, p.n_slabs * SLAB_COLUMNS * 2 - at), there = min(bytes, row_bytes - at);
  const u32 bar = shared.x_full + 8 * chunk, to = shared.x(p) + row * Shared::x_pitch(p) + at;
  wait_for_previous_kernel();
  if (lane >= n_chunks(p)) return;
  barrier_expect(bar, bytes);
  bulk_copy(to, p.x + (size_t)row * row_bytes + at, there, bar);
  if (there < bytes) bulk_copy(to + there, NO_COLUMNS, bytes - there, bar);
}

DEVICE void consume(const Arguments& p, const Run& run, const Shared& shared, int warp, int lane, u32 table) {
  Feed feed(p, run, warp, lane);
  for (int t = 0; t < p.depth; t++) feed.copy(p, shared, t, t, warp, lane);
  feed.read_all(p, lane);
  for (int row = warp; row < p.batch; row += WARPS) copy_x(p, run, shared, row, lane);
  const u32 x = shared.x(p) + (lane >> 2) * Shared::x_pitch(p) + (lane & 3) * 32;
  Sums sum = {};
  int piece = 0, row_end = (run.first_row + 1) * p.n_slabs, slot = 0;
  u32 phase = 0;
  for (int t = 0; t < feed.n; t++) {
    const int item = run.begin + warp + t * WARPS;
    for (; item >= row_end; row_end += p.n_slabs) deposit(p, run, shared, sum, piece++, warp, lane);
    feed.advance(t, lane);
    const u32 first = shared.item(p, slot, warp), second = first + (feed.entry(t).y & 0xffff) * 16;
    barrier_wait(shared.item_full(slot, warp), phase);
    const int slab = item - row_end + p.n_slabs;
    multiply(p, first, second, x + slab * SLAB_COLUMNS * 2, sum, lane, table, [&] { shared.wait_for_x(p, slab); });
    __syncwarp();
    feed.copy(p, shared, t + p.depth, slot, warp, lane);
    if (++slot == p.depth) slot = 0, phase ^= 1;
  }
  while (piece <= run.last_row - run.first_row) deposit(p, run, shared, sum, piece++, warp, lane);
  if (warp == 0)  // nothing is copied to a thread block that has ended
    for (int chunk = 0; chunk < n_chunks(p); chunk++) barrier_wait(shared.x_full + 8 * chunk, 0);
}

// What finishing a unit's rows takes beside its sums, asked for long before.
struct Late {
  static constexpr int AT_ONCE = 4;
  int row;
  const uint4* from;
  uint4 b[AT_ONCE];
  float4 bias;
  int step;
  DEVICE void ask(const Arguments& p, int unit_row, int lane) {  // unit_row: 16 rows of W
    row = unit_row * UNIT_ROWS + (lane >> 2);
    from = (const uint4*)p.lora_b + ((size_t)(unit_row / UNITS) * p.block_steps * UNITS + unit_row % UNITS) * 32 + lane;
    load(p, 0);
    bias = bias_of(p, row);
    step = p.block_steps ? p.first_step[unit_row / UNITS] : 0;
  }
  DEVICE void load(const Arguments& p, int at) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      b[i] = at + i < p.block_steps ? from[(size_t)(at + i) * UNITS * 32] : make_uint4(0, 0, 0, 0);
  }
  DEVICE void add_b(const Arguments& p, u32 u, float (&sum)[4], int lane) {  // u of the tile's rows of x
    for (int at = 0; at < p.block_steps; at += AT_ONCE) {
      if (at) load(p, at);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        if (at + i >= p.block_steps) break;
        const uint4 v = lds128_now(u + (at + i) * NT * 512 + lane * 16);
        const u32 a[4] = {b[i].x, b[i].y, b[i].z, b[i].w};
        mma(sum, a, v.x, v.y);
        mma(sum, a, v.z, v.w);
      }
    }
  }
};

// What other thread blocks have of the last row pair, of one tile of it.
DEVICE float4 others_sum(const Arguments& p, const Run& run, int tile, int lane) {
  const int row_end = (run.last_row + 1) * p.n_slabs;
  int n = 0;
  while (Run::begin_of(p, blockIdx.x + 1 + n) < row_end) n++;
  float4* first = p.partial + ((blockIdx.x + 1) * TILES + tile) * 32 + lane;
  float4 sum[1] = {make_float4(0.f, 0.f, 0.f, 0.f)};
  if (!has_sums(p, lane)) return sum[0];
  sum_in_order<1, 4>(first, first + TILES * 32, TILES * 32, n - 1, sum);
  for (int i = 0; i < n; i++) empty(first + i * TILES * 32);
  return sum[0];
}

// The row pairs of this finisher's team, its tile of each.
DEVICE void finish_rows(const Arguments& p, const Run& run, const Shared& shared, Late& late, int first_step, int team, int tile,
                        int lane) {
  const int n = tile % NT;
  for (int row_pair = run.first_row + team; row_pair <= run.last_row; row_pair += TEAMS) {
    const int piece = row_pair - run.first_row;
    const bool is_head = piece == 0 && run.has_head(p), ends = (row_pair + 1) * p.n_slabs <= run.end;
    float4 v = is_head || ends ? make_float4(0.f, 0.f, 0.f, 0.f) : others_sum(p, run, tile, lane);
    barrier_wait(shared.sums_full + 8 * team, piece / TEAMS & 1);
    if (!is_head) v = v + sum_of(shared.sums(p, team) + tile * 512 + lane * 16, SUMS_BYTES, WARPS);
    arrive_for_warp(shared.sums_empty + 8 * team, lane);
    if (!is_head) {
      float sum[4] = {v.x, v.y, v.z, v.w};
      barrier_wait(shared.u_full, 0);
      late.add_b(p, shared.u(p) + ((late.step - first_step) * NT + n) * 512, sum, lane);
      store_outputs(p, late.row, 8 * n + 2 * (lane & 3), as_float4(sum) + late.bias);
    }
    if (row_pair + TEAMS <= run.last_row) late.ask(p, (row_pair + TEAMS) * PAIR + tile / NT, lane);
  }
}

DEVICE void finish(const Arguments& p, const Run& run, const Shared& shared, int finisher, int lane) {
  const int team = finisher / TILES, tile = finisher % TILES;
  if (finisher == 0 && lane == 0) *shared.launch = count_launch(p);
  Late late;
  late.ask(p, min(run.first_row + team, run.last_row) * PAIR + tile / NT, lane);
  if (lane < p.rank_tiles) prefetch(p.scaling + lane * 16);
  const int first_step = p.rank_tiles ? p.first_step[run.first_row / PAIRS_OF_BLOCK] : 0;
  const int last_step = p.rank_tiles ? p.first_step[run.last_row / PAIRS_OF_BLOCK] + p.block_steps : 0;
  finishers_meet();
  const u32 launch = *shared.launch;
  for (int job = blockIdx.x; job < p.rank_tiles * p.a_parts; job += gridDim.x)
    multiply_a(p, shared, job, launch, finisher, lane);
  wait_for_previous_kernel();
  gather_u(p, shared, first_step, last_step - first_step, launch, finisher, lane);
  finish_rows(p, run, shared, late, first_step, team, tile, lane);
}

extern "C" __global__ void __maxnreg__(REGISTERS_BESIDE_SMALL(THREADS)) skinny_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(8) u64 full[MAX_DEPTH * WARPS], x_full[MAX_CHUNKS], sums_full[TEAMS], sums_empty[TEAMS], u_full, head_full;
  __shared__ u32 table[TABLE_WORDS], launch, head_sums;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x < p.depth * WARPS) barrier_init(shared_address(full + threadIdx.x), 1);
  if (threadIdx.x < MAX_CHUNKS) barrier_init(shared_address(x_full + threadIdx.x), p.batch);
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&u_full), FINISHERS * ARRIVALS_OF_WARP);
    barrier_init(shared_address(&head_full), WARPS * ARRIVALS_OF_WARP);
    head_sums = 0;
    for (int i = 0; i < TEAMS; i++) {
      barrier_init(shared_address(sums_full + i), WARPS * ARRIVALS_OF_WARP);
      barrier_init(shared_address(sums_empty + i), TILES * ARRIVALS_OF_WARP);
    }
  }
  barrier_init_fence();
  fill_table(table);
  __syncthreads();
  const Run run(p);
  const Shared shared{shared_address(memory), shared_address(full), shared_address(x_full), shared_address(sums_full),
                      shared_address(sums_empty), shared_address(&u_full), shared_address(&head_full), &launch, &head_sums};
  if (warp < WARPS)
    consume(p, run, shared, warp, lane, shared_address(table));
  else
    finish(p, run, shared, warp - WARPS, lane);
}
