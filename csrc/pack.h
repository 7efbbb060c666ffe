// Lossless packing of floats for the way to a drive and back: fewer bytes, the same bits.
//
// [Note: packed runs] Neighbours in a plane of weights or moments have much the same exponent, so
// 3 bits for most items say what 8 would; the mantissas are noise and stay as they are. That the
// exponents of bf16 weights hold 2.6 bits is DFloat11's observation (arXiv 2504.11651), whose
// Huffman code is made once for inference; these are made anew in every step. A *run* is
// the stretch of a plane that lies both in one tile and in one piece of its extent: it is read and
// written as a whole. A run keeps the place that its plain bytes would take, and begins there: its
// checksum blocks, each packed alone, lie one behind the other, and the rest of the place is not
// moved. Fewer bytes go over the bus; the file is no smaller, and nothing else in it ever moves.
//
// Beside the checksum of every block (which is that of its plain bytes), the table has its packed
// length, `stride` entries further on. A block that would not shrink is kept plain: its length is
// then that of its bytes. Lengths are of plain blocks, too, where a run was written by somebody
// who does not pack.
//
// A packed block is a sequence of groups of 64 items:
//   1 byte       base: the largest exponent of the group, at least 1; or 0 where all bits of all
//                items are zero, and then nothing follows
//   3 x 8 bytes  bit k of item i's code is bit i of word k; code = min(base - exponent, 7)
//   64 x 1 or 3  sign and mantissa of the items, the sign in the highest bit, little endian
//   1 byte for every item of code 7, in order: its exponent
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

constexpr uint64_t kPackGroupNumel = 64;
constexpr uint64_t kPackBlockNbytesMax = uint64_t{1} << 16;  // it passes through a stack
// A group is at most 281 bytes. Packing may write that much beyond the block's size before it
// gives up, and unpacking may read 64 bytes beyond the end, whatever they hold.
constexpr uint64_t kPackSlackNbytes = 512;

struct PackIsa {
  const char* name;
  // Bytes written to `packed`, or 0 where they would not be fewer than nbytes. item_nbytes is 2 or
  // 4; nbytes a multiple of a group's; `packed` has room for nbytes + kPackSlackNbytes.
  uint64_t (*pack)(unsigned item_nbytes, const char* raw, uint64_t nbytes, char* packed);
  // False where `packed` is not what pack() made of nbytes; `raw` then holds anything.
  bool (*unpack)(unsigned item_nbytes, const char* packed, uint64_t packed_nbytes, char* raw,
                 uint64_t nbytes);
};

// Entry i of what this CPU can run, fastest first; null beyond the last.
const PackIsa* pack_isa(size_t i);

// Whether blocks of this many bytes can be packed.
constexpr bool is_packable(unsigned item_nbytes, uint64_t nbytes) {
  return (item_nbytes == 2 || item_nbytes == 4) && nbytes % (item_nbytes * kPackGroupNumel) == 0;
}

// Packs a run block by block to `packed`, which may begin where `raw` does or be apart from it, and
// stores the length of every block.
void pack_run(unsigned item_nbytes, const char* raw, uint64_t nbytes, uint64_t block_nbytes,
              char* packed, uint32_t* lengths);

// How many bytes are moved for a run of nbytes: its packed blocks, in whole pages.
uint64_t stored_nbytes(const uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes);

// The lengths of a run that is kept plain.
void set_plain(uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes);

// Whether no block of a run is said to be longer than it is plain.
bool are_lengths(const uint32_t* lengths, uint64_t nbytes, uint64_t block_nbytes);

// Unpacks the blocks of a run in place: as stored they begin at `memory`, unpacked they fill nbytes
// from there. False where they are not what pack_block() makes.
bool unpack_run(unsigned item_nbytes, char* memory, uint64_t nbytes, uint64_t block_nbytes,
                const uint32_t* lengths);

}  // namespace offload
