// Which key blocks a query block attends exactly: PISA's top-k rules (arXiv 2602.01077) and the
// threshold of Sol-Attn (arXiv 2607.24027).

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace pisa {

// Splits the key blocks for one query block: `index` receives the exact ones in ascending order,
// followed by -1, and `bias` the log weight of the approximated ones and -inf elsewhere.
void Attention::select(const Scratch& s, const Head& h, int64_t query_head, bool dense) const {
  const int64_t first = dense ? 0 : call.free_first, last = dense ? 0 : call.free_last;
  int64_t picked = 0;
  if (first < last) {
    const float scale = static_cast<float>(call.scale);
    const float weight = static_cast<float>(call.routing_weight * std::log(2.0));
    std::fill_n(s.score, round_up(plan.blocks), -kInfinity);
    kernels.dots(s.score + first, s.query_mean, h.key_mean + first * plan.ld_key, plan.ld_key, last - first);
    for (int64_t j = first; j < last; ++j) s.score[j] *= scale;
    if (plan.covariance)
      for (int64_t j = first; j < last; ++j) s.score[j] += h.norm[j];
    if (weight != 0.0f)
      for (int64_t j = first; j < last; ++j) s.score[j] += weight * h.log_weight[j];
    for (int64_t j = first; j < last; ++j) {
      const bool candidate = h.length[j] > 0;
      // A NaN would break the ordering; like torch.topk, take it for the largest value.
      s.score[j] = std::isnan(s.score[j]) ? kInfinity : s.score[j];
      s.score[j] = candidate ? s.score[j] : -kInfinity;
      s.index[picked] = static_cast<int32_t>(j);
      picked += candidate;
    }
    picked = call.routing == kThreshold ? keep_above(s, picked, call.beta[query_head])
                                     : keep_best(s, picked, call.top_k[query_head]);
  }
  std::fill_n(s.bias, plan.blocks, -kInfinity);
  for (int64_t j = first; j < last; ++j)
    s.bias[j] = h.length[j] > 0 ? h.log_weight[j] : -kInfinity;
  for (int64_t i = 0; i < picked; ++i) s.bias[s.index[i]] = -kInfinity;
  picked = 0;
  for (int64_t j = 0; j < plan.blocks; ++j) {
    s.index[picked] = static_cast<int32_t>(j);
    picked += h.length[j] > 0 && s.bias[j] == -kInfinity;
  }
  if (picked < plan.blocks) s.index[picked] = -1;
}

// Keeps the `top_k` best of the first `count` entries of `index`, the earlier ones among equals.
// Scores are -inf wherever there is no candidate.
int64_t Attention::keep_best(const Scratch& s, int64_t count, int64_t top_k) const {
  if (count <= top_k) return count;
  const float limit = kernels.kth_largest(s.score, round_up(plan.blocks), top_k);
  const auto better = [=](float score) { return score > limit; };
  int64_t ties = top_k - std::count_if(s.score, s.score + plan.blocks, better);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t j = s.index[i];
    const bool tie = s.score[j] == limit && ties > 0;
    ties -= tie;
    s.index[kept] = j;
    kept += tie || better(s.score[j]);
  }
  return kept;
}

// Keeps the entries of `index` whose score exceeds mu + beta * sigma, and always the best.
int64_t Attention::keep_above(const Scratch& s, int64_t count, double beta) const {
  if (count == 0) return 0;
  double mean = 0.0, variance = 0.0;
  for (int64_t i = 0; i < count; ++i) mean += s.score[s.index[i]];
  mean /= static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) {
    const double deviation = s.score[s.index[i]] - mean;
    variance += deviation * deviation;
  }
  const double threshold = mean + beta * std::sqrt(variance / static_cast<double>(count));
  const float* score = s.score;
  const int32_t best = *std::max_element(s.index, s.index + count, [score](int32_t x, int32_t y) {
    return score[x] < score[y];
  });
  int32_t* end = std::remove_if(s.index, s.index + count, [=](int32_t j) {
    return !(score[j] > threshold) && j != best;
  });
  return end - s.index;
}

}  // namespace pisa
