// Functions as operators of torch, from which no C++ exception escapes: torch may be compiled with
// another C++ runtime, which cannot catch ours. torch itself throws the error, with our message.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#if defined(_MSC_VER)
#define DEFORM_ATTN_NOINLINE __declspec(noinline)
#else
#define DEFORM_ATTN_NOINLINE __attribute__((noinline))
#endif

namespace deform_attn {

// The message of the error that a call ends with, or null.
template <auto boxed_function>
DEFORM_ATTN_NOINLINE const char* error_of(StableIValue* stack, uint64_t num_args,
                                          uint64_t num_outputs) {
  static thread_local std::string message;  // not a local one: torch's error skips destructors
  try {
    boxed_function(stack, num_args, num_outputs);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// Torch's error passes through this function, which therefore must catch and destroy nothing.
template <auto boxed_function>
void without_exceptions(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  if (const char* message = error_of<boxed_function>(stack, num_args, num_outputs)) {
    aoti_torch_check(false, "deform_attn", "", 0, message);
  }
}

}  // namespace deform_attn

#define DEFORM_ATTN_BOX(function) (&::deform_attn::without_exceptions<TORCH_BOX(function)>)
