// Where the rows of a quantised matrix lie, whatever they are multiplied as.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matmul.h"

namespace llama31 {

constexpr int64_t kFetchAhead = 6 * 1024;  // bytes between what is multiplied and what is asked for, at least

// Four rows as they are stored: the numbers of `Bits`, and of each group of columns a scale and a bias.
template <typename Bits>
struct StoredRows {
  int64_t group_size, groups;
  const uint8_t *data[4];
  const float *scales[4], *biases[4];

  // A step's share of the next four rows of k columns, or of later ones: short rows do not take as long as memory does.
  void FetchNext(int64_t k, int64_t at, int64_t step) const { FetchLater(k, 4 * at, 4 * step); }
  void FetchLater(int64_t k, int64_t from, int64_t share) const {
    const int64_t ahead = std::max(4 * k / Bits::kPerByte, kFetchAhead);
    FetchLines(data[0] + ahead + from / Bits::kPerByte, share / Bits::kPerByte);
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
    FetchLines(stored_.scales + (n + 16) * groups_, 1), FetchLines(stored_.biases + (n + 16) * groups_, 1);
    StoredRows<Bits> rows{group_size_, groups_, {}, {}, {}};
    for (int j = 0; j < 4; ++j) {
      const int64_t row = std::min<int64_t>(n + j, n_end - 1);
      rows.data[j] = static_cast<const uint8_t *>(stored_.data) + row * k_ / Bits::kPerByte;
      rows.scales[j] = stored_.scales + row * groups_, rows.biases[j] = stored_.biases + row * groups_;
    }
    return rows;
  }

  int64_t k_, group_size_;

 private:
  Stored stored_;
  int64_t groups_;
};

}  // namespace llama31
