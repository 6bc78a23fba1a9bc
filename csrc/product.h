// The product of two packed panels, and how panels are packed.
//
// A panel holds `width` rows of an operand, their elements of one step side by side:
// panel[step][row]. A step is 4 bytes: one fp32 element, or two neighbours in bf16 (`Pair`), whose
// products the CPU adds to an fp32 sum. The product of a narrow panel (kRows wide, broadcast) and a
// wide one (kColumns wide, vectors) is a tile [kRows][kColumns], kept in registers over all steps.
#pragma once

#include "vector.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace roma {
namespace {

// 32 registers: 24 sums; 16 registers: 12.
constexpr int kRows = ROMA_LANES == 16 ? 12 : 4;
constexpr int kVecs = ROMA_LANES == 16 ? 2 : 3;
constexpr int kColumns = kVecs * kLanes;
static_assert(kRows % 4 == 0 && kColumns % 4 == 0, "pack_rows takes four at a time");

struct Tile {
  Vec at[kRows][kVecs];
};

// An operand of a product; a lane is what ends up as a row or a column of the result.
struct Operand {
  const void* data;
  int64_t lane_stride;
  int64_t stride;  // along the sum
  int32_t dtype;
};

ROMA_INLINE float element(const Operand& x, int64_t place) {
  switch (x.dtype) {
    case ROMA_FLOAT32: return static_cast<const float*>(x.data)[place];
    case ROMA_BFLOAT16: return from_bfloat16(static_cast<const uint16_t*>(x.data)[place]);
    default: return from_float16(static_cast<const uint16_t*>(x.data)[place]);
  }
}

// fp32 steps of one element, whatever the operands' dtype.
struct Single {
  static constexpr int kElements = 1;
  static constexpr int32_t kDtype = ROMA_FLOAT32;

  static ROMA_INLINE Vec multiply_add(Vec sum, uint32_t a, const uint32_t* b) {
    Vec other;
    std::memcpy(&other, b, sizeof other);
    return sum + bits<float>(a) * other;
  }

  static void convert(uint32_t* to, const Operand& x, int64_t place, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = bits<uint32_t>(element(x, place + i * x.stride));
  }

  static void join(uint32_t* to, const Operand& x, int64_t place, int lanes, bool) {
    std::memcpy(to, static_cast<const float*>(x.data) + place, 4 * static_cast<size_t>(lanes));
  }
};

#if defined(__AVX512BF16__)

// bf16 steps of two elements; both operands are bf16.
struct Pair {
  static constexpr int kElements = 2;
  static constexpr int32_t kDtype = ROMA_BFLOAT16;

  static ROMA_INLINE Vec multiply_add(Vec sum, uint32_t a, const uint32_t* b) {
    const __m512i other = _mm512_loadu_si512(b);
    return _mm512_dpbf16_ps(sum, bits<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                            bits<__m512bh>(other));
  }

  static void convert(uint32_t* to, const Operand& x, int64_t place, int64_t count) {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + place;
    for (int64_t i = 0; i < count; i += 2) {
      const uint32_t second = i + 1 < count ? from[(i + 1) * x.stride] : 0u;
      to[i / 2] = from[i * x.stride] | second << 16;
    }
  }

  static void join(uint32_t* to, const Operand& x, int64_t place, int lanes, bool both) {
    const uint16_t* first = static_cast<const uint16_t*>(x.data) + place;
    const uint16_t* second = first + (both ? x.stride : 0);
    const uint32_t keep = both ? 0xffff0000u : 0u;
    for (int i = 0; i < lanes; ++i) to[i] = first[i] | (uint32_t{second[i]} << 16 & keep);
  }
};

#endif

template <class Step>
constexpr int64_t steps_of(int64_t elements) {
  return (elements + Step::kElements - 1) / Step::kElements;
}

typedef uint32_t Quad __attribute__((vector_size(16)));

#if defined(__clang__)
#define ROMA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ROMA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Quad{__VA_ARGS__})
#endif

// Four rows of 4-byte steps into four neighbouring columns of a panel.
inline void transpose(uint32_t* panel, int width, const uint32_t* const (&rows)[4], int64_t steps) {
  int64_t s = 0;
  for (; s + 4 <= steps; s += 4) {
    Quad r[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&r[i], rows[i] + s, sizeof r[i]);
    const Quad a = ROMA_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = ROMA_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
    const Quad c = ROMA_SHUFFLE(r[0], r[1], 2, 6, 3, 7), d = ROMA_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
    const Quad out[4] = {ROMA_SHUFFLE(a, b, 0, 1, 4, 5), ROMA_SHUFFLE(a, b, 2, 3, 6, 7),
                         ROMA_SHUFFLE(c, d, 0, 1, 4, 5), ROMA_SHUFFLE(c, d, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(panel + (s + i) * width, &out[i], sizeof out[i]);
  }
  for (; s < steps; ++s) {
    for (int i = 0; i < 4; ++i) std::memcpy(panel + s * width + i, rows[i] + s, 4);
  }
}

// Packs `lanes` ≤ `width` lanes of an operand from `first` on, zeros behind them; `scratch` has
// room for four lanes.
template <class Step>
void pack(uint32_t* panel, int width, const Operand& x, int64_t first, int lanes, int64_t count,
          uint32_t* scratch) {
  const int64_t steps = steps_of<Step>(count);
  const bool same = x.dtype == Step::kDtype;
  if (same && x.lane_stride == 1 && x.stride != 1) {
    for (int64_t s = 0; s < steps; ++s, panel += width) {
      const int64_t k = s * Step::kElements;
      Step::join(panel, x, k * x.stride + first, lanes, k + Step::kElements <= count);
      if (lanes < width) {
        std::memset(panel + lanes, 0, 4 * static_cast<size_t>(width - lanes));
      }
    }
    return;
  }
  // Rows that are as they should be are read where they lie.
  const bool direct = same && x.stride == 1 && count % Step::kElements == 0;
  const int64_t size = Step::kDtype == ROMA_FLOAT32 ? 4 : 2;
  for (int lane = 0; lane < width; lane += 4) {
    const uint32_t* rows[4];
    for (int i = 0; i < 4; ++i) {
      uint32_t* own = scratch + i * steps;
      const int64_t place = (first + lane + i) * x.lane_stride;
      rows[i] = own;
      if (lane + i >= lanes) {
        std::memset(own, 0, 4 * static_cast<size_t>(steps));
      } else if (direct) {
        rows[i] = reinterpret_cast<const uint32_t*>(static_cast<const char*>(x.data) + place * size);
      } else {
        Step::convert(own, x, place, count);
      }
    }
    transpose(panel + lane, width, rows, steps);
  }
}

// Steps after which sums go to memory and start anew. One chain of 512 additions left log-probs off by
// 4.9e-6 nats (rms, logits up to 30), eight chains of 64 by 1.1e-6; the time is the same.
constexpr int64_t kChain = 64;

// The tile of two panels, over all steps.
template <class Step>
__attribute__((noinline)) void multiply_panels(int64_t steps, const uint32_t* narrow,
                                               const uint32_t* wide, Tile& tile) {
  for (int64_t done = 0; done < steps; done += kChain) {
    const int64_t some = steps - done < kChain ? steps - done : kChain;
    Vec sums[kRows][kVecs] = {};
    for (int64_t s = 0; s < some; ++s, narrow += kRows, wide += kColumns) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int n = 0; n < kVecs; ++n) {
          sums[i][n] = Step::multiply_add(sums[i][n], narrow[i], wide + n * kLanes);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) {
        tile.at[i][n] = done == 0 ? sums[i][n] : tile.at[i][n] + sums[i][n];
      }
    }
  }
}

}  // namespace
}  // namespace roma
