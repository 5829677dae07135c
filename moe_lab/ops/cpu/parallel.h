// Work shared among XLA's own threads, and memory that is kept between calls.

#ifndef MOE_LAB_OPS_CPU_PARALLEL_H_
#define MOE_LAB_OPS_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace moe_lab {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Bytes = ffi::Buffer<ffi::U8>;

// Runs body(i) for i in [0, count), in no order. The caller works too and takes all if no other thread is free, so a
// busy pool delays but never blocks it.
template <typename Body>
void parallel_for(ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // A helper that starts late finds nothing left and never touches `body`, which may be gone by then.
  auto work = [shared, count, &body] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      body(i);
      if (shared->done.fetch_add(1) + 1 == count) shared->done.notify_one();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int64_t done; (done = shared->done.load()) < count;) shared->done.wait(done);
}

// Floats that a thread keeps for its next call: fresh pages cost more than many of the products in them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  float* get(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + 15) / 16 * 16;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace moe_lab

#endif  // MOE_LAB_OPS_CPU_PARALLEL_H_
