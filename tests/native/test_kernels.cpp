// The kernels and the arithmetic of jobs, on memory that ends where it should: every instruction
// set, odd lengths, odd addresses and extreme values.
#include <cmath>
#include <cstring>
#include <limits>

#include "../../csrc/kernels.h"
#include "../../csrc/update_job.h"
#include "harness.h"

namespace offload::tests {

namespace {

std::vector<const KernelSet*> kernel_sets() {
  std::vector<const KernelSet*> found;
  for (const char* isa : {"portable", "avx2", "avx512", "auto"}) {
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

AdamwScalars scalars_of(uint64_t numel) {
  return make_adamw_scalars({1e-2, 0.9, 0.999, numel % 2 == 0 ? 1e-8 : 0.0, 0.1, 0.25,
                             1 + static_cast<int64_t>(numel), numel % 3 == 0});
}

struct Fp32Planes {
  Fp32Planes(uint64_t numel, uint64_t skew)
      : weight(numel, skew, 1), avg(numel, skew, 2), avg_sq(numel, skew, 3), grad(numel, skew, 4) {
    for (Array<float>* plane : {&weight, &avg, &avg_sq, &grad}) {
      make_real(plane->data(), numel);
    }
    for (uint64_t i = 0; i < numel; ++i) {
      avg_sq.data()[i] = std::fabs(avg_sq.data()[i]);
      // Products that overflow to Inf would end as Inf - Inf.
      for (Array<float>* plane : {&weight, &avg, &grad}) {
        plane->data()[i] = std::fmod(plane->data()[i], 1e15f);
      }
    }
  }
  Array<float> weight, avg, avg_sq, grad;
};

TEST(kernels_adamw_fp32) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    Fp32Planes got(numel, skew), want(numel, skew);
    for (auto [planes, kernels] : {std::pair{&got, &set}, {&want, portable_kernels()}}) {
      kernels->adamw_fp32(
          scalars_of(numel),
          {planes->weight.data(), planes->avg.data(), planes->avg_sq.data(), planes->grad.data()},
          numel);
    }
    CHECK(got.weight == want.weight && got.avg == want.avg && got.avg_sq == want.avg_sq);
  });
}

struct ExactPlanes {
  ExactPlanes(uint64_t numel, uint64_t skew)
      : weight(numel, skew, 1),
        residue(numel, skew, 2),
        grad(numel, skew, 3),
        grad_lo(numel, skew, 4),
        moments(numel, skew) {
    for (Array<uint16_t>* plane : {&weight, &grad}) {
      make_real(plane->data(), numel);
    }
  }
  Array<uint16_t> weight, residue, grad, grad_lo;
  Fp32Planes moments;
};

TEST(kernels_adamw_exact) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    for (const bool has_low : {false, true}) {
      ExactPlanes got(numel, skew), want(numel, skew);
      for (auto [planes, kernels] : {std::pair{&got, &set}, {&want, portable_kernels()}}) {
        kernels->adamw_exact(scalars_of(numel),
                             {planes->weight.data(), planes->residue.data(),
                              planes->moments.avg.data(), planes->moments.avg_sq.data(),
                              planes->grad.data(), has_low ? planes->grad_lo.data() : nullptr},
                             numel);
      }
      CHECK(got.weight == want.weight && got.residue == want.residue);
      CHECK(got.moments.avg == want.moments.avg && got.moments.avg_sq == want.moments.avg_sq);
    }
  });
}

// All bit patterns, NaNs included: splitting loses nothing.
TEST(kernels_split_and_join) {
  for_each_shape([](const KernelSet& set, uint64_t numel, uint64_t skew) {
    Array<float> source(numel, skew, 8), back(numel, skew, 8);
    Array<uint16_t> weight(numel, skew, 9), residue(numel, skew, 10);
    set.split_fp32(source.data(), weight.data(), residue.data(), numel);
    std::memset(back.data(), 0, numel * sizeof(float));
    set.join_fp32(weight.data(), residue.data(), back.data(), numel);
    CHECK(back == source);
    set.join_fp32(weight.data(), nullptr, back.data(), numel);
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

TEST(kernels_scalars_at_the_edges) {
  const double most = std::numeric_limits<double>::max();
  for (const double value : {0.0, -0.0, 1.0, 1e-320, 1e300, most}) {
    for (const int64_t step : {int64_t{1}, int64_t{1} << 62}) {
      const AdamwScalars scalars =
          make_adamw_scalars({value, 0.0, 0.999, value, value, value, step, true});
      CHECK(scalars.beta2 == 0.999f);
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
      plane.push_back({static_cast<int>(i), roll(dice, uint64_t{1} << 62), 1 + roll(dice, 5000)});
      nbytes += plane.back().nbytes;
    }
    const uint64_t begin = roll(dice, nbytes);
    const uint64_t end = begin + roll(dice, nbytes - begin + 1);
    Memory memory(end - begin + 1);
    std::vector<IoSegment> cut;
    cut_segments(plane, begin, end, memory.data(), cut);
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
    job.planes[kWeight].read = {{fd, offset, job.numel * 4}};
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
