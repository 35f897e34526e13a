// Where the rows of a quantised matrix lie, whatever they are multiplied as.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matmul.h"

namespace llama31 {

constexpr int64_t kFetchAhead = 6 * 1024;  // bytes between what is multiplied and what is asked for, at least

// Four rows as they are stored: the numbers of `Bits`, and the range of each group of columns.
template <typename Bits>
struct StoredRows {
  int64_t group_size, groups;
  const uint8_t *data[4];
  const Range *ranges[4];

  // As those of PlainRows; of later rows where the next ones do not take as long as memory does.
  const void *FetchFrom(int64_t k, int64_t from, bool) const {
    return data[0] + std::max(4 * k / Bits::kPerByte, kFetchAhead) + from / Bits::kPerByte;
  }
  static int64_t FetchBytes(int64_t count) { return count / Bits::kPerByte; }
  // For columns [begin, end).
  ALWAYS_INLINE void FetchNext(int64_t k, int64_t begin, int64_t end) const {
    FetchLines(FetchFrom(k, 4 * begin, true), FetchBytes(4 * (end - begin)));
  }
};

// A matrix (N, K) of them.
template <typename Bits>
class StoredMatrix {
 public:
  StoredMatrix(const Stored &stored, int64_t k, int64_t group_size)
      : k_(k), group_size_(group_size), stored_(stored), groups_((k + group_size - 1) / group_size) {}

  int64_t k() const { return k_; }
  int64_t part_unit() const { return group_size_; }

 protected:
  // The four rows from n on; beyond the last one, the last one again.
  StoredRows<Bits> RowsAt(int64_t n, int64_t n_end) const {
    // So few numbers of each row that the processor does not foresee them either.
    FetchLines(stored_.ranges + (n + 16) * groups_, 4 * groups_ * static_cast<int64_t>(sizeof(Range)));
    StoredRows<Bits> rows{group_size_, groups_, {}, {}};
    for (int j = 0; j < 4; ++j) {
      const int64_t row = std::min<int64_t>(n + j, n_end - 1);
      rows.data[j] = static_cast<const uint8_t *>(stored_.data) + row * k_ / Bits::kPerByte;
      rows.ranges[j] = stored_.ranges + row * groups_;
    }
    return rows;
  }

  int64_t k_, group_size_;

 private:
  Stored stored_;
  int64_t groups_;
};

}  // namespace llama31
