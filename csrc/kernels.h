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
// 0xFFC00000) show as NaN. int8 does the same with 24 bits: the master is rounded to bits whose low
// byte is zero (ties away from zero), and its residue is the signed byte above that one.
//
// [Note: stochastic rounding] bf16 adds 16 random bits below the bf16 and cuts: a moment that grows
// by less than half a step of bf16 still grows in the mean. The bits come from a hash of (seed,
// step, the low 32 bits of the element's number in its chunk), see Random in
// kernels_formats.h: they depend on no tile, thread or instruction set. exp_avg takes the low half
// of the hash, exp_avg_sq the high one. A value that fits bf16 is never changed.
//
// [Note: int8 groups] 32 elements share a bf16 scale s, their largest magnitude rounded up. exp_avg
// is the byte round(254 m / (s + |m|)), which is finer near zero (the companding of FlashOptim,
// arXiv 2602.23349); exp_avg_sq is the unsigned byte round(255 sqrt(v) / s), and at least 1 where v
// is not zero: as 0 it would make the next step many times too large. Zero bytes mean zero.
//
// [Note: factored] Adafactor (arXiv 1804.04235) keeps of the second moment of a matrix two vectors,
// the moving means of its rows and of its columns, and takes row_i * col_j / mean(row) for element
// (i, j). The caller keeps the vectors, and gives an op the factors of its step: row_i / mean(row)
// and col_j, for every matrix of the parameter. A vector is a matrix of one column with the factor
// 1. exp_avg averages the quotient of gradient and root, as in the paper's section 9.
// SCALE (arXiv 2506.16659) divides by the 2-norms of rows or columns in the same way, without any
// moment: their squares are the factors, and those of the other dimension 1. For vectors, which it
// trains with Adam, the caller gives the step itself as factors (is_direct).
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// What a chunk's planes are; offload/formats.py has the same in words.
enum class StateFormat { kFp32 = 0, kExact, kBf16, kInt8 };
constexpr int kNumFormats = 4;

enum PlaneIndex {
  kWeight = 0,
  kResidue,
  kExpAvg,
  kExpAvgSq,
  kExpAvgScale,
  kExpAvgSqScale,
  kGrad,
  kGradLo,
  kNumPlanes
};

// Elements that share one scale in int8. Parameters begin at multiples of 64 elements, so no group
// has elements of two.
constexpr uint64_t kGroupNumel = 32;

// Bytes of one item of a plane, 0 where the format has none, and the elements that share the item.
struct PlaneLayout {
  unsigned item_nbytes;
  unsigned group_numel;
};

constexpr PlaneLayout plane_layout(StateFormat format, int plane) {
  constexpr unsigned kItemNbytes[kNumFormats][kNumPlanes] = {
      {4, 0, 4, 4, 0, 0, 4, 0},
      {2, 2, 4, 4, 0, 0, 2, 2},
      {2, 2, 2, 2, 0, 0, 2, 2},
      {2, 1, 1, 1, 2, 2, 2, 2},
  };
  const bool is_scale = plane == kExpAvgScale || plane == kExpAvgSqScale;
  return {kItemNbytes[static_cast<int>(format)][plane],
          is_scale ? static_cast<unsigned>(kGroupNumel) : 1u};
}

// Bytes of the first numel elements of a plane.
constexpr uint64_t plane_nbytes(StateFormat format, int plane, uint64_t numel) {
  const PlaneLayout layout = plane_layout(format, plane);
  return (numel + layout.group_numel - 1) / layout.group_numel * layout.item_nbytes;
}

// Bytes of an item of a plane of floats that may be packed on a drive (see pack.h), else 0:
// residues and moments in 8 bits are noise.
constexpr unsigned packed_item_nbytes(StateFormat format, int plane) {
  const unsigned item_nbytes = plane_layout(format, plane).item_nbytes;
  const bool is_float = plane == kWeight || plane == kExpAvg || plane == kExpAvgSq;
  return is_float && item_nbytes >= 2 ? item_nbytes : 0;
}

// Chunks and tiles are multiples of this many elements, so every tile of every plane begins on a 4
// KiB boundary, as direct I/O wants it. A scale takes 2 bytes for 32 elements.
constexpr uint64_t kTileAlignNumel = 4096;
constexpr uint64_t tile_align_numel(StateFormat format) {
  return format == StateFormat::kInt8 ? 16 * kTileAlignNumel : kTileAlignNumel;
}

enum class RuleKind { kAdamw = 0, kSgd, kLion, kFactored, kScaled };
constexpr int kNumRules = 5;

constexpr bool has_factors(RuleKind kind) {
  return kind == RuleKind::kFactored || kind == RuleKind::kScaled;
}

// How a parameter is cut into matrices: as many as fit into it, row by row.
struct MatrixShape {
  uint64_t num_rows;
  uint64_t num_cols;
};

// Hyperparameters of one step, as the optimizers of torch have them. SGD takes momentum as beta1
// and dampening as beta2.
struct StepHyper {
  RuleKind kind;
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;  // multiplies the gradient, in fp32
  uint64_t seed;      // of stochastic rounding
  int64_t step;       // 1 for the first
  bool maximize;
  bool nesterov;
  bool is_direct = false;
};

// The same, rounded to fp32 exactly where torch does. grad_scale is negative to maximize.
struct AdamwScalars {
  float grad_scale;
  float decay;        // 1 - lr * weight_decay
  float lerp_weight;  // 1 - beta1
  float beta2;
  float grad_sq_weight;  // 1 - beta2
  float correction_sqrt;
  float eps;
  float step_size;  // -lr / (1 - beta1^step)
};
struct SgdScalars {
  float grad_scale;
  float weight_decay;
  float momentum;
  float grad_weight;  // 1 - dampening
  float negative_lr;
  bool has_weight_decay;  // in double, as torch asks: the float may be 0
  bool has_momentum;
  bool is_first;  // then momentum begins as the gradient
  bool nesterov;
};
struct LionScalars {
  float grad_scale;
  float decay;
  float beta1;
  float grad_weight1;  // 1 - beta1
  float beta2;
  float grad_weight2;  // 1 - beta2
  float negative_lr;
};

struct FactoredScalars {
  float grad_scale;
  float decay;
  float lerp_weight;  // 1 - beta1
  float eps_sq;
  float negative_lr;
  bool is_direct;
  MatrixShape shape;
  const float* rows;  // numel / num_cols of them, lent; null until the step runs
  const float* cols;  // numel / num_rows of them
  uint64_t begin;     // the parameter's elements in its chunk
  uint64_t numel;
};

// One step, ready to run: the scalars of its kind, and the key of [Note: stochastic rounding].
struct StepRule {
  RuleKind kind;
  AdamwScalars adamw;
  SgdScalars sgd;
  LionScalars lion;
  FactoredScalars factored;
  uint32_t key[2];
};

StepRule make_rule(const StepHyper& hyper);

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
  // The same for the 24-bit master of int8.
  void (*split_fp24)(const float* src, uint16_t* weight, uint8_t* residue, size_t numel);
  void (*join_fp24)(const uint16_t* weight, const uint8_t* residue, float* dst, size_t numel);
  // One step on numel elements. planes[i] points at the first of them, null where the format or the
  // rule has none, or where grad_lo is zero; index is its number in the chunk, in int8 a multiple
  // of kGroupNumel. AdamW and SGD follow torch.optim's fused=True on the CPU bit for bit in fp32,
  // and the other formats do the same arithmetic on what their planes decode to.
  void (*update)(StateFormat format, const StepRule& rule, char* const planes[kNumPlanes],
                 uint64_t index, size_t numel);
  // Set or accumulate src into the plane; return the sum of squares of what the plane then holds.
  // In bf16, kAccumulateFp32 needs plane.low; the other modes set it to zero if it is there.
  double (*grad_land)(const GradPlane& plane, const void* src, GradKind kind, LandMode mode,
                      size_t numel);
  // Of the joined values where low is not null.
  double (*sum_squares)(const void* high, const uint16_t* low, GradKind kind, size_t numel);
  // The same by rows and by columns of every matrix: numel / num_cols and numel / num_rows sums in
  // double. Lane j of 16 adds the elements i with i % 16 == j of a row in order, the lanes are
  // added as a tree; a column adds in order.
  void (*factor_sums)(const void* high, const uint16_t* low, GradKind kind,
                      const MatrixShape& shape, size_t numel, double* row_sums, double* col_sums);
};

// "auto" (the widest this CPU has), "avx512", "avx2" or "portable"; null if unknown or not on this
// CPU.
const KernelSet* find_kernels(const char* isa);

// Null where the build target or this CPU lacks them.
const KernelSet* portable_kernels();
const KernelSet* avx2_kernels();
const KernelSet* avx512_kernels();

}  // namespace offload
