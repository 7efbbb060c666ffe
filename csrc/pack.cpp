// Portable packing, the choice between instruction sets, and runs.
#include "pack.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "check.h"
#include "io_queue.h"

namespace offload {

#if defined(__x86_64__)
PackIsa pack_isa_avx2();
PackIsa pack_isa_avx512();
#endif

namespace {

#include "pack_body.h"

struct PortableCodec {
  // Fills the exponents and returns whether any bit of the group is set.
  template <typename Item>
  static bool exponents(const char* raw, uint8_t* exponents) {
    Item any = 0;
    for (int i = 0; i < kNumItems; ++i) {
      const Item item = load<Item>(raw + i * sizeof(Item));
      any |= item;
      exponents[i] = Parts<Item>::exponent(item);
    }
    return any != 0;
  }

  static uint8_t largest(const uint8_t* exponents) {
    return *std::max_element(exponents, exponents + kNumItems);
  }

  static void encode(const uint8_t* exponents, uint8_t base, uint64_t* words) {
    words[0] = words[1] = words[2] = 0;
    for (int i = 0; i < kNumItems; ++i) {
      const uint64_t code = std::min<unsigned>(base - exponents[i], kEscape);
      for (int k = 0; k < 3; ++k) {
        words[k] |= (code >> k & 1) << i;
      }
    }
  }

  static void decode(const uint64_t* words, uint8_t base, uint8_t* exponents) {
    for (int i = 0; i < kNumItems; ++i) {
      const uint64_t code =
          (words[0] >> i & 1) | (words[1] >> i & 1) << 1 | (words[2] >> i & 1) << 2;
      exponents[i] = static_cast<uint8_t>(base - code);
    }
  }

  template <typename Item>
  static void take_rests(const char* raw, char* rests) {
    for (int i = 0; i < kNumItems; ++i) {
      const Item rest = Parts<Item>::rest(load<Item>(raw + i * sizeof(Item)));
      std::memcpy(rests + i * Parts<Item>::kRestNbytes, &rest, Parts<Item>::kRestNbytes);
    }
  }

  template <typename Item>
  static void join(const uint8_t* exponents, const char* rests, char* raw) {
    for (int i = 0; i < kNumItems; ++i) {
      Item rest = 0;
      std::memcpy(&rest, rests + i * Parts<Item>::kRestNbytes, Parts<Item>::kRestNbytes);
      const Item item = Parts<Item>::join(exponents[i], rest);
      std::memcpy(raw + i * sizeof(Item), &item, sizeof(Item));
    }
  }
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

struct Isas {
  std::array<PackIsa, 3> isas;
  size_t num = 0;

  Isas() {
#if defined(__x86_64__)
    if (has_avx512()) {
      isas[num++] = pack_isa_avx512();
    }
    if (has_avx2()) {
      isas[num++] = pack_isa_avx2();
    }
#endif
    isas[num++] = {"portable", pack_any<Stepwise<PortableCodec>>,
                   unpack_any<Stepwise<PortableCodec>>};
  }
};

const Isas& supported() {
  static const Isas isas;
  return isas;
}

}  // namespace

const PackIsa* pack_isa(size_t i) { return i < supported().num ? &supported().isas[i] : nullptr; }

namespace {

uint64_t packed_nbytes(const uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes) {
  uint64_t total = 0;
  for (uint64_t begin = 0; begin < nbytes; begin += block_nbytes) {
    total += *lengths++;
  }
  return total;
}

}  // namespace

void pack_run(unsigned item_nbytes, const char* raw, uint64_t nbytes, uint64_t block_nbytes,
              char* packed, uint32_t* lengths) {
  CHECK(block_nbytes <= kPackBlockNbytesMax && is_packable(item_nbytes, nbytes));
  char scratch[kPackBlockNbytesMax + kPackSlackNbytes];
  for (uint64_t begin = 0; begin < nbytes; begin += block_nbytes) {
    const uint64_t plain = std::min(block_nbytes, nbytes - begin);
    uint64_t length = supported().isas[0].pack(item_nbytes, raw + begin, plain, scratch);
    if (length > 0) {
      std::memcpy(packed, scratch, length);
    } else {
      length = plain;
      std::memmove(packed, raw + begin, plain);
    }
    packed += length;
    *lengths++ = static_cast<uint32_t>(length);
  }
}

uint64_t stored_nbytes(const uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes) {
  const uint64_t total = packed_nbytes(lengths, nbytes, block_nbytes);
  return std::min((total + kPageNbytes - 1) / kPageNbytes * kPageNbytes, nbytes);
}

void set_plain(uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes) {
  for (uint64_t begin = 0; begin < nbytes; begin += block_nbytes) {
    *lengths++ = static_cast<uint32_t>(std::min(block_nbytes, nbytes - begin));
  }
}

bool are_lengths(const uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes) {
  for (uint64_t begin = 0; begin < nbytes; begin += block_nbytes) {
    if (*lengths++ > std::min(block_nbytes, nbytes - begin)) {
      return false;
    }
  }
  return true;
}

bool unpack_run(unsigned item_nbytes, char* memory, uint64_t nbytes, uint64_t block_nbytes,
                const uint32_t* lengths) {
  CHECK(block_nbytes <= kPackBlockNbytesMax && is_packable(item_nbytes, nbytes));
  char scratch[kPackBlockNbytesMax + kPackSlackNbytes];
  uint64_t packed_end = packed_nbytes(lengths, nbytes, block_nbytes);
  // From the last block to the first: none is longer packed than plain, so what is unpacked never
  // reaches into what is not.
  for (uint64_t i = (nbytes + block_nbytes - 1) / block_nbytes; i-- > 0;) {
    const uint64_t begin = i * block_nbytes;
    const uint64_t plain = std::min(block_nbytes, nbytes - begin);
    CHECK(lengths[i] <= plain && lengths[i] <= packed_end);
    packed_end -= lengths[i];
    if (lengths[i] == plain) {
      std::memmove(memory + begin, memory + packed_end, plain);
      continue;
    }
    std::memcpy(scratch, memory + packed_end, lengths[i]);
    if (!supported().isas[0].unpack(item_nbytes, scratch, lengths[i], memory + begin, plain)) {
      return false;
    }
  }
  return true;
}

}  // namespace offload
