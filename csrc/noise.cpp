// Random words, normal noise and impulses, the same bytes on every instruction set: compiled once for each,
// multiply-adds not contracted, from operations that IEEE 754 defines to the last bit.
// roma/views/noise.py says the same in PyTorch; tests hold the two to each other bit by bit.

#include "noise.h"

#include "vector.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace roma {
namespace {

constexpr int kCounters = 16;             // of a block
constexpr int kValues = 4 * kCounters;    // of a block: word 0 of its counters, word 1, …
constexpr float kWhole = 12582912.0f;     // 1.5·2²³: adding it rounds to whole numbers, ties to even

#if defined(__AVX512F__)  // masked by ones: GCC 12 warns of its own header for the plain form
#define ROMA_MULTIPLY_EVEN(a, b) \
  bits<BitVec>(_mm512_maskz_mul_epu32(0xff, bits<__m512i>(a), bits<__m512i>(b)))
#elif defined(__AVX2__)
#define ROMA_MULTIPLY_EVEN(a, b) bits<BitVec>(_mm256_mul_epu32(bits<__m256i>(a), bits<__m256i>(b)))
#elif defined(__SSE2__)
#define ROMA_MULTIPLY_EVEN(a, b) bits<BitVec>(_mm_mul_epu32(bits<__m128i>(a), bits<__m128i>(b)))
#endif

typedef uint64_t WideVec __attribute__((vector_size(4 * ROMA_LANES)));

// The upper 32 bits of 32 × 32 → 64 bits, lane by lane.
ROMA_INLINE BitVec multiply_high(BitVec a, uint32_t by) {
#if defined(ROMA_MULTIPLY_EVEN)
  const BitVec factor = by - BitVec{};
  const WideVec even = bits<WideVec>(ROMA_MULTIPLY_EVEN(a, factor));
  const WideVec odd = bits<WideVec>(ROMA_MULTIPLY_EVEN(bits<BitVec>(bits<WideVec>(a) >> 32), factor));
  return bits<BitVec>(even >> 32 | odd >> 32 << 32);
#else
  BitVec high;
  for (int i = 0; i < kLanes; ++i) high[i] = static_cast<uint32_t>(uint64_t{a[i]} * by >> 32);
  return high;
#endif
}

// Philox 4×32 of ten rounds (Salmon et al., SC 2011), of kLanes counters from `start` on, a multiple
// of kLanes: their upper halves are the same.
ROMA_INLINE void philox(uint64_t key, uint64_t start, BitVec (&words)[4]) {
  BitVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  BitVec c0 = lane + static_cast<uint32_t>(start);
  BitVec c1 = static_cast<uint32_t>(start >> 32) - BitVec{}, c2{}, c3{};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const BitVec high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const BitVec high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

ROMA_INLINE Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }

ROMA_INLINE Vec square_root(Vec x) {
  Vec found;
  for (int i = 0; i < kLanes; ++i) found[i] = __builtin_sqrtf(x[i]);
  return found;
}

// ln u of 0 < u ≤ 1, to 1e-6. u = 2^e·(1 + f), 1 + f in √½..√2, and
// ln(1 + f) = f − f²/2 + f³·p(f) with p fitted by least squares to 6e-8.
ROMA_INLINE Vec logarithm(Vec u) {
  const BitVec shifted = bits<BitVec>(u) + (0x3f800000u - 0x3f3504f3u);  // √½ is 0x3f3504f3
  const Vec exponent = to_float(bits<IntVec>(shifted >> 23) - 127);
  const Vec f = bits<Vec>((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  Vec p = f * 0.092721604f + -0.1411842f;
  p = p * f + 0.1467641f;
  p = p * f + -0.16592857f;
  p = p * f + 0.19985127f;
  p = p * f + -0.2500092f;
  p = p * f + 0.3333341f;
  p = p * f + -0.5f;
  return exponent * 0.6931472f + (p * f * f + f);
}

// Two independent normal numbers from two words (Box and Muller, 1958). A radius has 24 bits, so
// none exceeds 5.77; an angle has 26.
ROMA_INLINE void normals(BitVec word0, BitVec word1, Vec& first, Vec& second) {
  const Vec u = (to_float(bits<IntVec>(word0 >> 8)) + 1.0f) * 5.9604645e-08f;  // 2⁻²⁴
  const Vec radius = square_root(logarithm(u) * -2.0f);
  // Quarter turns, and what is left of the angle in ±π/4.
  const BitVec quarter = word1 >> 30;
  const Vec x = to_float(bits<IntVec>(word1 << 2) >> 8) * 9.362676e-08f;  // π/2·2⁻²⁴
  const Vec square = x * x;
  Vec s = square * -0.00019610747f + 0.00833286f;
  s = s * square + -0.16666666f;
  s = s * square * x + x;
  Vec c = square * 2.4801587e-05f + -0.0013888889f;
  c = c * square + 0.041666668f;
  c = c * square + -0.5f;
  c = c * square + 1.0f;
  const IntVec odd = bits<IntVec>(quarter & 1u) != 0;
  const BitVec minus_c = (quarter + 1u) << 30 & 0x80000000u, minus_s = quarter << 30 & 0x80000000u;
  first = bits<Vec>(bits<BitVec>(odd ? s : c) ^ minus_c) * radius;
  second = bits<Vec>(bits<BitVec>(odd ? c : s) ^ minus_s) * radius;
}

void block_of_words(uint64_t key, int64_t block, uint32_t (&out)[kValues]) {
  for (int i = 0; i < kCounters; i += kLanes) {
    BitVec words[4];
    philox(key, static_cast<uint64_t>(block * kCounters + i), words);
    for (int w = 0; w < 4; ++w) std::memcpy(out + w * kCounters + i, &words[w], sizeof words[w]);
  }
}

void block_of_normals(uint64_t key, int64_t block, float (&out)[kValues]) {
  for (int i = 0; i < kCounters; i += kLanes) {
    BitVec words[4];
    philox(key, static_cast<uint64_t>(block * kCounters + i), words);
    for (int w = 0; w < 4; w += 2) {
      Vec first, second;
      normals(words[w], words[w + 1], first, second);
      store(out + w * kCounters + i, first);
      store(out + (w + 1) * kCounters + i, second);
    }
  }
}

void random_words(uint64_t key, uint32_t* out, int64_t count) {
  uint32_t words[kValues];
  for (int64_t done = 0; done < count; done += kValues) {
    block_of_words(key, done / kValues, words);
    const int64_t some = count - done < kValues ? count - done : kValues;
    std::memcpy(out + done, words, 4 * static_cast<size_t>(some));
  }
}

template <bool proportional>
void add_normals(uint64_t key, float scale, const uint8_t* in, uint8_t* out, int64_t count) {
  float noise[kValues];
  uint8_t pixels[kValues] = {};
  for (int64_t done = 0; done < count; done += kValues) {
    const size_t some = static_cast<size_t>(count - done < kValues ? count - done : kValues);
    block_of_normals(key, done / kValues, noise);
    std::memcpy(pixels, in + done, some);
    for (int i = 0; i < kValues; ++i) {
      const float x = static_cast<float>(pixels[i]), n = noise[i] * scale;
      const float moved = x + (proportional ? n * x : n);
      const float kept = moved > 0.0f ? (moved < 255.0f ? moved : 255.0f) : 0.0f;
      pixels[i] = static_cast<uint8_t>((kept + kWhole) - kWhole);
    }
    std::memcpy(out + done, pixels, some);
  }
}

void add_noise(uint64_t key, float scale, bool proportional, const uint8_t* in, uint8_t* out,
               int64_t count) {
  (proportional ? add_normals<true> : add_normals<false>)(key, scale, in, out, count);
}

template <int channels>
void strike(uint64_t key, uint64_t salt, uint64_t hit, const uint8_t* in, uint8_t* out,
            int64_t places) {
  uint32_t words[kValues];
  for (int64_t done = 0; done < places; done += kValues) {
    block_of_words(key, done / kValues, words);
    const int64_t some = places - done < kValues ? places - done : kValues;
    for (int64_t i = 0; i < some; ++i) {
      const uint64_t word = words[i];
      for (int64_t at = (done + i) * channels; at < (done + i + 1) * channels; ++at) {
        out[at] = word < salt ? uint8_t{255} : word < hit ? uint8_t{0} : in[at];
      }
    }
  }
}

void add_impulses(uint64_t key, uint64_t salt, uint64_t hit, bool whole, const uint8_t* in,
                  uint8_t* out, int64_t places) {
  (whole ? strike<3> : strike<1>)(key, salt, hit, in, out, places);
}

}  // namespace

const Noise ROMA_NOISE{random_words, add_noise, add_impulses};

}  // namespace roma
