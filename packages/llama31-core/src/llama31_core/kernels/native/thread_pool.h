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
  //
  // It waits for parts that a thread has begun, not for threads: one that the system keeps from running takes none.
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
    unfinished_.store(parts, std::memory_order_relaxed);
    loops_ += 1;
    ticket_.store(loops_ << 32 | static_cast<uint64_t>(parts), std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(wake_mutex_);
      wake_.notify_all();
    }
    TakeParts();
    while (unfinished_.load(std::memory_order_acquire) > 0) _mm_pause();
  }

 private:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { Work(); });
      workers_.back().detach();
    }
  }

  // The number of parts left is in the ticket, beside the number of the loop: whoever lowers it has a part of that very
  // loop, which cannot end before the part does.
  void TakeParts() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (Left(ticket) > 0) {
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
      const int64_t part = parts_ - Left(ticket);
      (*body_)(part * count_ / parts_, (part + 1) * count_ / parts_);
      unfinished_.fetch_sub(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  static int64_t Left(uint64_t ticket) { return static_cast<int64_t>(ticket & 0xffffffff); }

  void Work() {
    for (;;) {
      const auto spin_until = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
      int turns = 0;
      while (Left(ticket_.load(std::memory_order_acquire)) == 0) {
        _mm_pause();
        if (++turns % 64 != 0 || std::chrono::steady_clock::now() < spin_until) continue;
        std::unique_lock<std::mutex> lock(wake_mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return Left(ticket_.load(std::memory_order_seq_cst)) > 0; });
        sleeping_.fetch_sub(1);
        break;
      }
      TakeParts();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex loop_, wake_mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> unfinished_{0};
  std::atomic<int> sleeping_{0};
  uint64_t loops_ = 0;
  const std::function<void(int64_t, int64_t)> *body_ = nullptr;
  int64_t count_ = 0, parts_ = 0;
};

}  // namespace llama31
