// The kernels in AVX-512F.
#include "kernels.h"

#if defined(__x86_64__)

// GCC 12's own header starts undefined registers from themselves and warns about it where it is
// inlined.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstring>

// Everything is included by now: code from a header must not be compiled for a CPU that may be
// absent.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

namespace offload {
namespace {

using Lanes = __m512;
using Ints = __m512i;

struct Sums {
  __m512d low, high;  // lanes 0..7 and 8..15
};

inline Lanes load(const float* src) { return _mm512_loadu_ps(src); }
inline void store(float* dst, Lanes value) { _mm512_storeu_ps(dst, value); }
inline Lanes broadcast(float value) { return _mm512_set1_ps(value); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes sqrt(Lanes a) { return _mm512_sqrt_ps(a); }

// These return b where a or b is NaN, as the portable ones do.
inline Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }

inline Ints bits_of(Lanes value) { return _mm512_castps_si512(value); }
inline Lanes lanes_of(Ints bits) { return _mm512_castsi512_ps(bits); }
inline Ints round_to_ints(Lanes value) { return _mm512_cvtps_epi32(value); }
inline Lanes to_lanes(Ints value) { return _mm512_cvtepi32_ps(value); }
inline Ints ibroadcast(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
inline Ints iadd(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints imul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints iand(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints ixor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline uint32_t largest(Ints value) { return _mm512_reduce_max_epu32(value); }

inline Ints lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

template <int kBits>
inline Ints shift_left(Ints value) {
  return _mm512_slli_epi32(value, kBits);
}

template <int kBits>
inline Ints shift_right(Ints value) {
  return _mm512_srli_epi32(value, kBits);
}

inline __m256i load_256(const void* src) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(src));
}
inline __m128i load_128(const void* src) {
  return _mm_loadu_si128(static_cast<const __m128i*>(src));
}
inline Ints load_u16(const uint16_t* src) { return _mm512_cvtepu16_epi32(load_256(src)); }
inline Ints load_s16(const uint16_t* src) { return _mm512_cvtepi16_epi32(load_256(src)); }
inline Ints load_u8(const uint8_t* src) { return _mm512_cvtepu8_epi32(load_128(src)); }
inline Ints load_s8(const uint8_t* src) { return _mm512_cvtepi8_epi32(load_128(src)); }

inline void store_u16(uint16_t* dst, Ints value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtepi32_epi16(value));
}

inline void store_u8(uint8_t* dst, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm512_cvtepi32_epi8(value));
}

// 1 and -1 with the sign of the value, 0 for zeros and NaN.
inline Lanes sign(Lanes value) {
  const __mmask16 is_other = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const Ints sign_bit = iand(bits_of(value), ibroadcast(0x80000000u));
  return lanes_of(_mm512_maskz_or_epi32(is_other, sign_bit, ibroadcast(0x3F800000u)));
}

// 0x7FC00000 where the first is NaN, else the second.
inline Lanes nan_else(Lanes value, Lanes otherwise) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return lanes_of(_mm512_mask_mov_epi32(bits_of(otherwise), is_nan, ibroadcast(0x7FC00000u)));
}

inline Sums zero_sums() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }

// The square of a float is exact in double, so fusing it with the add changes nothing.
inline void add_squares(Sums& sums, Lanes value) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
  const __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(value), 1);
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(upper));
  sums.low = _mm512_fmadd_pd(low, low, sums.low);
  sums.high = _mm512_fmadd_pd(high, high, sums.high);
}

inline Sums load_sums(const double* src) {
  return {_mm512_loadu_pd(src), _mm512_loadu_pd(src + 8)};
}

inline void store_sums(double* dst, const Sums& sums) {
  _mm512_storeu_pd(dst, sums.low);
  _mm512_storeu_pd(dst + 8, sums.high);
}

#include "kernels_body.h"

constexpr KernelSet kKernels = make_kernel_set("avx512");

}  // namespace
}  // namespace offload

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace offload {
const KernelSet* avx512_kernels() {
  return __builtin_cpu_supports("avx512f") ? &kKernels : nullptr;
}
}  // namespace offload

#else

namespace offload {
const KernelSet* avx512_kernels() { return nullptr; }
}  // namespace offload

#endif
