// The portable kernels, the choice between instruction sets, and the scalars of AdamW.
#include "kernels.h"

#include <cmath>
#include <cstring>

namespace offload {
namespace {

constexpr int kWidth = 16;

struct Lanes {
  float lane[kWidth];
};

struct Sums {
  double lane[kWidth];
};

// Applies a function of one lane to all of them.
template <typename Function>
inline Lanes each(const Function& function) {
  Lanes result;
  for (int j = 0; j < kWidth; ++j) {
    result.lane[j] = function(j);
  }
  return result;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline Lanes load(const float* src) {
  Lanes value;
  std::memcpy(value.lane, src, sizeof(value.lane));
  return value;
}

inline void store(float* dst, const Lanes& value) {
  std::memcpy(dst, value.lane, sizeof(value.lane));
}

inline Lanes broadcast(float value) {
  return each([&](int) { return value; });
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  return each([&](int j) { return a.lane[j] + b.lane[j]; });
}

inline Lanes sub(const Lanes& a, const Lanes& b) {
  return each([&](int j) { return a.lane[j] - b.lane[j]; });
}

inline Lanes mul(const Lanes& a, const Lanes& b) {
  return each([&](int j) { return a.lane[j] * b.lane[j]; });
}

inline Lanes div(const Lanes& a, const Lanes& b) {
  return each([&](int j) { return a.lane[j] / b.lane[j]; });
}

inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int j) { return std::fma(a.lane[j], b.lane[j], c.lane[j]); });
}

inline Lanes sqrt(const Lanes& a) {
  return each([&](int j) { return std::sqrt(a.lane[j]); });
}

inline Lanes load_bf16(const uint16_t* src) {
  return each([&](int j) { return from_bits(uint32_t{src[j]} << 16); });
}

inline void store_bf16(uint16_t* dst, const Lanes& value) {
  for (int j = 0; j < kWidth; ++j) {
    dst[j] = static_cast<uint16_t>(to_bits(value.lane[j]) >> 16);
  }
}

inline Lanes join(const uint16_t* high, const uint16_t* low) {
  return each([&](int j) {
    const int32_t residue = static_cast<int16_t>(low[j]);
    return from_bits((uint32_t{high[j]} << 16) + static_cast<uint32_t>(residue));
  });
}

inline void split(const Lanes& value, uint16_t* high, uint16_t* low) {
  for (int j = 0; j < kWidth; ++j) {
    const uint32_t bits = to_bits(value.lane[j]);
    high[j] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    low[j] = static_cast<uint16_t>(bits);
  }
}

// To nearest, ties to even, the low half zero; any NaN becomes 0x7FC0.
inline Lanes round_bf16(const Lanes& value) {
  return each([&](int j) {
    const uint32_t bits = to_bits(value.lane[j]);
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    return from_bits(is_nan ? 0x7FC00000u : rounded);
  });
}

inline Sums zero_sums() { return {}; }

inline void add_squares(Sums& sums, const Lanes& value) {
  for (int j = 0; j < kWidth; ++j) {
    const double wide = value.lane[j];
    sums.lane[j] += wide * wide;
  }
}

inline void store_sums(double* dst, const Sums& sums) {
  std::memcpy(dst, sums.lane, sizeof(sums.lane));
}

#include "kernels_body.h"

constexpr KernelSet kKernels = make_kernel_set("portable");

}  // namespace

const KernelSet* portable_kernels() { return &kKernels; }

const KernelSet* find_kernels(const char* isa) {
  const KernelSet* sets[] = {avx512_kernels(), avx2_kernels(), portable_kernels()};
  for (const KernelSet* set : sets) {
    if (set && (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, set->isa) == 0)) {
      return set;
    }
  }
  return nullptr;
}

// torch computes these in double. Its compiler fuses 1 - lr * weight_decay, which shows when the
// product is close to 1. A negative scale stands for maximize: the sign of a product is exact.
AdamwScalars make_adamw_scalars(const AdamwHyper& hyper) {
  const double step = static_cast<double>(hyper.step);
  const double correction1 = 1.0 - std::pow(hyper.beta1, step);
  const double correction2 = 1.0 - std::pow(hyper.beta2, step);
  const float scale = static_cast<float>(hyper.grad_scale);
  AdamwScalars scalars;
  scalars.grad_scale = hyper.maximize ? -scale : scale;
  scalars.decay = static_cast<float>(std::fma(-hyper.lr, hyper.weight_decay, 1.0));
  scalars.lerp_weight = static_cast<float>(1.0 - hyper.beta1);
  scalars.beta2 = static_cast<float>(hyper.beta2);
  scalars.grad_sq_weight = static_cast<float>(1.0 - hyper.beta2);
  scalars.correction_sqrt = static_cast<float>(std::sqrt(correction2));
  scalars.eps = static_cast<float>(hyper.eps);
  scalars.step_size = static_cast<float>(-(hyper.lr / correction1));
  return scalars;
}

}  // namespace offload
