// The three phases of every query tile, the threads that run them, and the C interface.
//
// Method: PISA (arXiv 2602.01077). A tile runs one online softmax through three phases: the
// centroids of the approximated blocks with the logarithm of the block length as a bias, then the
// first-order term with the mass gathered so far (the tail mass), then the tokens of the exact
// blocks. Every partial sum is rescaled whenever the running maximum grows, so the maximum may lie
// anywhere.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "dispatch.h"
#include "pool.h"

namespace pisa {
namespace {

constexpr double kLog2E = 1.4426950408889634;

constexpr int kSpins = 1000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

Scratch Attention::scratch(int64_t thread) const {
  float* base = call.workspace + thread * plan.per_thread;
  float* rows = base + plan.rows;
  return Scratch{base + plan.keys,
                 base + plan.values,
                 base + plan.query,
                 base + plan.logits,
                 base + plan.acc,
                 rows,
                 rows + kTile,
                 rows + 2 * kTile,
                 rows + 3 * kTile,
                 rows + 4 * kTile,
                 rows + 5 * kTile,
                 base + plan.score,
                 base + plan.bias,
                 reinterpret_cast<int32_t*>(base + plan.index),
                 base + plan.block_matrix};
}

Head Attention::head(int64_t first, int64_t offset) const {
  const int64_t b = (first + offset) / call.kv_heads;
  float* keys = call.workspace + plan.pack + offset * plan.packed_size;
  return Head{b,
              (first + offset) % call.kv_heads,
              call.workspace + plan.key_mean + offset * plan.blocks * plan.ld_key,
              call.workspace + plan.value_mean + offset * plan.blocks * plan.ld_value,
              call.workspace + plan.matrix + offset * plan.chunks * plan.matrix_size,
              call.workspace + plan.norm + offset * plan.blocks,
              call.workspace + plan.log_weight + offset * plan.blocks,
              call.workspace + plan.variance + offset * plan.blocks * plan.ld_key,
              call.workspace + plan.energy + (first + offset) * plan.chunks * plan.ld_key,
              keys,
              keys + plan.blocks * call.key_block * plan.ld_key,
              reinterpret_cast<int32_t*>(call.workspace + plan.length) + b * plan.blocks};
}

// ---- One query tile ----

// One step of the online softmax, over at most kTile keys in all; `bias` [keys] may be null.
void Attention::attend(const Scratch& s, const Rows* keys, const Rows* values, int64_t pieces,
                       int64_t width, const float* bias) const {
  std::fill_n(s.peak, width, -kInfinity);
  int64_t count = 0;
  for (const Rows* piece = keys; piece < keys + pieces; count += piece++->count)
    kernels.scores(s.logits + count * width, s.peak, piece->first, plan.ld_key, piece->count, s.query,
             call.head_dim, width, static_cast<float>(call.scale * kLog2E), bias ? bias + count : bias);
  kernels.softmax(s.logits, count, width, s.peak, s.top, s.mass, s.alpha);
  kernels.accumulate(s.acc, s.alpha, values, pieces, plan.ld_value, call.value_dim, s.logits, width);
}

void Attention::approximate(const Scratch& s, const Head& h, int64_t width) const {
  bool any = false;
  for (int64_t j = 0; j < plan.blocks; j += kTile) {
    const int64_t count = std::min(kTile, plan.blocks - j);
    if (std::all_of(s.bias + j, s.bias + j + count, [](float x) { return x == -kInfinity; }))
      continue;
    any = true;
    const Rows keys{h.key_mean + j * plan.ld_key, count};
    const Rows values{h.value_mean + j * plan.ld_value, count};
    attend(s, &keys, &values, 1, width, s.bias + j);
  }
  if (!any || (call.order != kHybrid && call.order != kCorrected)) return;
  // The mass so far is the tail mass g, and the term (g / Tk) * scale * q @ H has the form of
  // one more product with H in the place of the values.
  const double per_key = call.scale / static_cast<double>(valid_keys[h.b]);
  for (int64_t w = 0; w < width; ++w)
    s.factor[w] = static_cast<float>(s.mass[w] * per_key);
  kernels.scale_columns(s.keys, s.query, s.factor, width, call.head_dim);
  const Rows matrix{h.matrix, call.head_dim};
  kernels.accumulate(s.acc, nullptr, &matrix, 1, plan.ld_value, call.value_dim, s.keys, width);
}

void Attention::exact(const Scratch& s, const Head& h, int64_t width) const {
  // Small blocks are attended to several at a time: in place where they have been packed, else
  // gathered in scratch.
  Rows keys[kTile], values[kTile];
  int64_t pieces = 0, filled = 0;
  const auto flush = [&] {
    if (filled > 0) attend(s, keys, values, pieces, width, nullptr);
    pieces = filled = 0;
  };
  const auto add = [&](const float* key, const float* value, int64_t count) {
    if (count == 0) return;
    filled += count;
    if (pieces > 0 && keys[pieces - 1].first + keys[pieces - 1].count * plan.ld_key == key) {
      keys[pieces - 1].count += count;  // values lie as keys do
      values[pieces - 1].count += count;
      return;
    }
    keys[pieces] = {key, count};
    values[pieces++] = {value, count};
  };
  for (int64_t i = 0; i < plan.blocks && s.index[i] >= 0; ++i) {
    const int64_t j = s.index[i];
    const int64_t length = plan.packed ? h.length[j] : block_rows(j);
    for (int64_t n = 0; n < length; n += kTile) {
      const int64_t rows = std::min(kTile, length - n), place = j * call.key_block + n;
      if (filled + rows > kTile) flush();
      if (plan.packed) {
        add(h.packed_keys + place * plan.ld_key, h.packed_values + place * plan.ld_value, rows);
        continue;
      }
      float* key = s.keys + filled * plan.ld_key;
      float* value = s.values + filled * plan.ld_value;
      add(key, value, load(h, key, value, place, rows));
    }
  }
  flush();
}

void Attention::tile(const Scratch& s, int64_t first_head, int64_t unit) {
  const int64_t offset = unit / plan.tiles / plan.group;
  const Head h = head(first_head, offset);
  const int64_t query_head = h.g * plan.group + unit / plan.tiles % plan.group;
  const int64_t t = unit % plan.tiles * plan.width, query_block = t / call.query_block;
  const int64_t rows = std::min(plan.width, call.query_len - t);
  const int64_t width = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;

  const int64_t block_start = query_block * call.query_block;
  const int64_t block_rows = std::min(call.query_block, call.query_len - block_start);
  kernels.load_rows(s.keys, plan.ld_key,
              row(call.query, call.query_stride, h.b, query_head, start(block_start)),
              call.query_stride[2], tokens(block_start), block_rows, call.head_dim, call.dtype, nullptr);
  kernels.column_mean(s.query_mean, s.keys, plan.ld_key, block_rows, static_cast<float>(block_rows));
  select(s, h, query_head,
         call.top_k[query_head] == 0 || query_block < call.query_first || query_block >= call.query_last);

  float* tile_rows = s.keys + (t - block_start) * plan.ld_key;
  std::fill_n(tile_rows + rows * plan.ld_key, (width - rows) * plan.ld_key, 0.0f);
  kernels.transpose(s.query, width, tile_rows, plan.ld_key, width, plan.ld_key);

  std::fill_n(s.top, width, -kInfinity);
  std::fill_n(s.mass, width, 0.0f);
  std::fill_n(s.acc, plan.ld_value * width, 0.0f);
  if (call.order != kNone) approximate(s, h, width);
  exact(s, h, width);

  const int64_t* at = tokens(t);
  float* lse = call.lse + (h.b * call.heads + query_head) * call.query_len + start(t);
  for (int64_t w = 0; w < rows; ++w)
    lse[at ? at[w] : w] =
        static_cast<float>((s.top[w] + std::log2(static_cast<double>(s.mass[w]))) / kLog2E);
  for (int64_t w = 0; w < width; ++w) s.factor[w] = s.mass[w] != 0.0f ? 1.0f / s.mass[w] : 0.0f;
  kernels.scale_columns(s.acc, s.acc, s.factor, width, plan.ld_value);
  kernels.transpose(s.values, plan.ld_value, s.acc, width, plan.ld_value, width);
  void* out = const_cast<void*>(row(call.out, call.out_stride, h.b, query_head, start(t)));
  kernels.store_rows(out, call.out_stride[2], at, s.values, plan.ld_value, rows, call.value_dim, call.dtype);
}

// ---- Threads ----

// Units are handed out by a counter, so a thread that loses its core delays one unit only; a
// phase is complete when its units are, whichever threads took them.
void Attention::work() {
  const Scratch s = scratch(arrived.fetch_add(1));
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    const int64_t units = phases[phase].units;
    for (int64_t unit; (unit = next[phase].fetch_add(1)) < units;) {
      (this->*phases[phase].unit)(s, phases[phase].first_head, unit);
      if (done[phase].fetch_add(1) + 1 == units) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
    // The last units usually end within microseconds, sooner than a sleeping thread wakes.
    for (int spin = 0; spin < kSpins && done[phase].load() < units; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done[phase].load() == units; });
  }
}

void Attention::run() {
  valid_keys.assign(call.batch, 0);
  for (int64_t b = 0; b < call.batch; ++b) count_lengths(b);
  const int64_t kv = call.batch * call.kv_heads;
  if (plan.corrected && plan.token_major)
    phases.push_back({&Attention::energies, 0, call.batch * plan.chunks});
  for (int64_t first = 0; first < kv; first += plan.heads) {
    const int64_t heads = std::min(plan.heads, kv - first);
    // Where a head's queries lie together, shortly before they are attended with.
    if (plan.corrected && !plan.token_major)
      phases.push_back({&Attention::energies, first, heads * plan.chunks});
    if (plan.sparse || plan.packed)
      phases.push_back({&Attention::statistics, first, heads * plan.chunks});
    if (plan.corrected || (plan.first_order && plan.chunks > 1))
      phases.push_back({&Attention::reduce, first, heads});
    if (plan.covariance) phases.push_back({&Attention::covariance, first, heads * plan.chunks});
    phases.push_back({&Attention::tile, first, heads * plan.group * plan.tiles});
  }
  next = std::vector<std::atomic<int64_t>>(phases.size());
  done = std::vector<std::atomic<int64_t>>(phases.size());
  const auto body = [](void* self) { static_cast<Attention*>(self)->work(); };
  if (plan.threads == 1)
    body(this);
  else if (call.parallel)
    call.parallel(body, this, static_cast<uint32_t>(plan.threads), 0);
  else
    Pool::instance().run(plan.threads, body, this);
}

}  // namespace pisa

#define PISA_EXPORT extern "C" __attribute__((visibility("default")))

PISA_EXPORT int32_t pisa_abi_version() { return pisa::kAbiVersion; }

// Size of Call: a second guard against a mirror that has drifted.
PISA_EXPORT int64_t pisa_call_size() { return sizeof(pisa::Call); }

PISA_EXPORT int64_t pisa_workspace_floats(const pisa::Call* call) {
  return pisa::Plan(*call).total;
}

// Runs on the `variant`-th supported instruction set, see pisa_variant. Returns 0 on success.
PISA_EXPORT int32_t pisa_attention(const pisa::Call* call, int32_t variant) {
  const pisa::Kernels* kernels = pisa::supported_kernels(variant);
  if (!kernels) return 1;
  try {
    pisa::Attention(*call, *kernels).run();
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
