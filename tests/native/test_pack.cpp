// Packing under the sanitizers: nothing is written or read beyond its bounds, whatever the bytes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../../csrc/pack.h"
#include "harness.h"

namespace offload::tests {

namespace {

// Bits between noise and floats of much the same size, as `kind` says.
std::vector<char> make_bytes(Dice& dice, uint64_t nbytes, uint64_t kind) {
  std::vector<char> bytes(nbytes);
  for (uint64_t i = 0; i + 4 <= nbytes; i += 4) {
    uint32_t bits = static_cast<uint32_t>(dice());
    if (kind == 0) {
      bits = 0;
    } else if (kind < 3) {  // exponents 100..107, or 100..115
      bits = (bits & 0x807FFFFF) | static_cast<uint32_t>(100 + roll(dice, 8 * kind)) << 23;
    }
    std::memcpy(&bytes[i], &bits, sizeof(bits));
  }
  return bytes;
}

}  // namespace

TEST(pack_keeps_its_bounds) {
  Dice dice(1);
  for (size_t i = 0; const PackIsa* isa = pack_isa(i); ++i) {
    for (int round = 0; round < 400; ++round) {
      const unsigned item_nbytes = round % 2 == 0 ? 2 : 4;
      const uint64_t nbytes = (1 + roll(dice, 40)) * item_nbytes * kPackGroupNumel;
      const std::vector<char> raw = make_bytes(dice, nbytes, roll(dice, 4));
      std::vector<char> packed(nbytes + kPackSlackNbytes);
      const uint64_t length = isa->pack(item_nbytes, raw.data(), nbytes, packed.data());
      if (length == 0) {
        continue;
      }
      CHECK(length < nbytes);
      std::vector<char> source(packed.begin(), packed.begin() + static_cast<long>(length));
      source.resize(length + 64);
      std::vector<char> back(nbytes);
      CHECK(isa->unpack(item_nbytes, source.data(), length, back.data(), nbytes));
      CHECK(back == raw);
      for (int flip = 0; flip < 4; ++flip) {
        source[roll(dice, length)] ^= static_cast<char>(1 + roll(dice, 255));
        isa->unpack(item_nbytes, source.data(), length, back.data(), nbytes);
      }
      CHECK(!isa->unpack(item_nbytes, source.data(), 0, back.data(), nbytes));
    }
  }
}

TEST(pack_runs_in_place) {
  Dice dice(2);
  for (int round = 0; round < 100; ++round) {
    const unsigned item_nbytes = round % 2 == 0 ? 2 : 4;
    const uint64_t block_nbytes = kPageNbytes << roll(dice, 3);
    const uint64_t nbytes = (1 + roll(dice, 30)) * kPageNbytes;
    std::vector<char> raw;
    while (raw.size() < nbytes) {
      const std::vector<char> part = make_bytes(dice, kPageNbytes, roll(dice, 4));
      raw.insert(raw.end(), part.begin(), part.end());
    }
    std::vector<char> memory = raw;
    std::vector<char> apart(nbytes);
    std::vector<uint32_t> lengths((nbytes + block_nbytes - 1) / block_nbytes);
    std::vector<uint32_t> same(lengths.size());
    pack_run(item_nbytes, raw.data(), nbytes, block_nbytes, apart.data(), lengths.data());
    pack_run(item_nbytes, memory.data(), nbytes, block_nbytes, memory.data(), same.data());
    CHECK(lengths == same && are_lengths(lengths.data(), nbytes, block_nbytes));
    const uint64_t stored = stored_nbytes(lengths.data(), nbytes, block_nbytes);
    CHECK(stored <= nbytes && stored % kPageNbytes == 0);
    uint64_t total = 0;
    for (const uint32_t length : lengths) {
      total += length;
    }
    CHECK(std::equal(apart.begin(), apart.begin() + static_cast<long>(total), memory.begin()));
    CHECK(unpack_run(item_nbytes, memory.data(), nbytes, block_nbytes, lengths.data()));
    CHECK(memory == raw);
  }
}

}  // namespace offload::tests
