// Threads of a thread block as fibers of one thread of the machine: each runs until it waits for others.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace gpu {

typedef void (*Entry)();
constexpr size_t STACK_BYTES = 64 << 10;

#if defined(__x86_64__)
// What a call must keep lies on the stack, so that a stack pointer is all there is to a fiber.
struct Context {
  void* stack = nullptr;
  void begin(char* memory, Entry entry) {
    void** top = (void**)(memory + STACK_BYTES) - 8;
    for (int i = 0; i < 6; i++) top[i] = nullptr;
    top[6] = (void*)entry, top[7] = nullptr;
    stack = top;
  }
};
__attribute__((naked, noinline, unused)) static void change_stack(void**, void*) {
  asm("push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
      "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
      "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
}
inline void change(Context& from, Context& to) { change_stack(&from.stack, to.stack); }
#else
struct Context {
  ucontext_t context;
  void begin(char* memory, Entry entry) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory, context.uc_stack.ss_size = STACK_BYTES, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
inline void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

}  // namespace gpu
