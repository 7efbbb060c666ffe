#include "update_job.h"

#include <algorithm>

namespace offload {
namespace {

constexpr const char* kPlaneNames[kNumPlanes] = {"weight",     "residue",       "exp_avg",
                                                 "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale",
                                                 "grad",       "grad_lo"};

bool is_grad(int plane) { return plane == kGrad || plane == kGradLo; }

uint64_t total_nbytes(const std::vector<PlaneSegment>& segments) {
  uint64_t total = 0;
  for (const PlaneSegment& segment : segments) {
    total += segment.nbytes;
  }
  return total;
}

// What is wrong with a plane that is there.
const char* plane_fault(const UpdatePlane& plane, int index, uint64_t nbytes, bool has_ops) {
  if (nbytes == 0) {
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
  if (plane.has_read && total_nbytes(plane.read) != nbytes) {
    return "has read segments that do not add up to its size";
  }
  if (plane.has_write && total_nbytes(plane.write) != nbytes) {
    return "has write segments that do not add up to its size";
  }
  return nullptr;
}

// Whether an update cannot do without a plane that the format has.
bool is_needed(const UpdateJob& job, int plane) {
  if (plane == kExpAvgSq || plane == kExpAvgSqScale) {
    return std::any_of(job.ops.begin(), job.ops.end(),
                       [](const UpdateOp& op) { return op.rule.kind == RuleKind::kAdamw; });
  }
  if (plane == kExpAvg || plane == kExpAvgScale) {
    return std::any_of(job.ops.begin(), job.ops.end(),
                       [](const UpdateOp& op) { return op.rule.kind != RuleKind::kScaled; });
  }
  return plane != kGradLo && !job.ops.empty();
}

std::string check_planes(const UpdateJob& job) {
  for (int i = 0; i < kNumPlanes; ++i) {
    const UpdatePlane& plane = job.planes[i];
    const char* fault = nullptr;
    if (plane.present) {
      const uint64_t nbytes = plane_nbytes(job.format, i, job.numel);
      fault = plane_fault(plane, i, nbytes, !job.ops.empty());
    } else if (plane_layout(job.format, i).item_nbytes != 0 && is_needed(job, i)) {
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
      const uint64_t tile_nbytes = plane_nbytes(job.format, i, tile_numel);
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
    if (job.format == StateFormat::kInt8 && op.begin % kGroupNumel != 0) {
      return "op [" + std::to_string(op.begin) + ", " + std::to_string(op.end) +
             ") begins inside a group of " + std::to_string(kGroupNumel) + " elements";
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
      ranges.push_back({-1, begin, begin + plane_nbytes(job.format, i, job.numel)});
    }
    for (const std::vector<PlaneSegment>* segments : {&plane.read, &plane.write}) {
      for (const PlaneSegment& segment : *segments) {
        ranges.push_back({segment.fd, segment.offset, segment.offset + segment.nbytes});
      }
    }
  }
  return ranges;
}

}  // namespace

const char* plane_name(int plane) { return kPlaneNames[plane]; }

std::string validate_planes_and_ops(const UpdateJob& job) {
  const std::string ops_fault = check_ops(job);
  return ops_fault.empty() ? check_planes(job) : ops_fault;
}

std::string validate_job(const UpdateJob& job, uint64_t tile_numel, uint64_t checksum_nbytes) {
  const uint64_t multiple = tile_align_numel(job.format);
  if (job.numel == 0 || job.numel % multiple != 0 || tile_numel % multiple != 0) {
    return "numel " + std::to_string(job.numel) + " and the tiles of " +
           std::to_string(tile_numel) + " elements must be positive multiples of " +
           std::to_string(multiple);
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
      const uint64_t group_nbytes = plane_nbytes(job.format, i, kGroupNumel);
      block_numel = std::max(block_numel, checksum_nbytes * kGroupNumel / group_nbytes);
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
    const uint64_t from = std::max(op.begin, begin);
    StepRule rule = op.rule;
    if (has_factors(rule.kind)) {
      rule.factored.rows = op.factors.data();
      rule.factored.cols = op.factors.data() + (op.end - op.begin) / rule.factored.shape.num_cols;
    }
    char* at[kNumPlanes];
    for (int plane = 0; plane < kNumPlanes; ++plane) {
      at[plane] =
          planes[plane] ? planes[plane] + plane_nbytes(job.format, plane, from - begin) : nullptr;
    }
    kernels.update(job.format, rule, at, from, std::min(op.end, end) - from);
  }
}

}  // namespace offload
