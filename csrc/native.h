// The C interface of libroma_native. Plain C types alone, no Python and no torch: ctypes opens it,
// and one build serves every Python and every torch. Strings are static: nobody frees them.
#pragma once

#define ROMA_API __attribute__((visibility("default")))

extern "C" {

// The version of roma that this library was built from, as in pyproject.toml.
ROMA_API const char* roma_version() noexcept;

// Name and version of the compiler that built it.
ROMA_API const char* roma_compiler() noexcept;

// The widest instruction set that kernels may use on the CPU at hand, asked at run time:
// "avx512_bf16", "avx512", "avx2" or "portable".
ROMA_API const char* roma_cpu_level() noexcept;

}  // extern "C"
