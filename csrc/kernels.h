// Elementwise kernels on fp32 and bf16 planes, in three instruction sets with one and the same
// result.
//
// [Note: bit identity] kernels_body.h is compiled once per instruction set over blocks of 16
// lanes. Every operation it uses (add, multiply, fma, divide, square root, integer shifts) is
// exactly rounded, and no order depends on the vector length, so all versions give the same bits. A
// tail shorter than 16 runs through the same code in a padded block. The build must say
// -ffp-contract=off, because a compiler that fuses a multiply and an add changes the bits. Only the
// payload of a NaN that is born from two different NaNs is left open: x86 keeps the first
// operand's, and compilers swap operands.
//
// [Note: residue] An fp32 master with bits b is kept as weight = (b + 0x8000) >> 16 modulo 2^16 and
// residue = b & 0xFFFF; the way back is b = (weight << 16) + sign_extend(residue) modulo 2^32. This
// is a bijection on all 2^32 patterns. What the weight shows as bf16: the master rounded to
// nearest, ties away from zero, and Inf where that rounds beyond bf16. Three groups of NaN lose
// their looks, though never their bits: payloads 1..0x7FFF show as Inf, 0x7FFF8000..0x7FFFFFFF show
// as -0.0 and 0xFFFF8000..0xFFFFFFFF show as +0.0. NaNs that arithmetic makes (0x7FC00000,
// 0xFFC00000) show as NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// Hyperparameters of one step, as torch.optim.AdamW has them.
struct AdamwHyper {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;  // multiplies the gradient, in fp32
  int64_t step;       // 1 for the first
  bool maximize;
};

// The same, rounded to fp32 exactly where torch does.
struct AdamwScalars {
  float grad_scale;   // negative to maximize
  float decay;        // 1 - lr * weight_decay
  float lerp_weight;  // 1 - beta1
  float beta2;
  float grad_sq_weight;  // 1 - beta2
  float correction_sqrt;
  float eps;
  float step_size;  // -lr / (1 - beta1^step)
};

AdamwScalars make_adamw_scalars(const AdamwHyper& hyper);

// exp_avg and the others point at the same element of their planes. residue and grad_lo belong to
// the exact format; grad_lo may be null (zero).
struct AdamwFp32 {
  float* weight;
  float* exp_avg;
  float* exp_avg_sq;
  const float* grad;
};
struct AdamwExact {
  uint16_t* weight;
  uint16_t* residue;
  float* exp_avg;
  float* exp_avg_sq;
  const uint16_t* grad;
  const uint16_t* grad_lo;
};

enum class GradKind { kBf16 = 0, kFp32 = 1 };
enum class LandMode { kSet = 0, kAccumulateFp32 = 1, kAccumulateInDtype = 2 };

// A gradient plane: bf16 with its low halves (or null), or fp32 without.
struct GradPlane {
  void* high;
  uint16_t* low;
};

// Sums of squares: products and sums in double. Lane j of 16 adds the elements i with i % 16 == j
// of a tile of 65536 elements in order; the lanes are added as a tree (8, 4, 2, 1) and the tiles in
// order.
constexpr size_t kSumTileNumel = 65536;

struct KernelSet {
  const char* isa;
  void (*split_fp32)(const float* src, uint16_t* weight, uint16_t* residue, size_t numel);
  // residue may be null (zero).
  void (*join_fp32)(const uint16_t* weight, const uint16_t* residue, float* dst, size_t numel);
  // Follow torch.optim.AdamW(fused=True) on the CPU bit for bit (see adamw_lanes in
  // kernels_body.h).
  void (*adamw_fp32)(const AdamwScalars& scalars, const AdamwFp32& planes, size_t numel);
  void (*adamw_exact)(const AdamwScalars& scalars, const AdamwExact& planes, size_t numel);
  // Set or accumulate src into the plane; return the sum of squares of what the plane then holds.
  // In bf16, kAccumulateFp32 needs plane.low; the other modes set it to zero if it is there.
  double (*grad_land)(const GradPlane& plane, const void* src, GradKind kind, LandMode mode,
                      size_t numel);
  // Of the joined values where low is not null.
  double (*sum_squares)(const void* high, const uint16_t* low, GradKind kind, size_t numel);
};

// "auto" (the widest this CPU has), "avx512", "avx2" or "portable"; null if unknown or not on this
// CPU.
const KernelSet* find_kernels(const char* isa);

// Null where the build target or this CPU lacks them.
const KernelSet* portable_kernels();
const KernelSet* avx2_kernels();
const KernelSet* avx512_kernels();

}  // namespace offload
