// Packing group by group. Included once per instruction set, inside an unnamed namespace; see
// [Note: packed runs].

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they lie");

constexpr int kNumItems = static_cast<int>(kPackGroupNumel);
constexpr unsigned kEscape = 7;
constexpr uint64_t kWordsNbytes = 3 * sizeof(uint64_t);

template <typename T>
inline T load(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// A group taken apart: exponents, and sign with mantissa in the rest of the item's bytes.
template <typename Item>
struct Parts {
  static constexpr int kMantissaBits = sizeof(Item) == 2 ? 7 : 23;
  static constexpr uint64_t kRestNbytes = sizeof(Item) - 1;
  static constexpr Item kMantissa = (Item{1} << kMantissaBits) - 1;
  static constexpr Item kSign = Item{1} << kMantissaBits;  // in the rest

  static uint8_t exponent(Item item) { return static_cast<uint8_t>(item >> kMantissaBits); }
  static Item rest(Item item) {
    return static_cast<Item>((item & kMantissa) | ((item >> 8) & kSign));
  }
  static Item join(uint8_t exponent, Item rest) {
    return static_cast<Item>((rest & kMantissa) | ((rest & kSign) << 8) |
                             (Item{exponent} << kMantissaBits));
  }
  static Item with_exponent(Item item, uint8_t exponent) {
    constexpr Item kExponent = Item{0xFF} << kMantissaBits;
    return static_cast<Item>((item & ~kExponent) | (Item{exponent} << kMantissaBits));
  }
};

// One group by steps that the codec does for all of its items at once, through arrays.
template <typename Codec>
struct Stepwise {
  // Returns where the group ends.
  template <typename Item>
  static char* pack(const char* raw, char* out) {
    alignas(64) uint8_t exponents[kNumItems];
    if (!Codec::template exponents<Item>(raw, exponents)) {
      *out++ = 0;
      return out;
    }
    const uint8_t largest = Codec::largest(exponents);
    const uint8_t base = largest == 0 ? 1 : largest;
    uint64_t words[3];
    Codec::encode(exponents, base, words);
    *out++ = static_cast<char>(base);
    std::memcpy(out, words, kWordsNbytes);
    out += kWordsNbytes;
    Codec::template take_rests<Item>(raw, out);
    out += kNumItems * Parts<Item>::kRestNbytes;
    for (uint64_t left = words[0] & words[1] & words[2]; left != 0; left &= left - 1) {
      *out++ = static_cast<char>(exponents[__builtin_ctzll(left)]);
    }
    return out;
  }

  // What stands in a group behind its base.
  template <typename Item>
  static void unpack(uint8_t base, const uint64_t* words, const char* rests, const char* escapes,
                     char* raw) {
    alignas(64) uint8_t exponents[kNumItems];
    Codec::decode(words, base, exponents);
    Codec::template join<Item>(exponents, rests, raw);
    for (uint64_t left = words[0] & words[1] & words[2]; left != 0; left &= left - 1) {
      char* const at = raw + __builtin_ctzll(left) * sizeof(Item);
      const Item item = Parts<Item>::with_exponent(load<Item>(at), load<uint8_t>(escapes++));
      std::memcpy(at, &item, sizeof(item));
    }
  }
};

template <typename Group, typename Item>
inline uint64_t pack_items(const char* raw, uint64_t nbytes, char* packed) {
  const char* const end = raw + nbytes;
  char* out = packed;
  for (; raw < end; raw += kNumItems * sizeof(Item)) {
    if (static_cast<uint64_t>(out - packed) >= nbytes) {
      return 0;
    }
    out = Group::template pack<Item>(raw, out);
  }
  const uint64_t packed_nbytes = static_cast<uint64_t>(out - packed);
  return packed_nbytes < nbytes ? packed_nbytes : 0;
}

template <typename Group, typename Item>
inline bool unpack_items(const char* packed, uint64_t packed_nbytes, char* raw, uint64_t nbytes) {
  constexpr int64_t kRestsNbytes = kNumItems * Parts<Item>::kRestNbytes;
  const char* const packed_end = packed + packed_nbytes;
  const char* const end = raw + nbytes;
  for (; raw < end; raw += kNumItems * sizeof(Item)) {
    if (packed == packed_end) {
      return false;
    }
    const uint8_t base = load<uint8_t>(packed++);
    if (base == 0) {
      std::memset(raw, 0, kNumItems * sizeof(Item));
      continue;
    }
    if (packed_end - packed < static_cast<int64_t>(kWordsNbytes) + kRestsNbytes) {
      return false;
    }
    uint64_t words[3];
    std::memcpy(words, packed, kWordsNbytes);
    const char* const rests = packed + kWordsNbytes;
    const char* const escapes = rests + kRestsNbytes;
    packed = escapes + __builtin_popcountll(words[0] & words[1] & words[2]);
    if (packed > packed_end) {
      return false;
    }
    Group::template unpack<Item>(base, words, rests, escapes, raw);
  }
  return packed == packed_end;
}

// The functions of a PackIsa.
template <typename Group>
inline uint64_t pack_any(unsigned item_nbytes, const char* raw, uint64_t nbytes, char* packed) {
  return item_nbytes == 2 ? pack_items<Group, uint16_t>(raw, nbytes, packed)
                          : pack_items<Group, uint32_t>(raw, nbytes, packed);
}

template <typename Group>
inline bool unpack_any(unsigned item_nbytes, const char* packed, uint64_t packed_nbytes, char* raw,
                       uint64_t nbytes) {
  return item_nbytes == 2 ? unpack_items<Group, uint16_t>(packed, packed_nbytes, raw, nbytes)
                          : unpack_items<Group, uint32_t>(packed, packed_nbytes, raw, nbytes);
}
