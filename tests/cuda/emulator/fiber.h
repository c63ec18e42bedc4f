// Fibers: a stack for each, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

#ifdef __x86_64__

// The saved registers lie on the stack, so the stack pointer is all there is to keep.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void emulator_switch(void** from, void* to);

inline void switch_context(Context& from, Context& to) {
  emulator_switch(&from.stack_pointer, to.stack_pointer);
}

inline void make_context(Context& context, std::byte* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto* top = reinterpret_cast<uint64_t*>(stack + bytes);
  *--top = 0;  // no return address of `entry`; also aligns the stack as after a call
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = 0;
  context.stack_pointer = top;
}

inline bool overflows(const Context& context, const std::byte* stack) {
  constexpr int kMargin = 2048;
  return static_cast<std::byte*>(context.stack_pointer) < stack + kMargin;
}

#else

struct Context {
  ucontext_t registers;
};

inline void switch_context(Context& from, Context& to) {
  swapcontext(&from.registers, &to.registers);
}

inline void make_context(Context& context, std::byte* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

inline bool overflows(const Context&, const std::byte*) { return false; }

#endif

}  // namespace emulator
