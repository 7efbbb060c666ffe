// The kernels in AVX2 with FMA: 16 lanes are two registers.
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

// Everything is included by now: code from a header must not be compiled for a CPU that may be
// absent.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace offload {
namespace {

struct Lanes {
  __m256 low, high;  // lanes 0..7 and 8..15
};

struct Sums {
  __m256d quarters[4];
};

inline Lanes load(const float* src) { return {_mm256_loadu_ps(src), _mm256_loadu_ps(src + 8)}; }
inline Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes sqrt(Lanes a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }

inline void store(float* dst, Lanes value) {
  _mm256_storeu_ps(dst, value.low);
  _mm256_storeu_ps(dst + 8, value.high);
}

inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

inline Lanes sub(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

inline Lanes mul(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

inline Lanes div(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline __m128i load_u16(const uint16_t* src) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
}

// Takes lanes that fit 16 bits. The pack works within 128-bit halves, the permute puts them in
// order.
inline void store_u16(uint16_t* dst, __m256i low, __m256i high) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), packed);
}

inline __m256i upper_half(const uint16_t* src) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_u16(src)), 16);
}

inline Lanes load_bf16(const uint16_t* src) {
  return {_mm256_castsi256_ps(upper_half(src)), _mm256_castsi256_ps(upper_half(src + 8))};
}

inline void store_bf16(uint16_t* dst, Lanes value) {
  store_u16(dst, _mm256_srli_epi32(_mm256_castps_si256(value.low), 16),
            _mm256_srli_epi32(_mm256_castps_si256(value.high), 16));
}

inline __m256 join_half(const uint16_t* high, const uint16_t* low) {
  const __m256i residue = _mm256_cvtepi16_epi32(load_u16(low));
  return _mm256_castsi256_ps(_mm256_add_epi32(upper_half(high), residue));
}

inline Lanes join(const uint16_t* high, const uint16_t* low) {
  return {join_half(high, low), join_half(high + 8, low + 8)};
}

inline __m256i rounded_upper(__m256i bits) {
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
}

inline void split(Lanes value, uint16_t* high, uint16_t* low) {
  const __m256i bits_low = _mm256_castps_si256(value.low);
  const __m256i bits_high = _mm256_castps_si256(value.high);
  const __m256i mask = _mm256_set1_epi32(0xFFFF);
  store_u16(high, rounded_upper(bits_low), rounded_upper(bits_high));
  store_u16(low, _mm256_and_si256(bits_low, mask), _mm256_and_si256(bits_high, mask));
}

inline __m256 round_half(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m256i rounded = _mm256_and_si256(_mm256_add_epi32(bits, bias), mask);
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan);
}

// To nearest, ties to even, the low half zero; any NaN becomes 0x7FC0.
inline Lanes round_bf16(Lanes value) { return {round_half(value.low), round_half(value.high)}; }

inline Sums zero_sums() {
  const __m256d zero = _mm256_setzero_pd();
  return {{zero, zero, zero, zero}};
}

// The square of a float is exact in double, so fusing it with the add changes nothing.
inline void add_quarter(__m256d& sums, __m128 value) {
  const __m256d wide = _mm256_cvtps_pd(value);
  sums = _mm256_fmadd_pd(wide, wide, sums);
}

inline void add_squares(Sums& sums, Lanes value) {
  add_quarter(sums.quarters[0], _mm256_castps256_ps128(value.low));
  add_quarter(sums.quarters[1], _mm256_extractf128_ps(value.low, 1));
  add_quarter(sums.quarters[2], _mm256_castps256_ps128(value.high));
  add_quarter(sums.quarters[3], _mm256_extractf128_ps(value.high, 1));
}

inline void store_sums(double* dst, const Sums& sums) {
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_pd(dst + 4 * i, sums.quarters[i]);
  }
}

#include "kernels_body.h"

constexpr KernelSet kKernels = make_kernel_set("avx2");

}  // namespace
}  // namespace offload

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace offload {
const KernelSet* avx2_kernels() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kKernels : nullptr;
}
}  // namespace offload

#else

namespace offload {
const KernelSet* avx2_kernels() { return nullptr; }
}  // namespace offload

#endif
