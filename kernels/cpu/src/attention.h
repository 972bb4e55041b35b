// One call at work: what its parts share. Their bodies are in
//
//   statistics.cpp  what the approximation knows of each key block
//   routing.cpp     which key blocks a query block attends exactly
//   attention.cpp   the three phases of a query tile, the threads, and the C interface

#ifndef PISA_ATTENTION_H
#define PISA_ATTENTION_H

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "pisa.h"
#include "plan.h"

namespace pisa {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class Attention {
 public:
  Attention(const Call& given, const Kernels& chosen)
      : call(given), kernels(chosen), plan(given) {}

  void run();

 private:
  // Work that is cut into independent units; a phase starts when the one before is complete.
  struct Phase {
    void (Attention::*unit)(const Scratch&, int64_t head_offset, int64_t unit);
    int64_t first_head, units;
  };

  void work();
  Scratch scratch(int64_t thread) const;
  Head head(int64_t first, int64_t offset) const;
  const void* row(const void* base, const int64_t* stride, int64_t b, int64_t h, int64_t t) const {
    const int64_t element = call.dtype == kFloat32 ? 4 : 2;
    return static_cast<const char*>(base) +
           (b * stride[0] + h * stride[1] + t * stride[2]) * element;
  }
  // The tokens at the places from `t` on are start(t) + tokens(t)[i], or start(t) + i if null.
  const int64_t* tokens(int64_t t) const { return call.permutation ? call.permutation + t : nullptr; }
  int64_t start(int64_t t) const { return call.permutation ? 0 : t; }
  int64_t block_rows(int64_t j) const { return std::min(call.key_block, call.key_len - j * call.key_block); }
  const uint8_t* keep(int64_t b, int64_t t) const {
    return call.mask ? call.mask + b * call.key_len + start(t) : nullptr;
  }
  // The valid keys and values among `rows` tokens from place `t`, as float32. Returns their number.
  int64_t load(const Head& head, float* keys, float* values, int64_t t, int64_t rows) const {
    kernels.load_rows(keys, plan.ld_key, row(call.key, call.key_stride, head.b, head.g, start(t)),
                call.key_stride[2], tokens(t), rows, call.head_dim, call.dtype, keep(head.b, t));
    return kernels.load_rows(values, plan.ld_value, row(call.value, call.value_stride, head.b, head.g, start(t)),
                       call.value_stride[2], tokens(t), rows, call.value_dim, call.dtype, keep(head.b, t));
  }

  void count_lengths(int64_t b);
  void statistics(const Scratch& s, int64_t first_head, int64_t unit);
  void energies(const Scratch& s, int64_t first_head, int64_t unit);
  void reduce(const Scratch& s, int64_t first_head, int64_t unit);
  void covariance(const Scratch& s, int64_t first_head, int64_t unit);
  void tile(const Scratch& s, int64_t first_head, int64_t unit);

  void select(const Scratch& s, const Head& head, int64_t query_head, bool dense) const;
  int64_t keep_best(const Scratch& s, int64_t count, int64_t top_k) const;
  int64_t keep_above(const Scratch& s, int64_t count, double beta) const;
  void approximate(const Scratch& s, const Head& head, int64_t width) const;
  void exact(const Scratch& s, const Head& head, int64_t width) const;
  void attend(const Scratch& s, const Rows* keys, const Rows* values, int64_t pieces,
              int64_t width, const float* bias) const;

  const Call& call;
  const Kernels& kernels;
  const Plan plan;
  std::vector<Phase> phases;
  std::vector<int64_t> valid_keys;                // [B]
  std::vector<std::atomic<int64_t>> next, done;  // units begun and completed, per phase
  std::atomic<int64_t> arrived{0};                // threads that have begun
  std::mutex mutex;
  std::condition_variable finished;
};

}  // namespace pisa

#endif  // PISA_ATTENTION_H
