// Which instruction set the CPU at hand has. The library is compiled for the oldest CPU of its
// architecture; a kernel compiled for more is called only if this says that it may be.

#include "native.h"

namespace {

#if defined(__x86_64__)

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
const char* detect() noexcept {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return "portable";
  // f, bw, dq and vl came together with Skylake-SP and Zen 4; Xeon Phi has f alone.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return "avx2";
  return __builtin_cpu_supports("avx512bf16") ? "avx512_bf16" : "avx512";
}

#else

const char* detect() noexcept { return "portable"; }

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

const char* roma_cpu_level() noexcept {
  static const char* const level = detect();
  return level;
}
