// What an update does and where its planes are: plain data and pure functions, no threads, no I/O.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io_queue.h"
#include "kernels.h"

namespace offload {

const char* plane_name(int plane);

// Bytes per element of all planes together, in the format that has the most.
constexpr uint64_t kTileItemNbytes = 16;

// A piece of an extent: bytes that lie together in a file; a plane is a list of them in plane
// order. `checksums` has one entry per block of the piece (see [Note: checksum blocks]), or is
// null.
struct PlaneSegment {
  int fd;
  uint64_t offset;
  uint64_t nbytes;
  uint32_t* checksums = nullptr;
};

// With an address, the whole plane is in memory there: it is read into, computed in and written
// from that memory. Without, it passes through tile buffers.
struct UpdatePlane {
  bool present = false;
  char* address = nullptr;
  bool has_read = false;
  bool has_write = false;
  std::vector<PlaneSegment> read;
  std::vector<PlaneSegment> write;
};

// One optimizer step on the elements [begin, end).
struct UpdateOp {
  uint64_t begin;
  uint64_t end;
  StepRule rule;
  std::vector<float> factors =
      {};  // where the rule has factors: those of the rows, then those of the columns
};

struct UpdateJob {
  uint64_t tag = 0;
  StateFormat format = StateFormat::kFp32;
  uint64_t numel = 0;
  UpdatePlane planes[kNumPlanes];
  std::vector<UpdateOp> ops;  // sorted, disjoint
  // The write segments are another version of the planes: tiles without ops are copied there, too.
  bool write_all = false;
};

// Empty if the job can run in tiles of tile_numel with blocks of checksum_nbytes (0: none), else
// what is wrong with it.
std::string validate_job(const UpdateJob& job, uint64_t tile_numel, uint64_t checksum_nbytes);

// The same without the rule on numel, for planes that are in memory.
std::string validate_planes_and_ops(const UpdateJob& job);

// Whether any byte of memory or file belongs to both, so that one must wait for the other. The same
// file behind two descriptors is not noticed.
bool jobs_overlap(const UpdateJob& a, const UpdateJob& b);

// Cuts the bytes [begin, end) of a plane out of its segments, to or from contiguous memory; the
// result has the segments' checksums unless checksum_nbytes is 0.
void cut_segments(const std::vector<PlaneSegment>& plane, uint64_t begin, uint64_t end,
                  char* memory, uint64_t checksum_nbytes, std::vector<IoSegment>& result);

bool has_checksums(const std::vector<PlaneSegment>& plane);

// How many elements to verify, compute and checksum at once: about kHotNumel, whole checksum blocks
// of every plane, and all of them where there is nothing to check.
constexpr uint64_t kHotNumel = 16384;
uint64_t hot_numel(const UpdateJob& job, uint64_t checksum_nbytes);

// The first op that reaches beyond begin, as an index into job.ops.
size_t first_op_after(const UpdateJob& job, uint64_t begin);

// Runs all ops on the elements [begin, end); planes[i] points at element `begin` of plane i, null
// where the format or the job has none.
void run_kernels(const UpdateJob& job, const KernelSet& kernels, uint64_t begin, uint64_t end,
                 char* const planes[kNumPlanes]);

}  // namespace offload
