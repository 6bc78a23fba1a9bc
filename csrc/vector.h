// A vector of kLanes floats in the compiler's own extension: one source for every instruction set.
// Included by level.cpp and noise.cpp, which are compiled once for each.
#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"

namespace roma {
namespace {  // each instruction set has its own

constexpr int kLanes = ROMA_LANES;
typedef float Vec __attribute__((vector_size(4 * ROMA_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * ROMA_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * ROMA_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * ROMA_LANES)));

#define ROMA_INLINE inline __attribute__((always_inline))

template <class To, class From>
ROMA_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

ROMA_INLINE Vec load(const float* from) {
  Vec found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

ROMA_INLINE void store(float* to, Vec from) { std::memcpy(to, &from, sizeof from); }

ROMA_INLINE Vec all(float value) { return value - Vec{}; }

// NaN in `b` is not chosen, NaN in `a` stays: a peak that is a number keeps e^(z−peak) of a NaN a NaN.
ROMA_INLINE Vec larger(Vec a, Vec b) { return b > a ? b : a; }

// e^x for x ≤ 88, within 1 unit of the last place; 0 below −87.3, where e^x is no normal number.
// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and Taylor's series of e^r: its eighth term is 5e-9.
ROMA_INLINE Vec exponential(Vec x) {
  const float whole = 12582912.0f;  // 1.5·2²³: adding it rounds to whole numbers
  const Vec shifted = x * 1.44269504f + whole;
  const Vec n = shifted - whole;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  Vec p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec power = bits<Vec>((bits<BitVec>(shifted) << 23) + (127u << 23));
  return x < -87.3f ? Vec{} : p * power;
}

// tanh x: an odd polynomial below 0.55 (least squares of the relative error, 1e-9), else
// 1 − 2/(e^2|x| + 1).
ROMA_INLINE Vec hyperbolic_tangent(Vec x) {
  const BitVec sign = bits<BitVec>(x) & 0x80000000u;
  const Vec size = bits<Vec>(bits<BitVec>(x) & 0x7fffffffu);
  const Vec capped = size > 20.0f ? all(20.0f) : size;
  const Vec large = 1.0f - 2.0f / (exponential(2.0f * capped) + 1.0f);
  const Vec u = x * x;
  Vec p = u * -0.006274240091443062f + 0.021071679890155792f;
  p = p * u - 0.05385230854153633f;
  p = p * u + 0.13332585990428925f;
  p = p * u - 0.33333316445350647f;
  const Vec small = size + size * u * p;
  return bits<Vec>(bits<BitVec>(size < 0.55f ? small : large) | sign);
}

// To the nearest bf16, ties to even; NaN stays NaN.
ROMA_INLINE HalfVec to_bfloat16(Vec x) {
  const BitVec b = bits<BitVec>(x);
  const BitVec rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const BitVec found = x == x ? rounded : (b >> 16) | 0x40u;
  return __builtin_convertvector(found, HalfVec);
}

ROMA_INLINE float from_bfloat16(uint16_t x) { return bits<float>(uint32_t{x} << 16); }

// Exponents are moved by 2¹¹², which also makes fp16's small numbers normal ones.
ROMA_INLINE float from_float16(uint16_t x) {
  const uint32_t size = uint32_t{x} & 0x7fffu, sign = (uint32_t{x} & 0x8000u) << 16;
  const uint32_t special = size >= 0x7c00u ? 0x7f800000u | (size & 0x3ffu) << 13 : 0u;
  const float found = bits<float>(size << 13) * 5.192296858534828e33f;  // 2¹¹²
  return bits<float>((special ? special : bits<uint32_t>(found)) | sign);
}

// `lanes` elements of a matrix in fp32 or bf16.
ROMA_INLINE Vec load_as(int32_t dtype, const void* from, int64_t place, int64_t lanes) {
  Vec found{};
  if (dtype == ROMA_BFLOAT16) {
    HalfVec half{};
    std::memcpy(&half, static_cast<const uint16_t*>(from) + place, 2 * static_cast<size_t>(lanes));
    return bits<Vec>(__builtin_convertvector(half, BitVec) << 16);
  }
  std::memcpy(&found, static_cast<const float*>(from) + place, 4 * static_cast<size_t>(lanes));
  return found;
}

ROMA_INLINE void store_as(int32_t dtype, void* to, int64_t place, Vec x, int64_t lanes) {
  if (dtype == ROMA_BFLOAT16) {
    const HalfVec half = to_bfloat16(x);
    std::memcpy(static_cast<uint16_t*>(to) + place, &half, 2 * static_cast<size_t>(lanes));
  } else {
    std::memcpy(static_cast<float*>(to) + place, &x, 4 * static_cast<size_t>(lanes));
  }
}

}  // namespace
}  // namespace roma
