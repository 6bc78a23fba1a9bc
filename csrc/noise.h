// The noise of one instruction set, as a table: native.cpp picks one at run time.
#pragma once

#include "native.h"

namespace roma {

struct Noise {
  void (*random_words)(uint64_t, uint32_t*, int64_t);
  void (*add_noise)(uint64_t, float, bool, const uint8_t*, uint8_t*, int64_t);
  void (*add_impulses)(uint64_t, uint64_t, uint64_t, bool, const uint8_t*, uint8_t*, int64_t);
};

// Defined in noise.cpp, which is compiled once for each.
extern const Noise portable_noise, avx2_noise, avx512_noise;

}  // namespace roma
