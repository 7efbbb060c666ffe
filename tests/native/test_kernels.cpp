// The kernels and the arithmetic of jobs, on memory that ends where it should: every instruction
// set, odd lengths, odd addresses and extreme values.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "../../csrc/crc32c.h"
#include "../../csrc/kernels.h"
#include "../../csrc/update_job.h"
#include "harness.h"
#include "planes.h"

namespace offload::tests {

namespace {

std::vector<const KernelSet*> kernel_sets() {
  std::vector<const KernelSet*> found;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (const KernelSet* set = find_kernels(isa)) {
      found.push_back(set);
    }
  }
  return found;
}

// Exactly `numel` elements behind `skew` others that are not there: the address is as odd as an
// element allows, and the byte behind the last one belongs to somebody else.
template <typename T>
class Array {
 public:
  Array(uint64_t numel, uint64_t skew, uint64_t seed)
      : memory_(std::max<uint64_t>((numel + skew) * sizeof(T), 1), seed), skew_(skew) {}
  T* data() { return memory_.as<T>(skew_); }
  bool operator==(const Array& other) const { return memory_ == other.memory_; }

 private:
  Memory memory_;
  uint64_t skew_;
};

// Everything but NaN, whose payloads are left open.
void make_real(float* values, uint64_t numel) {
  const float extremes[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 3.4e38f, -3.4e38f, 1e-38f, 1.0f};
  for (uint64_t i = 0; i < numel; ++i) {
    if (std::isnan(values[i]) || i % 7 == 0) {
      values[i] = extremes[i % 8];
    }
  }
}

// High halves below 2 that are a number with any low half: 0x8000 with a negative residue is a NaN.
void make_real(uint16_t* values, uint64_t numel) {
  for (uint64_t i = 0; i < numel; ++i) {
    values[i] = static_cast<uint16_t>((values[i] & 0xBFFF) | 0x0100);
  }
}

constexpr uint64_t kNumels[] = {0, 1, 7, 15, 16, 17, 31, 33, 100, 4096, 66001};

template <typename Function>
void for_each_shape(const Function& function) {
  for (const KernelSet* set : kernel_sets()) {
    for (const uint64_t numel : kNumels) {
      for (const uint64_t skew : {0, 1}) {
        function(*set, numel, skew);
      }
    }
  }
}

// Every plane of a chunk with exactly the elements asked for, at addresses as odd as items allow.
struct Planes {
  Planes(StateFormat format, uint64_t numel, uint64_t skew) {
    Dice dice(numel);
    for (int i = 0; i < kNumPlanes; ++i) {
      const Memory content = make_plane(dice, format, i, numel);
      const uint64_t item_nbytes = plane_layout(format, i).item_nbytes;
      planes.push_back(
          std::make_unique<Array<uint8_t>>(content.nbytes(), skew * item_nbytes, uint64_t{1}));
      if (content.nbytes() > 0) {
        std::memcpy(planes[i]->data(), content.data(), content.nbytes());
      }
      is_there[i] = item_nbytes > 0;
    }
  }

  void update(const KernelSet& set, StateFormat format, const StepRule& rule, uint64_t numel,
              bool has_low) {
    set.update(format, rule, addresses(has_low).data(), 64, numel);
  }

  // Where element `begin` of every plane is.
  std::vector<char*> addresses(bool has_low, StateFormat format = StateFormat::kFp32,
                               uint64_t begin = 0) {
    std::vector<char*> found(kNumPlanes);
    for (int i = 0; i < kNumPlanes; ++i) {
      if (is_there[i] && (i != kGradLo || has_low)) {
        found[i] = reinterpret_cast<char*>(planes[i]->data()) + plane_nbytes(format, i, begin);
      }
    }
    return found;
  }

  bool operator==(const Planes& other) const {
    return std::equal(planes.begin(), planes.end(), other.planes.begin(),
                      [](const auto& a, const auto& b) { return *a == *b; });
  }

  std::vector<std::unique_ptr<Array<uint8_t>>> planes;
  bool is_there[kNumPlanes];
};

TEST(kernels_update) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    if (numel > kTileAlignNumel) {
      return;  // long ones are for the sums, which have tiles
    }
    for (const StateFormat format : kFormats) {
      for (const RuleKind kind : kRules) {
        const bool has_low = numel % 2 == 0;
        Dice dice(numel);
        const StepRule rule = make_step(dice, kind, 1 + static_cast<int64_t>(numel % 5));
        Planes got(format, numel, skew), want(format, numel, skew);
        got.update(set, format, rule, numel, has_low);
        want.update(*portable_kernels(), format, rule, numel, has_low);
        CHECK(got == want);
      }
    }
  });
}

// Factors end with the last row and column; ops run piece by piece, as tiles cut them.
TEST(kernels_factored) {
  constexpr MatrixShape kShapes[] = {{1, 1}, {5, 1}, {1, 33}, {3, 16}, {7, 48}, {40, 5}, {2, 100}};
  for (const KernelSet* set : kernel_sets()) {
    for (const MatrixShape& shape : kShapes) {
      for (const uint64_t num_matrices : {uint64_t{1}, uint64_t{3}}) {
        for (const StateFormat format : kFormats) {
          const uint64_t numel = num_matrices * shape.num_rows * shape.num_cols;
          Dice dice(numel);
          const RuleKind kind = numel % 2 == 0 ? RuleKind::kFactored : RuleKind::kScaled;
          UpdateJob job;
          job.format = format;
          job.numel = numel;
          job.ops.push_back({0, numel, make_step(dice, kind, 3), {}});
          job.ops[0].rule.factored.shape = shape;
          job.ops[0].rule.factored.numel = numel;
          for (uint64_t i = 0; i < numel / shape.num_cols + numel / shape.num_rows; ++i) {
            job.ops[0].factors.push_back(static_cast<float>(1 + roll(dice, 1000)) * 1e-6f);
          }
          Planes got(format, numel, 1), want(format, numel, 1);
          run_kernels(job, *portable_kernels(), 0, numel, want.addresses(false).data());
          for (uint64_t begin = 0; begin < numel; begin += 64) {
            const std::vector<char*> at = got.addresses(false, format, begin);
            run_kernels(job, *set, begin, std::min(begin + 64, numel), at.data());
          }
          CHECK(got == want);
        }
      }
    }
  }
}

TEST(kernels_factor_sums) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    for (const uint64_t num_cols : {uint64_t{1}, uint64_t{7}, uint64_t{16}, uint64_t{33}}) {
      const MatrixShape shape = {numel / num_cols, num_cols};
      const uint64_t whole = shape.num_rows * num_cols;
      if (whole == 0) {
        continue;
      }
      Array<float> values(whole, skew, numel);
      make_real(values.data(), whole);
      Array<double> rows(shape.num_rows, 0, 1), cols(num_cols, 0, 1);
      Array<double> want_rows(shape.num_rows, 0, 1), want_cols(num_cols, 0, 1);
      set.factor_sums(values.data(), nullptr, GradKind::kFp32, shape, whole, rows.data(),
                      cols.data());
      portable_kernels()->factor_sums(values.data(), nullptr, GradKind::kFp32, shape, whole,
                                      want_rows.data(), want_cols.data());
      CHECK(rows == want_rows && cols == want_cols);
    }
  });
}

// All bit patterns, NaNs included: splitting loses nothing, or of 24 bits only the rest.
TEST(kernels_split_and_join) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    Array<float> source(numel, skew, 8), back(numel, skew, 8);
    Array<uint16_t> weight(numel, skew, 9), residue(numel, skew, 10);
    set.split_fp32(source.data(), weight.data(), residue.data(), numel);
    std::memset(back.data(), 0, numel * sizeof(float));
    set.join_fp32(weight.data(), residue.data(), back.data(), numel);
    CHECK(back == source);
    set.join_fp32(weight.data(), nullptr, back.data(), numel);
    Array<uint8_t> low(numel, skew, 11);
    Array<float> rounded(numel, skew, 8);
    set.split_fp24(source.data(), weight.data(), low.data(), numel);
    set.join_fp24(weight.data(), low.data(), rounded.data(), numel);
    set.split_fp24(rounded.data(), weight.data(), low.data(), numel);
    set.join_fp24(weight.data(), low.data(), back.data(), numel);
    set.join_fp24(weight.data(), nullptr, back.data(), numel);
  });
}

TEST(kernels_land) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    for (const LandMode mode :
         {LandMode::kSet, LandMode::kAccumulateFp32, LandMode::kAccumulateInDtype}) {
      Array<uint16_t> source(numel, skew, 1), got(numel, skew, 2), want(numel, skew, 2);
      Array<uint16_t> got_low(numel, skew, 3), want_low(numel, skew, 3);
      make_real(source.data(), numel);
      make_real(got.data(), numel);
      make_real(want.data(), numel);
      const double sum =
          set.grad_land({got.data(), got_low.data()}, source.data(), GradKind::kBf16, mode, numel);
      const double other = portable_kernels()->grad_land(
          {want.data(), want_low.data()}, source.data(), GradKind::kBf16, mode, numel);
      CHECK(std::memcmp(&sum, &other, sizeof sum) == 0 && got == want && got_low == want_low);
      CHECK(set.sum_squares(got.data(), got_low.data(), GradKind::kBf16, numel) == sum);
      Array<float> wide(numel, skew, 4), plane(numel, skew, 5);
      make_real(wide.data(), numel);
      make_real(plane.data(), numel);
      const double landed =
          set.grad_land({plane.data(), nullptr}, wide.data(), GradKind::kFp32, mode, numel);
      const double summed = set.sum_squares(plane.data(), nullptr, GradKind::kFp32, numel);
      CHECK(std::memcmp(&landed, &summed, sizeof landed) == 0);
    }
  });
}

TEST(kernels_rules_at_the_edges) {
  const double most = std::numeric_limits<double>::max();
  for (const RuleKind kind : kRules) {
    for (const double value : {0.0, -0.0, 1.0, 1e-320, 1e300, most}) {
      for (const int64_t step : {int64_t{1}, int64_t{1} << 62}) {
        const StepRule rule = make_rule(
            {kind, value, 0.0, 0.999, value, value, value, UINT64_MAX, step, true, false});
        CHECK(rule.kind == kind);
      }
    }
  }
}

TEST(crc32c_isas_agree) {
  for (const uint64_t numel : kNumels) {
    for (const uint64_t skew : {0, 1, 3}) {
      Array<uint8_t> bytes(numel, skew, numel);
      for (size_t i = 0; const Crc32cIsa* isa = crc32c_isa(i); ++i) {
        CHECK(isa->function(bytes.data(), numel) == crc32c(bytes.data(), numel));
      }
    }
  }
}

TEST(crc32c_finds_the_first_wrong_block) {
  constexpr uint64_t kBlockNbytes = 4096;
  for (const uint64_t nbytes : {uint64_t{1}, uint64_t{4096}, uint64_t{40001}}) {
    Memory memory(nbytes, 1);
    std::vector<uint32_t> checksums(num_checksums(nbytes, kBlockNbytes));
    crc32c_blocks(memory.data(), nbytes, kBlockNbytes, checksums.data());
    CHECK(first_wrong_block(memory.data(), nbytes, kBlockNbytes, checksums.data()) == nbytes);
    for (const uint64_t at : {nbytes - 1, nbytes / 2}) {
      memory.data()[at] ^= 0x10;
      CHECK(first_wrong_block(memory.data(), nbytes, kBlockNbytes, checksums.data()) ==
            at / kBlockNbytes * kBlockNbytes);
      memory.data()[at] ^= 0x10;
    }
  }
}

// What cut_segments gives covers the range in order, without a gap.
TEST(job_cut_segments) {
  Dice dice(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<PlaneSegment> plane;
    uint64_t nbytes = 0;
    for (uint64_t i = 0; i < 1 + roll(dice, 6); ++i) {
      const uint64_t offset = roll(dice, uint64_t{1} << 62);
      plane.push_back({static_cast<int>(i), offset, 1 + roll(dice, 5000), nullptr});
      nbytes += plane.back().nbytes;
    }
    const uint64_t begin = roll(dice, nbytes);
    const uint64_t end = begin + roll(dice, nbytes - begin + 1);
    Memory memory(end - begin + 1);
    std::vector<IoSegment> cut;
    cut_segments(plane, begin, end, memory.data(), 0, cut);
    char* next = memory.data();
    for (const IoSegment& segment : cut) {
      CHECK(segment.address == next && segment.nbytes > 0);
      const PlaneSegment& home = plane[static_cast<size_t>(segment.fd)];
      CHECK(segment.offset >= home.offset);
      CHECK(segment.offset + segment.nbytes <= home.offset + home.nbytes);
      next += segment.nbytes;
    }
    CHECK(next == memory.data() + (end - begin));
  }
}

TEST(job_overlap) {
  const auto job_at = [](int fd, uint64_t offset, char* address) {
    UpdateJob job;
    job.numel = kTileAlignNumel;
    job.planes[kWeight].present = true;
    job.planes[kWeight].address = address;
    job.planes[kWeight].has_read = true;
    job.planes[kWeight].read = {{fd, offset, job.numel * 4, nullptr}};
    return job;
  };
  const uint64_t nbytes = kTileAlignNumel * 4;
  Memory memory(2 * nbytes);
  char* const here = memory.data();
  const uint64_t far = INT64_MAX - nbytes;
  CHECK(jobs_overlap(job_at(1, 0, nullptr), job_at(1, nbytes - 1, nullptr)));
  CHECK(!jobs_overlap(job_at(1, 0, nullptr), job_at(1, nbytes, nullptr)));
  CHECK(!jobs_overlap(job_at(1, 0, nullptr), job_at(2, 0, nullptr)));
  CHECK(jobs_overlap(job_at(1, far, nullptr), job_at(1, far, nullptr)));
  CHECK(jobs_overlap(job_at(1, 0, here), job_at(2, 0, here + nbytes - 1)));
  CHECK(!jobs_overlap(job_at(1, 0, here), job_at(2, 0, here + nbytes)));
}

}  // namespace

}  // namespace offload::tests
