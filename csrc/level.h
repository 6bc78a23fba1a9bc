// The kernels of one instruction set, as a table: native.cpp picks one at run time.
#pragma once

#include "native.h"

namespace roma {

struct Kernels {
  int32_t (*sweep)(int, const RomaRows&, const RomaHead&, float*, int64_t, bool);
  int32_t (*dlogits)(int, const RomaRows&, const RomaHead&, const RomaUpstream&, void*, int64_t,
                     int32_t);
  int32_t (*multiply)(int, int64_t, int64_t, int64_t, const RomaMatrix&, const RomaMatrix&, void*,
                      int64_t, int32_t, bool);
  int64_t row_block;
};

// Defined in level.cpp, which is compiled once for each.
extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace roma
