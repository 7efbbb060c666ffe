// How the state formats read and write their planes, included by kernels_body.h. A format has
// kFormat, kBlocks (how many blocks of 16 elements are stored together), load_weight, store_weight,
// load_grad, load_moments and store_moments, all in fp32 lanes.

// Every plane at the first element of an update; null where there is none.
struct Planes {
  char* at[kNumPlanes];

  template <typename T>
  T* item(int plane, size_t i) const {
    return reinterpret_cast<T*>(at[plane]) + i;
  }
};

template <size_t kBlocks>
struct Moments {
  Lanes exp_avg[kBlocks];
  Lanes exp_avg_sq[kBlocks];  // left alone where the rule has no squares
};

inline Lanes magnitude(Lanes value) {
  return lanes_of(iand(bits_of(value), ibroadcast(0x7FFFFFFFu)));
}

// The key of a step, and the number of its first element: see [Note: stochastic rounding].
struct Random {
  uint32_t key0, key1, index;

  Random from(size_t begin) const { return {key0, key1, index + static_cast<uint32_t>(begin)}; }

  // 32 bits for each of the elements from i on: two rounds of multiply and xor-shift.
  Ints lanes(size_t i) const {
    Ints x = iadd(ibroadcast(index + static_cast<uint32_t>(i)), lane_numbers());
    x = ixor(x, ibroadcast(key0));
    x = imul(ixor(x, shift_right<16>(x)), ibroadcast(0x7FEB352Du));
    x = ixor(ixor(x, shift_right<15>(x)), ibroadcast(key1));
    x = imul(x, ibroadcast(0x846CA68Bu));
    return ixor(x, shift_right<16>(x));
  }
};

// ---- masters and gradients ----

struct Fp32Master {
  static Lanes load_weight(const Planes& p, size_t i) { return load(p.item<float>(kWeight, i)); }
  static void store_weight(const Planes& p, size_t i, Lanes value) {
    store(p.item<float>(kWeight, i), value);
  }
  static Lanes load_grad(const Planes& p, size_t i) { return load(p.item<float>(kGrad, i)); }
};

template <typename Residue>
struct SplitMaster {
  static Lanes load_weight(const Planes& p, size_t i) {
    return join(p.item<uint16_t>(kWeight, i), p.item<Residue>(kResidue, i));
  }
  static void store_weight(const Planes& p, size_t i, Lanes value) {
    split(value, p.item<uint16_t>(kWeight, i), p.item<Residue>(kResidue, i));
  }
  static Lanes load_grad(const Planes& p, size_t i) {
    const uint16_t* high = p.item<uint16_t>(kGrad, i);
    return p.at[kGradLo] ? join(high, p.item<uint16_t>(kGradLo, i)) : load_bf16(high);
  }
};

// ---- moments ----

struct Fp32Moments {
  static constexpr size_t kBlocks = 1;

  template <bool kHasSquares>
  static void load_moments(const Planes& p, size_t i, Moments<1>& moments) {
    moments.exp_avg[0] = load(p.item<float>(kExpAvg, i));
    if (kHasSquares) {
      moments.exp_avg_sq[0] = load(p.item<float>(kExpAvgSq, i));
    }
  }

  template <bool kHasSquares>
  static void store_moments(const Planes& p, size_t i, const Moments<1>& moments, const Random&) {
    store(p.item<float>(kExpAvg, i), moments.exp_avg[0]);
    if (kHasSquares) {
      store(p.item<float>(kExpAvgSq, i), moments.exp_avg_sq[0]);
    }
  }
};

struct Bf16Moments {
  static constexpr size_t kBlocks = 1;

  template <bool kHasSquares>
  static void load_moments(const Planes& p, size_t i, Moments<1>& moments) {
    moments.exp_avg[0] = load_bf16(p.item<uint16_t>(kExpAvg, i));
    if (kHasSquares) {
      moments.exp_avg_sq[0] = load_bf16(p.item<uint16_t>(kExpAvgSq, i));
    }
  }

  template <bool kHasSquares>
  static void store_moments(const Planes& p, size_t i, const Moments<1>& moments,
                            const Random& random) {
    const Ints bits = random.lanes(i);
    store_rounded(p.item<uint16_t>(kExpAvg, i), moments.exp_avg[0],
                  iand(bits, ibroadcast(0xFFFFu)));
    if (kHasSquares) {
      store_rounded(p.item<uint16_t>(kExpAvgSq, i), moments.exp_avg_sq[0], shift_right<16>(bits));
    }
  }

  // Adds 16 random bits and cuts; any NaN becomes 0x7FC0.
  static void store_rounded(uint16_t* dst, Lanes value, Ints random) {
    store_bf16(dst, nan_else(value, lanes_of(iadd(bits_of(value), random))));
  }
};

// See [Note: int8 groups].
struct Int8Moments {
  static constexpr size_t kBlocks = kGroupNumel / kLanes;
  static constexpr uint32_t kScaleMin = 0x0080, kScaleMax = 0x7F7F;  // normal and finite as bf16

  template <bool kHasSquares>
  static void load_moments(const Planes& p, size_t i, Moments<kBlocks>& moments) {
    const Lanes scale = broadcast(scale_value(*p.item<uint16_t>(kExpAvgScale, i / kGroupNumel)));
    for (size_t b = 0; b < kBlocks; ++b) {
      const Lanes code = to_lanes(load_s8(p.item<uint8_t>(kExpAvg, i + b * kLanes)));
      moments.exp_avg[b] = mul(scale, div(code, sub(broadcast(254.0f), magnitude(code))));
    }
    if (kHasSquares) {
      const float scale_sq = scale_value(*p.item<uint16_t>(kExpAvgSqScale, i / kGroupNumel));
      const Lanes step = broadcast(scale_sq / 255.0f);
      for (size_t b = 0; b < kBlocks; ++b) {
        const Lanes code = to_lanes(load_u8(p.item<uint8_t>(kExpAvgSq, i + b * kLanes)));
        const Lanes root = mul(code, step);
        moments.exp_avg_sq[b] = mul(root, root);
      }
    }
  }

  template <bool kHasSquares>
  static void store_moments(const Planes& p, size_t i, const Moments<kBlocks>& moments,
                            const Random&) {
    const uint32_t scale = make_scale(moments.exp_avg);
    *p.item<uint16_t>(kExpAvgScale, i / kGroupNumel) = static_cast<uint16_t>(scale);
    const Lanes bound = broadcast(divisor(scale));
    for (size_t b = 0; b < kBlocks; ++b) {
      const Lanes value = moments.exp_avg[b];
      const Lanes share = div(value, add(bound, magnitude(value)));
      const Lanes code =
          min(max(mul(share, broadcast(254.0f)), broadcast(-127.0f)), broadcast(127.0f));
      store_u8(p.item<uint8_t>(kExpAvg, i + b * kLanes),
               iand(round_to_ints(code), ibroadcast(0xFFu)));
    }
    if (kHasSquares) {
      store_squares(p, i, moments);
    }
  }

  static void store_squares(const Planes& p, size_t i, const Moments<kBlocks>& moments) {
    Lanes roots[kBlocks];
    for (size_t b = 0; b < kBlocks; ++b) {
      roots[b] = sqrt(moments.exp_avg_sq[b]);
    }
    const uint32_t scale = make_scale(roots);
    *p.item<uint16_t>(kExpAvgSqScale, i / kGroupNumel) = static_cast<uint16_t>(scale);
    const Lanes codes_per_unit = broadcast(255.0f / divisor(scale));
    for (size_t b = 0; b < kBlocks; ++b) {
      const Lanes code = max(mul(roots[b], codes_per_unit), sign(roots[b]));
      store_u8(p.item<uint8_t>(kExpAvgSq, i + b * kLanes),
               round_to_ints(min(code, broadcast(255.0f))));
    }
  }

  static float scale_value(uint32_t scale) {
    const uint32_t bits = scale << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // What to divide by: where the scale is 0 all values are, and their quotient must be.
  static float divisor(uint32_t scale) { return scale_value(scale ? scale : kScaleMin); }

  // The largest magnitude as bf16, rounded up; compared as integers, which orders NaN, too.
  static uint32_t make_scale(const Lanes (&values)[kBlocks]) {
    uint32_t top = 0;
    for (size_t b = 0; b < kBlocks; ++b) {
      const uint32_t here = largest(bits_of(magnitude(values[b])));
      top = here > top ? here : top;
    }
    const uint32_t scale = (top + 0xFFFFu) >> 16;
    if (scale == 0) {
      return 0;
    }
    return scale < kScaleMin ? kScaleMin : scale > kScaleMax ? kScaleMax : scale;
  }
};

// ---- formats ----

struct Fp32Format : Fp32Master, Fp32Moments {
  static constexpr StateFormat kFormat = StateFormat::kFp32;
};
struct ExactFormat : SplitMaster<uint16_t>, Fp32Moments {
  static constexpr StateFormat kFormat = StateFormat::kExact;
};
struct Bf16Format : SplitMaster<uint16_t>, Bf16Moments {
  static constexpr StateFormat kFormat = StateFormat::kBf16;
};
struct Int8Format : SplitMaster<uint8_t>, Int8Moments {
  static constexpr StateFormat kFormat = StateFormat::kInt8;
};
