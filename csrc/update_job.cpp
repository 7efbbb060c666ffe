#include "update_job.h"

#include <algorithm>

namespace offload {
namespace {

constexpr const char* kPlaneNames[kNumPlanes] = {"weight",     "residue", "exp_avg",
                                                 "exp_avg_sq", "grad",    "grad_lo"};
constexpr unsigned kItemsizes[2][kNumPlanes] = {{4, 0, 4, 4, 4, 0}, {2, 2, 4, 4, 2, 2}};

bool is_grad(int plane) { return plane == kGrad || plane == kGradLo; }

uint64_t total_nbytes(const std::vector<PlaneSegment>& segments) {
  uint64_t total = 0;
  for (const PlaneSegment& segment : segments) {
    total += segment.nbytes;
  }
  return total;
}

// What is wrong with a plane that is there.
const char* plane_fault(const UpdatePlane& plane, int index, unsigned itemsize, uint64_t numel,
                        bool has_ops) {
  if (itemsize == 0) {
    return "is not part of this format";
  }
  if (is_grad(index) && plane.has_write) {
    return "is never written, so it takes no write segments";
  }
  if (!plane.address && !plane.has_read) {
    return "needs an address or read segments";
  }
  if (!plane.address && has_ops && !is_grad(index) && !plane.has_write) {
    return "has neither an address nor write segments, so its update would be lost";
  }
  if (plane.has_read && total_nbytes(plane.read) != numel * itemsize) {
    return "has read segments that do not add up to its size";
  }
  if (plane.has_write && total_nbytes(plane.write) != numel * itemsize) {
    return "has write segments that do not add up to its size";
  }
  return nullptr;
}

std::string check_planes(const UpdateJob& job) {
  for (int i = 0; i < kNumPlanes; ++i) {
    const UpdatePlane& plane = job.planes[i];
    const unsigned itemsize = plane_itemsize(job.format, i);
    const char* fault = nullptr;
    if (plane.present) {
      fault = plane_fault(plane, i, itemsize, job.numel, !job.ops.empty());
    } else if (itemsize != 0 && i != kGradLo && !job.ops.empty()) {
      fault = "is missing";
    }
    if (fault) {
      return std::string("plane ") + kPlaneNames[i] + " " + fault;
    }
  }
  return "";
}

// What is wrong with the checksums of a plane's segments.
const char* checksum_fault(const std::vector<PlaneSegment>& plane, uint64_t tile_nbytes,
                           uint64_t checksum_nbytes) {
  uint64_t begin = 0;
  for (const PlaneSegment& segment : plane) {
    if (segment.checksums) {
      if (checksum_nbytes == 0) {
        return "has checksums, but the pipeline's checksum_nbytes is 0";
      }
      if (begin % checksum_nbytes != 0 || tile_nbytes % checksum_nbytes != 0) {
        return "has pieces or tiles that do not begin where checksum blocks do";
      }
    }
    begin += segment.nbytes;
  }
  return nullptr;
}

std::string check_checksums(const UpdateJob& job, uint64_t tile_numel, uint64_t checksum_nbytes) {
  for (int i = 0; i < kNumPlanes; ++i) {
    for (const std::vector<PlaneSegment>* plane : {&job.planes[i].read, &job.planes[i].write}) {
      const uint64_t tile_nbytes = tile_numel * plane_itemsize(job.format, i);
      if (const char* fault = checksum_fault(*plane, tile_nbytes, checksum_nbytes)) {
        return std::string("plane ") + kPlaneNames[i] + " " + fault;
      }
    }
  }
  return "";
}

std::string check_ops(const UpdateJob& job) {
  uint64_t end = 0;
  for (const UpdateOp& op : job.ops) {
    if (op.begin < end || op.end <= op.begin || op.end > job.numel) {
      return "op [" + std::to_string(op.begin) + ", " + std::to_string(op.end) +
             ") is empty, out of order, or outside the chunk's " + std::to_string(job.numel) +
             " elements";
    }
    end = op.end;
  }
  return "";
}

// A range of one file, or of memory (fd -1).
struct Range {
  int fd;
  uint64_t begin;
  uint64_t end;
};

std::vector<Range> touched_ranges(const UpdateJob& job) {
  std::vector<Range> ranges;
  for (int i = 0; i < kNumPlanes; ++i) {
    const UpdatePlane& plane = job.planes[i];
    if (plane.address) {
      const uint64_t begin = reinterpret_cast<uintptr_t>(plane.address);
      ranges.push_back({-1, begin, begin + job.numel * plane_itemsize(job.format, i)});
    }
    for (const std::vector<PlaneSegment>* segments : {&plane.read, &plane.write}) {
      for (const PlaneSegment& segment : *segments) {
        ranges.push_back({segment.fd, segment.offset, segment.offset + segment.nbytes});
      }
    }
  }
  return ranges;
}

template <typename T>
T* at(char* plane, uint64_t element) {
  return plane ? reinterpret_cast<T*>(plane) + element : nullptr;
}

}  // namespace

const char* plane_name(int plane) { return kPlaneNames[plane]; }

unsigned plane_itemsize(StateFormat format, int plane) {
  return kItemsizes[static_cast<int>(format)][plane];
}

std::string validate_planes_and_ops(const UpdateJob& job) {
  const std::string ops_fault = check_ops(job);
  return ops_fault.empty() ? check_planes(job) : ops_fault;
}

std::string validate_job(const UpdateJob& job, uint64_t tile_numel, uint64_t checksum_nbytes) {
  if (job.numel == 0 || job.numel % kTileAlignNumel != 0) {
    return "numel " + std::to_string(job.numel) + " is not a positive multiple of " +
           std::to_string(kTileAlignNumel);
  }
  const std::string fault = validate_planes_and_ops(job);
  return fault.empty() ? check_checksums(job, tile_numel, checksum_nbytes) : fault;
}

bool jobs_overlap(const UpdateJob& a, const UpdateJob& b) {
  const std::vector<Range> others = touched_ranges(b);
  for (const Range& mine : touched_ranges(a)) {
    for (const Range& other : others) {
      if (mine.fd == other.fd && mine.begin < other.end && other.begin < mine.end) {
        return true;
      }
    }
  }
  return false;
}

void cut_segments(const std::vector<PlaneSegment>& plane, uint64_t begin, uint64_t end,
                  char* memory, uint64_t checksum_nbytes, std::vector<IoSegment>& result) {
  uint64_t segment_begin = 0;
  for (const PlaneSegment& segment : plane) {
    const uint64_t from = std::max(begin, segment_begin);
    const uint64_t to = std::min(end, segment_begin + segment.nbytes);
    if (from < to) {
      const bool is_checked = segment.checksums && checksum_nbytes > 0;
      result.push_back(
          {segment.fd, segment.offset + (from - segment_begin), memory + (from - begin), to - from,
           is_checked ? segment.checksums + (from - segment_begin) / checksum_nbytes : nullptr});
    }
    segment_begin += segment.nbytes;
  }
}

bool has_checksums(const std::vector<PlaneSegment>& plane) {
  return std::any_of(plane.begin(), plane.end(),
                     [](const PlaneSegment& segment) { return segment.checksums != nullptr; });
}

uint64_t hot_numel(const UpdateJob& job, uint64_t checksum_nbytes) {
  uint64_t block_numel = 0;  // of the plane with the smallest items
  for (int i = 0; i < kNumPlanes; ++i) {
    if (has_checksums(job.planes[i].read) || has_checksums(job.planes[i].write)) {
      block_numel = std::max(block_numel, checksum_nbytes / plane_itemsize(job.format, i));
    }
  }
  if (block_numel == 0) {
    return job.numel;
  }
  return (kHotNumel + block_numel - 1) / block_numel * block_numel;
}

size_t first_op_after(const UpdateJob& job, uint64_t begin) {
  const auto ends_before = [](const UpdateOp& op, uint64_t element) { return op.end <= element; };
  return std::lower_bound(job.ops.begin(), job.ops.end(), begin, ends_before) - job.ops.begin();
}

void run_kernels(const UpdateJob& job, const KernelSet& kernels, uint64_t begin, uint64_t end,
                 char* const planes[kNumPlanes]) {
  for (size_t i = first_op_after(job, begin); i < job.ops.size() && job.ops[i].begin < end; ++i) {
    const UpdateOp& op = job.ops[i];
    const uint64_t from = std::max(op.begin, begin) - begin;
    const uint64_t numel = std::min(op.end, end) - begin - from;
    float* const exp_avg = at<float>(planes[kExpAvg], from);
    float* const exp_avg_sq = at<float>(planes[kExpAvgSq], from);
    if (job.format == StateFormat::kFp32) {
      kernels.adamw_fp32(op.scalars,
                         AdamwFp32{at<float>(planes[kWeight], from), exp_avg, exp_avg_sq,
                                   at<float>(planes[kGrad], from)},
                         numel);
    } else {
      kernels.adamw_exact(
          op.scalars,
          AdamwExact{at<uint16_t>(planes[kWeight], from), at<uint16_t>(planes[kResidue], from),
                     exp_avg, exp_avg_sq, at<uint16_t>(planes[kGrad], from),
                     at<uint16_t>(planes[kGradLo], from)},
          numel);
    }
  }
}

}  // namespace offload
