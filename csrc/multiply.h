// The product of two matrices, and what it shares with the kernels of level.cpp: tasks and counts.
#pragma once

#include "product.h"
#include "tasks.h"

namespace roma {
namespace {

constexpr int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Runs a callable as tasks.
template <class Work>
void parallel(int threads, int64_t tasks, Work& work) {
  run_tasks(
      threads, tasks,
      [](void* context, int64_t task, int thread) { (*static_cast<Work*>(context))(task, thread); },
      &work);
}

size_t bytes_of(int64_t floats) { return 4 * static_cast<size_t>(floats); }

constexpr int64_t kBlock = 512;             // steps after which a product's tile returns to memory
constexpr int64_t kSide = 8;  // panels: what a block of 8 × 8 reads in kBlock steps stays in L2

struct Block {
  Vec at[kSide * kRows][kSide * kVecs];
};

template <class Step>
int32_t multiply(int threads, int64_t m, int64_t n, int64_t k, const RomaMatrix& left,
                 const RomaMatrix& right, void* out, int64_t stride, int32_t dtype, bool add) {
  const Operand a{left.data, left.row_stride, left.column_stride, left.dtype};
  const Operand b{right.data, right.column_stride, right.row_stride, right.dtype};
  const int64_t steps = steps_of<Step>(k);
  const int64_t narrow = divide(m, kRows), wide = divide(n, kColumns);
  Buffer lefts(bytes_of(narrow * kRows * steps)), rights(bytes_of(wide * kColumns * steps));
  Buffer space(bytes_of(threads * 4 * steps));
  Buffer blocks(sizeof(Block) * static_cast<size_t>(threads));
  if (!lefts.data() || !rights.data() || !space.data() || !blocks.data()) return 1;
  uint32_t* const packed_left = static_cast<uint32_t*>(lefts.data());
  uint32_t* const packed_right = static_cast<uint32_t*>(rights.data());

  auto pack_both = [&](int64_t task, int thread) {
    uint32_t* const scratch = static_cast<uint32_t*>(space.data()) + thread * 4 * steps;
    if (task < wide) {
      const int lanes = static_cast<int>(least(kColumns, n - task * kColumns));
      pack<Step>(packed_right + task * kColumns * steps, kColumns, b, task * kColumns, lanes, k,
                 scratch);
    } else {
      const int64_t panel = task - wide;
      const int lanes = static_cast<int>(least(kRows, m - panel * kRows));
      pack<Step>(packed_left + panel * kRows * steps, kRows, a, panel * kRows, lanes, k, scratch);
    }
  };
  parallel(threads, wide + narrow, pack_both);

  const int64_t across = divide(wide, kSide);
  auto compute = [&](int64_t task, int thread) {
    Block& block = static_cast<Block*>(blocks.data())[thread];
    const int64_t first_left = task / across * kSide, first_right = task % across * kSide;
    const int64_t lefts_here = least(kSide, narrow - first_left);
    const int64_t rights_here = least(kSide, wide - first_right);
    for (int64_t s = 0; s < steps; s += kBlock) {
      for (int64_t j = 0; j < rights_here; ++j) {
        for (int64_t i = 0; i < lefts_here; ++i) {
          Tile tile;
          multiply_panels<Step>(least(kBlock, steps - s),
                                packed_left + ((first_left + i) * steps + s) * kRows,
                                packed_right + ((first_right + j) * steps + s) * kColumns, tile);
          for (int r = 0; r < kRows; ++r) {
            for (int c = 0; c < kVecs; ++c) {
              Vec& sum = block.at[i * kRows + r][j * kVecs + c];
              sum = s == 0 ? tile.at[r][c] : sum + tile.at[r][c];
            }
          }
        }
      }
    }
    const int64_t row = first_left * kRows, column = first_right * kColumns;
    const int64_t columns = least(kSide * kColumns, n - column);
    for (int64_t r = 0; r < least(kSide * kRows, m - row); ++r) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t place = (row + r) * stride + column + c;
        Vec sum = block.at[r][c / kLanes];
        if (add) sum += load_as(dtype, out, place, least(kLanes, columns - c));
        store_as(dtype, out, place, sum, least(kLanes, columns - c));
      }
    }
  };
  parallel(threads, divide(narrow, kSide) * across, compute);
  return 0;
}

}  // namespace
}  // namespace roma
