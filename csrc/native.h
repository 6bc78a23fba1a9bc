// The C interface of libroma_native. Plain C types alone, no Python and no torch: ctypes opens it,
// and one build serves every Python and every torch. Strings are static: nobody frees them.
//
// Shapes: R rows, D hidden size, V entries of the vocabulary. Strides count elements, not bytes.
#pragma once

#include <cstdint>

#define ROMA_API __attribute__((visibility("default")))

extern "C" {

enum RomaDtype : int32_t { ROMA_FLOAT32 = 0, ROMA_BFLOAT16 = 1, ROMA_FLOAT16 = 2 };

// Instruction sets that kernels are compiled for; a CPU that has one has all below it.
enum RomaLevel : int32_t {
  ROMA_PORTABLE = 0,
  ROMA_AVX2 = 1,
  ROMA_AVX512 = 2,
  ROMA_AVX512_BF16 = 3
};

struct RomaMatrix {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  int32_t dtype;
};

struct RomaRows {
  RomaMatrix states;      // [R, D]
  int64_t count;          // R
  int64_t depth;          // D
  const int64_t* tokens;  // [R]
  const float* scale;     // [R], 1/τ
};

struct RomaHead {
  RomaMatrix weight;  // [V, D]
  int64_t vocab;      // V
  const float* bias;  // [V] or null
  float softcap;      // s, or 0 for none
  int64_t start;      // token of the first weight row
};

struct RomaUpstream {
  const float* lse;       // [R]
  const float* entropy;   // [R], null together with dentropy
  const float* dlogp;     // [R]
  const float* dentropy;  // [R] or null
};

// The version of roma that this library was built from, as in pyproject.toml.
ROMA_API const char* roma_version() noexcept;

// Name and version of the compiler that built it.
ROMA_API const char* roma_compiler() noexcept;

// The highest level that the CPU at hand allows, asked at run time, among those compiled in.
ROMA_API int32_t roma_cpu_level() noexcept;

// The functions below run on `threads` threads, the caller's among them, and return 0, or 1 if memory
// ran out. Results do not depend on `threads`: every sum is taken by one thread, in one order.

// Peak, total = Σ e^(z−peak), target and (if `moment`) Σ z·e^(z−peak) of each row: sums[i·stride+r].
ROMA_API int32_t roma_sweep(int32_t level, int32_t threads, const RomaRows* rows,
                            const RomaHead* head, float* sums, int64_t stride,
                            int32_t moment) noexcept;

// How many rows a column of dlogits is padded to: `dz` below has room for R rounded up to it.
ROMA_API int64_t roma_row_block(int32_t level) noexcept;

// dz[v·stride+r] for the V entries of a head, or of a slice of one; rows beyond R are written too.
ROMA_API int32_t roma_dlogits(int32_t level, int32_t threads, const RomaRows* rows,
                              const RomaHead* head, const RomaUpstream* upstream, void* dz,
                              int64_t stride, int32_t dtype) noexcept;

// out[M, N] = left[M, K]·right[K, N], or is added to if `add`; summed in fp32 and rounded once. The
// rows of out are contiguous, `stride` apart.
ROMA_API int32_t roma_multiply(int32_t level, int32_t threads, int64_t m, int64_t n, int64_t k,
                               const RomaMatrix* left, const RomaMatrix* right, void* out,
                               int64_t stride, int32_t dtype, int32_t add) noexcept;

// `count` words of Philox 4×32-10. A block of 64 holds word 0 of 16 counters, then word 1, 2 and 3;
// block b has the counters from 16·b on. Runs on the caller's thread, as do the next two.
ROMA_API void roma_random_words(int32_t level, uint64_t key, uint32_t* out, int64_t count) noexcept;

// out = x + scale·n, or x·(1 + scale·n) if `proportional`, rounded and clipped to 0..255, with n
// standard normal, made of the words of the same places. in and out may be the same.
ROMA_API void roma_add_noise(int32_t level, uint64_t key, float scale, int32_t proportional,
                             const uint8_t* in, uint8_t* out, int64_t count) noexcept;

// Places whose word is below `salt` become 255, else those below `hit` 0. A place is a value, or a
// whole pixel of three if `whole`.
ROMA_API void roma_add_impulses(int32_t level, uint64_t key, uint64_t salt, uint64_t hit,
                                int32_t whole, const uint8_t* in, uint8_t* out,
                                int64_t places) noexcept;

}  // extern "C"
