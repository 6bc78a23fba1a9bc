#include "tasks.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace roma {

void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t, int),
               void* context) noexcept {
  std::atomic<int64_t> next{0};
  const auto loop = [&](int thread) {
    for (int64_t task = next++; task < tasks; task = next++) work(context, task, thread);
  };
  std::vector<std::thread> others;
  try {
    const int64_t wanted = std::min<int64_t>(threads, tasks);
    others.reserve(static_cast<size_t>(std::max<int64_t>(wanted, 1)));
    for (int thread = 1; thread < wanted; ++thread) others.emplace_back(loop, thread);
  } catch (const std::system_error&) {  // no more threads
  } catch (const std::bad_alloc&) {
  }
  loop(0);
  for (std::thread& other : others) other.join();
}

namespace {
constexpr std::align_val_t kLine{64};
}

Buffer::Buffer(size_t bytes) noexcept : data_(::operator new(bytes, kLine, std::nothrow)) {}

Buffer::~Buffer() { ::operator delete(data_, kLine); }

}  // namespace roma
