// Packing in AVX-512 with its byte permutations (VBMI and VBMI2).
#include "pack.h"

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
#pragma clang attribute push(                                                           \
    __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx2,bmi,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx2,bmi,popcnt")
#endif

namespace offload {
namespace {

#include "pack_body.h"

// Byte i of a result is byte index[i] of one or two registers.
struct Indices {
  alignas(64) uint8_t even[64];        // bytes 0, 2, 4, ... of two registers
  alignas(64) uint8_t odd[64];         // bytes 1, 3, 5, ...
  alignas(64) uint8_t merge_low[64];   // bytes of two registers in turns: of items 0..31
  alignas(64) uint8_t merge_high[64];  // of items 32..63
  alignas(64) uint8_t fourth[64];      // bytes 0, 4, 8, ... of two registers, in the lower half
  alignas(64) uint8_t dense[64];       // 3 of 4 bytes
  alignas(64) uint8_t apart[64];       // and back

  constexpr Indices() : even(), odd(), merge_low(), merge_high(), fourth(), dense(), apart() {
    for (int i = 0; i < 64; ++i) {
      even[i] = static_cast<uint8_t>(2 * i);
      odd[i] = static_cast<uint8_t>(2 * i + 1);
      merge_low[i] = static_cast<uint8_t>(i / 2 + i % 2 * 64);
      merge_high[i] = static_cast<uint8_t>(merge_low[i] + 32);
      fourth[i] = static_cast<uint8_t>(4 * (i % 32));
      dense[i] = static_cast<uint8_t>(i < 48 ? i / 3 * 4 + i % 3 : 0);
      apart[i] = static_cast<uint8_t>(i / 4 * 3 + (i % 4 < 3 ? i % 4 : 2));
    }
  }
};

constexpr Indices kIndices;

inline __m512i load_512(const void* bytes) { return _mm512_loadu_si512(bytes); }

inline uint8_t largest_byte(__m512i bytes) {
  const __m256i half =
      _mm256_max_epu8(_mm512_castsi512_si256(bytes), _mm512_extracti64x4_epi64(bytes, 1));
  __m128i most = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  most = _mm_max_epu8(most, _mm_srli_epi16(most, 8));
  // The smallest of eight complements takes one instruction.
  const __m128i low = _mm_and_si128(most, _mm_set1_epi16(0xFF));
  const __m128i smallest = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(0xFF), low));
  return static_cast<uint8_t>(0xFF - (_mm_cvtsi128_si32(smallest) & 0xFF));
}

// Bits of `a` where the mask has them, else of `b`.
inline __m512i choose(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi64(mask, a, b, 0xCA);
}

struct Avx512Group {
  template <typename Item>
  static char* pack(const char* raw, char* out);

  template <typename Item>
  static void unpack(uint8_t base, const uint64_t* words, const char* rests, const char* escapes,
                     char* raw) {
    const __m512i bases = _mm512_set1_epi8(static_cast<char>(base));
    const __m512i code = _mm512_ternarylogic_epi64(_mm512_maskz_set1_epi8(words[0], 1),
                                                   _mm512_maskz_set1_epi8(words[1], 2),
                                                   _mm512_maskz_set1_epi8(words[2], 4), 0xFE);
    const __m512i exponents = _mm512_mask_expand_epi8(
        _mm512_sub_epi8(bases, code), words[0] & words[1] & words[2], load_512(escapes));
    join<Item>(exponents, rests, raw);
  }

 private:
  static char* pack_exponents(__m512i exponents, char* out) {
    const uint8_t largest = largest_byte(exponents);
    const uint8_t base = largest == 0 ? 1 : largest;
    const __m512i bases = _mm512_set1_epi8(static_cast<char>(base));
    const __m512i code =
        _mm512_min_epu8(_mm512_sub_epi8(bases, exponents), _mm512_set1_epi8(kEscape));
    *out++ = static_cast<char>(base);
    for (int k = 0; k < 3; ++k) {
      const uint64_t word =
          _mm512_test_epi8_mask(code, _mm512_set1_epi8(static_cast<char>(1 << k)));
      std::memcpy(out, &word, sizeof(word));
      out += sizeof(word);
    }
    return out;
  }

  static char* pack_escapes(__m512i exponents, const char* words, char* out) {
    const uint64_t mask =
        load<uint64_t>(words) & load<uint64_t>(words + 8) & load<uint64_t>(words + 16);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(mask, exponents));
    return out + __builtin_popcountll(mask);
  }

  template <typename Item>
  static void join(__m512i exponents, const char* rests, char* raw);
};

template <>
inline char* Avx512Group::pack<uint16_t>(const char* raw, char* out) {
  const __m512i first = load_512(raw);
  const __m512i second = load_512(raw + 64);
  const __m512i any = _mm512_or_si512(first, second);
  if (_mm512_test_epi64_mask(any, any) == 0) {
    *out++ = 0;
    return out;
  }
  const __m512i even = load_512(kIndices.even);
  const __m512i low = _mm512_permutex2var_epi8(first, even, second);
  const __m512i high = _mm512_permutex2var_epi8(first, load_512(kIndices.odd), second);
  const __m512i exponents =
      _mm512_permutex2var_epi8(_mm512_srli_epi16(first, 7), even, _mm512_srli_epi16(second, 7));
  const char* const words = out + 1;
  out = pack_exponents(exponents, out);
  _mm512_storeu_si512(out, choose(_mm512_set1_epi8(0x7F), low, high));
  return pack_escapes(exponents, words, out + kNumItems);
}

template <>
inline void Avx512Group::join<uint16_t>(__m512i exponents, const char* rests, char* raw) {
  const __m512i rest = load_512(rests);
  const __m512i mantissa = _mm512_set1_epi8(0x7F);
  const __m512i low = choose(mantissa, rest, _mm512_slli_epi16(exponents, 7));
  const __m512i high = choose(mantissa, _mm512_srli_epi16(exponents, 1), rest);
  _mm512_storeu_si512(raw, _mm512_permutex2var_epi8(low, load_512(kIndices.merge_low), high));
  _mm512_storeu_si512(raw + 64, _mm512_permutex2var_epi8(low, load_512(kIndices.merge_high), high));
}

template <>
inline char* Avx512Group::pack<uint32_t>(const char* raw, char* out) {
  __m512i items[4];
  for (int i = 0; i < 4; ++i) {
    items[i] = load_512(raw + 64 * i);
  }
  const __m512i any =
      _mm512_or_si512(_mm512_or_si512(items[0], items[1]), _mm512_or_si512(items[2], items[3]));
  if (_mm512_test_epi64_mask(any, any) == 0) {
    *out++ = 0;
    return out;
  }
  const __m512i fourth = load_512(kIndices.fourth);
  const __m512i lower = _mm512_permutex2var_epi8(_mm512_srli_epi32(items[0], 23), fourth,
                                                 _mm512_srli_epi32(items[1], 23));
  const __m512i upper = _mm512_permutex2var_epi8(_mm512_srli_epi32(items[2], 23), fourth,
                                                 _mm512_srli_epi32(items[3], 23));
  const __m512i exponents = _mm512_inserti64x4(lower, _mm512_castsi512_si256(upper), 1);
  const char* const words = out + 1;
  out = pack_exponents(exponents, out);
  const __m512i dense = load_512(kIndices.dense);
  for (int i = 0; i < 4; ++i) {
    const __m512i rest =
        choose(_mm512_set1_epi32(0x7FFFFF), items[i], _mm512_srli_epi32(items[i], 8));
    // 16 bytes more than there are; what follows writes over them.
    _mm512_storeu_si512(out, _mm512_permutexvar_epi8(dense, rest));
    out += 48;
  }
  return pack_escapes(exponents, words, out);
}

template <>
inline void Avx512Group::join<uint32_t>(__m512i exponents, const char* rests, char* raw) {
  alignas(64) uint8_t bytes[kNumItems];
  _mm512_store_si512(bytes, exponents);
  const __m512i apart = load_512(kIndices.apart);
  const __m512i mantissa = _mm512_set1_epi32(0x7FFFFF);
  for (int i = 0; i < 4; ++i) {
    const __m512i rest = _mm512_permutexvar_epi8(apart, load_512(rests + 48 * i));
    const __m512i exponent = _mm512_slli_epi32(
        _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i))), 23);
    const __m512i sign =
        _mm512_and_si512(_mm512_slli_epi32(rest, 8), _mm512_set1_epi32(static_cast<int>(1u << 31)));
    _mm512_storeu_si512(raw + 64 * i, choose(mantissa, rest, _mm512_or_si512(exponent, sign)));
  }
}

}  // namespace

PackIsa pack_isa_avx512() { return {"avx512", pack_any<Avx512Group>, unpack_any<Avx512Group>}; }

}  // namespace offload

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
