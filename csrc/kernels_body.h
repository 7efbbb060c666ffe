// The kernels themselves, included once per instruction set inside an anonymous namespace that
// defines Lanes (16 floats) and Sums (16 doubles) with: load, store, broadcast, add, sub, mul, div,
// fma, sqrt, load_bf16, join, split, round_bf16, store_bf16, zero_sums, add_squares, store_sums.

constexpr size_t kLanes = 16;

// The scalars in every lane, so that a loop keeps them in registers.
struct AdamwLanes {
  Lanes grad_scale, decay, lerp, beta2, grad_sq_weight, correction_sqrt, eps, step_size;
};

inline AdamwLanes broadcast_scalars(const AdamwScalars& s, bool lerp_from_grad) {
  return {broadcast(s.grad_scale),
          broadcast(s.decay),
          broadcast(lerp_from_grad ? s.lerp_weight - 1.0f : s.lerp_weight),
          broadcast(s.beta2),
          broadcast(s.grad_sq_weight),
          broadcast(s.correction_sqrt),
          broadcast(s.eps),
          broadcast(s.step_size)};
}

// One AdamW step on 16 elements. The shape of every line is that of torch's fused CPU kernel, and
// so is which multiply-adds are fused: lerp and the second moment are, the update of the weight is
// not. This was found by trying all combinations against torch 2.13 (its AVX2 and AVX-512 code
// agree). torch adds elements beyond the last full vector of a tensor in other precision; those can
// differ from here by one unit in the last place.
template <bool kLerpFromGrad>
inline void adamw_lanes(const AdamwLanes& s, Lanes grad, Lanes& weight, Lanes& exp_avg,
                        Lanes& exp_avg_sq) {
  grad = mul(grad, s.grad_scale);
  weight = mul(weight, s.decay);
  exp_avg = fma(s.lerp, sub(grad, exp_avg), kLerpFromGrad ? grad : exp_avg);
  exp_avg_sq = fma(mul(s.grad_sq_weight, grad), grad, mul(exp_avg_sq, s.beta2));
  const Lanes denominator = add(div(sqrt(exp_avg_sq), s.correction_sqrt), s.eps);
  weight = add(weight, div(mul(s.step_size, exp_avg), denominator));
}

template <bool kLerpFromGrad>
inline void adamw_block(const AdamwLanes& s, const AdamwFp32& planes) {
  Lanes weight = load(planes.weight);
  Lanes exp_avg = load(planes.exp_avg);
  Lanes exp_avg_sq = load(planes.exp_avg_sq);
  adamw_lanes<kLerpFromGrad>(s, load(planes.grad), weight, exp_avg, exp_avg_sq);
  store(planes.weight, weight);
  store(planes.exp_avg, exp_avg);
  store(planes.exp_avg_sq, exp_avg_sq);
}

template <bool kLerpFromGrad>
inline void adamw_block(const AdamwLanes& s, const AdamwExact& planes) {
  Lanes weight = join(planes.weight, planes.residue);
  Lanes exp_avg = load(planes.exp_avg);
  Lanes exp_avg_sq = load(planes.exp_avg_sq);
  const Lanes grad = planes.grad_lo ? join(planes.grad, planes.grad_lo) : load_bf16(planes.grad);
  adamw_lanes<kLerpFromGrad>(s, grad, weight, exp_avg, exp_avg_sq);
  split(weight, planes.weight, planes.residue);
  store(planes.exp_avg, exp_avg);
  store(planes.exp_avg_sq, exp_avg_sq);
}

inline AdamwFp32 advance(const AdamwFp32& p, size_t i) {
  return {p.weight + i, p.exp_avg + i, p.exp_avg_sq + i, p.grad + i};
}

inline AdamwExact advance(const AdamwExact& p, size_t i) {
  return {p.weight + i,     p.residue + i, p.exp_avg + i,
          p.exp_avg_sq + i, p.grad + i,    p.grad_lo ? p.grad_lo + i : nullptr};
}

// Up to 16 elements in memory of their own, so that a tail runs through the code of a full block.
template <typename T>
struct Padded {
  Padded() = default;
  Padded(const T* src, size_t numel) { std::memcpy(values, src, numel * sizeof(T)); }
  void copy_to(T* dst, size_t numel) const { std::memcpy(dst, values, numel * sizeof(T)); }
  T values[kLanes] = {};
};

template <bool kLerpFromGrad>
void adamw_tail(const AdamwLanes& s, const AdamwFp32& p, size_t numel) {
  Padded<float> weight(p.weight, numel), exp_avg(p.exp_avg, numel), exp_avg_sq(p.exp_avg_sq, numel);
  const Padded<float> grad(p.grad, numel);
  adamw_block<kLerpFromGrad>(
      s, AdamwFp32{weight.values, exp_avg.values, exp_avg_sq.values, grad.values});
  weight.copy_to(p.weight, numel);
  exp_avg.copy_to(p.exp_avg, numel);
  exp_avg_sq.copy_to(p.exp_avg_sq, numel);
}

template <bool kLerpFromGrad>
void adamw_tail(const AdamwLanes& s, const AdamwExact& p, size_t numel) {
  Padded<float> exp_avg(p.exp_avg, numel), exp_avg_sq(p.exp_avg_sq, numel);
  Padded<uint16_t> weight(p.weight, numel), residue(p.residue, numel);
  const Padded<uint16_t> grad(p.grad, numel);
  const Padded<uint16_t> grad_lo =
      p.grad_lo ? Padded<uint16_t>(p.grad_lo, numel) : Padded<uint16_t>();
  adamw_block<kLerpFromGrad>(s, AdamwExact{weight.values, residue.values, exp_avg.values,
                                           exp_avg_sq.values, grad.values, grad_lo.values});
  weight.copy_to(p.weight, numel);
  residue.copy_to(p.residue, numel);
  exp_avg.copy_to(p.exp_avg, numel);
  exp_avg_sq.copy_to(p.exp_avg_sq, numel);
}

template <bool kLerpFromGrad, typename Planes>
void adamw_loop(const AdamwScalars& scalars, const Planes planes, size_t numel) {
  const AdamwLanes s = broadcast_scalars(scalars, kLerpFromGrad);
  size_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    adamw_block<kLerpFromGrad>(s, advance(planes, i));
  }
  if (i < numel) {
    adamw_tail<kLerpFromGrad>(s, advance(planes, i), numel - i);
  }
}

// torch's lerp starts from the nearer end: from the gradient where 1 - beta1 is 0.5 or more.
template <typename Planes>
void adamw(const AdamwScalars& scalars, const Planes& planes, size_t numel) {
  if (scalars.lerp_weight < 0.5f && scalars.lerp_weight > -0.5f) {
    adamw_loop<false>(scalars, planes, numel);
  } else {
    adamw_loop<true>(scalars, planes, numel);
  }
}

void split_fp32(const float* src, uint16_t* weight, uint16_t* residue, size_t numel) {
  size_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    split(load(src + i), weight + i, residue + i);
  }
  const Padded<float> tail(src + i, numel - i);
  Padded<uint16_t> tail_weight, tail_residue;
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

void join_fp32(const uint16_t* weight, const uint16_t* residue, float* dst, size_t numel) {
  size_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    store(dst + i, load_joined(weight + i, offset_or_null(residue, i)));
  }
  const Padded<uint16_t> tail(weight + i, numel - i);
  const Padded<uint16_t> tail_low =
      residue ? Padded<uint16_t>(residue + i, numel - i) : Padded<uint16_t>();
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

constexpr KernelSet make_kernel_set(const char* isa) {
  return {isa, split_fp32, join_fp32, adamw<AdamwFp32>, adamw<AdamwExact>, grad_land, sum_squares};
}
