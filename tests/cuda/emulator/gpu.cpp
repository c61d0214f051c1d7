// Runs the thread blocks of a launch, each as a thread of the machine, their threads as fibers (fibers.h), in an order that a
// seed decides. Copies to shared memory come late, and asynchronous products are made when they are waited for, so that who
// does not wait gets what was there before.
//
// Refused: lanes of a warp that meet at different operations, accesses beyond shared memory or not aligned, copies to a
// thread block that has ended, launches that do not end.
#include "gpu.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <utility>
#include <vector>

#include "fibers.h"

namespace gpu {

constexpr int MOST_BARRIERS = 16, MOST_AT_ONCE = 16, MOST_THREADS = 1024;
constexpr double LIMIT_S = 300, STUCK_S = 20;  // of a launch, and without any thread of it getting on

struct Warp {
  int arrived = 0, live = 0, site = 0;
  void (*run)(void**) = nullptr;
  void* given[WARP] = {};
};

struct Fiber : Thread {
  Context context;
  enum { READY, WAITING, DONE } state = READY;
  std::deque<Product> products;
  int groups = 0;
};

struct Copy {
  u8* to;
  const void* from;
  u32 bytes;
  u64* barrier;
  u8* const* of_block;
  Thread* thread;  // after whose copies before it comes, null where in any order
};

struct Cluster {
  u8* base[16] = {};
  int arrived = 0, turn = 0;
};

static double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// One launch, as all of its thread blocks see it.
struct Launch {
  uint3 grid, block;
  u32 cluster, shared_bytes;
  u64 seed;
  void** arguments;
  void (*enter)(void**);
  std::vector<Cluster> clusters;
  u32 next = 0, moves = 0;  // moves: how often a thread block got on
  int failed = 0;
  double begin_s = now_s();
};

struct Block : Place {
  Launch* launch;
  Cluster* cluster_of;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier[MOST_BARRIERS];
  std::vector<Copy> copies;
  std::vector<bool> late;
  std::vector<std::pair<u8*, size_t>> variables;
  Context scheduler;
  int live;
  u64 random;
  u64 next_random() { return random ^= random << 13, random ^= random >> 7, random ^= random << 17; }
};

__thread Thread* here;
__thread Place* block;
__thread u8 dynamic[MOST_SHARED_BYTES] __align__(128);
static char message[512];

static Block& own() { return *(Block*)block; }
static Fiber& fiber() { return *(Fiber*)here; }
static void leave() { change(fiber().context, own().scheduler); }

static void complain(const char* format, va_list values) {
  if (add(own().launch->failed, 1)) return;
  const int n = std::snprintf(message, sizeof message, "thread block %u, thread %d: ", block->number, here ? (int)here->index.x : -1);
  std::vsnprintf(message + n, sizeof message - n, format, values);
}
static void complain(const char* format, ...) {
  va_list values;
  va_start(values, format);
  complain(format, values);
  va_end(values);
}
void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  complain(format, values);
  va_end(values);
  for (;;) leave();
}

void ask_again() { leave(); }
u8* const* base_of_rank(u32 rank) { return own().cluster_of->base + rank; }

// ---- meeting

static void release(Warp& warp) {
  warp.run(warp.given);
  warp.arrived = 0, warp.run = nullptr;
  const int first = (int)(&warp - own().warps.data()) * WARP;
  for (int lane = 0; lane < WARP; lane++) {
    if (warp.given[lane]) own().fibers[first + lane].state = Fiber::READY;
    warp.given[lane] = nullptr;
  }
  block->moved = true;
}

void variable(void* place, size_t bytes) {
  if (is_variable(place, bytes)) return;
  own().variables.push_back({(u8*)place, bytes});
  std::memset(place, 0xff, bytes);
}
bool is_variable(const void* place, size_t bytes) {
  for (auto& each : own().variables)
    if (place >= each.first && (const u8*)place + bytes <= each.first + each.second) return true;
  return false;
}

void together(int site, void* given, void (*run)(void**)) {
  Warp& warp = own().warps[here->warp];
  if (warp.arrived && (warp.run != run || warp.site != site)) fail("lanes of a warp meet at different operations");
  warp.run = run, warp.site = site, warp.given[here->lane] = given;
  if (++warp.arrived == warp.live) return release(warp);
  fiber().state = Fiber::WAITING;
  leave();
}

static void release(std::vector<Fiber*>& waiting) {
  for (Fiber* each : waiting) each->state = Fiber::READY;
  waiting.clear();
  block->moved = true;
}

void meet(int barrier, int threads) {
  auto& waiting = own().at_barrier[barrier];
  waiting.push_back(&fiber());
  fiber().state = Fiber::WAITING;
  if ((int)waiting.size() == (threads ? threads : own().live)) release(waiting);
  leave();
}

void cluster_meet() {
  Cluster& cluster = *own().cluster_of;
  const int turn = load(cluster.turn), all = block->cluster * block->block.x;
  if (add(cluster.arrived, 1) + 1 == all) {
    store(cluster.arrived, 0);
    add(cluster.turn, 1);
  }
  while (load(cluster.turn) == turn) ask_again();
}

// ---- what comes late

void count(u64* barrier, int arrivals, int bytes) {
  u64 before = load(*barrier), after;
  do {
    Barrier b = Barrier::of(before);
    if ((int)b.left < arrivals) return complain("more arrivals at a barrier than it has");
    b.left -= arrivals, b.bytes += bytes;
    if (b.left == 0 && b.bytes == 0) b.left = b.arrivals, b.phase ^= 1;
    after = b.bits();
  } while (!__atomic_compare_exchange_n(barrier, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
}

void copy_later(u8* to, const void* from, u32 bytes, u64* barrier, u8* const* of_block, bool in_order) {
  own().copies.push_back({to, from, bytes, barrier, of_block, in_order ? here : nullptr});
}

static void finish(const Copy& copy) {
  if (!load(*copy.of_block)) return complain("a copy to a thread block that has ended");
  std::memcpy(copy.to, copy.from, copy.bytes);
  if (copy.barrier) count(copy.barrier, copy.bytes ? 0 : 1, -(int)copy.bytes);
}

static void some_copies() {
  auto& copies = own().copies;
  if (copies.empty() || own().next_random() % 2) return;
  const u64 share = own().next_random() % 4;
  size_t left = 0;
  auto& late = own().late;  // threads of which a copy has been left for later
  late.assign(copies[0].thread ? own().fibers.size() : 0, false);
  for (const Copy& copy : copies) {
    const bool is_late = (copy.thread && late[copy.thread->index.x]) || own().next_random() % 4 < share;
    if (copy.thread && is_late) late[copy.thread->index.x] = true;
    if (is_late) copies[left++] = copy;
    else finish(copy), block->moved = true;
  }
  copies.resize(left);
}

void multiply_later(float* sums, const u32* a, u64 x, int tiles) {
  fiber().products.push_back({sums, a, x, tiles, fiber().groups});
}
void commit() { fiber().groups++; }

struct Wait {
  Fiber* fiber;
  int groups;
  void (*make)(Product* (&)[WARP]);
};
void wait_for_all_groups_but(int n, void (*make)(Product* (&)[WARP])) {
  Wait mine{&fiber(), fiber().groups - n, make};
  together(n, &mine, [](void** given) {
    auto** lanes = (Wait**)given;
    for (auto& products = lanes[0]->fiber->products; !products.empty() && products.front().group < lanes[0]->groups;) {
      Product* each[WARP];
      for (int lane = 0; lane < WARP; lane++) each[lane] = &lanes[lane]->fiber->products.front();
      lanes[0]->make(each);
      for (int lane = 0; lane < WARP; lane++) lanes[lane]->fiber->products.pop_front();
    }
  });
}

// ---- running

static void thread_main() {
  own().launch->enter(own().launch->arguments);
  Warp& warp = own().warps[here->warp];
  fiber().state = Fiber::DONE;
  warp.live--, own().live--;
  block->moved = true;
  if (warp.arrived && warp.arrived == warp.live) release(warp);
  auto& waiting = own().at_barrier[0];
  if (!waiting.empty() && (int)waiting.size() == own().live) release(waiting);
  for (;;) leave();
}

static void begin(Block& b, Launch& launch, u32 number, char* stacks) {
  const u32 n = launch.block.x;
  const uint3 index = {number % launch.grid.x, number / launch.grid.x % launch.grid.y, number / launch.grid.x / launch.grid.y};
  (Place&)b = {index, launch.grid, launch.block, number, launch.cluster, launch.shared_bytes, false};
  b.launch = &launch, b.cluster_of = &launch.clusters[number / launch.cluster];
  b.fibers = std::vector<Fiber>(n), b.warps = std::vector<Warp>((n + WARP - 1) / WARP);
  for (auto& waiting : b.at_barrier) waiting.clear();
  b.copies.clear(), b.variables.clear();
  b.live = (int)n;
  b.random = (launch.seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xbf58476d1ce4e5b9ull;
  std::memset(dynamic, 0xff, launch.shared_bytes);  // as a float, not a number
  for (u32 i = 0; i < n; i++) {
    (Thread&)b.fibers[i] = {{i, 0, 0}, (int)i % WARP, (int)i / WARP};
    b.warps[i / WARP].live++;
    b.fibers[i].context.begin(stacks + i * STACK_BYTES, thread_main);
  }
  store(b.cluster_of->base[number % launch.cluster], base());
}

static void run_warp(Block& b, int warp) {
  const int turn = (int)(b.next_random() % WARP), step = b.next_random() % 2 ? 1 : WARP - 1;
  for (int lane = 0; lane < WARP; lane++) {
    const int i = warp * WARP + (turn + lane * step) % WARP;
    if (i >= (int)b.fibers.size() || b.fibers[i].state != Fiber::READY) continue;
    here = &b.fibers[i];
    change(b.scheduler, b.fibers[i].context);
  }
  here = nullptr;
}

static void run_block(Block& b, Launch& launch, u32 number, char* stacks) {
  begin(b, launch, number, stacks);
  std::vector<int> order(b.warps.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
  u32 idle = 0, moves = 0;
  double moved_s = now_s();
  for (u32 pass = 0; b.live && !load(launch.failed); pass++) {
    b.moved = false;
    for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[b.next_random() % (i + 1)]);
    for (int warp : order)
      if (b.next_random() % 4) run_warp(b, warp);
    some_copies();
    idle = b.moved || !b.copies.empty() ? 0 : idle + 1;
    if (!idle) add(launch.moves, 1u);
    if (idle) usleep(idle < 10 ? 10 * idle : 100);
    if (pass % 256) continue;
    if (now_s() - launch.begin_s > LIMIT_S) complain("%d threads still wait after %g s", b.live, LIMIT_S);
    if (moves != load(launch.moves)) moves = load(launch.moves), moved_s = now_s();
    if (idle && now_s() - moved_s > STUCK_S) complain("%d threads wait for what does not come", b.live);
  }
  store(b.cluster_of->base[number % launch.cluster], (u8*)nullptr);
  if (!load(launch.failed) && !b.copies.empty()) complain("a copy to shared memory outlives its thread block");
}

static void* worker(void* given) {
  Launch& launch = *(Launch*)given;
  Block mine;
  block = &mine;
  char* stacks = new char[launch.block.x * STACK_BYTES];
  const u32 n = launch.grid.x * launch.grid.y * launch.grid.z;
  for (u32 number = add(launch.next, 1u); number < n && !load(launch.failed); number = add(launch.next, 1u))
    run_block(mine, launch, number, stacks);
  delete[] stacks;
  return nullptr;
}

// 0, or -1 where `what_was_wrong` says what was.
int launch(void (*enter)(void**), u32 cluster, const u32* grid, u32 threads, u32 shared_bytes, void** arguments, u64 seed) {
  const u32 n = grid[0] * grid[1] * grid[2];
  if (n == 0 || n % cluster || threads == 0 || threads > MOST_THREADS || (int)shared_bytes > MOST_SHARED_BYTES)
    return std::snprintf(message, sizeof message, "%u thread blocks of %u threads, %u bytes", n, threads, shared_bytes), -1;
  Launch launch{{grid[0], grid[1], grid[2]}, {threads, 1, 1}, cluster, shared_bytes, seed, arguments, enter,
                std::vector<Cluster>(n / cluster)};
  std::vector<pthread_t> workers(n < MOST_AT_ONCE ? n : MOST_AT_ONCE);
  for (auto& each : workers) pthread_create(&each, nullptr, worker, &launch);
  for (auto& each : workers) pthread_join(each, nullptr);
  return launch.failed ? -1 : 0;
}

}  // namespace gpu

extern "C" const char* what_was_wrong() { return gpu::message; }
