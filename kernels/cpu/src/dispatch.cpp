#include "dispatch.h"

namespace pisa {

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_baseline;

namespace {

struct Variant {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

const Variant kVariants[] = {
#if defined(__x86_64__)
    {"avx512", &kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &kernels_baseline, [] { return true; }},
};

const Variant* supported(int32_t index) {
  for (const Variant& variant : kVariants)
    if (variant.supported() && index-- == 0) return &variant;
  return nullptr;
}

}  // namespace

const Kernels* supported_kernels(int32_t index) {
  const Variant* variant = supported(index);
  return variant ? variant->kernels : nullptr;
}

}  // namespace pisa

// Name of the `index`-th instruction set that this processor supports, best first, or null.
extern "C" __attribute__((visibility("default"))) const char* pisa_variant(int32_t index) {
  const pisa::Variant* variant = pisa::supported(index);
  return variant ? variant->name : nullptr;
}

// Digest of the sources, so that a library older than its sources is noticed.
#ifndef PISA_SOURCE_DIGEST
#define PISA_SOURCE_DIGEST ""
#endif
extern "C" __attribute__((visibility("default"))) const char* pisa_source_digest() {
  return PISA_SOURCE_DIGEST;
}
