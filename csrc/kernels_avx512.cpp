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

inline __m256i load_u16(const uint16_t* src) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
}

inline void store_u16(uint16_t* dst, __m512i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtepi32_epi16(value));
}

inline __m512i upper_half(const uint16_t* src) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_u16(src)), 16);
}

inline Lanes load_bf16(const uint16_t* src) { return _mm512_castsi512_ps(upper_half(src)); }

inline void store_bf16(uint16_t* dst, Lanes value) {
  store_u16(dst, _mm512_srli_epi32(_mm512_castps_si512(value), 16));
}

inline Lanes join(const uint16_t* high, const uint16_t* low) {
  const __m512i residue = _mm512_cvtepi16_epi32(load_u16(low));
  return _mm512_castsi512_ps(_mm512_add_epi32(upper_half(high), residue));
}

inline void split(Lanes value, uint16_t* high, uint16_t* low) {
  const __m512i bits = _mm512_castps_si512(value);
  store_u16(high, _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16));
  store_u16(low, bits);
}

// To nearest, ties to even, the low half zero; any NaN becomes 0x7FC0.
inline Lanes round_bf16(Lanes value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i rounded = _mm512_and_si512(_mm512_add_epi32(bits, bias), mask);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000)));
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
