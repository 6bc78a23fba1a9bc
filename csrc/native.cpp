// The C functions: which instruction set, and on to its kernels.

#include "level.h"
#include "noise.h"

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

const roma::Noise& noise_of(int32_t level) noexcept {
  switch (level) {
    case ROMA_AVX512_BF16:  // nothing in it is bf16
    case ROMA_AVX512: return roma::avx512_noise;
    case ROMA_AVX2: return roma::avx2_noise;
    default: return roma::portable_noise;
  }
}

#else

RomaLevel detect() noexcept { return ROMA_PORTABLE; }

const roma::Kernels& kernels_of(int32_t) noexcept { return roma::portable_kernels; }

const roma::Noise& noise_of(int32_t) noexcept { return roma::portable_noise; }

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

void roma_random_words(int32_t level, uint64_t key, uint32_t* out, int64_t count) noexcept {
  noise_of(level).random_words(key, out, count);
}

void roma_add_noise(int32_t level, uint64_t key, float scale, int32_t proportional,
                    const uint8_t* in, uint8_t* out, int64_t count) noexcept {
  noise_of(level).add_noise(key, scale, proportional != 0, in, out, count);
}

void roma_add_impulses(int32_t level, uint64_t key, uint64_t salt, uint64_t hit, int32_t whole,
                       const uint8_t* in, uint8_t* out, int64_t places) noexcept {
  noise_of(level).add_impulses(key, salt, hit, whole != 0, in, out, places);
}
