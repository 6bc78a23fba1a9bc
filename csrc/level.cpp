// The kernels for one instruction set. Compiled once for each, with ROMA_LANES floats a vector and
// ROMA_KERNELS the table's name; nothing of the standard library is instantiated here (tasks.h).
//
// Everywhere a lane of a vector is a row of hidden states, and the vocabulary is walked in panels of
// kRows entries: peak and sums of a row are kept lane by lane, and nothing is reduced across lanes.

#include "level.h"

#include "multiply.h"

namespace roma {
namespace {

constexpr float kLowest = -3.40282347e38f;  // finite: a row may hold nothing but −∞
constexpr int64_t kCache = 256 * 1024;      // bytes of packed weights that stay in a core's L2
constexpr int64_t kChunk = 768;             // entries of the vocabulary that share partial sums

// How many panels of packed weights stay in a core's L2.
int64_t panels_in_cache(int64_t steps) {
  const int64_t fit = kCache / (4 * kRows * (steps > 0 ? steps : 1));
  return fit > 0 ? fit : 1;
}

// Rows in wide panels, with what belongs to each of them, padded to whole panels.
template <class Step>
class PackedRows {
 public:
  PackedRows(const RomaRows& rows, int64_t vocab, int64_t start)
      : panels(divide(rows.count, kColumns)),
        steps(steps_of<Step>(rows.depth)),
        rows_(rows),
        vocab_(vocab),
        start_(start),
        states_(bytes_of(panels * kColumns * steps)),
        scale_(bytes_of(panels * kColumns)),
        label_(bytes_of(panels * kColumns)) {}

  bool ready() const { return states_.data() && scale_.data() && label_.data(); }

  // `scratch`: for every thread, four rows.
  void pack_panel(int64_t panel, uint32_t* scratch) {
    const int64_t first = panel * kColumns;
    const int lanes = static_cast<int>(least(kColumns, rows_.count - first));
    const Operand x{rows_.states.data, rows_.states.row_stride, rows_.states.column_stride,
                    rows_.states.dtype};
    pack<Step>(static_cast<uint32_t*>(states_.data()) + first * steps, kColumns, x, first, lanes,
               rows_.depth, scratch);
    for (int i = 0; i < kColumns; ++i) {
      const int64_t token = i < lanes ? rows_.tokens[first + i] - start_ : -1;
      static_cast<float*>(scale_.data())[first + i] = i < lanes ? rows_.scale[first + i] : 1.0f;
      static_cast<int32_t*>(label_.data())[first + i] =
          token >= 0 && token < vocab_ ? static_cast<int32_t>(token) : -1;
    }
  }

  const uint32_t* states(int64_t panel) const {
    return static_cast<const uint32_t*>(states_.data()) + panel * kColumns * steps;
  }
  Vec scale(int64_t row) const { return load(static_cast<const float*>(scale_.data()) + row); }
  // Entry of the vocabulary, or −1 where the token is not among these.
  IntVec label(int64_t row) const {
    return bits<IntVec>(load(static_cast<const float*>(label_.data()) + row));
  }

  const int64_t panels, steps;

 private:
  const RomaRows& rows_;
  const int64_t vocab_, start_;
  Buffer states_, scale_, label_;
};

// Entries [first, first + count) of the head in narrow panels.
template <class Step>
void pack_head(uint32_t* panels, const RomaHead& head, int64_t first, int64_t count, int64_t depth,
               uint32_t* scratch) {
  const Operand x{head.weight.data, head.weight.row_stride, head.weight.column_stride,
                  head.weight.dtype};
  for (int64_t v = 0; v < count; v += kRows) {
    pack<Step>(panels + v * steps_of<Step>(depth), kRows, x, first + v,
               static_cast<int>(least(kRows, count - v)), depth, scratch);
  }
}

// z = wh + b ; z = s·tanh(z/s) ; z = z/τ                                  MATH section 1
ROMA_INLINE Vec logit(Vec product, const RomaHead& head, int64_t entry, Vec scale) {
  Vec z = product;
  if (head.bias) z += head.bias[entry];
  if (head.softcap > 0) z = head.softcap * hyperbolic_tangent(z / head.softcap);
  return z * scale;
}

ROMA_INLINE Vec masked_share(Vec weight, Vec z) {  // of an entry of −∞: 0, not 0·(−∞)
  return z == -__builtin_inff() ? Vec{} : weight * z;
}

// --------------------------------------------------------------------------------------- forward

// A sum, and what rounding took from it (Kahan): one probability near 1 and thousands of small ones
// would else leave the sum off by one rounding each.
ROMA_INLINE void add_compensated(Vec& sum, Vec& lost, Vec value) {
  const Vec corrected = value - lost, grown = sum + corrected;
  lost = (grown - sum) - corrected;
  sum = grown;
}

// What is kept of kColumns rows while the vocabulary goes by.
struct Sums {
  enum Line : int64_t { kPeak, kTotal, kLost, kTarget, kMoment };

  float* at;  // [4 or 5][padded rows]
  int64_t stride;
  bool moment;

  // Adds `count` entries from `entry` on.
  void add(const Tile& tile, int64_t entry, int count, const RomaHead& head, int64_t row, Vec scale,
           IntVec label, int n) const {
    float* const place = at + row;
    const Vec before = load(place + kPeak * stride);
    Vec z[kRows], peak = before, target = load(place + kTarget * stride);
    for (int i = 0; i < count; ++i) {
      z[i] = logit(tile.at[i][n], head, entry + i, scale);
      peak = larger(peak, z[i]);
      target = label == static_cast<int32_t>(entry + i) ? z[i] : target;
    }
    Vec total{}, share{};
    for (int i = 0; i < count; ++i) {
      const Vec weight = exponential(z[i] - peak);
      total += weight;
      if (moment) share += masked_share(weight, z[i]);
    }
    const Vec shrink = exponential(before - peak);
    Vec sum = load(place + kTotal * stride) * shrink, lost = load(place + kLost * stride) * shrink;
    add_compensated(sum, lost, total);
    store(place + kPeak * stride, peak);
    store(place + kTotal * stride, sum);
    store(place + kLost * stride, lost);
    store(place + kTarget * stride, target);
    if (moment) {
      float* const sums = place + kMoment * stride;
      store(sums, load(sums) * shrink + share);
    }
  }
};

template <class Step>
int32_t sweep(int threads, const RomaRows& rows, const RomaHead& head, float* sums, int64_t stride,
              bool moment) {
  PackedRows<Step> packed(rows, head.vocab, head.start);
  const int64_t padded = packed.panels * kColumns, lines = moment ? 5 : 4;
  const int64_t chunks = divide(head.vocab, kChunk);
  const int64_t at_once = kRows * panels_in_cache(packed.steps);
  // Rows are divided too where there are too few chunks to keep every thread busy.
  const int64_t wanted = chunks < 4 * threads ? divide(4 * threads, chunks) : 1;
  const int64_t group = divide(packed.panels, least(wanted, packed.panels));
  const int64_t groups = divide(packed.panels, group);
  const int64_t own = at_once * packed.steps + 4 * packed.steps;
  Buffer partial(bytes_of(chunks * lines * padded)), space(bytes_of(threads * own));
  if (!packed.ready() || !partial.data() || !space.data()) return 1;

  const auto scratch = [&](int thread) {
    return static_cast<uint32_t*>(space.data()) + thread * own;
  };
  const auto sums_of = [&](int64_t chunk) {
    return Sums{static_cast<float*>(partial.data()) + chunk * lines * padded, padded, moment};
  };

  auto pack_rows = [&](int64_t panel, int thread) { packed.pack_panel(panel, scratch(thread)); };
  parallel(threads, packed.panels, pack_rows);

  auto walk = [&](int64_t task, int thread) {
    const int64_t chunk = task / groups, first_panel = task % groups * group;
    const int64_t last_panel = least(first_panel + group, packed.panels);
    const Sums mine = sums_of(chunk);
    for (int64_t row = first_panel * kColumns; row < last_panel * kColumns; row += kLanes) {
      for (int64_t line = 0; line < lines; ++line) {
        store(mine.at + line * padded + row, line == Sums::kPeak ? all(kLowest) : Vec{});
      }
    }
    uint32_t* const weights = scratch(thread);
    const int64_t end = least((chunk + 1) * kChunk, head.vocab);
    for (int64_t first = chunk * kChunk; first < end; first += at_once) {
      const int64_t count = least(at_once, end - first);
      pack_head<Step>(weights, head, first, count, rows.depth, weights + at_once * packed.steps);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        for (int64_t v = 0; v < count; v += kRows) {
          Tile tile;
          multiply_panels<Step>(packed.steps, weights + v * packed.steps, packed.states(panel), tile);
          for (int n = 0; n < kVecs; ++n) {
            const int64_t row = panel * kColumns + n * kLanes;
            mine.add(tile, first + v, static_cast<int>(least(kRows, count - v)), head, row,
                     packed.scale(row), packed.label(row), n);
          }
        }
      }
    }
  };
  parallel(threads, chunks * groups, walk);

  auto merge = [&](int64_t panel, int) {
    for (int64_t row = panel * kColumns; row < (panel + 1) * kColumns; row += kLanes) {
      Vec peak = all(kLowest), total{}, lost{}, target{}, share{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        peak = larger(peak, load(sums_of(chunk).at + row));
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* const from = sums_of(chunk).at + row;
        const Vec shrink = exponential(load(from + Sums::kPeak * padded) - peak);
        add_compensated(total, lost, load(from + Sums::kTotal * padded) * shrink);
        lost += load(from + Sums::kLost * padded) * shrink;
        target += load(from + Sums::kTarget * padded);
        if (moment) share += load(from + Sums::kMoment * padded) * shrink;
      }
      const Vec found[4] = {peak, total - lost, target, share};
      const int64_t lanes = least(kLanes, rows.count - row);
      for (int64_t line = 0; lanes > 0 && line < (moment ? 4 : 3); ++line) {
        std::memcpy(sums + line * stride + row, &found[line], bytes_of(lanes));
      }
    }
  };
  parallel(1, packed.panels, merge);
  return 0;
}

// --------------------------------------------------------------------------------------- dlogits

// What a row's dlogits depend on, padded to whole panels.
class PaddedUpstream {
 public:
  PaddedUpstream(const RomaUpstream& from, int64_t count, int64_t padded)
      : entropies(from.dentropy != nullptr), padded_(padded), values_(bytes_of(4 * padded)) {
    if (!values_.data()) return;
    const float* const sources[4] = {from.lse, from.dlogp, from.entropy, from.dentropy};
    for (int64_t i = 0; i < 4; ++i) {
      float* const to = static_cast<float*>(values_.data()) + i * padded;
      std::memset(to, 0, bytes_of(padded));
      if (sources[i]) std::memcpy(to, sources[i], bytes_of(count));
    }
  }

  bool ready() const { return values_.data() != nullptr; }
  Vec lse(int64_t row) const { return value(0, row); }
  Vec dlogp(int64_t row) const { return value(1, row); }
  Vec entropy(int64_t row) const { return value(2, row); }
  Vec dentropy(int64_t row) const { return value(3, row); }

  const bool entropies;

 private:
  Vec value(int64_t which, int64_t row) const {
    return load(static_cast<const float*>(values_.data()) + which * padded_ + row);
  }
  const int64_t padded_;
  Buffer values_;
};

// dz = g·(1[v=y] − p) − e·p·(log p + H), then by the soft cap and 1/τ          MATH section 1
ROMA_INLINE Vec dlogit(Vec z, int64_t entry, const RomaHead& head, int64_t row, Vec scale,
                       IntVec label, const PaddedUpstream& upstream) {
  const Vec log_p = z - upstream.lse(row), p = exponential(log_p), g = upstream.dlogp(row);
  Vec slope = g;
  if (upstream.entropies) {
    slope += upstream.dentropy(row) * ((p > 0 ? log_p : Vec{}) + upstream.entropy(row));
  }
  Vec dz = (label == static_cast<int32_t>(entry) ? g : Vec{}) - p * slope;
  if (head.softcap > 0) {
    const Vec tangent = z / (scale * head.softcap);
    dz *= 1.0f - tangent * tangent;
  }
  return dz * scale;
}

template <class Step>
int32_t dlogits(int threads, const RomaRows& rows, const RomaHead& head,
                const RomaUpstream& given, void* dz, int64_t stride, int32_t dtype) {
  PackedRows<Step> packed(rows, head.vocab, head.start);
  const PaddedUpstream upstream(given, rows.count, packed.panels * kColumns);
  // At least two tasks a thread, if there are enough panels.
  const int64_t share = divide(divide(head.vocab, kRows), 2 * threads);
  const int64_t at_once = kRows * least(panels_in_cache(packed.steps), share);
  const int64_t own = at_once * packed.steps + 4 * packed.steps;
  Buffer space(bytes_of(threads * own));
  if (!packed.ready() || !upstream.ready() || !space.data()) return 1;

  const auto scratch = [&](int thread) {
    return static_cast<uint32_t*>(space.data()) + thread * own;
  };
  auto pack_rows = [&](int64_t panel, int thread) { packed.pack_panel(panel, scratch(thread)); };
  parallel(threads, packed.panels, pack_rows);

  auto walk = [&](int64_t task, int thread) {
    uint32_t* const weights = scratch(thread);
    const int64_t first = task * at_once, count = least(at_once, head.vocab - first);
    pack_head<Step>(weights, head, first, count, rows.depth, weights + at_once * packed.steps);
    for (int64_t panel = 0; panel < packed.panels; ++panel) {
      for (int64_t v = 0; v < count; v += kRows) {
        Tile tile;
        multiply_panels<Step>(packed.steps, weights + v * packed.steps, packed.states(panel), tile);
        const int entries = static_cast<int>(least(kRows, count - v));
        for (int n = 0; n < kVecs; ++n) {
          const int64_t row = panel * kColumns + n * kLanes;
          const Vec scale = packed.scale(row);
          const IntVec label = packed.label(row);
          for (int i = 0; i < entries; ++i) {
            const int64_t entry = first + v + i, place = entry * stride + row;
            const Vec z = logit(tile.at[i][n], head, entry, scale);
            const Vec found = dlogit(z, entry, head, row, scale, label, upstream);
            store_as(dtype, dz, place, found, kLanes);
          }
        }
      }
    }
  };
  parallel(threads, divide(head.vocab, at_once), walk);
  return 0;
}

// ------------------------------------------------------------------------------- which step to take

bool both_bfloat16(const RomaMatrix& a, const RomaMatrix& b) {
  return a.dtype == ROMA_BFLOAT16 && b.dtype == ROMA_BFLOAT16;
}

#if defined(__AVX512BF16__)
#define ROMA_BY_STEP(pairs, function, ...) \
  ((pairs) ? function<Pair>(__VA_ARGS__) : function<Single>(__VA_ARGS__))
#else
#define ROMA_BY_STEP(pairs, function, ...) ((void)(pairs), function<Single>(__VA_ARGS__))
#endif

int32_t sweep_any(int threads, const RomaRows& rows, const RomaHead& head, float* sums,
                  int64_t stride, bool moment) {
  return ROMA_BY_STEP(both_bfloat16(rows.states, head.weight), sweep, threads, rows, head, sums,
                      stride, moment);
}

int32_t dlogits_any(int threads, const RomaRows& rows, const RomaHead& head,
                    const RomaUpstream& upstream, void* dz, int64_t stride, int32_t dtype) {
  return ROMA_BY_STEP(both_bfloat16(rows.states, head.weight), dlogits, threads, rows, head,
                      upstream, dz, stride, dtype);
}

int32_t multiply_any(int threads, int64_t m, int64_t n, int64_t k, const RomaMatrix& left,
                     const RomaMatrix& right, void* out, int64_t stride, int32_t dtype, bool add) {
  return ROMA_BY_STEP(both_bfloat16(left, right), multiply, threads, m, n, k, left, right, out,
                      stride, dtype, add);
}

}  // namespace

const Kernels ROMA_KERNELS{sweep_any, dlogits_any, multiply_any, kColumns};

}  // namespace roma
