// Threads and memory. Not inline: the standard library's templates, compiled for AVX-512 in one
// file, would otherwise be shared with files that run on any CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace roma {

// Calls work(context, task, thread) for every task in 0..tasks-1; `thread` is below `threads`. The
// threads live for this call alone: nothing survives that a fork or another Python thread could
// trip over. Where the system gives fewer threads, those that there are do the work.
void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t, int), void* context) noexcept;

// Memory aligned to a cache line that is freed with its owner; data() is null if there was none.
class Buffer {
 public:
  explicit Buffer(size_t bytes) noexcept;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const noexcept { return data_; }

 private:
  void* data_;
};

}  // namespace roma
