// The C functions: which instruction set, and on to its kernels.

#include "level.h"

namespace {

#if defined(__x86_64__)

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
RomaLevel detect() noexcept {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ROMA_PORTABLE;
  // f, bw, dq and vl came together with Skylake-SP and Zen 4; Xeon Phi has f alone.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return ROMA_AVX2;
  return __builtin_cpu_supports("avx512bf16") ? ROMA_AVX512_BF16 : ROMA_AVX512;
}

const roma::Kernels& kernels_of(int32_t level) noexcept {
  switch (level) {
    case ROMA_AVX512_BF16: return roma::avx512_bf16_kernels;
    case ROMA_AVX512: return roma::avx512_kernels;
    case ROMA_AVX2: return roma::avx2_kernels;
    default: return roma::portable_kernels;
  }
}

#else

RomaLevel detect() noexcept { return ROMA_PORTABLE; }

const roma::Kernels& kernels_of(int32_t) noexcept { return roma::portable_kernels; }

#endif

}  // namespace

#if defined(__clang__)
#define ROMA_COMPILER __VERSION__  // clang writes its own name into it
#elif defined(__GNUC__)
#define ROMA_COMPILER "GCC " __VERSION__
#else
#error "expected GCC or Clang; set CXX to one of them"
#endif

const char* roma_version() noexcept { return ROMA_VERSION; }

const char* roma_compiler() noexcept { return ROMA_COMPILER; }

int32_t roma_cpu_level() noexcept {
  static const RomaLevel level = detect();
  return level;
}

int32_t roma_sweep(int32_t level, int32_t threads, const RomaRows* rows, const RomaHead* head,
                   float* sums, int64_t stride, int32_t moment) noexcept {
  return kernels_of(level).sweep(threads, *rows, *head, sums, stride, moment != 0);
}

int64_t roma_row_block(int32_t level) noexcept { return kernels_of(level).row_block; }

int32_t roma_dlogits(int32_t level, int32_t threads, const RomaRows* rows, const RomaHead* head,
                     const RomaUpstream* upstream, void* dz, int64_t stride,
                     int32_t dtype) noexcept {
  return kernels_of(level).dlogits(threads, *rows, *head, *upstream, dz, stride, dtype);
}

int32_t roma_multiply(int32_t level, int32_t threads, int64_t m, int64_t n, int64_t k,
                      const RomaMatrix* left, const RomaMatrix* right, void* out, int64_t stride,
                      int32_t dtype, int32_t add) noexcept {
  return kernels_of(level).multiply(threads, m, n, k, *left, *right, out, stride, dtype, add != 0);
}
