// Packing in AVX2.
#include "pack.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

// Everything is included by now: code from a header must not be compiled for a CPU that may be
// absent.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,popcnt")
#endif

namespace offload {
namespace {

#include "pack_body.h"

inline __m256i load_256(const void* bytes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
}

inline void store_256(void* bytes, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(bytes), value);
}

inline uint64_t bit_of_bytes(__m256i low, __m256i high, __m128i shift) {
  const uint32_t first = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(low, shift)));
  const uint32_t second =
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(high, shift)));
  return uint64_t{second} << 32 | first;
}

// Byte i is `value` where bit i is set, else 0.
inline __m256i bytes_of_bits(uint32_t bits, char value) {
  const __m256i byte_of =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
  const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  return _mm256_and_si256(is_set, _mm256_set1_epi8(value));
}

struct Avx2Codec {
  template <typename Item>
  static bool exponents(const char* raw, uint8_t* exponents);

  static uint8_t largest(const uint8_t* exponents) {
    const __m256i both = _mm256_max_epu8(load_256(exponents), load_256(exponents + 32));
    __m128i most = _mm_max_epu8(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    most = _mm_max_epu8(most, _mm_srli_epi16(most, 8));
    // The smallest of eight 16-bit numbers, of complements: one instruction.
    const __m128i low = _mm_and_si128(most, _mm_set1_epi16(0xFF));
    const __m128i smallest = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(0xFF), low));
    return static_cast<uint8_t>(0xFF - (_mm_cvtsi128_si32(smallest) & 0xFF));
  }

  static void encode(const uint8_t* exponents, uint8_t base, uint64_t* words) {
    const __m256i bases = _mm256_set1_epi8(static_cast<char>(base));
    const __m256i most = _mm256_set1_epi8(kEscape);
    const __m256i low = _mm256_min_epu8(_mm256_sub_epi8(bases, load_256(exponents)), most);
    const __m256i high = _mm256_min_epu8(_mm256_sub_epi8(bases, load_256(exponents + 32)), most);
    for (int k = 0; k < 3; ++k) {
      words[k] = bit_of_bytes(low, high, _mm_cvtsi32_si128(7 - k));
    }
  }

  static void decode(const uint64_t* words, uint8_t base, uint8_t* exponents) {
    const __m256i bases = _mm256_set1_epi8(static_cast<char>(base));
    for (int half = 0; half < 2; ++half) {
      __m256i code = _mm256_setzero_si256();
      for (int k = 0; k < 3; ++k) {
        const uint32_t bits = static_cast<uint32_t>(words[k] >> (32 * half));
        code = _mm256_or_si256(code, bytes_of_bits(bits, static_cast<char>(1 << k)));
      }
      store_256(exponents + 32 * half, _mm256_sub_epi8(bases, code));
    }
  }

  template <typename Item>
  static void take_rests(const char* raw, char* rests);
  template <typename Item>
  static void join(const uint8_t* exponents, const char* rests, char* raw);
};

// The lower bytes of 2 x 16 numbers of 16 bits, in order.
inline __m256i bytes_of_words(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xD8);
}

template <>
inline bool Avx2Codec::exponents<uint16_t>(const char* raw, uint8_t* exponents) {
  __m256i any = _mm256_setzero_si256();
  for (int half = 0; half < 2; ++half) {
    const __m256i first = load_256(raw + 64 * half);
    const __m256i second = load_256(raw + 64 * half + 32);
    any = _mm256_or_si256(any, _mm256_or_si256(first, second));
    const __m256i mask = _mm256_set1_epi16(0xFF);
    store_256(exponents + 32 * half,
              bytes_of_words(_mm256_and_si256(_mm256_srli_epi16(first, 7), mask),
                             _mm256_and_si256(_mm256_srli_epi16(second, 7), mask)));
  }
  return _mm256_testz_si256(any, any) == 0;
}

inline __m256i rest_of_16(__m256i items) {
  const __m256i mantissa = _mm256_and_si256(items, _mm256_set1_epi16(0x7F));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(items, 8), _mm256_set1_epi16(0x80));
  return _mm256_or_si256(mantissa, sign);
}

template <>
inline void Avx2Codec::take_rests<uint16_t>(const char* raw, char* rests) {
  for (int half = 0; half < 2; ++half) {
    store_256(rests + 32 * half, bytes_of_words(rest_of_16(load_256(raw + 64 * half)),
                                                rest_of_16(load_256(raw + 64 * half + 32))));
  }
}

inline __m256i widened(const void* bytes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}

template <>
inline void Avx2Codec::join<uint16_t>(const uint8_t* exponents, const char* rests, char* raw) {
  for (int i = 0; i < kNumItems; i += 16) {
    const __m256i exponent = _mm256_slli_epi16(widened(exponents + i), 7);
    const __m256i rest = widened(rests + i);
    const __m256i mantissa = _mm256_and_si256(rest, _mm256_set1_epi16(0x7F));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(rest, _mm256_set1_epi16(0x80)), 8);
    store_256(raw + i * sizeof(uint16_t),
              _mm256_or_si256(exponent, _mm256_or_si256(mantissa, sign)));
  }
}

template <>
inline bool Avx2Codec::exponents<uint32_t>(const char* raw, uint8_t* exponents) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // after two packings by lanes
  const __m256i mask = _mm256_set1_epi32(0xFF);
  __m256i any = _mm256_setzero_si256();
  for (int half = 0; half < 2; ++half) {
    __m256i part[4];
    for (int i = 0; i < 4; ++i) {
      const __m256i items = load_256(raw + 128 * half + 32 * i);
      any = _mm256_or_si256(any, items);
      part[i] = _mm256_and_si256(_mm256_srli_epi32(items, 23), mask);
    }
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(part[0], part[1]),
                                               _mm256_packus_epi32(part[2], part[3]));
    store_256(exponents + 32 * half, _mm256_permutevar8x32_epi32(packed, order));
  }
  return _mm256_testz_si256(any, any) == 0;
}

template <>
inline void Avx2Codec::take_rests<uint32_t>(const char* raw, char* rests) {
  const __m256i bytes = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                         0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const __m256i together = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7);
  for (int i = 0; i < kNumItems; i += 8) {
    const __m256i items = load_256(raw + i * sizeof(uint32_t));
    const __m256i mantissa = _mm256_and_si256(items, _mm256_set1_epi32(0x7FFFFF));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(items, 8), _mm256_set1_epi32(0x800000));
    const __m256i rest = _mm256_shuffle_epi8(_mm256_or_si256(mantissa, sign), bytes);
    // 8 bytes more than there are; the next store, or the next group, writes over them.
    store_256(rests + i * 3, _mm256_permutevar8x32_epi32(rest, together));
  }
}

template <>
inline void Avx2Codec::join<uint32_t>(const uint8_t* exponents, const char* rests, char* raw) {
  const __m256i apart = _mm256_setr_epi32(0, 1, 2, 6, 3, 4, 5, 7);
  const __m256i bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                         0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  for (int i = 0; i < kNumItems; i += 8) {
    const __m256i dense = _mm256_permutevar8x32_epi32(load_256(rests + i * 3), apart);
    const __m256i rest = _mm256_shuffle_epi8(dense, bytes);
    const __m256i exponent =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(exponents + i)));
    const __m256i mantissa = _mm256_and_si256(rest, _mm256_set1_epi32(0x7FFFFF));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(rest, _mm256_set1_epi32(0x800000)), 8);
    store_256(raw + i * sizeof(uint32_t),
              _mm256_or_si256(_mm256_slli_epi32(exponent, 23), _mm256_or_si256(mantissa, sign)));
  }
}

}  // namespace

PackIsa pack_isa_avx2() {
  return {"avx2", pack_any<Stepwise<Avx2Codec>>, unpack_any<Stepwise<Avx2Codec>>};
}

}  // namespace offload

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
