// CRC32C in three instruction sets. A register of 32 bits holds a polynomial over GF(2) with its
// bits reflected: the most significant bit is the coefficient of x^0.
#include "crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace offload {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they lie");

constexpr uint32_t kPolynomial = 0x82F63B78;  // x^32 is left out

constexpr uint32_t times_x(uint32_t value) {
  return (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
}

template <typename T>
inline T load(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// table[k][byte]: what a byte adds to the checksum when k more bytes follow it.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) {
      value = times_x(value);
    }
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < tables.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t crc32c_portable(const void* data, size_t nbytes) {
  const char* bytes = static_cast<const char*>(data);
  uint32_t crc = ~uint32_t{0};
  for (; nbytes >= 8; nbytes -= 8, bytes += 8) {
    const uint64_t word = load<uint64_t>(bytes) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) {
      crc ^= kTables[7 - k][(word >> (8 * k)) & 0xFF];
    }
  }
  for (; nbytes > 0; --nbytes, ++bytes) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ load<uint8_t>(bytes)) & 0xFF];
  }
  return ~crc;
}

#if defined(__x86_64__)

// x^exponent modulo the polynomial.
constexpr uint32_t power_of_x(uint64_t exponent) {
  uint32_t value = 0x80000000;
  for (uint64_t i = 0; i < exponent; ++i) {
    value = times_x(value);
  }
  return value;
}

#define TARGET_SSE42 __attribute__((target("sse4.2,pclmul")))

// The crc32 instruction takes 3 cycles, and one can start every cycle: three stretches of Nbytes
// are read side by side. Then crc(A B C) = crc(A) * x^(16 Nbytes) + crc(B) * x^(8 Nbytes) + crc(C).
// A carry-less product of two reflected words lacks one factor x, and crc32 of the 64-bit product
// adds x^32 while it reduces: the constants have 33 powers less.
template <size_t Nbytes>
TARGET_SSE42 inline uint64_t crc_of_three(uint64_t crc, const char* bytes) {
  uint64_t second = 0;
  uint64_t third = 0;
  for (size_t i = 0; i < Nbytes; i += 8) {
    crc = _mm_crc32_u64(crc, load<uint64_t>(bytes + i));
    second = _mm_crc32_u64(second, load<uint64_t>(bytes + Nbytes + i));
    third = _mm_crc32_u64(third, load<uint64_t>(bytes + 2 * Nbytes + i));
  }
  constexpr uint32_t kFirst = power_of_x(16 * Nbytes - 33);
  constexpr uint32_t kSecond = power_of_x(8 * Nbytes - 33);
  const __m128i pair = _mm_set_epi64x(kSecond, kFirst);
  const __m128i first = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<int64_t>(crc)), pair, 0);
  const __m128i next =
      _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<int64_t>(second)), pair, 0x10);
  const int64_t product = _mm_cvtsi128_si64(_mm_xor_si128(first, next));
  return _mm_crc32_u64(0, static_cast<uint64_t>(product)) ^ third;
}

TARGET_SSE42 inline uint64_t crc_of_tail(uint64_t crc, const char* bytes, size_t nbytes) {
  for (; nbytes >= 8; nbytes -= 8, bytes += 8) {
    crc = _mm_crc32_u64(crc, load<uint64_t>(bytes));
  }
  for (; nbytes > 0; --nbytes, ++bytes) {
    crc = _mm_crc32_u8(static_cast<uint32_t>(crc), load<uint8_t>(bytes));
  }
  return crc;
}

TARGET_SSE42 uint32_t crc32c_sse42(const void* data, size_t nbytes) {
  constexpr size_t kLong = 4096;
  constexpr size_t kShort = 256;
  const char* bytes = static_cast<const char*>(data);
  uint64_t crc = ~uint32_t{0};
  for (; nbytes >= 3 * kLong; nbytes -= 3 * kLong, bytes += 3 * kLong) {
    crc = crc_of_three<kLong>(crc, bytes);
  }
  for (; nbytes >= 3 * kShort; nbytes -= 3 * kShort, bytes += 3 * kShort) {
    crc = crc_of_three<kShort>(crc, bytes);
  }
  return ~static_cast<uint32_t>(crc_of_tail(crc, bytes, nbytes));
}

#define TARGET_AVX512 __attribute__((target("sse4.2,pclmul,avx512f,vpclmulqdq")))

// Each 128-bit lane times x^2048, plus the 256 bytes further on that stand in its place.
TARGET_AVX512 inline __m512i fold(__m512i lanes, __m512i factors, const char* bytes) {
  _mm_prefetch(bytes + 4096, _MM_HINT_T0);  // the CPU's own prefetching ends with the page
  const __m512i low = _mm512_clmulepi64_epi128(lanes, factors, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(lanes, factors, 0x11);
  return _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(bytes), 0x96);  // all xor
}

// Folds the message into 256 bytes that leave the same remainder, so their checksum is its. The
// first 8 bytes of a lane stand 64 powers above the others, and the product of two reflected words
// lacks one factor x.
TARGET_AVX512 uint32_t crc32c_avx512(const void* data, size_t nbytes) {
  constexpr size_t kStride = 256;
  if (nbytes < 2 * kStride) {
    return crc32c_sse42(data, nbytes);
  }
  constexpr int64_t kLow = int64_t{power_of_x(8 * kStride + 63)} << 32;
  constexpr int64_t kHigh = int64_t{power_of_x(8 * kStride - 1)} << 32;
  const __m512i factors = _mm512_set_epi64(kHigh, kLow, kHigh, kLow, kHigh, kLow, kHigh, kLow);
  const char* bytes = static_cast<const char*>(data);
  __m512i a = _mm512_loadu_si512(bytes);
  __m512i b = _mm512_loadu_si512(bytes + 64);
  __m512i c = _mm512_loadu_si512(bytes + 128);
  __m512i d = _mm512_loadu_si512(bytes + 192);
  a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1)));  // where a crc starts
  bytes += kStride;
  nbytes -= kStride;
  for (; nbytes >= kStride; nbytes -= kStride, bytes += kStride) {
    a = fold(a, factors, bytes);
    b = fold(b, factors, bytes + 64);
    c = fold(c, factors, bytes + 128);
    d = fold(d, factors, bytes + 192);
  }
  char folded[kStride];
  _mm512_storeu_si512(folded, a);
  _mm512_storeu_si512(folded + 64, b);
  _mm512_storeu_si512(folded + 128, c);
  _mm512_storeu_si512(folded + 192, d);
  return ~static_cast<uint32_t>(crc_of_tail(crc_of_tail(0, folded, kStride), bytes, nbytes));
}

bool has_sse42() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"); }

bool has_avx512() {
  return has_sse42() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

#endif

struct Isas {
  std::array<Crc32cIsa, 3> isas;
  size_t num = 0;

  Isas() {
#if defined(__x86_64__)
    if (has_avx512()) {
      isas[num++] = {"avx512", crc32c_avx512};
    }
    if (has_sse42()) {
      isas[num++] = {"sse42", crc32c_sse42};
    }
#endif
    isas[num++] = {"portable", crc32c_portable};
  }
};

const Isas& supported() {
  static const Isas isas;
  return isas;
}

}  // namespace

uint32_t crc32c(const void* data, size_t nbytes) {
  return supported().isas[0].function(data, nbytes);
}

const Crc32cIsa* crc32c_isa(size_t i) {
  return i < supported().num ? &supported().isas[i] : nullptr;
}

void crc32c_blocks(const void* data, uint64_t nbytes, uint64_t checksum_nbytes,
                   uint32_t* checksums) {
  CHECK(checksum_nbytes > 0);
  const char* bytes = static_cast<const char*>(data);
  for (uint64_t begin = 0; begin < nbytes; begin += checksum_nbytes) {
    *checksums++ = crc32c(bytes + begin, std::min(checksum_nbytes, nbytes - begin));
  }
}

uint64_t first_wrong_block(const void* data, uint64_t nbytes, uint64_t checksum_nbytes,
                           const uint32_t* checksums) {
  CHECK(checksum_nbytes > 0);
  const char* bytes = static_cast<const char*>(data);
  for (uint64_t begin = 0; begin < nbytes; begin += checksum_nbytes) {
    if (crc32c(bytes + begin, std::min(checksum_nbytes, nbytes - begin)) != *checksums++) {
      return begin;
    }
  }
  return nbytes;
}

}  // namespace offload
