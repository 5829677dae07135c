// Makes a kernel known to XLA: its signature says which buffers it takes and gives.

#pragma once

#include <type_traits>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace moe_lab {

template <typename T>
struct ResultOf : std::false_type {};
template <typename T>
struct ResultOf<xla::ffi::Result<T>> : std::true_type {
  using Buffer = T;
};

// A binding in XLA's sense, of any kernel that takes the thread pool, then its arguments and results.
struct Signature {
  template <typename... Parameters>
  auto To(xla::ffi::Error (*kernel)(xla::ffi::ThreadPool, Parameters...)) const {
    return bound<Parameters...>(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>(), kernel);
  }

 private:
  // XLA's bindings can't be moved, only gone on from: so the kernel comes along to the end.
  template <typename... Rest, typename Binding, typename Kernel>
  static auto bound(Binding&& binding, Kernel kernel) {
    if constexpr (sizeof...(Rest) == 0) {
      return std::move(binding).To(kernel);
    } else {
      return bound_next<Rest...>(std::move(binding), kernel);
    }
  }

  template <typename First, typename... Rest, typename Binding, typename Kernel>
  static auto bound_next(Binding&& binding, Kernel kernel) {
    if constexpr (ResultOf<First>::value) {
      return bound<Rest...>(std::move(binding).template Ret<typename ResultOf<First>::Buffer>(), kernel);
    } else {
      return bound<Rest...>(std::move(binding).template Arg<First>(), kernel);
    }
  }
};

}  // namespace moe_lab

#define MOE_LAB_KERNEL(name, function) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_lab_##name, moe_lab::function, moe_lab::Signature())
