// What the compiled part of roma tells its loader, roma/_native.py.
#pragma once

#define ROMA_EXPORT __attribute__((visibility("default")))

extern "C" {

// Number of this interface. It grows by one whenever a function here changes its meaning or its
// arguments, so that a stale library is refused and not called wrongly.
ROMA_EXPORT int roma_abi_version();

// The best instruction set that this processor and its operating system both support:
// "avx512_bf16", "avx512", "avx2" or "portable". The string is static; nobody frees it.
ROMA_EXPORT const char* roma_cpu_level();
}
