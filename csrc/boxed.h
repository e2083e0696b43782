// Functions as operators of torch, from which no C++ exception escapes: torch may be compiled with
// another C++ runtime, which cannot catch ours. torch itself throws the error, with our message.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

namespace deform_attn {

template <auto boxed_function>
void without_exceptions(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  static thread_local std::string message;  // not a local one: torch's error skips destructors
  try {
    boxed_function(stack, num_args, num_outputs);
    return;
  } catch (const std::exception& error) {
    message = error.what();
  }
  aoti_torch_check(false, "deform_attn", "", 0, message.c_str());
}

}  // namespace deform_attn

#define DEFORM_ATTN_BOX(function) (&::deform_attn::without_exceptions<TORCH_BOX(function)>)
