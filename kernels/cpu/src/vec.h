// Vectors of the widest registers that the current compilation targets, in GCC/Clang extensions.
//
// Included by kernels.cpp only, once per instruction set, inside that variant's namespace. No
// standard library templates here: a template that was compiled for AVX-512 must never be the
// copy that the linker keeps for everybody.

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileVectors = 4;  // 32 registers: 6 x 4 sums, 4 + 1 operands
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileVectors = 2;  // 16 registers: 6 x 2 sums, 2 + 1 operands
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileVectors = 4;
#else
constexpr int kLanes = 4, kTileVectors = 2;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

#define PISA_INLINE static inline __attribute__((always_inline))

PISA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
PISA_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
PISA_INLINE vf splat(float x) { return x - vf{}; }
PISA_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
PISA_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
PISA_INLINE vi as_int(vu x) { return reinterpret_cast<vi>(x); }
PISA_INLINE vu as_bits(vf x) { return reinterpret_cast<vu>(x); }
PISA_INLINE vf maximum(vf x, vf y) { return x > y ? x : y; }

PISA_INLINE float horizontal_sum(vf x) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^x for x <= 0, relative error below 2e-7; 0 below 2^-125, so that no result is denormal.
PISA_INLINE vf exp2_nonpositive(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);  // [-0.5, 0.5]
  // Minimax polynomial of 2^r on that interval.
  vf p = splat(1.32647172e-3f);
  p = p * r + 9.67151292e-3f;
  p = p * r + 5.55073440e-2f;
  p = p * r + 2.40222420e-1f;
  p = p * r + 6.93146980e-1f;
  p = p * r + 1.0f;
  // Without a sign, as bits are shifted and sums may wrap where x is far below the range.
  const vu exponent = (as_bits(shifted) - as_bits(magic)) << 23;
  return as_float(as_int(as_bits(p) + exponent) & ~(x < splat(-125.0f)));
}

// Interleaves the lower (or upper) halves of x and y.
#if defined(__clang__) || __GNUC__ >= 12
#define PISA_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PISA_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, vi{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
PISA_INLINE vf low_pairs(vf x, vf y) {
  return PISA_SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
PISA_INLINE vf high_pairs(vf x, vf y) {
  return PISA_SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX__)
PISA_INLINE vf low_pairs(vf x, vf y) { return PISA_SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11); }
PISA_INLINE vf high_pairs(vf x, vf y) { return PISA_SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
PISA_INLINE vf low_pairs(vf x, vf y) { return PISA_SHUFFLE(x, y, 0, 4, 1, 5); }
PISA_INLINE vf high_pairs(vf x, vf y) { return PISA_SHUFFLE(x, y, 2, 6, 3, 7); }
#endif

// Transposes a kLanes x kLanes tile: each of the log2(kLanes) perfect shuffles rotates the bits
// of the index (row, column) by one.
PISA_INLINE void transpose_tile(vf (&x)[kLanes]) {
  vf y[kLanes];
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = low_pairs(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = high_pairs(x[i], x[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// 16-bit floats. Written on integers, so that every instruction set runs the same code.
PISA_INLINE vf from_bfloat16(vh x) {
  return reinterpret_cast<vf>(__builtin_convertvector(x, vu) << 16);
}

PISA_INLINE vf from_float16(vh x) {
  const vu wide = __builtin_convertvector(x, vu);
  const vu sign = (wide & 0x8000u) << 16;
  // Moves exponent and fraction in place; the multiplication corrects the exponent's bias and
  // normalises denormals.
  const vf magnitude = reinterpret_cast<vf>((wide & 0x7fffu) << 13) * 0x1p112f;
  const vu infinite = reinterpret_cast<vu>((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<vf>(reinterpret_cast<vu>(magnitude) | infinite | sign);
}

PISA_INLINE vh to_bfloat16(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vu is_nan = reinterpret_cast<vu>(x != x);
  return __builtin_convertvector(((rounded & ~is_nan) | (0x7fc00000u & is_nan)) >> 16, vh);
}

PISA_INLINE vh to_float16(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu sign = (bits >> 16) & 0x8000u;
  const vu magnitude = bits & 0x7fffffffu;
  const vu rounded = ((magnitude - 0x38000000u) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14 are denormal: adding 0.5 makes the floating-point unit round them.
  const vu denormal =
      reinterpret_cast<vu>(reinterpret_cast<vf>(magnitude) + 0.5f) - 0x3f000000u;
  const vu small = reinterpret_cast<vu>(magnitude < 0x38800000u);
  const vu large = reinterpret_cast<vu>(magnitude >= 0x477ff000u);
  const vu nan = reinterpret_cast<vu>(x != x);
  vu half = (rounded & ~small) | (denormal & small);
  half = (half & ~large) | (0x7c00u & large);
  return __builtin_convertvector(half | sign | (0x200u & nan), vh);
}
