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

struct Ints {
  __m256i low, high;
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

// These return b where a or b is NaN, as the portable ones do.
inline Lanes min(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}

inline Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

inline Ints bits_of(Lanes value) {
  return {_mm256_castps_si256(value.low), _mm256_castps_si256(value.high)};
}

inline Lanes lanes_of(Ints bits) {
  return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)};
}

inline Ints round_to_ints(Lanes value) {
  return {_mm256_cvtps_epi32(value.low), _mm256_cvtps_epi32(value.high)};
}

inline Lanes to_lanes(Ints value) {
  return {_mm256_cvtepi32_ps(value.low), _mm256_cvtepi32_ps(value.high)};
}

inline Ints ibroadcast(uint32_t value) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(value));
  return {all, all};
}

inline Ints lane_numbers() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
          _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

inline Ints iadd(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}

inline Ints imul(Ints a, Ints b) {
  return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
}

inline Ints iand(Ints a, Ints b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}

inline Ints ixor(Ints a, Ints b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}

template <int kBits>
inline Ints shift_left(Ints value) {
  return {_mm256_slli_epi32(value.low, kBits), _mm256_slli_epi32(value.high, kBits)};
}

template <int kBits>
inline Ints shift_right(Ints value) {
  return {_mm256_srli_epi32(value.low, kBits), _mm256_srli_epi32(value.high, kBits)};
}

inline uint32_t largest(Ints value) {
  const __m256i eight = _mm256_max_epu32(value.low, value.high);
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}

inline __m128i load_128(const void* src) {
  return _mm_loadu_si128(static_cast<const __m128i*>(src));
}

inline __m128i load_64(const void* src) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(src));
}

inline Ints load_u16(const uint16_t* src) {
  return {_mm256_cvtepu16_epi32(load_128(src)), _mm256_cvtepu16_epi32(load_128(src + 8))};
}

inline Ints load_s16(const uint16_t* src) {
  return {_mm256_cvtepi16_epi32(load_128(src)), _mm256_cvtepi16_epi32(load_128(src + 8))};
}

inline Ints load_u8(const uint8_t* src) {
  return {_mm256_cvtepu8_epi32(load_64(src)), _mm256_cvtepu8_epi32(load_64(src + 8))};
}

inline Ints load_s8(const uint8_t* src) {
  return {_mm256_cvtepi8_epi32(load_64(src)), _mm256_cvtepi8_epi32(load_64(src + 8))};
}

// Takes lanes that fit 16 bits. The pack works within 128-bit halves, the permute puts them in
// order.
inline __m256i pack_u16(Ints value) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(value.low, value.high), 0xD8);
}

inline void store_u16(uint16_t* dst, Ints value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), pack_u16(value));
}

// Takes lanes that fit 8 bits.
inline void store_u8(uint8_t* dst, Ints value) {
  const __m256i packed = pack_u16(value);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(dst),
      _mm_packus_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
}

inline __m256 sign_half(__m256 value) {
  const __m256 is_other = _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  const __m256 sign_bit = _mm256_and_ps(value, _mm256_set1_ps(-0.0f));
  return _mm256_and_ps(is_other, _mm256_or_ps(sign_bit, _mm256_set1_ps(1.0f)));
}

// 1 and -1 with the sign of the value, 0 for zeros and NaN.
inline Lanes sign(Lanes value) { return {sign_half(value.low), sign_half(value.high)}; }

inline __m256 nan_else_half(__m256 value, __m256 otherwise) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  return _mm256_blendv_ps(otherwise, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
}

// 0x7FC00000 where the first is NaN, else the second.
inline Lanes nan_else(Lanes value, Lanes otherwise) {
  return {nan_else_half(value.low, otherwise.low), nan_else_half(value.high, otherwise.high)};
}

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

inline Sums load_sums(const double* src) {
  return {{_mm256_loadu_pd(src), _mm256_loadu_pd(src + 4), _mm256_loadu_pd(src + 8),
           _mm256_loadu_pd(src + 12)}};
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
