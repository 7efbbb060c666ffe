// The kernels themselves, included once per instruction set inside an anonymous namespace that
// defines Lanes (16 floats), Ints (16 uint32_t) and Sums (16 doubles) with:
//   load, store, broadcast, add, sub, mul, div, fma, sqrt, min, max, sign, nan_else;
//   bits_of, lanes_of, round_to_ints, to_lanes, ibroadcast, lane_numbers, iadd, imul, iand, ixor,
//   shift_left, shift_right, largest; load_u16, load_s16, load_u8, load_s8, store_u16, store_u8;
//   zero_sums, add_squares, load_sums, store_sums.

constexpr size_t kLanes = 16;

inline Lanes load_bf16(const uint16_t* src) { return lanes_of(shift_left<16>(load_u16(src))); }

inline void store_bf16(uint16_t* dst, Lanes value) {
  store_u16(dst, shift_right<16>(bits_of(value)));
}

inline Lanes join(const uint16_t* high, const uint16_t* low) {
  return lanes_of(iadd(shift_left<16>(load_u16(high)), load_s16(low)));
}

inline void split(Lanes value, uint16_t* high, uint16_t* low) {
  const Ints bits = bits_of(value);
  store_u16(high, shift_right<16>(iadd(bits, ibroadcast(0x8000u))));
  store_u16(low, iand(bits, ibroadcast(0xFFFFu)));
}

inline Lanes join(const uint16_t* high, const uint8_t* low) {
  return lanes_of(iadd(shift_left<16>(load_u16(high)), shift_left<8>(load_s8(low))));
}

inline void split(Lanes value, uint16_t* high, uint8_t* low) {
  const Ints bits = shift_right<8>(iadd(bits_of(value), ibroadcast(0x80u)));
  store_u16(high, iand(shift_right<8>(iadd(bits, ibroadcast(0x80u))), ibroadcast(0xFFFFu)));
  store_u8(low, iand(bits, ibroadcast(0xFFu)));
}

// To nearest, ties to even, the low half zero; any NaN becomes 0x7FC0.
inline Lanes round_bf16(Lanes value) {
  const Ints bits = bits_of(value);
  const Ints odd = iand(shift_right<16>(bits), ibroadcast(1u));
  const Ints rounded = iadd(bits, iadd(odd, ibroadcast(0x7FFFu)));
  return nan_else(value, lanes_of(iand(rounded, ibroadcast(0xFFFF0000u))));
}

// Up to 16 elements in memory of their own, so that a tail runs through the code of a full block.
template <typename T>
struct Padded {
  Padded() = default;
  Padded(const T* src, size_t numel) { std::memcpy(values, src, numel * sizeof(T)); }
  void copy_to(T* dst, size_t numel) const { std::memcpy(dst, values, numel * sizeof(T)); }
  T values[kLanes] = {};
};

template <typename Residue>
void split_master(const float* src, uint16_t* weight, Residue* residue, size_t numel) {
  size_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    split(load(src + i), weight + i, residue + i);
  }
  const Padded<float> tail(src + i, numel - i);
  Padded<uint16_t> tail_weight;
  Padded<Residue> tail_residue;
  split(load(tail.values), tail_weight.values, tail_residue.values);
  tail_weight.copy_to(weight + i, numel - i);
  tail_residue.copy_to(residue + i, numel - i);
}

inline Lanes load_joined(const uint16_t* high, const uint16_t* low) {
  return low ? join(high, low) : load_bf16(high);
}

inline const uint16_t* offset_or_null(const uint16_t* low, size_t i) {
  return low ? low + i : nullptr;
}
inline uint16_t* offset_or_null(uint16_t* low, size_t i) { return low ? low + i : nullptr; }

template <typename Residue>
void join_master(const uint16_t* weight, const Residue* residue, float* dst, size_t numel) {
  size_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    store(dst + i, residue ? join(weight + i, residue + i) : load_bf16(weight + i));
  }
  const Padded<uint16_t> tail(weight + i, numel - i);
  const Padded<Residue> tail_low =
      residue ? Padded<Residue>(residue + i, numel - i) : Padded<Residue>();
  Padded<float> tail_dst;
  store(tail_dst.values, join(tail.values, tail_low.values));
  tail_dst.copy_to(dst + i, numel - i);
}

// Puts 16 elements into a plane and returns what the plane then holds there.
template <LandMode kMode>
inline Lanes land_block(float* dst, uint16_t*, const float* src) {
  const Lanes value = kMode == LandMode::kSet ? load(src) : add(load(dst), load(src));
  store(dst, value);
  return value;
}

template <LandMode kMode>
inline Lanes land_block(uint16_t* dst, uint16_t* dst_lo, const uint16_t* src) {
  Lanes value = load_bf16(src);
  if (kMode == LandMode::kAccumulateFp32) {
    value = add(join(dst, dst_lo), value);
    split(value, dst, dst_lo);
    return value;
  }
  if (kMode == LandMode::kAccumulateInDtype) {
    value = round_bf16(add(load_joined(dst, dst_lo), value));
  }
  store_bf16(dst, value);
  if (dst_lo) {
    std::memset(dst_lo, 0, kLanes * sizeof(uint16_t));
  }
  return value;
}

template <LandMode kMode, typename T>
inline Lanes land_tail(T* dst, uint16_t* dst_lo, const T* src, size_t numel) {
  Padded<T> tail(dst, numel);
  Padded<uint16_t> tail_lo = dst_lo ? Padded<uint16_t>(dst_lo, numel) : Padded<uint16_t>();
  const Padded<T> tail_src(src, numel);
  const Lanes value = land_block<kMode>(tail.values, tail_lo.values, tail_src.values);
  tail.copy_to(dst, numel);
  if (dst_lo) {
    tail_lo.copy_to(dst_lo, numel);
  }
  return value;
}

inline double sum_of_lanes(const Sums& sums) {
  double lanes[kLanes];
  store_sums(lanes, sums);
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
}

// Adds value(i, n) over a range in the order that kernels.h defines. value(i, n) returns the n <=
// 16 elements from i on, zeros behind them: adding the square of a zero changes no sum.
template <typename Value>
inline double sum_tiles(size_t numel, const Value& value) {
  double total = 0.0;
  for (size_t begin = 0; begin < numel; begin += kSumTileNumel) {
    const size_t end = numel - begin < kSumTileNumel ? numel : begin + kSumTileNumel;
    Sums sums = zero_sums();
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      add_squares(sums, value.block(i));
    }
    if (i < end) {
      add_squares(sums, value.tail(i, end - i));
    }
    total += sum_of_lanes(sums);
  }
  return total;
}

template <LandMode kMode, typename T>
struct Landing {
  T* dst;
  uint16_t* dst_lo;
  const T* src;
  Lanes block(size_t i) const {
    return land_block<kMode>(dst + i, offset_or_null(dst_lo, i), src + i);
  }
  Lanes tail(size_t i, size_t n) const {
    return land_tail<kMode>(dst + i, offset_or_null(dst_lo, i), src + i, n);
  }
};

struct Fp32Values {
  const float* src;
  Lanes block(size_t i) const { return load(src + i); }
  Lanes tail(size_t i, size_t n) const { return load(Padded<float>(src + i, n).values); }
};

struct Bf16Values {
  const uint16_t* src;
  const uint16_t* low;
  Lanes block(size_t i) const { return load_joined(src + i, offset_or_null(low, i)); }
  Lanes tail(size_t i, size_t n) const {
    const Padded<uint16_t> tail_low = low ? Padded<uint16_t>(low + i, n) : Padded<uint16_t>();
    return join(Padded<uint16_t>(src + i, n).values, tail_low.values);
  }
};

template <typename T>
double grad_land_as(const GradPlane& plane, const void* src, LandMode mode, size_t numel) {
  T* dst = static_cast<T*>(plane.high);
  const T* from = static_cast<const T*>(src);
  switch (mode) {
    case LandMode::kSet:
      return sum_tiles(numel, Landing<LandMode::kSet, T>{dst, plane.low, from});
    case LandMode::kAccumulateFp32:
      return sum_tiles(numel, Landing<LandMode::kAccumulateFp32, T>{dst, plane.low, from});
    case LandMode::kAccumulateInDtype:
      break;
  }
  return sum_tiles(numel, Landing<LandMode::kAccumulateInDtype, T>{dst, plane.low, from});
}

double grad_land(const GradPlane& plane, const void* src, GradKind kind, LandMode mode,
                 size_t numel) {
  return kind == GradKind::kFp32 ? grad_land_as<float>(plane, src, mode, numel)
                                 : grad_land_as<uint16_t>(plane, src, mode, numel);
}

double sum_squares(const void* high, const uint16_t* low, GradKind kind, size_t numel) {
  if (kind == GradKind::kFp32) {
    return sum_tiles(numel, Fp32Values{static_cast<const float*>(high)});
  }
  return sum_tiles(numel, Bf16Values{static_cast<const uint16_t*>(high), low});
}

// The squares of one row, and every square onto the sum of its column.
template <typename Values>
double row_sum(const Values& values, size_t begin, size_t num_cols, double* col_sums) {
  Sums row = zero_sums();
  size_t j = 0;
  for (; j + kLanes <= num_cols; j += kLanes) {
    const Lanes value = values.block(begin + j);
    add_squares(row, value);
    Sums column = load_sums(col_sums + j);
    add_squares(column, value);
    store_sums(col_sums + j, column);
  }
  if (j < num_cols) {
    const Lanes value = values.tail(begin + j, num_cols - j);
    add_squares(row, value);
    double padded[kLanes] = {};
    std::memcpy(padded, col_sums + j, (num_cols - j) * sizeof(double));
    Sums column = load_sums(padded);
    add_squares(column, value);
    store_sums(padded, column);
    std::memcpy(col_sums + j, padded, (num_cols - j) * sizeof(double));
  }
  return sum_of_lanes(row);
}

template <typename Values>
void factor_sums_of(const Values& values, const MatrixShape& shape, size_t numel, double* row_sums,
                    double* col_sums) {
  std::memset(col_sums, 0, numel / shape.num_rows * sizeof(double));
  for (size_t row = 0; row < numel / shape.num_cols; ++row) {
    double* const columns = col_sums + row / shape.num_rows * shape.num_cols;
    row_sums[row] = row_sum(values, row * shape.num_cols, shape.num_cols, columns);
  }
}

void factor_sums(const void* high, const uint16_t* low, GradKind kind, const MatrixShape& shape,
                 size_t numel, double* row_sums, double* col_sums) {
  if (kind == GradKind::kFp32) {
    factor_sums_of(Fp32Values{static_cast<const float*>(high)}, shape, numel, row_sums, col_sums);
  } else {
    factor_sums_of(Bf16Values{static_cast<const uint16_t*>(high), low}, shape, numel, row_sums,
                   col_sums);
  }
}

#include "kernels_formats.h"
#include "kernels_rules.h"

template <typename Format, typename Rule>
inline void update_block(const Rule& rule, const Planes& planes, size_t i, uint64_t element,
                         const Random& random) {
  Moments<Format::kBlocks> moments;
  if constexpr (Rule::kHasMoments) {
    Format::template load_moments<Rule::kHasSquares>(planes, i, moments);
  }
  for (size_t b = 0; b < Format::kBlocks; ++b) {
    const size_t at = i + b * kLanes;
    Lanes weight = Format::load_weight(planes, at);
    rule.step(element + b * kLanes, Format::load_grad(planes, at), weight, moments.exp_avg[b],
              moments.exp_avg_sq[b]);
    Format::store_weight(planes, at, weight);
  }
  if constexpr (Rule::kHasMoments) {
    Format::template store_moments<Rule::kHasSquares>(planes, i, moments, random);
  }
}

// The last elements, fewer than a block, in memory of their own with zeros behind them.
template <typename Format, typename Rule>
void update_tail(const Rule& rule, const Planes& planes, size_t begin, size_t numel,
                 uint64_t element, const Random& random) {
  char memory[kNumPlanes][Format::kBlocks * kLanes * sizeof(float)] = {};
  char* source[kNumPlanes] = {};
  Planes padded = {};
  for (int plane = 0; plane < kNumPlanes; ++plane) {
    if (planes.at[plane]) {
      source[plane] = planes.at[plane] + plane_nbytes(Format::kFormat, plane, begin);
      padded.at[plane] = memory[plane];
      std::memcpy(memory[plane], source[plane], plane_nbytes(Format::kFormat, plane, numel));
    }
  }
  update_block<Format>(rule, padded, 0, element + begin, random.from(begin));
  for (int plane = 0; plane < kGrad; ++plane) {
    if (planes.at[plane]) {
      std::memcpy(source[plane], memory[plane], plane_nbytes(Format::kFormat, plane, numel));
    }
  }
}

template <typename Format, typename Rule>
void update_as(const Rule& rule, const Planes planes, size_t numel, uint64_t element,
               const Random random) {
  constexpr size_t kBlock = Format::kBlocks * kLanes;
  size_t i = 0;
  for (; i + kBlock <= numel; i += kBlock) {
    update_block<Format>(rule, planes, i, element + i, random);
  }
  if (i < numel) {
    update_tail<Format>(rule, planes, i, numel - i, element, random);
  }
}

template <typename Rule>
void update_with(StateFormat format, const Rule& rule, const Planes& planes, size_t numel,
                 uint64_t element, const Random& random) {
  switch (format) {
    case StateFormat::kFp32:
      return update_as<Fp32Format>(rule, planes, numel, element, random);
    case StateFormat::kExact:
      return update_as<ExactFormat>(rule, planes, numel, element, random);
    case StateFormat::kBf16:
      return update_as<Bf16Format>(rule, planes, numel, element, random);
    case StateFormat::kInt8:
      return update_as<Int8Format>(rule, planes, numel, element, random);
  }
}

void update(StateFormat format, const StepRule& rule, char* const planes[kNumPlanes],
            uint64_t index, size_t numel) {
  Planes at;
  std::memcpy(at.at, planes, sizeof(at.at));
  const Random random = {rule.key[0], rule.key[1], static_cast<uint32_t>(index)};
  switch (rule.kind) {
    case RuleKind::kAdamw:
      // torch's lerp: it starts from the nearer end.
      if (rule.adamw.lerp_weight < 0.5f && rule.adamw.lerp_weight > -0.5f) {
        return update_with(format, AdamwRule<false>(rule.adamw), at, numel, index, random);
      }
      return update_with(format, AdamwRule<true>(rule.adamw), at, numel, index, random);
    case RuleKind::kSgd:
      return update_with(format, SgdRule(rule.sgd), at, numel, index, random);
    case RuleKind::kLion:
      return update_with(format, LionRule(rule.lion), at, numel, index, random);
    case RuleKind::kFactored:
      return update_with(format, FactoredRule(rule.factored), at, numel, index, random);
    case RuleKind::kScaled:
      return update_with(format, ScaledRule(rule.factored), at, numel, index, random);
  }
}

constexpr KernelSet make_kernel_set(const char* isa) {
  return {isa,
          split_master<uint16_t>,
          join_master<uint16_t>,
          split_master<uint8_t>,
          join_master<uint8_t>,
          update,
          grad_land,
          sum_squares,
          factor_sums};
}
