// The portable kernels, the choice between instruction sets, and the scalars of AdamW.
#include "kernels.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace offload {
namespace {

constexpr int kWidth = 16;

struct Lanes {
  float lane[kWidth];
};

struct Ints {
  uint32_t lane[kWidth];
};

struct Sums {
  double lane[kWidth];
};

// Applies a function of one lane to all of them.
template <typename Result = Lanes, typename Function>
inline Result each(const Function& function) {
  Result result;
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

// These return b where a or b is NaN, as the instructions of x86 do.
inline Lanes min(const Lanes& a, const Lanes& b) {
  return each([&](int j) { return a.lane[j] < b.lane[j] ? a.lane[j] : b.lane[j]; });
}

inline Lanes max(const Lanes& a, const Lanes& b) {
  return each([&](int j) { return a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j]; });
}

// 1 and -1 with the sign of the value, 0 for zeros and NaN.
inline Lanes sign(const Lanes& a) {
  return each([&](int j) { return a.lane[j] > 0.0f ? 1.0f : a.lane[j] < 0.0f ? -1.0f : 0.0f; });
}

// 0x7FC00000 where the first is NaN, else the second.
inline Lanes nan_else(const Lanes& value, const Lanes& otherwise) {
  return each([&](int j) {
    return std::isnan(value.lane[j]) ? from_bits(0x7FC00000u) : otherwise.lane[j];
  });
}

inline Ints bits_of(const Lanes& a) {
  return each<Ints>([&](int j) { return to_bits(a.lane[j]); });
}

inline Lanes lanes_of(const Ints& a) {
  return each([&](int j) { return from_bits(a.lane[j]); });
}

// To nearest, ties to even; takes values that fit.
inline Ints round_to_ints(const Lanes& a) {
  return each<Ints>([&](int j) { return static_cast<uint32_t>(std::lrint(a.lane[j])); });
}

inline Lanes to_lanes(const Ints& a) {
  return each([&](int j) { return static_cast<float>(static_cast<int32_t>(a.lane[j])); });
}

inline Ints ibroadcast(uint32_t value) {
  return each<Ints>([&](int) { return value; });
}

inline Ints lane_numbers() {
  return each<Ints>([](int j) { return static_cast<uint32_t>(j); });
}

inline Ints iadd(const Ints& a, const Ints& b) {
  return each<Ints>([&](int j) { return a.lane[j] + b.lane[j]; });
}

inline Ints imul(const Ints& a, const Ints& b) {
  return each<Ints>([&](int j) { return a.lane[j] * b.lane[j]; });
}

inline Ints iand(const Ints& a, const Ints& b) {
  return each<Ints>([&](int j) { return a.lane[j] & b.lane[j]; });
}

inline Ints ixor(const Ints& a, const Ints& b) {
  return each<Ints>([&](int j) { return a.lane[j] ^ b.lane[j]; });
}

template <int kBits>
inline Ints shift_left(const Ints& a) {
  return each<Ints>([&](int j) { return a.lane[j] << kBits; });
}

template <int kBits>
inline Ints shift_right(const Ints& a) {
  return each<Ints>([&](int j) { return a.lane[j] >> kBits; });
}

inline uint32_t largest(const Ints& a) {
  uint32_t result = 0;
  for (int j = 0; j < kWidth; ++j) {
    result = a.lane[j] > result ? a.lane[j] : result;
  }
  return result;
}

inline Ints load_u16(const uint16_t* src) {
  return each<Ints>([&](int j) { return uint32_t{src[j]}; });
}

inline Ints load_s16(const uint16_t* src) {
  return each<Ints>([&](int j) {
    return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(src[j])));
  });
}

inline Ints load_u8(const uint8_t* src) {
  return each<Ints>([&](int j) { return uint32_t{src[j]}; });
}

inline Ints load_s8(const uint8_t* src) {
  return each<Ints>([&](int j) {
    return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(src[j])));
  });
}

// These take lanes that fit.
inline void store_u16(uint16_t* dst, const Ints& value) {
  for (int j = 0; j < kWidth; ++j) {
    dst[j] = static_cast<uint16_t>(value.lane[j]);
  }
}

inline void store_u8(uint8_t* dst, const Ints& value) {
  for (int j = 0; j < kWidth; ++j) {
    dst[j] = static_cast<uint8_t>(value.lane[j]);
  }
}

inline Sums zero_sums() { return {}; }

inline void add_squares(Sums& sums, const Lanes& value) {
  for (int j = 0; j < kWidth; ++j) {
    const double wide = value.lane[j];
    sums.lane[j] += wide * wide;
  }
}

inline Sums load_sums(const double* src) {
  Sums sums;
  std::memcpy(sums.lane, src, sizeof(sums.lane));
  return sums;
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

namespace {

// The finalizer of splitmix64 (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// torch computes the scalars in double. Its compiler fuses 1 - lr * weight_decay, which shows when
// the product is close to 1. A negative scale stands for maximize: the sign of a product is exact.
float grad_scale_of(const StepHyper& hyper) {
  const float scale = static_cast<float>(hyper.grad_scale);
  return hyper.maximize ? -scale : scale;
}

float decay_of(const StepHyper& hyper) {
  return static_cast<float>(std::fma(-hyper.lr, hyper.weight_decay, 1.0));
}

AdamwScalars adamw_scalars(const StepHyper& hyper) {
  const double step = static_cast<double>(hyper.step);
  const double correction1 = 1.0 - std::pow(hyper.beta1, step);
  const double correction2 = 1.0 - std::pow(hyper.beta2, step);
  AdamwScalars scalars;
  scalars.grad_scale = grad_scale_of(hyper);
  scalars.decay = decay_of(hyper);
  scalars.lerp_weight = static_cast<float>(1.0 - hyper.beta1);
  scalars.beta2 = static_cast<float>(hyper.beta2);
  scalars.grad_sq_weight = static_cast<float>(1.0 - hyper.beta2);
  scalars.correction_sqrt = static_cast<float>(std::sqrt(correction2));
  scalars.eps = static_cast<float>(hyper.eps);
  scalars.step_size = static_cast<float>(-(hyper.lr / correction1));
  return scalars;
}

SgdScalars sgd_scalars(const StepHyper& hyper) {
  SgdScalars scalars;
  scalars.grad_scale = grad_scale_of(hyper);
  scalars.weight_decay = static_cast<float>(hyper.weight_decay);
  scalars.momentum = static_cast<float>(hyper.beta1);
  scalars.grad_weight = static_cast<float>(1.0 - hyper.beta2);
  scalars.negative_lr = static_cast<float>(-hyper.lr);
  scalars.has_weight_decay = hyper.weight_decay != 0.0;
  scalars.has_momentum = hyper.beta1 != 0.0;
  scalars.is_first = hyper.step == 1;
  scalars.nesterov = hyper.nesterov;
  return scalars;
}

LionScalars lion_scalars(const StepHyper& hyper) {
  LionScalars scalars;
  scalars.grad_scale = grad_scale_of(hyper);
  scalars.decay = static_cast<float>(1.0 - hyper.lr * hyper.weight_decay);
  scalars.beta1 = static_cast<float>(hyper.beta1);
  scalars.grad_weight1 = static_cast<float>(1.0 - hyper.beta1);
  scalars.beta2 = static_cast<float>(hyper.beta2);
  scalars.grad_weight2 = static_cast<float>(1.0 - hyper.beta2);
  scalars.negative_lr = static_cast<float>(-hyper.lr);
  return scalars;
}

FactoredScalars factored_scalars(const StepHyper& hyper) {
  FactoredScalars scalars = {};
  scalars.grad_scale = grad_scale_of(hyper);
  scalars.decay = decay_of(hyper);
  scalars.lerp_weight = static_cast<float>(1.0 - hyper.beta1);
  // Never 0, which fp32 makes of the square of a small eps: where there is no gradient (a row that
  // was not looked up, the padding of a tail) the step would be 0 / 0.
  scalars.eps_sq = static_cast<float>(std::fmax(hyper.eps * hyper.eps, double{FLT_MIN}));
  scalars.negative_lr = static_cast<float>(-hyper.lr);
  scalars.is_direct = hyper.is_direct;
  return scalars;
}

}  // namespace

StepRule make_rule(const StepHyper& hyper) {
  const uint64_t key = mix(mix(hyper.seed) ^ static_cast<uint64_t>(hyper.step));
  return {hyper.kind,
          adamw_scalars(hyper),
          sgd_scalars(hyper),
          lion_scalars(hyper),
          factored_scalars(hyper),
          {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}};
}

}  // namespace offload
