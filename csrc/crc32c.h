// CRC32C (Castagnoli), the checksum of what lies on a drive, and checksums of blocks.
//
// [Note: checksum blocks] An extent is a list of pieces, each contiguous in one file. A piece is
// cut into blocks of checksum_nbytes from its start; its last block may be shorter. A table in
// memory has one uint32 per block: it is never on the drive beside the data, so a write that went
// elsewhere, or was lost, or is half old leaves bytes that the table contradicts. Whoever writes a
// block changes its entry first, and whoever reads it compares before anybody uses it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

constexpr uint64_t kChecksumNbytesMax = uint64_t{1} << 30;  // a block moves in one system call

using Crc32cFunction = uint32_t (*)(const void* data, size_t nbytes);

struct Crc32cIsa {
  const char* name;
  Crc32cFunction function;
};

// The fastest that this CPU has.
uint32_t crc32c(const void* data, size_t nbytes);

// Entry i of what this CPU can run, fastest first; null beyond the last.
const Crc32cIsa* crc32c_isa(size_t i);

inline uint64_t num_checksums(uint64_t nbytes, uint64_t checksum_nbytes) {
  return (nbytes + checksum_nbytes - 1) / checksum_nbytes;
}

// One checksum per block of checksum_nbytes; the last block may be shorter.
void crc32c_blocks(const void* data, uint64_t nbytes, uint64_t checksum_nbytes,
                   uint32_t* checksums);

// Where the first block begins whose checksum is another; nbytes if there is none.
uint64_t first_wrong_block(const void* data, uint64_t nbytes, uint64_t checksum_nbytes,
                           const uint32_t* checksums);

}  // namespace offload
