// A pool of threads for loops of some tens of microseconds: workers spin between the loops of one forward pass and
// sleep between passes.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace llama31 {

class ThreadPool {
 public:
  inline static int num_threads = 1;  // for the first Get()

  static ThreadPool &Get() {
    static ThreadPool *pool = new ThreadPool(num_threads);  // never destroyed: workers may outlive main's statics
    return *pool;
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end) for parts of [0, count), each of at least `grain` items; returns when all are done.
  void For(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)> &body) {
    const int64_t parts = std::min<int64_t>((count + grain - 1) / grain, 4 * size());
    if (parts <= 1 || workers_.empty()) {
      if (count > 0) body(0, count);
      return;
    }
    std::lock_guard<std::mutex> one_loop_at_a_time(loop_);
    body_ = &body;
    count_ = count;
    parts_ = parts;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(wake_mutex_);
      wake_.notify_all();
    }
    TakeParts();
    while (busy_.load(std::memory_order_acquire) > 0) _mm_pause();
  }

 private:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { Work(); });
      workers_.back().detach();
    }
  }

  void TakeParts() {
    for (int64_t part = next_.fetch_add(1); part < parts_; part = next_.fetch_add(1)) {
      (*body_)(part * count_ / parts_, (part + 1) * count_ / parts_);
    }
  }

  void Work() {
    uint64_t seen = 0;
    for (;;) {
      const auto spin_until = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
      int turns = 0;
      while (epoch_.load(std::memory_order_acquire) == seen) {
        _mm_pause();
        if (++turns % 64 != 0 || std::chrono::steady_clock::now() < spin_until) continue;
        std::unique_lock<std::mutex> lock(wake_mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
        sleeping_.fetch_sub(1);
        break;
      }
      seen = epoch_.load(std::memory_order_acquire);
      TakeParts();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex loop_, wake_mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0}, sleeping_{0};
  const std::function<void(int64_t, int64_t)> *body_ = nullptr;
  int64_t count_ = 0, parts_ = 0;
};

}  // namespace llama31
